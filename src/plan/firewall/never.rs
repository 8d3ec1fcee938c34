//! What no machine may reach, and what a refusal of it is called.

use std::net::IpAddr;

use crate::spec::Cidr;

/// A range of addresses no machine may reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Never {
    /// The addresses.
    pub cidr: Cidr,
    /// Name of the rule.
    pub rule: &'static str,
}

/// Special addresses (RFC 6890 and its updates; IANA's special-purpose address
/// registries). Of two that overlap, the longer prefix counts. Documentation
/// addresses are not among them: nobody routes those. Of IPv6, only what is in
/// 2000::/3 is the internet: no IPv4 in disguise (::ffff:0:0/96, ::/96), none behind a
/// translator (64:ff9b::/96), no segments (5f00::/16), nothing that is not given out.
const NEVER: [(&str, &str); 30] = [
    ("0.0.0.0/8", "special"),
    ("10.0.0.0/8", "private"),
    ("100.64.0.0/10", "cgnat"),
    ("100.100.100.200/32", "metadata"), // Alibaba Cloud
    ("127.0.0.0/8", "host"),
    ("168.63.129.16/32", "metadata"), // Azure
    ("169.254.0.0/16", "link-local"),
    ("169.254.169.254/32", "metadata"),
    ("169.254.170.2/32", "metadata"), // AWS, for containers
    ("169.254.170.23/32", "metadata"),
    ("172.16.0.0/12", "private"),
    ("192.0.0.0/24", "special"),
    ("192.0.0.192/32", "metadata"), // Oracle Cloud
    ("192.88.99.0/24", "special"),
    ("192.168.0.0/16", "private"),
    ("198.18.0.0/15", "private"), // ours, too
    ("224.0.0.0/4", "multicast"),
    ("240.0.0.0/4", "special"),
    ("255.255.255.255/32", "broadcast"),
    ("::/3", "special"),
    ("2001::/23", "special"), // Teredo, with IPv4 inside, and other protocols' own
    ("2002::/16", "special"), // 6to4: IPv4 inside
    ("4000::/2", "special"),
    ("8000::/1", "special"),
    ("fc00::/7", "private"),
    ("fd00:ec2::254/128", "metadata"), // AWS
    ("fd20:ce::254/128", "metadata"),  // Google Cloud
    ("fe80::/10", "link-local"),
    ("fec0::/10", "private"),
    ("ff00::/8", "multicast"),
];

/// What no machine may reach, without overlaps, by address: IPv4 or IPv6.
/// `host` are addresses of the host itself.
pub fn never(v6: bool, host: &[IpAddr]) -> Vec<(Cidr, String)> {
    let fixed = NEVER.iter().filter_map(|(cidr, rule)| {
        let cidr = cidr.parse().ok()?;
        Some(Never { cidr, rule })
    });
    let host = host.iter().filter_map(|address| {
        let cidr = Cidr::new(*address, if address.is_ipv4() { 32 } else { 128 }).ok()?;
        Some(Never { cidr, rule: "host" })
    });
    // Later and longer ones cut their piece out of the others.
    let mut wanted: Vec<Never> = fixed.chain(host).collect();
    wanted.retain(|one| one.cidr.first().is_ipv6() == v6);
    wanted.sort_by_key(|one| one.cidr.length());
    let mut pieces: Vec<(Cidr, String)> = Vec::new();
    for one in wanted {
        let mut cut = Vec::new();
        for (cidr, rule) in pieces {
            if cidr.overlaps(&one.cidr) {
                cut.extend(without(cidr, &one.cidr).map(|rest| (rest, rule.clone())));
            } else {
                cut.push((cidr, rule));
            }
        }
        cut.push((one.cidr, one.rule.to_owned()));
        pieces = cut;
    }
    pieces.sort_by_key(|(cidr, _)| cidr.first());
    pieces
}

/// What is left of a range when a part of it is taken away: the other half, the
/// other half of the half, and so on.
fn without(whole: Cidr, part: &Cidr) -> impl Iterator<Item = Cidr> {
    let target = part.first();
    (whole.length() + 1..=part.length()).filter_map(move |length| sibling(target, length))
}

/// The range of this length beside the one an address is in.
fn sibling(address: IpAddr, length: u8) -> Option<Cidr> {
    let first = match address {
        IpAddr::V4(address) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(length))?;
            let flip = 1 << (32 - u32::from(length));
            IpAddr::V4(((u32::from(address) & mask) ^ flip).into())
        }
        IpAddr::V6(address) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(length))?;
            let flip = 1 << (128 - u32::from(length));
            IpAddr::V6(((u128::from(address) & mask) ^ flip).into())
        }
    };
    Cidr::new(first, length).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(address: &str, host: &[IpAddr]) -> Option<String> {
        let address: IpAddr = address.parse().unwrap();
        let pieces = never(address.is_ipv6(), host);
        let mut found = pieces
            .into_iter()
            .filter(|(cidr, _)| (cidr.first()..=cidr.last()).contains(&address));
        let rule = found.next().map(|(_, rule)| rule);
        assert!(found.next().is_none(), "{address} is there twice");
        rule
    }

    #[test]
    fn every_special_address_has_its_rule() {
        for (text, expected) in NEVER {
            let cidr: Cidr = text.parse().unwrap();
            let last = rule(&cidr.last().to_string(), &[]);
            assert!(last.is_some(), "{text}");
            if cidr.first() == cidr.last() {
                assert_eq!(last.as_deref(), Some(expected), "{text}");
            }
        }
        for (address, expected) in [
            ("10.255.255.255", "private"),
            ("169.254.169.253", "link-local"),
            ("169.254.169.254", "metadata"),
            ("169.254.169.255", "link-local"),
            ("100.127.255.255", "cgnat"),
            ("::1", "special"),
            ("::7f00:1", "special"),
            ("::ffff:10.0.0.1", "special"),
            ("::ffff:0:10.0.0.1", "special"),
            ("64:ff9b::10.0.0.1", "special"),
            ("200::1", "special"),
            ("2001:1ff::1", "special"),
            ("2002:a00:1::1", "special"),
            ("4000::1", "special"),
            ("5f00::1", "special"),
            ("fbff::1", "special"),
            ("fd00:ec2::254", "metadata"),
            ("fd00:ec2::255", "private"),
        ] {
            assert_eq!(rule(address, &[]).as_deref(), Some(expected), "{address}");
        }
        for address in [
            "9.255.255.255",
            "11.0.0.0",
            "8.8.8.8",
            "169.253.0.1",
            "2001:200::1",
            "2003::1",
            "2600::1",
            "3fff:ffff::1",
        ] {
            assert_eq!(rule(address, &[]), None, "{address}");
        }
    }

    #[test]
    fn addresses_of_the_host_are_its_own() {
        let host: Vec<IpAddr> = ["192.0.2.7", "192.168.1.4", "2001:db8::7"]
            .map(|text| text.parse().unwrap())
            .into();
        for address in &host {
            assert_eq!(rule(&address.to_string(), &host).as_deref(), Some("host"));
        }
        assert_eq!(rule("192.168.1.5", &host).as_deref(), Some("private"));
        assert_eq!(rule("192.0.2.8", &host), None);
        // One that is there twice is there once.
        assert_eq!(
            rule("192.0.2.7", &[host[0], host[0]]).as_deref(),
            Some("host")
        );
    }
}
