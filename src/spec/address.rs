//! Ports, ranges of addresses, and exceptions made of both.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::units::{Malformed, as_text, malformed};

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
}
