//! The network a machine gets, by name.

use serde::{Deserialize, Serialize};

use super::units::name_type;

/// The network a machine gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum NetworkMode {
    /// No network device at all.
    #[default]
    Isolated,
}

name_type! {
    /// Name of a network: 1 to 63 of `a-z`, `0-9`, `_` and `-`, starting with a
    /// letter or digit.
    NetworkName, "a network's name (1 to 63 of a-z, 0-9, _ and -, such as `offline`)"
}

/// Modes, also those of later versions: a network of that name would mislead.
const MODES: [&str; 3] = ["isolated", "nat-filtered", "bridge"];

impl NetworkName {
    /// Whether it is the name of a mode, which means that mode and nothing else.
    pub(super) fn is_mode(&self) -> bool {
        MODES.contains(&self.0.as_str())
    }
}

impl Default for NetworkName {
    fn default() -> Self {
        Self(MODES[0].into())
    }
}

/// A network as configuration files define it. Every key is one that is
/// enforced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct NetworkPolicy {
    /// How its machines are connected.
    pub mode: NetworkMode,
}
