//! What users save of their machines: memory, devices and disk, in a directory
//! of the machine's record. What saves and restores is in [`crate::run`].

mod error;
mod store;

pub use error::SnapshotError;
pub use store::{Manifest, Saved, Snapshot, Store, Summary, Wish};

pub(crate) use store::{DISK, SCHEMA, STATE};

use crate::spec::Malformed;

/// Name of a snapshot: 1 to 63 of `a-z`, `0-9`, `_` and `-`, starting with a
/// letter or digit.
#[derive(
    Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(with = "String"))]
#[serde(try_from = "String", into = "String")]
pub struct SnapshotName(String);

impl SnapshotName {
    /// One that no other fork has.
    pub(crate) fn fork() -> Self {
        Self(format!("fork-{}", crate::spec::VmId::random()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for SnapshotName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&self.0)
    }
}

impl std::str::FromStr for SnapshotName {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<Self, Malformed> {
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "_-".contains(c);
        let begins = text.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
        match begins && text.len() <= 63 && text.chars().all(allowed) {
            true => Ok(Self(text.to_owned())),
            false => Err(Malformed {
                value: text.to_owned(),
                expected: "a name of 1 to 63 of a-z, 0-9, _ and -, starting with a letter or digit",
            }),
        }
    }
}

impl TryFrom<String> for SnapshotName {
    type Error = Malformed;
    fn try_from(text: String) -> Result<Self, Malformed> {
        text.parse()
    }
}

impl From<SnapshotName> for String {
    fn from(name: SnapshotName) -> Self {
        name.0
    }
}

#[cfg(test)]
mod tests {
    use super::SnapshotName;

    #[test]
    fn a_name_cannot_lead_out_of_its_directory() {
        for good in ["a", "before-upgrade", "1_2"] {
            assert_eq!(good.parse::<SnapshotName>().unwrap().as_str(), good);
        }
        for bad in ["", ".", "..", "a/b", "A", "-a", ".staging-x", "a\n"] {
            assert!(bad.parse::<SnapshotName>().is_err(), "{bad:?}");
        }
    }
}
