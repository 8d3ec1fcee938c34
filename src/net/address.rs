//! Addresses that no machine may reach, whatever a name says.
//!
//! From IANA's registries of special-purpose addresses (RFC 6890 and after),
//! with what clouds use for metadata.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A block of IPv4 addresses: network, prefix length, what it is.
pub type Block4 = (Ipv4Addr, u8, &'static str);
/// A block of IPv6 addresses.
pub type Block6 = (Ipv6Addr, u8, &'static str);

/// IPv4 blocks that are not the public internet. The first match names it.
pub const SPECIAL4: &[Block4] = &[
    (Ipv4Addr::new(0, 0, 0, 0), 8, "this host"),
    (Ipv4Addr::new(10, 0, 0, 0), 8, "private"),
    (Ipv4Addr::new(100, 100, 100, 200), 32, "metadata"),
    (Ipv4Addr::new(100, 64, 0, 0), 10, "carrier-grade NAT"),
    (Ipv4Addr::new(127, 0, 0, 0), 8, "loopback"),
    (Ipv4Addr::new(168, 63, 129, 16), 32, "metadata"),
    (Ipv4Addr::new(169, 254, 169, 254), 32, "metadata"),
    (Ipv4Addr::new(169, 254, 0, 0), 16, "link-local"),
    (Ipv4Addr::new(172, 16, 0, 0), 12, "private"),
    (Ipv4Addr::new(192, 0, 0, 0), 24, "protocol assignments"),
    (Ipv4Addr::new(192, 0, 2, 0), 24, "documentation"),
    (Ipv4Addr::new(192, 88, 99, 0), 24, "6to4 relay"),
    (Ipv4Addr::new(192, 168, 0, 0), 16, "private"),
    (Ipv4Addr::new(198, 18, 0, 0), 15, "benchmarking"),
    (Ipv4Addr::new(198, 51, 100, 0), 24, "documentation"),
    (Ipv4Addr::new(203, 0, 113, 0), 24, "documentation"),
    (Ipv4Addr::new(224, 0, 0, 0), 4, "multicast"),
    (Ipv4Addr::new(255, 255, 255, 255), 32, "broadcast"),
    (Ipv4Addr::new(240, 0, 0, 0), 4, "reserved"),
];

/// IPv6 blocks inside 2000::/3 that are not the public internet. What is
/// outside of 2000::/3 is not either.
pub const SPECIAL6: &[Block6] = &[
    (
        Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, 0, 0),
        23,
        "protocol assignments",
    ),
    (
        Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0),
        32,
        "documentation",
    ),
    (Ipv6Addr::new(0x2002, 0, 0, 0, 0, 0, 0, 0), 16, "6to4"),
    (
        Ipv6Addr::new(0x3fff, 0, 0, 0, 0, 0, 0, 0),
        20,
        "documentation",
    ),
];

/// NAT64 by its well-known prefix: the IPv4 address is in the last four bytes.
const NAT64: Block6 = (Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0, 0), 96, "NAT64");

/// What the address is, where it is not one of the public internet.
pub fn special(address: IpAddr) -> Option<&'static str> {
    match address {
        IpAddr::V4(address) => special4(address),
        IpAddr::V6(address) => special6(address),
    }
}

fn special4(address: Ipv4Addr) -> Option<&'static str> {
    let bits = u32::from(address);
    let within = |(net, prefix, _): &&Block4| {
        (bits ^ u32::from(*net))
            .checked_shr(32 - u32::from(*prefix))
            .unwrap_or(0)
            == 0
    };
    SPECIAL4.iter().find(within).map(|block| block.2)
}

