//! The layers a VMM is confined by, and which of them are waived.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A layer of the jail that can be waived by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum JailLayer {
    /// A user of its own, without groups.
    User,
    /// A root of its own with nothing but what QEMU needs.
    Files,
    /// Namespaces of its own: processes, network, IPC, host name, control groups.
    Namespaces,
    /// The list of allowed system calls.
    Seccomp,
    /// Landlock, where the kernel has it.
    Landlock,
    /// A control group that limits memory, processes and CPU time.
    Cgroup,
    /// An AppArmor profile or SELinux context, where one is given or loaded.
    Lsm,
}

impl JailLayer {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::User,
        Self::Files,
        Self::Namespaces,
        Self::Seccomp,
        Self::Landlock,
        Self::Cgroup,
        Self::Lsm,
    ];

    /// As it is written.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Files => "files",
            Self::Namespaces => "namespaces",
            Self::Seccomp => "seccomp",
            Self::Landlock => "landlock",
            Self::Cgroup => "cgroup",
            Self::Lsm => "lsm",
        }
    }
}

impl fmt::Display for JailLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The layers somebody does without; written as names with commas between.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Waived(BTreeSet<JailLayer>);

impl Waived {
    /// Whether `layer` is waived.
    pub fn has(&self, layer: JailLayer) -> bool {
        self.0.contains(&layer)
    }

    /// The waived layers.
    pub fn iter(&self) -> impl Iterator<Item = JailLayer> {
        self.0.iter().copied()
    }

    /// Waives all of `others` besides.
    pub fn extend(&mut self, others: &Self) {
        self.0.extend(&others.0);
    }
}

impl fmt::Display for Waived {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, layer) in self.0.iter().enumerate() {
            write!(f, "{}{layer}", if at == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

impl From<Waived> for String {
    fn from(waived: Waived) -> Self {
        waived.to_string()
    }
}

impl FromStr for Waived {
    type Err = super::Malformed;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let layer = |name: &str| JailLayer::ALL.into_iter().find(|one| one.as_str() == name);
        let layers = text
            .split(',')
            .map(str::trim)
            .filter(|name| !name.is_empty());
        let found: Option<BTreeSet<_>> = layers.map(layer).collect();
        found.map(Self).ok_or_else(|| super::Malformed {
            value: text.to_owned(),
            expected: "layers of the jail (user, files, namespaces, seccomp, landlock, cgroup, lsm), with commas between",
        })
    }
}

impl TryFrom<String> for Waived {
    type Error = super::Malformed;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

/// A range of user ids of this host that belongs to nobody else: every machine
/// takes one of them while it runs. Written `FIRST-LAST`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct UidRange {
    /// The first.
    pub first: u32,
    /// The last.
    pub last: u32,
}

impl Default for UidRange {
    /// 65536 ids that no known allocation uses: below systemd's foreign ids,
    /// above those of containers (systemd's UIDS-GIDS document).
    fn default() -> Self {
        Self {
            first: 1_900_000_000,
            last: 1_900_065_535,
        }
    }
}

impl UidRange {
    /// How many ids it has.
    pub const fn count(self) -> u32 {
        self.last - self.first + 1
    }
}

impl fmt::Display for UidRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

impl From<UidRange> for String {
    fn from(range: UidRange) -> Self {
        range.to_string()
    }
}

impl FromStr for UidRange {
    type Err = super::Malformed;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parsed = text
            .split_once('-')
            .and_then(|(first, last)| Some((first.parse().ok()?, last.parse().ok()?)));
        match parsed {
            // Root and the system's users are nobody's to give away; the two
            // highest ids mean "none" to the kernel.
            Some((first, last)) if first >= 1000 && first <= last && last < u32::MAX - 1 => {
                Ok(Self { first, last })
            }
            _ => Err(super::Malformed {
                value: text.to_owned(),
                expected: "a range of user ids FIRST-LAST, FIRST at least 1000",
            }),
        }
    }
}

impl TryFrom<String> for UidRange {
    type Error = super::Malformed;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

#[cfg(feature = "schema")]
impl schemars::JsonSchema for Waived {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Waived".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "type": "string" })
    }
}

#[cfg(feature = "schema")]
impl schemars::JsonSchema for UidRange {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "UidRange".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "type": "string", "pattern": "^[0-9]+-[0-9]+$" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waived_layers_are_named() {
        let waived: Waived = "seccomp, files".parse().unwrap();
        assert!(waived.has(JailLayer::Files) && !waived.has(JailLayer::User));
        assert_eq!(waived.to_string(), "files,seccomp");
        assert_eq!("".parse::<Waived>().unwrap(), Waived::default());
        assert!("everything".parse::<Waived>().is_err());
    }

    #[test]
    fn ranges_are_read_as_they_are_written() {
        let range: UidRange = "200000-200063".parse().unwrap();
        assert_eq!(
            (range.count(), range.to_string()),
            (64, "200000-200063".into())
        );
        for bad in ["", "5", "0-10", "2000-1999", "5000-4294967295", "a-b"] {
            assert!(bad.parse::<UidRange>().is_err(), "{bad}");
        }
    }
}
