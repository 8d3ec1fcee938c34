//! The network a machine gets: its mode, what it may reach, its limits.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::address::{Exception, Port};
use super::bridge::Bridge;
use super::error::SpecError;
use super::host::{HostPattern, Hosts};
use super::preset::Preset;
use super::units::{Bytes, name_type};

/// The network a machine gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum NetworkMode {
    /// The internet by allowed ports; never the host, other machines, private
    /// or special addresses; nothing comes in.
    #[default]
    NatFiltered,
    /// No network device at all.
    Isolated,
    /// On a bridge or tap of the host's: whatever can be reached there, held to nothing
    /// but addresses of its own.
    Bridge,
}

impl NetworkMode {
    /// Its name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NatFiltered => "nat-filtered",
            Self::Isolated => "isolated",
            Self::Bridge => "bridge",
        }
    }
}

name_type! {
    /// Name of a network: 1 to 63 of `a-z`, `0-9`, `_` and `-`, starting with a
    /// letter or digit.
    NetworkName, "a network's name (1 to 63 of a-z, 0-9, _ and -, such as `offline`)"
}

/// Modes of networks; each, and each preset, is also the name of a network that
/// means the same everywhere.
const MODES: [NetworkMode; 2] = [NetworkMode::Isolated, NetworkMode::NatFiltered];

/// A mode that has to be told which bridge: a network of that name would mislead.
const RESERVED: &str = "bridge";

impl NetworkName {
    /// Whether it is built in.
    pub(super) fn is_built_in(&self) -> bool {
        self.0 == RESERVED || Self::built_in().any(|(name, _)| name == *self)
    }

    /// The built-in networks.
    pub(super) fn built_in() -> impl Iterator<Item = (Self, NetworkPolicy)> {
        let modes = MODES.map(|mode| (mode.into(), NetworkPolicy::of_mode(mode)));
        let preset = |preset: Preset| {
            let name = Self(preset.as_str().into());
            (name, NetworkPolicy::of_preset(preset))
        };
        modes.into_iter().chain(Preset::ALL.map(preset))
    }
}

impl From<NetworkMode> for NetworkName {
    fn from(mode: NetworkMode) -> Self {
        Self(mode.as_str().into())
    }
}

impl Default for NetworkName {
    fn default() -> Self {
        Self(NetworkMode::NatFiltered.as_str().into())
    }
}

/// A network as configuration files define it. Every key is one that is
/// enforced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct NetworkPolicy {
    /// How its machines are connected.
    pub mode: NetworkMode,
    /// The bridge or tap with mode `bridge`, and the machine's address and gateway
    /// there, such as `br0:192.0.2.50/24@192.0.2.1`. Of the other keys, only
    /// limits of bandwidth go with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bridge: Option<Bridge>,
    /// Which hosts may be reached, by the name of a preset: `dev` (any public
    /// host; the default), `llm-only`, `packages`, `offline` (none but
    /// `allow_hosts`) or `open`.
    #[serde(default)]
    pub preset: Preset,
    /// Hosts that may be reached besides, such as `example.org`,
    /// `*.example.org` or `example.org:8443`.
    #[serde(default)]
    pub allow_hosts: BTreeSet<HostPattern>,
    /// Hosts that may not, whatever else allows them.
    #[serde(default)]
    pub deny_hosts: BTreeSet<HostPattern>,
    /// Read the name in every connection to ports 80 and 443, and hold it to
    /// the hosts above.
    #[serde(default)]
    pub strict: bool,
    /// Ports at which hosts may be reached, such as `443`, `8000-8100` or
    /// `4433/udp`; the preset's when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ports: Option<BTreeSet<Port>>,
    /// Exceptions from what no machine may reach, such as `10.1.2.3/32:5432`.
    #[serde(default)]
    pub exceptions: BTreeSet<Exception>,
    /// With IPv6, filtered as IPv4 is.
    #[serde(default)]
    pub ipv6: bool,
    /// What its machines may use.
    #[serde(default)]
    pub limits: NetworkLimits,
}

impl Default for NetworkPolicy {
    fn default() -> Self {
        Self::of_mode(NetworkMode::default())
    }
}

impl NetworkPolicy {
    /// A mode with everything else as usual.
    pub fn of_mode(mode: NetworkMode) -> Self {
        Self {
            mode,
            bridge: None,
            preset: Preset::default(),
            allow_hosts: BTreeSet::new(),
            deny_hosts: BTreeSet::new(),
            strict: false,
            ports: None,
            exceptions: BTreeSet::new(),
            ipv6: false,
            limits: NetworkLimits::default(),
        }
    }

    /// A preset with everything else as usual.
    pub fn of_preset(preset: Preset) -> Self {
        Self {
            preset,
            ..Self::of_mode(NetworkMode::NatFiltered)
        }
    }

    /// A bridge with everything else as usual.
    pub fn of_bridge(bridge: Bridge) -> Self {
        Self {
            bridge: Some(bridge),
            ..Self::of_mode(NetworkMode::Bridge)
        }
    }

