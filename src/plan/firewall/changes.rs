//! What can change of a machine's rules while it runs, and what names change.

use std::net::IpAddr;

use super::machine::refuse;
use super::*;
use crate::plan::network::{PROXY, TAP};
use crate::spec::{Exception, NetworkPolicy};

/// What names have to do with what may be reached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Names {
    /// Nothing: every address that is not forbidden, at the allowed ports; and
    /// hosts at ports of their own.
    #[default]
    Any,
    /// Only what the resolver put into [`ALLOWED`].
    Fed,
    /// As fed, but TCP only; and web connections (to 80 and 443) go to this port
    /// of the gateway, where the name they ask for is read.
    Strict(u16),
}

impl Names {
    /// What names have to do with a machine of this policy.
    pub fn of(policy: &NetworkPolicy) -> Self {
        match (policy.strict, policy.is_closed()) {
            (true, _) => Self::Strict(PROXY),
            (false, true) => Self::Fed,
            (false, false) => Self::Any,
        }
    }
}

/// What can change while the machine runs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// Counters that have to be there: one for each exception. Those of others stay,
    /// with what they have counted.
    pub counters: Vec<String>,
    /// Chains whose rules are replaced.
    pub chains: Vec<Chain>,
    /// Sets whose elements are replaced.
    pub sets: Vec<Set>,
}

/// The rules and sets that follow from what is allowed and limited. `used` are
/// the bytes that count against the total already.
pub fn changes(policy: &NetworkPolicy, names: Names, used: u64) -> Changes {
    let port = || [Expr::Mark(Through::Port), Expr::goto("let-through")];
    let host = || [Expr::Mark(Through::Host), Expr::goto("let-through")];
    let ports = policy.ports();
    let sets = [("ports-tcp", Protocol::Tcp), ("ports-udp", Protocol::Udp)];
    let sets = sets.map(|(name, protocol)| {
        let ports = ports.iter().filter(|port| port.protocol == protocol);
        Set {
            name,
            elements: Elements::Ports(merged(ports)),
        }
    });
    let to_ports = |protocol, set| {
        let at = [Expr::L4(protocol), Expr::InSet(Field::Port, set)];
        [&at[..], &port()].concat()
    };
    // At ports of its own, or at the policy's. Port 0 is none: it stands for those.
    let to_own = |family, v6| {
        let at = [
            Expr::Nfproto(family),
            Expr::L4(TCP),
            Expr::Is(Field::Port, vec![0, 0], false),
            Expr::DestInSet(v6, ALLOWED[usize::from(v6)]),
        ];
        [&at[..], &host()].concat()
    };
    let to_fed = |family, v6, protocol, ports| {
        let at = [
            Expr::Nfproto(family),
            Expr::L4(protocol),
            Expr::InSet(Field::Port, ports),
            Expr::DestAnyPort(v6, ALLOWED[usize::from(v6)]),
        ];
        [&at[..], &host()].concat()
    };
    let fed = |family, v6| [to_own(family, v6), to_fed(family, v6, TCP, "ports-tcp")];
    let udp = |family, v6| to_fed(family, v6, UDP, "ports-udp");
    // The port would do: it is the name that is missing.
    let nameless = |protocol, set| {
        vec![
            Expr::L4(protocol),
            Expr::InSet(Field::Port, set),
            refuse("name"),
        ]
    };
    let by_name = [fed(2, false), fed(10, true)].concat();
    let mut allowed = match names {
        Names::Any => {
            let ports = [to_ports(TCP, "ports-tcp"), to_ports(UDP, "ports-udp")];
            // A host may have ports that others do not.
            let own = policy.allow_hosts.iter().any(|host| host.port().is_some());
            let own = own.then(|| [to_own(2, false), to_own(10, true)]);
            ports.into_iter().chain(own.into_iter().flatten()).collect()
        }
        Names::Fed => [
            by_name,
            vec![udp(2, false), udp(10, true), nameless(UDP, "ports-udp")],
        ]
        .concat(),
        Names::Strict(_) => by_name,
    };
    if names != Names::Any {
        allowed.push(nameless(TCP, "ports-tcp"));
    }
    let limits = &policy.limits;
    let new = vec![
        vec![Expr::RateOver(limits.connection_rate), refuse("rate")],
        vec![Expr::CountOver(limits.connections), refuse("connections")],
    ];
    let quota = limits
        .total
        .map(|total| vec![Expr::QuotaOver(total.0, used), refuse("quota")]);
    let mut chains = vec![
        chain("exceptions", exceptions(policy, let_through)),
        chain("allowed", allowed),
        chain("limits", new),
        chain("quota", quota.into_iter().collect()),
    ];
    if let Names::Strict(_) = names {
        let accept = |_: &Exception| vec![Expr::Accept];
        chains.push(chain("not-strict", exceptions(policy, accept)));
    }
    let counters = policy.exceptions.iter().map(counter);
    Changes {
        counters: counters.collect(),
        chains,
        sets: sets.into(),
    }
}

