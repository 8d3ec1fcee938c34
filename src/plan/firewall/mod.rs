//! Firewall rules as plain data: what a machine may reach, and what keeps the
//! host safe from it.
//!
//! The words are nftables' own (nft(8)). [`std::fmt::Display`] writes what
//! `nft list ruleset` would, and what marks stand for besides; nothing at run time
//! reads it.

mod bridge;
mod changes;
mod gate;
mod machine;
mod never;
mod text;
mod through;

use std::net::IpAddr;

use crate::spec::{Cidr, Port, Protocol};

pub use bridge::{bridged, guard, guard_name};
pub use changes::{Changes, Names, changes};
pub use gate::{gate, gate_mark, gate_member};
pub use machine::machine;
pub use never::{Never, never};
pub use through::Through;

/// Name of every table of ours in a machine's namespace, and of the gate.
pub const TABLE: &str = "bulkhead";
/// Group of every packet that is logged (NFLOG).
pub const LOG_GROUP: u16 = 1;
/// What the log says of a connection that was let through.
pub const LOG_NEW: &str = "new:";
/// What the log says of one that was not, before the rule's name.
pub const LOG_REFUSED: &str = "refused:";
/// Before an exception, in the name of its rule and of its counter.
pub const ALLOW_CIDR: &str = "allow-cidr:";
/// Sets of addresses and ports that names stand for, fed by the resolver. Port 0
/// stands for those of the policy.
pub const ALLOWED: [&str; 2] = ["allowed4", "allowed6"];

/// Tables that are made together or not at all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ruleset {
    /// The tables.
    pub tables: Vec<Table>,
}

/// Which packets a table sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// IPv4 and IPv6.
    Inet,
    /// Everything that comes in at one device, before anything else sees it.
    Netdev,
}

/// A table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Which packets it sees.
    pub family: Family,
    /// Its name.
    pub name: String,
    /// Its named counters.
    pub counters: Vec<String>,
    /// Its sets and maps.
    pub sets: Vec<Set>,
    /// Its chains.
    pub chains: Vec<Chain>,
}

/// A set, or a map to verdicts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Set {
    /// Its name.
    pub name: &'static str,
    /// What is in it.
    pub elements: Elements,
}

/// What a set has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Elements {
    /// Ranges of ports.
    Ports(Vec<(u16, u16)>),
    /// Ranges of addresses, and the chain each leads to. All of one family, by
    /// address, without overlaps.
    Chains {
        /// Whether they are IPv6.
        v6: bool,
        /// The ranges and their chains.
        ranges: Vec<(Cidr, String)>,
    },
    /// Addresses with a port, each for a time. Filled while the machine runs.
    Timed {
        /// Whether they are IPv6.
        v6: bool,
    },
}

/// A chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// Its name.
    pub name: String,
    /// Where packets enter it; others jump to it when absent.
    pub base: Option<Base>,
    /// Its rules, in order.
    pub rules: Vec<Rule>,
}

/// Where packets enter a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Base {
    /// Whether it changes addresses.
    pub nat: bool,
    /// The hook.
    pub hook: Hook,
    /// Lower comes first.
    pub priority: i32,
    /// What becomes of a packet no rule decides: refused when false.
    pub accept: bool,
}

/// A hook of netfilter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hook {
    /// Before routing.
    Prerouting,
    /// To this host itself.
    Input,
    /// Through this host.
    Forward,
    /// From this host itself.
    Output,
    /// After routing.
    Postrouting,
    /// In at a device.
    Ingress(String),
}

/// A rule: all of it, in order.
pub type Rule = Vec<Expr>;

/// A number of bytes in a packet, compared or looked up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Field {
    /// Source address of the frame.
    EtherSource,
    /// Type of the frame.
    EtherType,
    /// Sender's hardware address in an ARP packet.
    ArpEther,
    /// Sender's address in an ARP packet.
    ArpIp,
    /// Source address.
    Ip4Source,
    /// Destination address.
    Ip4Dest,
    /// Source address.
    Ip6Source,
    /// Destination address.
    Ip6Dest,
    /// Source port of TCP or UDP.
    SourcePort,
    /// Destination port of TCP or UDP.
    Port,
    /// Type of an ICMP message.
    IcmpType,
    /// Type of an ICMPv6 message.
    Icmp6Type,
    /// Target of a neighbour solicitation or advertisement.
    Target6,
}

/// A header beside the usual ones, or an option of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extra {
    /// A routing header of IPv6 (RFC 8200, RFC 8754).
    Routing6,
    /// A loose source route of IPv4 (RFC 791).
    LooseRoute4,
    /// A strict source route of IPv4.
    StrictRoute4,
}

/// States of connection tracking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Part of, or belonging to, a connection that was let through.
    Known,
    /// Makes no sense.
    Invalid,
}

