//! A bridge or tap of the host that a machine is put on, and its address there.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::units::{Malformed, as_text, malformed};

/// Longest name of a network device (linux/if.h, IFNAMSIZ).
const LONGEST: usize = 15;

/// An existing bridge or tap, and the machine's address and gateway there, such as
/// `br0:192.0.2.50/24@192.0.2.1`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(with = "String"))]
#[serde(try_from = "String", into = "String")]
pub struct Bridge {
    /// The bridge or tap.
    pub device: String,
    /// The machine's address, which is nobody else's there.
    pub address: Ipv4Addr,
    /// Length of its prefix.
    pub prefix: u8,
    /// Who routes and resolves names for it.
    pub gateway: Ipv4Addr,
}

impl Bridge {
    /// The guest's hardware address: one that is given locally, and as much its
    /// own as its address is.
    pub fn mac(&self) -> [u8; 6] {
        let [a, b, c, d] = self.address.octets();
        [0x02, 0x62, a, b, c, d]
    }
}

impl FromStr for Bridge {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<Self, Malformed> {
        let parse = || {
            let (device, rest) = text.split_once(':')?;
            let (address, gateway) = rest.split_once('@')?;
            let (address, prefix) = address.split_once('/')?;
            let bridge = Self {
                device: device.to_owned(),
                address: address.parse().ok()?,
                prefix: prefix.parse().ok()?,
                gateway: gateway.parse().ok()?,
            };
            bridge.is_possible().then_some(bridge)
        };
        parse().ok_or_else(|| malformed(text, expected(text)))
    }
}

/// What should have been there.
fn expected(text: &str) -> &'static str {
    let place = text.split_once(':').map_or("", |(_, place)| place);
    if place == "dhcp" {
        return "a bridge with an address there, such as `br0:192.0.2.50/24@192.0.2.1` (there is no DHCP: only an address that is known can be held to)";
    }
    if place.matches(':').count() > 1 {
        return "a bridge with an IPv4 address there, such as `br0:192.0.2.50/24@192.0.2.1` (IPv6 is stopped on a bridge)";
    }
    "a bridge or tap, an address and a gateway there, such as `br0:192.0.2.50/24@192.0.2.1`"
}

impl Bridge {
    fn is_possible(&self) -> bool {
        let usual = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        let named = (1..=LONGEST).contains(&self.device.len())
            && self.device.bytes().all(usual)
            && ![".", ".."].contains(&self.device.as_str());
        if !named || !(8..=30).contains(&self.prefix) {
            return false;
        }
        let mask = u32::MAX << (32 - self.prefix);
        let (address, gateway) = (u32::from(self.address), u32::from(self.gateway));
        let host = |address: u32| ![0, !mask].contains(&(address & !mask));
        address & mask == gateway & mask && host(address) && host(gateway) && address != gateway
    }
}

impl fmt::Display for Bridge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            device,
            address,
            prefix,
            gateway,
        } = self;
        write!(f, "{device}:{address}/{prefix}@{gateway}")
    }
}

as_text!(Bridge);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bridges_are_read_as_they_are_written() {
        let text = "br0:192.0.2.50/24@192.0.2.1";
        let bridge: Bridge = text.parse().unwrap();
        assert_eq!(bridge.to_string(), text);
        assert_eq!(bridge.mac(), [2, 0x62, 192, 0, 2, 50]);
        for bad in [
            "br0",
            "br0:192.0.2.50/24",
            "br0:192.0.2.50@192.0.2.1",
            "br0:192.0.2.50/24@192.0.3.1",
            "br0:192.0.2.1/24@192.0.2.1",
            "br0:192.0.2.0/24@192.0.2.1",
            "br0:192.0.2.255/24@192.0.2.1",
            "br0:192.0.2.50/31@192.0.2.51",
            "a/b:192.0.2.50/24@192.0.2.1",
            "..:192.0.2.50/24@192.0.2.1",
            "a-name-too-long-x:192.0.2.50/24@192.0.2.1",
        ] {
            assert!(bad.parse::<Bridge>().is_err(), "{bad}");
        }
    }

    #[test]
    fn what_a_bridge_does_not_have_is_said() {
        for (text, words) in [
            ("br0:dhcp", "there is no DHCP"),
            ("br0:[2001:db8::5]/64@2001:db8::1", "IPv6 is stopped"),
            ("br0:2001:db8::5/64@2001:db8::1", "IPv6 is stopped"),
            ("br0", "a bridge or tap"),
        ] {
            let error = text.parse::<Bridge>().unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
