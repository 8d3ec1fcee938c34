//! The label a security module of the host knows QEMU by.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest label: the name of an AppArmor profile or an SELinux context.
const LONGEST: usize = 255;

/// Name of an AppArmor profile, or an SELinux context.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(into = "String", try_from = "String")]
pub struct LsmLabel(String);

impl LsmLabel {
    /// As it is written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for LsmLabel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<LsmLabel> for String {
    fn from(label: LsmLabel) -> Self {
        label.0
    }
}

impl FromStr for LsmLabel {
    type Err = super::Malformed;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // What the kernel reads ends at a zero byte, and at white space.
        let fits = |c: char| c.is_ascii_graphic();
        match (1..=LONGEST).contains(&text.len()) && text.chars().all(fits) {
            true => Ok(Self(text.to_owned())),
            false => Err(super::Malformed {
                value: text.to_owned(),
                expected: "an AppArmor profile's name or an SELinux context, without spaces",
            }),
        }
    }
}

impl TryFrom<String> for LsmLabel {
    type Error = super::Malformed;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_words() {
        for good in [
            "bulkhead-qemu",
            "system_u:system_r:svirt_t:s0:c1,c2",
            "/usr/bin/x",
        ] {
            assert_eq!(good.parse::<LsmLabel>().unwrap().as_str(), good);
        }
        for bad in ["", "a b", "a\n", "a\0", "\u{e4}", &"a".repeat(256)] {
            assert!(bad.parse::<LsmLabel>().is_err(), "{bad}");
        }
    }
}
