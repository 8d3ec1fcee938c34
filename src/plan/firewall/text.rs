//! Rules in nftables' own words, for people and snapshots.

use std::fmt::{self, Display, Formatter};

use super::*;
use crate::plan::network::mac;

impl Display for Ruleset {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.tables.iter().try_for_each(|table| table.fmt(f))
    }
}

impl Display for Table {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let family = match self.family {
            Family::Inet => "inet",
            Family::Netdev => "netdev",
        };
        writeln!(f, "table {family} {} {{", self.name)?;
        for counter in &self.counters {
            writeln!(f, "  counter {counter}")?;
        }
        self.sets.iter().try_for_each(|set| set.fmt(f))?;
        self.chains.iter().try_for_each(|chain| chain.fmt(f))?;
        writeln!(f, "}}")
    }
}

impl Display for Set {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let name = self.name;
        let ip = |v6| if v6 { "ipv6_addr" } else { "ipv4_addr" };
        match &self.elements {
            Elements::Ports(ranges) => {
                let ranges = ranges.iter().map(|(first, last)| match first == last {
                    true => first.to_string(),
                    false => format!("{first}-{last}"),
                });
                let ranges: Vec<_> = ranges.collect();
                let ranges = ranges.join(", ");
                writeln!(
                    f,
                    "  set {name} {{ type inet_service; flags interval; elements = {{ {ranges} }} }}"
                )
            }
            Elements::Timed { v6 } => {
                writeln!(
                    f,
                    "  set {name} {{ type {} . inet_service; flags timeout }}",
                    ip(*v6)
                )
            }
            Elements::Chains { v6, ranges } => {
                writeln!(
                    f,
                    "  map {name} {{ type {} : verdict; flags interval; elements = {{",
                    ip(*v6)
                )?;
                for (cidr, chain) in ranges {
                    writeln!(f, "    {cidr} : goto {chain},")?;
                }
                writeln!(f, "  }} }}")
            }
        }
    }
}

impl Display for Chain {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "  chain {} {{", self.name)?;
        if let Some(base) = &self.base {
            let kind = if base.nat { "nat" } else { "filter" };
            let (hook, device) = match &base.hook {
                Hook::Prerouting => ("prerouting", ""),
                Hook::Input => ("input", ""),
                Hook::Forward => ("forward", ""),
                Hook::Output => ("output", ""),
                Hook::Postrouting => ("postrouting", ""),
                Hook::Ingress(device) => ("ingress device", device.as_str()),
            };
            let space = if device.is_empty() { "" } else { " " };
            let policy = if base.accept { "accept" } else { "drop" };
            let priority = base.priority;
            writeln!(
                f,
                "    type {kind} hook {hook}{space}{device} priority {priority}; policy {policy};"
            )?;
        }
        for rule in &self.rules {
            let words: Vec<_> = rule.iter().map(Expr::to_string).collect();
            write!(f, "    {}", words.join(" "))?;
            // What the number stands for.
            match rule.iter().find_map(|expr| match expr {
                Expr::Mark(through) => Some(through),
                _ => None,
            }) {
                Some(through) => writeln!(f, " comment \"{through}\"")?,
                None => writeln!(f)?,
            }
        }
        writeln!(f, "  }}")
    }
}

impl Display for Field {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::EtherSource => "ether saddr",
            Self::EtherType => "ether type",
            Self::ArpEther => "arp saddr ether",
            Self::ArpIp => "arp saddr ip",
            Self::Ip4Source => "ip saddr",
            Self::Ip4Dest => "ip daddr",
            Self::Ip6Source => "ip6 saddr",
            Self::Ip6Dest => "ip6 daddr",
            Self::SourcePort => "th sport",
            Self::Port => "th dport",
            Self::IcmpType => "icmp type",
            Self::Icmp6Type => "icmpv6 type",
            Self::Target6 => "icmpv6 taddr",
        })
    }
}