/// A part of a rule: a condition, or what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expr {
    /// Came in here.
    In(&'static str),
    /// Goes out there.
    Out(&'static str),
    /// Came in at a device of this group.
    InGroup(u32),
    /// Goes out, or does not, at a device of this group.
    OutGroup(u32, bool),
    /// For others than the receiver alone: broadcast, multicast.
    NotForHost,
    /// Of this kind (linux/if_packet.h): broadcast (1) or multicast (2).
    Cast(u8),
    /// IPv4 (2) or IPv6 (10).
    Nfproto(u8),
    /// This transport protocol, by number.
    L4(u8),
    /// Any transport protocol: the headers before it and their lengths make sense.
    Whole,
    /// This header or option is there.
    Has(Extra),
    /// A field is, or is not, this.
    Is(Field, Vec<u8>, bool),
    /// A field is in this range.
    Between(Field, Vec<u8>, Vec<u8>),
    /// An address begins like this.
    Within(Field, Cidr),
    /// A field is in this set of ports.
    InSet(Field, &'static str),
    /// Destination and port are in this set. Whether they are IPv6.
    DestInSet(bool, &'static str),
    /// Destination and port 0, which stands for the policy's ports, are in it.
    DestAnyPort(bool, &'static str),
    /// Goes where this map of destinations says.
    Map(Field, &'static str),
    /// Destination is not a plain address of another host, as routing sees it.
    NotToOthers,
    /// State of its connection.
    Ct(State),
    /// Of a connection that was sent elsewhere.
    Redirected,
    /// More connections than this at a time.
    CountOver(u32),
    /// More than so many a second; after a burst of as many.
    RateOver(u32),
    /// Up to so many a second.
    Rate(u32),
    /// More than this many bytes in all; so many are used already.
    QuotaOver(u64, u64),
    /// Counted here.
    Counter(String),
    /// Logged with this prefix, to [`LOG_GROUP`].
    Log(String),
    /// Marked as let through by this, the packet and its connection.
    Mark(Through),
    /// Let through.
    Accept,
    /// Thrown away without a word.
    Drop,
    /// Refused with a TCP reset.
    Reset,
    /// Refused with "administratively prohibited".
    Prohibit,
    /// On in that chain, and back.
    Jump(String),
    /// On in that chain.
    Goto(String),
    /// Back.
    Return,
    /// Sent to this port of this host.
    Redirect(u16),
    /// Takes the address of where it goes out.
    Masquerade,
}

impl Expr {
    fn is(field: Field, bytes: impl AsRef<[u8]>) -> Self {
        Self::Is(field, bytes.as_ref().to_vec(), true)
    }

    fn jump(chain: &str) -> Self {
        Self::Jump(chain.to_owned())
    }

    fn goto(chain: &str) -> Self {
        Self::Goto(chain.to_owned())
    }

    /// One address exactly.
    fn is_address(address: IpAddr, source: bool) -> Self {
        match (address, source) {
            (IpAddr::V4(address), true) => Self::is(Field::Ip4Source, address.octets()),
            (IpAddr::V4(address), false) => Self::is(Field::Ip4Dest, address.octets()),
            (IpAddr::V6(address), true) => Self::is(Field::Ip6Source, address.octets()),
            (IpAddr::V6(address), false) => Self::is(Field::Ip6Dest, address.octets()),
        }
    }

    /// Conditions for a port, the protocol first.
    fn port(port: Port) -> [Self; 2] {
        let (first, last) = (port.first.to_be_bytes(), port.last.to_be_bytes());
        let number = match first == last {
            true => Self::is(Field::Port, first),
            false => Self::Between(Field::Port, first.into(), last.into()),
        };
        [Self::L4(port.protocol.number()), number]
    }
}

/// A chain without a hook.
fn chain(name: &str, rules: Vec<Rule>) -> Chain {
    Chain {
        name: name.to_owned(),
        base: None,
        rules,
    }
}

/// A chain on a hook.
fn base(name: &str, hook: Hook, priority: i32, accept: bool, rules: Vec<Rule>) -> Chain {
    let base = Base {
        nat: false,
        hook,
        priority,
        accept,
    };
    Chain {
        name: name.to_owned(),
        base: Some(base),
        rules,
    }
}

/// As [`base`], and it changes addresses.
fn nat(name: &str, hook: Hook, priority: i32, rules: Vec<Rule>) -> Chain {
    let mut chain = base(name, hook, priority, true, rules);
    if let Some(base) = &mut chain.base {
        base.nat = true;
    }
    chain
}

const TCP: u8 = Protocol::Tcp.number();
const UDP: u8 = Protocol::Udp.number();
const ICMP: u8 = 1;
const ICMP6: u8 = 58;

#[cfg(test)]
mod tests;