/// Name of the counter of an exception: that of its rule.
fn counter(exception: &Exception) -> String {
    Through::Exception(*exception).to_string()
}

/// What becomes of a connection that an exception is made for.
fn let_through(exception: &Exception) -> Rule {
    vec![
        Expr::Counter(counter(exception)),
        Expr::Mark(Through::Exception(*exception)),
        Expr::goto("let-through"),
    ]
}

/// A rule for each exception and protocol, which ends with `then`.
fn exceptions(policy: &NetworkPolicy, then: impl Fn(&Exception) -> Rule) -> Vec<Rule> {
    let rules = policy.exceptions.iter().flat_map(|exception| {
        let (family, field) = match exception.cidr.first() {
            IpAddr::V4(_) => (2, Field::Ip4Dest),
            IpAddr::V6(_) => (10, Field::Ip6Dest),
        };
        let ports = match exception.port {
            Some(port) => vec![Expr::port(port).to_vec()],
            None => vec![vec![Expr::L4(TCP)], vec![Expr::L4(UDP)]],
        };
        let to = vec![Expr::Nfproto(family), Expr::Within(field, exception.cidr)];
        let then = then(exception);
        let rule = move |port| [to.clone(), port, then.clone()].concat();
        ports.into_iter().map(rule)
    });
    rules.collect()
}

/// Web connections go to the proxy, but for exceptions by address; what no
/// machine may reach is refused here, where its address is still seen.
pub(super) fn strict(policy: &NetworkPolicy, port: u16) -> [Chain; 2] {
    let web = |to: u16| {
        let to = Expr::is(Field::Port, to.to_be_bytes());
        vec![Expr::In(TAP), Expr::L4(TCP), to, Expr::goto("strict")]
    };
    let mut rules = vec![
        vec![Expr::jump("not-strict")],
        vec![Expr::Nfproto(2), Expr::Map(Field::Ip4Dest, "never4")],
    ];
    rules.push(match policy.ipv6 {
        true => vec![Expr::Nfproto(10), Expr::Map(Field::Ip6Dest, "never6")],
        false => vec![Expr::Nfproto(10), refuse("ipv6")],
    });
    rules.push(vec![Expr::Redirect(port)]);
    [
        nat(
            "prerouting",
            Hook::Prerouting,
            -100,
            vec![web(80), web(443)],
        ),
        chain("strict", rules),
    ]
}

/// Ranges of ports without overlaps or neighbours, in order.
fn merged<'p>(ports: impl Iterator<Item = &'p crate::spec::Port>) -> Vec<(u16, u16)> {
    let mut sorted: Vec<_> = ports.map(|port| (port.first, port.last)).collect();
    sorted.sort_unstable();
    let mut merged: Vec<(u16, u16)> = Vec::new();
    for (first, last) in sorted {
        match merged.last_mut() {
            Some(before) if u32::from(first) <= u32::from(before.1) + 1 => {
                before.1 = before.1.max(last)
            }
            _ => merged.push((first, last)),
        }
    }
    merged
}