fn special6(address: Ipv6Addr) -> Option<&'static str> {
    let within = |(net, prefix, _): &&Block6| within6(address, *net, *prefix);
    if within6(address, NAT64.0, NAT64.1) {
        let [.., a, b, c, d] = address.octets();
        return special4(Ipv4Addr::new(a, b, c, d)).map(|_| "NAT64 of a special address");
    }
    if address.to_ipv4_mapped().is_some() {
        return Some("IPv4-mapped");
    }
    let first = address.segments()[0];
    match first {
        0xfd00 if address == METADATA6 => Some("metadata"),
        0xfc00..=0xfdff => Some("private"),
        0xfe80..=0xfebf => Some("link-local"),
        0xfec0..=0xfeff => Some("site-local"),
        0xff00..=0xffff => Some("multicast"),
        0x2000..=0x3fff => SPECIAL6.iter().find(within).map(|block| block.2),
        _ if address.is_loopback() => Some("loopback"),
        _ => Some("reserved"),
    }
}

/// Where one cloud has its metadata service.
const METADATA6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);

fn within6(address: Ipv6Addr, net: Ipv6Addr, prefix: u8) -> bool {
    (u128::from(address) ^ u128::from(net))
        .checked_shr(128 - u32::from(prefix))
        .unwrap_or(0)
        == 0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn kind(text: &str) -> Option<&'static str> {
        special(text.parse().unwrap())
    }

    #[test]
    fn the_edges_of_every_block() {
        for (inside, outside) in [
            ("10.0.0.0", "9.255.255.255"),
            ("10.255.255.255", "11.0.0.0"),
            ("100.64.0.0", "100.63.255.255"),
            ("100.127.255.255", "100.128.0.0"),
            ("127.0.0.1", "128.0.0.1"),
            ("169.254.169.254", "169.255.0.0"),
            ("172.31.255.255", "172.32.0.0"),
            ("192.168.0.0", "192.167.255.255"),
            ("198.19.255.255", "198.20.0.0"),
            ("224.0.0.1", "223.255.255.255"),
            ("255.255.255.255", "8.8.8.8"),
            ("0.0.0.0", "1.0.0.0"),
            ("168.63.129.16", "168.63.129.17"),
            ("::1", "2606:4700::1111"),
            ("::", "2400::1"),
            ("fe80::1", "2a00::1"),
            ("fd00:ec2::254", "2c0f::1"),
            ("ff02::1", "2620:fe::fe"),
            ("2001:db8::1", "2001:db9::1"),
            ("2001::1", "2001:200::1"),
            ("2002:a00:1::", "2003::1"),
            ("3fff::1", "3ffe::1"),
            ("4000::1", "2600::1"),
            ("::ffff:8.8.8.8", "64:ff9b::8.8.8.8"),
            ("::ffff:10.0.0.1", "64:ff9b::1.1.1.1"),
            ("64:ff9b::10.0.0.1", "64:ff9b::9.9.9.9"),
            ("64:ff9b::169.254.169.254", "2a01::1"),
            ("64:ff9b:1::1", "2a02::1"),
            ("::10.0.0.1", "2a03::1"),
        ] {
            assert!(kind(inside).is_some(), "{inside}");
            assert_eq!(kind(outside), None, "{outside}");
        }
        assert_eq!(kind("169.254.169.254"), Some("metadata"));
        assert_eq!(kind("fd00:ec2::254"), Some("metadata"));
    }

    proptest! {
        /// However an IPv4 address is wrapped up, what is special stays so.
        #[test]
        fn wrapping_hides_nothing(bits: u32) {
            let plain = Ipv4Addr::from(bits);
            if special4(plain).is_some() {
                let [a, b, c, d] = plain.octets();
                let (high, low) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
                for wrapped in [
                    Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, high, low),
                    Ipv6Addr::new(0, 0, 0, 0, 0, 0, high, low),
                    Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, high, low),
                    Ipv6Addr::new(0x64, 0xff9b, 1, 0, 0, 0, high, low),
                    Ipv6Addr::new(0x2002, high, low, 0, 0, 0, 0, 1),
                ] {
                    prop_assert!(special6(wrapped).is_some(), "{}", wrapped);
                }
            }
        }
    }
}
