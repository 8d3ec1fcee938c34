//! Which template a machine may be cloned from.

use serde::{Deserialize, Serialize};

use super::units::name_type;

name_type! {
    /// Name of a trust domain: 1 to 63 of `a-z`, `0-9`, `_` and `-`, starting
    /// with a letter or digit.
    DomainName, "a trust domain's name (1 to 63 of a-z, 0-9, _ and -, such as `ci`)"
}

impl Default for DomainName {
    fn default() -> Self {
        Self("default".into())
    }
}

/// Which template a machine may be cloned from.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Templates {
    /// None: it boots.
    pub cold: bool,
    /// This one and no other; it must match.
    pub id: Option<String>,
    /// Templates of this trust domain only: what its machines read of a
    /// template's memory they share.
    pub domain: DomainName,
}
