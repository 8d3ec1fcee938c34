//! The network a machine gets: its mode, what it may reach, its limits.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::bridge::Bridge;
use super::error::SpecError;
use super::host::{HostPattern, Hosts};
use super::preset::Preset;
use super::units::{Bytes, Malformed, as_text, malformed, name_type};

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
    /// On a bridge of the host's: whatever can be reached there, held to nothing
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

/// A transport protocol with ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    /// Its number (RFC 5237).
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }

    /// Its name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// A port or a range of ports, such as `443`, `8000-8100` or `4433/udp`; TCP
/// where no protocol is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(with = "String", extend("pattern" = r"^[0-9]+(-[0-9]+)?(/(tcp|udp))?$")))]
#[serde(try_from = "String", into = "String")]
pub struct Port {
    /// Over which protocol.
    pub protocol: Protocol,
    /// The lowest, at least 1.
    pub first: u16,
    /// The highest.
    pub last: u16,
}

impl Port {
    pub(super) const fn range(protocol: Protocol, first: u16, last: u16) -> Self {
        Self {
            protocol,
            first,
            last,
        }
    }
}

impl FromStr for Port {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<Self, Malformed> {
        let parse = || {
            let (range, protocol) = match text.split_once('/') {
                None => (text, Protocol::Tcp),
                Some((range, "tcp")) => (range, Protocol::Tcp),
                Some((range, "udp")) => (range, Protocol::Udp),
                Some(_) => return None,
            };
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let number = |digits: &str| {
                let plain = digits.bytes().all(|byte| byte.is_ascii_digit());
                digits.parse::<u16>().ok().filter(|_| plain)
            };
            let port = Self::range(protocol, number(first)?, number(last)?);
            (1..=port.last).contains(&port.first).then_some(port)
        };
        parse().ok_or_else(|| malformed(text, "a port such as `443`, `8000-8100` or `4433/udp`"))
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.first)?;
        if self.last != self.first {
            write!(f, "-{}", self.last)?;
        }
        match self.protocol {
            Protocol::Tcp => Ok(()),
            Protocol::Udp => f.write_str("/udp"),
        }
    }
}

as_text!(Port);

/// Addresses with the same beginning, such as `10.0.0.0/8` or `fd00::/8`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(with = "String"))]
#[serde(try_from = "String", into = "String")]
pub struct Cidr {
    address: IpAddr,
    length: u8,
}

impl Cidr {
    /// The lowest address.
    pub fn first(&self) -> IpAddr {
        self.address
    }

    /// How many leading bits are the same.
    pub fn length(&self) -> u8 {
        self.length
    }

    /// The highest address.
    pub fn last(&self) -> IpAddr {
        match self.address {
            IpAddr::V4(first) => {
                let host = u32::MAX.checked_shr(self.length.into()).unwrap_or(0);
                IpAddr::V4((u32::from(first) | host).into())
            }
            IpAddr::V6(first) => {
                let host = u128::MAX.checked_shr(self.length.into()).unwrap_or(0);
                IpAddr::V6((u128::from(first) | host).into())
            }
        }
    }

    /// Whether the address is among them.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.address.is_ipv4() == address.is_ipv4()
            && (self.first()..=self.last()).contains(&address)
    }

    /// Whether they have addresses in common.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.address.is_ipv4() == other.address.is_ipv4()
            && self.first() <= other.last()
            && other.first() <= self.last()
    }

    /// All addresses that begin as this one does.
    ///
    /// # Errors
    /// The prefix is longer than an address.
    pub fn new(address: IpAddr, length: u8) -> Result<Self, Malformed> {
        let bits = if address.is_ipv4() { 32 } else { 128 };
        let one = Self { address, length };
        let aligned = length <= bits && {
            let host = match address {
                IpAddr::V4(four) => {
                    u128::from(u32::from(four))
                        & u128::from(u32::MAX.checked_shr(length.into()).unwrap_or(0))
                }
                IpAddr::V6(six) => {
                    u128::from(six) & u128::MAX.checked_shr(length.into()).unwrap_or(0)
                }
            };
            host == 0
        };
        aligned
            .then_some(one)
            .ok_or_else(|| malformed(&format!("{address}/{length}"), CIDR))
    }
}

const CIDR: &str =
    "a range of addresses such as `10.1.2.0/24` (the bits after the prefix are zero)";