    /// Ports at which hosts may be reached whose rule names none.
    pub fn ports(&self) -> BTreeSet<Port> {
        self.ports.clone().unwrap_or_else(|| self.preset.ports())
    }

    /// Whether only listed hosts may be reached, so that an address has to be
    /// known by one of their names.
    pub fn is_closed(&self) -> bool {
        let any = |host: &HostPattern| host.hosts == Hosts::Any && host.port().is_none();
        !self.preset.is_open() && !self.allow_hosts.iter().any(any)
    }

    /// Says whether it can be.
    ///
    /// # Errors
    /// A limit is out of range, a host is denied at a port only, or something
    /// is asked for that does not go with a bridge.
    pub fn check(&self) -> Result<(), SpecError> {
        self.check_bridge()?;
        if let Some(host) = self.deny_hosts.iter().find(|host| host.port().is_some()) {
            return Err(SpecError::Value {
                what: "deny_hosts",
                value: host.to_string(),
                why: "a host is denied at all ports",
            });
        }
        self.limits.check()
    }
}

impl NetworkPolicy {
    /// Nothing is asked for on a bridge that is not enforced there.
    fn check_bridge(&self) -> Result<(), SpecError> {
        let value = |why| {
            Err(SpecError::Value {
                what: "mode",
                value: self.mode.as_str().into(),
                why,
            })
        };
        match &self.bridge {
            None if self.mode == NetworkMode::Bridge => value("`bridge` does not say which"),
            None => Ok(()),
            Some(_) if self.mode != NetworkMode::Bridge => value("`bridge` goes with mode bridge"),
            Some(_) if self.ipv6 => value("on a bridge, IPv6 is stopped"),
            Some(bridge) => {
                let mut enforced = Self::of_bridge(bridge.clone());
                enforced.limits.upload = self.limits.upload;
                enforced.limits.download = self.limits.download;
                match *self == enforced {
                    true => Ok(()),
                    false => value("on a bridge, only limits of bandwidth are enforced"),
                }
            }
        }
    }
}

/// What the machines of a network may use of it; what is absent is not limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct NetworkLimits {
    /// Bytes a second from the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub upload: Option<Bytes>,
    /// Bytes a second to the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub download: Option<Bytes>,
    /// New connections a second.
    pub connection_rate: u32,
    /// Connections at a time.
    pub connections: u32,
    /// Bytes in all, both ways together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total: Option<Bytes>,
}

impl Default for NetworkLimits {
    fn default() -> Self {
        // More than any build needs, and nothing a host with a hundred
        // machines and the kernel's own table of connections is troubled by.
        Self {
            upload: None,
            download: None,
            connection_rate: 500,
            connections: 2000,
            total: None,
        }
    }
}

impl NetworkLimits {
    fn check(&self) -> Result<(), SpecError> {
        let value = |what, value: String, why| Err(SpecError::Value { what, value, why });
        for (what, rate) in [("upload", self.upload), ("download", self.download)] {
            // Below, one packet takes longer than a connection waits.
            if let Some(rate) = rate.filter(|rate| rate.0 < 4096 || rate.0 > 4 << 30) {
                return value(what, rate.to_string(), "4K to 4G a second are possible");
            }
        }
        for (what, count) in [
            ("connection_rate", self.connection_rate),
            ("connections", self.connections),
        ] {
            if !(1..=1_000_000).contains(&count) {
                return value(what, count.to_string(), "1 to 1000000 are possible");
            }
        }
        match self.total {
            Some(total) if total.0 < 4096 => {
                value("total", total.to_string(), "at least 4K are possible")
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bridge_goes_with_limits_of_bandwidth_alone() {
        let policy = |text: &str| {
            let policy: NetworkPolicy = toml::from_str(text).unwrap();
            policy.check()
        };
        let bridge = "bridge = \"br0:192.0.2.50/24@192.0.2.1\"";
        policy(&format!("mode = \"bridge\"\n{bridge}")).unwrap();
        policy(&format!(
            "mode = \"bridge\"\n{bridge}\nlimits = {{ upload = \"1M\" }}"
        ))
        .unwrap();
        for bad in [
            "mode = \"bridge\"".to_owned(),
            format!("mode = \"nat-filtered\"\n{bridge}"),
            format!("mode = \"bridge\"\n{bridge}\nipv6 = true"),
            format!("mode = \"bridge\"\n{bridge}\nports = [\"80\"]"),
            format!("mode = \"bridge\"\n{bridge}\nlimits = {{ connections = 5 }}"),
        ] {
            assert!(policy(&bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_cannot_be_enforced_is_refused() {
        let policy = |text: &str| {
            let policy: NetworkPolicy = toml::from_str(text).unwrap();
            policy.check()
        };
        policy("mode = \"nat-filtered\"").unwrap();
        for bad in [
            "mode = \"nat-filtered\"\nlimits = { connections = 0 }",
            "mode = \"nat-filtered\"\nlimits = { upload = \"1\" }",
        ] {
            assert!(policy(bad).is_err(), "{bad}");
        }
    }
}
