//! How long a machine lives that outlives its command.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::units::{Malformed, Timeout};

/// What ends a detached machine besides its user.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Lifetime {
    /// Stopped so long after its start; never when absent.
    pub ttl: Option<Timeout>,
    /// Stopped when nothing happened in it for so long; never when absent.
    pub idle: Option<Timeout>,
    /// What happens to it when its supervisor dies.
    pub survivors: Survivors,
    /// How long the guest may take to power off before the VMM is killed.
    pub stop_grace: Timeout,
}

impl Default for Lifetime {
    fn default() -> Self {
        Self {
            ttl: None,
            idle: None,
            survivors: Survivors::default(),
            stop_grace: Timeout::secs(10),
        }
    }
}

/// What happens to a machine whose supervisor died.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Survivors {
    /// The kernel ends it with its supervisor.
    #[default]
    Kill,
    /// It runs on, and `bulkhead gc` or its next `start` gives it a new supervisor.
    Adopt,
}

/// Name of a label: 1 to 63 of letters, digits, `.`, `_`, `/` and `-`, starting
/// with a letter or digit.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(extend("pattern" = "^[A-Za-z0-9][A-Za-z0-9._/-]{0,62}$")))]
#[serde(try_from = "String", into = "String")]
pub struct LabelName(String);

impl LabelName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for LabelName {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<Self, Malformed> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "._/-".contains(c);
        let starts_well = text.starts_with(|c: char| c.is_ascii_alphanumeric());
        if text.len() <= 63 && starts_well && text.chars().all(allowed) {
            Ok(Self(text.to_owned()))
        } else {
            Err(Malformed {
                value: text.to_owned(),
                expected: "a label's name (1 to 63 letters, digits, `.`, `_`, `/` and `-`, such as `team`)",
            })
        }
    }
}

impl TryFrom<String> for LabelName {
    type Error = Malformed;
    fn try_from(text: String) -> Result<Self, Malformed> {
        text.parse()
    }
}

impl From<LabelName> for String {
    fn from(name: LabelName) -> Self {
        name.0
    }
}

impl fmt::Display for LabelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_labels() {
        for good in ["a", "team", "example.org/team_1"] {
            assert_eq!(good.parse::<LabelName>().unwrap().as_str(), good);
        }
        for bad in ["", "-a", ".a", "a b", "a=b", &"x".repeat(64)] {
            assert!(bad.parse::<LabelName>().is_err(), "{bad}");
        }
    }
}