impl FromStr for Cidr {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<Self, Malformed> {
        let (address, length) = match text.split_once('/') {
            Some((address, length)) => (address, Some(length)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| malformed(text, CIDR))?;
        let length = match length {
            None if address.is_ipv4() => 32,
            None => 128,
            Some(length) => length.parse().map_err(|_| malformed(text, CIDR))?,
        };
        Self::new(address, length).map_err(|_| malformed(text, CIDR))
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

as_text!(Cidr);

/// A named exception: addresses that may be reached although they are private
/// or special, and the port, such as `10.1.2.3/32:5432`, `10.1.2.3:53/udp` or
/// `[fd00::1]/128:443`. Without a port, all of TCP and UDP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(with = "String"))]
#[serde(try_from = "String", into = "String")]
pub struct Exception {
    /// The addresses.
    pub cidr: Cidr,
    /// The ports; all when absent.
    pub port: Option<Port>,
}

impl FromStr for Exception {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<Self, Malformed> {
        let expected = "an exception such as `10.1.2.3/32:5432` or `[fd00::1]/128:443`";
        let parse = || {
            // The colons of an IPv6 address stand in brackets.
            let (address, rest) = match text.strip_prefix('[') {
                Some(inner) => inner.split_once(']')?,
                None if text.matches(':').count() > 1 => return None,
                None => text.split_at(text.find(['/', ':']).unwrap_or(text.len())),
            };
            let (length, port) = match rest.split_once(':') {
                Some((length, port)) => (length, Some(port.parse().ok()?)),
                None => (rest, None),
            };
            let cidr = format!("{address}{length}").parse().ok()?;
            Some(Self { cidr, port })
        };
        parse().ok_or_else(|| malformed(text, expected))
    }
}

impl fmt::Display for Exception {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.cidr.address {
            IpAddr::V4(_) => write!(f, "{}", self.cidr)?,
            IpAddr::V6(address) => write!(f, "[{address}]/{}", self.cidr.length)?,
        }
        self.port.map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}

as_text!(Exception);

/// A network as configuration files define it. Every key is one that is
/// enforced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct NetworkPolicy {
    /// How its machines are connected.
    pub mode: NetworkMode,
    /// The bridge with mode `bridge`, and the machine's address and gateway
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
    fn ports_are_read_as_they_are_written() {
        for text in ["443", "8000-8100", "4433/udp", "1-65535/udp"] {
            assert_eq!(text.parse::<Port>().unwrap().to_string(), text);
        }
        assert_eq!("443/tcp".parse::<Port>().unwrap().to_string(), "443");
        for bad in ["", "0", "65536", "9-8", "443/sctp", "+1", "1-", "http"] {
            assert!(bad.parse::<Port>().is_err(), "{bad}");
        }
    }

    #[test]
    fn ranges_of_addresses_begin_where_they_say() {
        for text in ["10.0.0.0/8", "0.0.0.0/0", "10.1.2.3/32", "fd00::/8", "::/0"] {
            assert_eq!(text.parse::<Cidr>().unwrap().to_string(), text);
        }
        for bad in ["10.0.0.1/8", "10.0.0.0/33", "10.0.0/8", "fd00::1/8", ""] {
            assert!(bad.parse::<Cidr>().is_err(), "{bad}");
        }
        let ten: Cidr = "10.0.0.0/8".parse().unwrap();
        assert_eq!(ten.last().to_string(), "10.255.255.255");
        let overlaps = |text: &str| ten.overlaps(&text.parse().unwrap());
        assert!(overlaps("10.1.0.0/16") && overlaps("0.0.0.0/0"));
        assert!(!overlaps("11.0.0.0/8") && !overlaps("::/0"));
    }

    #[test]
    fn exceptions_name_addresses_and_a_port() {
        for (text, shown) in [
            ("10.1.2.3/32:5432", "10.1.2.3/32:5432"),
            ("10.1.2.3:53/udp", "10.1.2.3/32:53/udp"),
            ("192.168.0.0/16", "192.168.0.0/16"),
            ("[fd00::1]:443", "[fd00::1]/128:443"),
            ("[fd00::]/8", "[fd00::]/8"),
        ] {
            let exception: Exception = text.parse().unwrap();
            assert_eq!(exception.to_string(), shown);
            assert_eq!(shown.parse(), Ok(exception));
        }
        for bad in [
            "",
            ":80",
            "10.1.2.3/32:",
            "10.1.2.3/8:1",
            "fd00::1:443",
            "[fd00::1",
            "x:1",
        ] {
            assert!(bad.parse::<Exception>().is_err(), "{bad}");
        }
    }

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