/// Bytes as that field shows them.
fn shown(field: Field, bytes: &[u8]) -> String {
    match (field, bytes) {
        (Field::EtherType, [a, b]) => format!("0x{a:02x}{b:02x}"),
        (_, [one]) => one.to_string(),
        (_, [a, b]) => u16::from_be_bytes([*a, *b]).to_string(),
        (_, [a, b, c, d]) => std::net::Ipv4Addr::new(*a, *b, *c, *d).to_string(),
        (_, &[a, b, c, d, e, g]) => mac([a, b, c, d, e, g]),
        _ => match <[u8; 16]>::try_from(bytes) {
            Ok(address) => std::net::Ipv6Addr::from(address).to_string(),
            Err(_) => format!("{bytes:?}"),
        },
    }
}

impl Display for Expr {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::In(device) => write!(f, "iifname {device}"),
            Self::Out(device) => write!(f, "oifname {device}"),
            Self::InGroup(group) => write!(f, "iifgroup {group}"),
            Self::OutGroup(group, true) => write!(f, "oifgroup {group}"),
            Self::OutGroup(group, false) => write!(f, "oifgroup != {group}"),
            Self::NotForHost => write!(f, "meta pkttype != host"),
            Self::Cast(1) => write!(f, "meta pkttype broadcast"),
            Self::Cast(_) => write!(f, "meta pkttype multicast"),
            Self::Nfproto(2) => write!(f, "meta nfproto ipv4"),
            Self::Nfproto(_) => write!(f, "meta nfproto ipv6"),
            Self::L4(TCP) => write!(f, "meta l4proto tcp"),
            Self::L4(UDP) => write!(f, "meta l4proto udp"),
            Self::L4(number) => write!(f, "meta l4proto {number}"),
            Self::Whole => write!(f, "meta l4proto >= 0"),
            Self::Has(Extra::Routing6) => write!(f, "exthdr rt exists"),
            Self::Has(Extra::LooseRoute4) => write!(f, "ip option lsrr exists"),
            Self::Has(Extra::StrictRoute4) => write!(f, "ip option ssrr exists"),
            Self::Is(field, bytes, true) => write!(f, "{field} {}", shown(*field, bytes)),
            Self::Is(field, bytes, false) => write!(f, "{field} != {}", shown(*field, bytes)),
            Self::Between(field, first, last) => {
                write!(
                    f,
                    "{field} {}-{}",
                    shown(*field, first),
                    shown(*field, last)
                )
            }
            Self::Within(field, cidr) => write!(f, "{field} {cidr}"),
            Self::InSet(field, set) => write!(f, "{field} @{set}"),
            Self::DestInSet(v6, set) => {
                let ip = if *v6 { "ip6" } else { "ip" };
                write!(f, "{ip} daddr . th dport @{set}")
            }
            Self::DestAnyPort(v6, set) => {
                let ip = if *v6 { "ip6" } else { "ip" };
                write!(f, "{ip} daddr . 0 @{set}")
            }
            Self::Map(field, map) => write!(f, "{field} vmap @{map}"),
            Self::NotToOthers => write!(f, "fib daddr type != unicast"),
            Self::Ct(State::Known) => write!(f, "ct state established,related"),
            Self::Ct(State::Invalid) => write!(f, "ct state invalid"),
            Self::Redirected => write!(f, "ct status dnat"),
            Self::Redirect(port) => write!(f, "redirect to :{port}"),
            Self::CountOver(count) => write!(f, "ct count over {count}"),
            Self::RateOver(rate) => write!(f, "limit rate over {rate}/second burst {rate} packets"),
            Self::Rate(rate) => write!(f, "limit rate {rate}/second burst {rate} packets"),
            Self::QuotaOver(bytes, used) => write!(f, "quota over {bytes} bytes used {used} bytes"),
            Self::Counter(name) => write!(f, "counter name {name}"),
            Self::Log(prefix) => write!(f, "log prefix \"{prefix}\" group {LOG_GROUP}"),
            Self::Mark(through) => {
                let mark = through.mark();
                write!(f, "meta mark set {mark:#010x} ct mark set {mark:#010x}")
            }
            Self::Accept => write!(f, "accept"),
            Self::Drop => write!(f, "drop"),
            Self::Reset => write!(f, "reject with tcp reset"),
            Self::Prohibit => write!(f, "reject with icmpx admin-prohibited"),
            Self::Jump(chain) => write!(f, "jump {chain}"),
            Self::Goto(chain) => write!(f, "goto {chain}"),
            Self::Return => write!(f, "return"),
            Self::Masquerade => write!(f, "masquerade"),
        }
    }
}
