//! The presets: policies by name, as data in presets.toml.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

use super::address::{Port, Protocol};
use super::host::{HostPattern, Hosts};

/// A policy by name.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize,
)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Preset {
    /// Any public host, at the ports of a developer.
    #[default]
    Dev,
    /// Model providers only.
    LlmOnly,
    /// Registries of packages.
    Packages,
    /// Nothing but what is allowed by name.
    Offline,
    /// Any public host at any port.
    Open,
}

impl Preset {
    /// All there are.
    pub const ALL: [Self; 5] = [
        Self::Dev,
        Self::LlmOnly,
        Self::Packages,
        Self::Offline,
        Self::Open,
    ];

    /// Its name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Dev => "dev",
            Self::LlmOnly => "llm-only",
            Self::Packages => "packages",
            Self::Offline => "offline",
            Self::Open => "open",
        }
    }

    /// What it allows.
    pub fn data(self) -> &'static PresetData {
        &presets()[&self]
    }

    /// At which ports its hosts may be reached.
    pub fn ports(self) -> BTreeSet<Port> {
        let all = |protocol| Port::range(protocol, 1, u16::MAX);
        match &self.data().ports {
            None => [all(Protocol::Tcp), all(Protocol::Udp)].into(),
            Some(ports) => {
                let one = |&port: &u16| Port::range(Protocol::Tcp, port, port);
                ports.iter().map(one).collect()
            }
        }
    }

    /// Whether it allows every public host.
    pub(crate) fn is_open(self) -> bool {
        self.data()
            .hosts
            .iter()
            .any(|host| host.hosts == Hosts::Any)
    }
}

impl std::fmt::Display for Preset {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a preset allows.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PresetData {
    /// For people.
    pub about: String,
    /// Which hosts.
    pub hosts: Vec<HostPattern>,
    /// At which TCP ports; absent for all of TCP and UDP.
    pub ports: Option<Vec<u16>>,
}

/// All presets.
pub fn presets() -> &'static BTreeMap<Preset, PresetData> {
    static DATA: OnceLock<BTreeMap<Preset, PresetData>> = OnceLock::new();
    // The file is part of the program, and a test reads it.
    DATA.get_or_init(|| toml::from_str(include_str!("presets.toml")).expect("presets are right"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_is_there_and_sorted_out() {
        assert_eq!(presets().len(), Preset::ALL.len());
        for preset in Preset::ALL {
            let data = preset.data();
            assert!(!data.about.is_empty());
            let mut hosts = data.hosts.clone();
            hosts.sort();
            hosts.dedup();
            assert_eq!(
                hosts.len(),
                data.hosts.len(),
                "{preset}: a host stands twice"
            );
            assert_eq!(serde_json::to_value(preset).unwrap(), preset.as_str());
        }
        assert_eq!(Preset::Dev.data().ports, Some(vec![22, 80, 443, 9418]));
    }
}
