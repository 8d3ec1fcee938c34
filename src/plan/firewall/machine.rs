//! The rules of one machine, in its own network namespace.

use std::net::{IpAddr, Ipv6Addr};

use super::changes::{Names, changes, strict};
use super::*;
use crate::plan::network::{
    GATEWAY_LINK_LOCAL6, GATEWAY4, GATEWAY6, GUEST_MAC, GUEST4, GUEST6, LINK_LOCAL6, OUT, TAP,
};
use crate::spec::NetworkPolicy;

/// ARP (RFC 826).
pub(super) const ARP: [u8; 2] = [0x08, 0x06];
pub(super) const IP: [u8; 2] = [0x08, 0x00];
const IP6: [u8; 2] = [0x86, 0xdd];
/// ICMP: echo request.
const ECHO: u8 = 8;
const ECHO6: u8 = 128;
/// Neighbour discovery (RFC 4861): router solicitation and advertisement,
/// neighbour solicitation and advertisement, redirect.
const ROUTER_ASKED: u8 = 133;
const ROUTER: u8 = 134;
const ASKED: u8 = 135;
const NEIGHBOUR: u8 = 136;
const REDIRECT: u8 = 137;
/// Multicast listener report, version 2 (RFC 3810): every Linux sends them.
const LISTENER: u8 = 143;
/// First and last of link-local addresses, of multicast, and of multicast on a link
/// (RFC 4291).
const LINK_LOCALS6: [u128; 2] = [0xfe80 << 112, (0xfec0 << 112) - 1];
const MULTICAST6: [u128; 2] = [0xff00 << 112, u128::MAX];
const MULTICAST_ON_LINK6: [u128; 2] = [0xff02 << 112, (0xff03 << 112) - 1];
/// DNS, and DNS over TLS.
const DNS: [u16; 2] = [53, 853];
/// Refusals logged a second; all are counted.
const LOGGED: u32 = 200;

/// Rules that a refused packet can name.
const AT_THE_TAP: [&str; 8] = [
    "mac",
    "arp",
    "ip",
    "type",
    "broadcast",
    "router",
    "neighbour",
    "route",
];
const BEYOND: [&str; 17] = [
    "host",
    "private",
    "cgnat",
    "link-local",
    "metadata",
    "multicast",
    "broadcast",
    "special",
    "dns",
    "name",
    "port",
    "ipv6",
    "inbound",
    "invalid",
    "rate",
    "connections",
    "quota",
];

/// All rules of a machine. `host` are addresses of the host.
pub fn machine(policy: &NetworkPolicy, names: Names, host: &[IpAddr]) -> Ruleset {
    if let Some(bridge) = &policy.bridge {
        return bridged(bridge);
    }
    Ruleset {
        tables: vec![at_the_tap(policy), beyond(policy, names, host)],
    }
}

pub(super) fn refuse(rule: &str) -> Expr {
    Expr::Goto(format!("refuse-{rule}"))
}

/// Where a refused packet is counted and, not too often, logged. `then` is what
/// becomes of it.
pub(super) fn refusal(rule: &str, then: &Expr) -> Chain {
    let name = format!("refuse-{rule}");
    let counted = vec![
        Expr::Counter(rule.to_owned()),
        Expr::Rate(LOGGED),
        Expr::Log(format!("{LOG_REFUSED}{rule}")),
    ];
    chain(&name, vec![counted, vec![then.clone()]])
}

/// What comes out of the guest and is not its own is dropped here, before
/// anything looks at it.
fn at_the_tap(policy: &NetworkPolicy) -> Table {
    // A field that is not there fails its rule: only what is right goes on.
    let mut own = vec![
        vec![Expr::is(Field::EtherType, IP), Expr::goto("ip4")],
        vec![Expr::is(Field::EtherType, ARP), Expr::goto("arp")],
    ];
    if policy.ipv6 {
        own.push(vec![Expr::is(Field::EtherType, IP6), Expr::goto("ip6")]);
    }
    // VLAN tags, and whatever else there may be.
    own.push(vec![refuse("type")]);
    let ingress = vec![
        vec![Expr::is(Field::EtherSource, GUEST_MAC), Expr::goto("own")],
        vec![refuse("mac")],
    ];
    let arp = vec![
        vec![
            Expr::is(Field::ArpEther, GUEST_MAC),
            Expr::is(Field::ArpIp, GUEST4.octets()),
            Expr::Accept,
        ],
        vec![refuse("arp")],
    ];
    let from_guest = || Expr::is(Field::Ip4Source, GUEST4.octets());
    // Whoever takes a packet by a route of the sender's sends it on to an address
    // that was never looked at.
    let routed = |extra| vec![Expr::Has(extra), refuse("route")];
    let ip4 = vec![
        routed(Extra::LooseRoute4),
        routed(Extra::StrictRoute4),
        vec![from_guest(), Expr::NotForHost, refuse("broadcast")],
        vec![from_guest(), Expr::Accept],
        vec![refuse("ip")],
    ];
    let mut chains = vec![base(
        "ingress",
        Hook::Ingress(TAP.into()),
        -500,
        false,
        ingress,
    )];
    chains.extend([chain("own", own), chain("ip4", ip4), chain("arp", arp)]);
    if policy.ipv6 {
        chains.push(chain("ip6", ip6_at_the_tap()));
        chains.extend(neighbour6());
    }
    chains.extend(AT_THE_TAP.map(|rule| refusal(rule, &Expr::Drop)));
    Table {
        family: Family::Netdev,
        name: TABLE.into(),
        counters: AT_THE_TAP.map(str::to_owned).into(),
        sets: Vec::new(),
        chains,
    }
}

/// To an IPv6 address of this range.
fn to_range([first, last]: [u128; 2]) -> Expr {
    let bytes = |address: u128| address.to_be_bytes().into();
    Expr::Between(Field::Ip6Dest, bytes(first), bytes(last))
}

fn ip6_at_the_tap() -> Vec<Rule> {
    let icmp = |kind| [Expr::L4(ICMP6), Expr::is(Field::Icmp6Type, [kind])];
    let rule = |conditions: &[Expr], then: Expr| [conditions, &[then]].concat();
    let from_guest = || Expr::is(Field::Ip6Source, GUEST6.octets());
    vec![
        vec![Expr::Has(Extra::Routing6), refuse("route")],
        rule(&icmp(ROUTER), refuse("router")),
        rule(&icmp(REDIRECT), refuse("router")),
        // Nobody answers them, and nothing is wrong with asking.
        rule(&icmp(ROUTER_ASKED), Expr::Drop),
        rule(&icmp(LISTENER), Expr::Drop),
        // Multicast by nature.
        rule(&icmp(ASKED), Expr::goto("neighbour6")),
        rule(&icmp(NEIGHBOUR), Expr::goto("neighbour6")),
        // Nobody else is on this link; to ask for somebody there costs the host memory.
        rule(&[from_guest(), to_range(LINK_LOCALS6)], refuse("neighbour")),
        rule(&[from_guest(), to_range(MULTICAST6)], refuse("broadcast")),
        rule(&[from_guest(), Expr::NotForHost], refuse("broadcast")),
        rule(&[from_guest()], Expr::Accept),
        vec![refuse("ip")],
    ]
}

fn beyond(policy: &NetworkPolicy, names: Names, host: &[IpAddr]) -> Table {
    let known = || Expr::Ct(State::Known);
    let input = vec![
        vec![Expr::In("lo"), Expr::Accept],
        vec![Expr::In(TAP), Expr::goto("service")],
        vec![known(), Expr::Accept],
        vec![refuse("inbound")],
    ];
    let forward = vec![
        vec![Expr::In(TAP), Expr::Out(OUT), Expr::goto("outgoing")],
        vec![Expr::In(OUT), Expr::Out(TAP), Expr::goto("incoming")],
        // Back to where it came from.
        vec![Expr::In(TAP), refuse("private")],
        vec![refuse("inbound")],
    ];
    let output = vec![
        vec![Expr::Out("lo"), Expr::Accept],
        vec![Expr::Out(TAP), Expr::Accept],
        vec![known(), Expr::Accept],
        // What is relayed for the guest reaches no more than the guest.
        vec![Expr::Out(OUT), Expr::goto("new")],
    ];
    let mut chains = vec![
        base("input", Hook::Input, 0, false, input),
        base("forward", Hook::Forward, 0, false, forward),
        base("output", Hook::Output, 0, false, output),
        nat(
            "postrouting",
            Hook::Postrouting,
            100,
            vec![vec![Expr::Out(OUT), Expr::Masquerade]],
        ),
        chain("service", service(policy, names)),
        chain(
            "outgoing",
            vec![
                vec![Expr::jump("quota")],
                vec![known(), Expr::Counter("sent".into()), Expr::Accept],
                vec![Expr::Ct(State::Invalid), refuse("invalid")],
                vec![Expr::goto("new")],
            ],
        ),
        chain(
            "incoming",
            vec![
                vec![Expr::jump("quota")],
                vec![known(), Expr::Counter("received".into()), Expr::Accept],
                vec![refuse("inbound")],
            ],
        ),
        chain("new", new(policy)),
        chain("let-through", through()),
    ];
    if let Names::Strict(port) = names {
        chains.extend(strict(policy, port));
    }
    let changing = changes(policy, names, 0);
    chains.extend(changing.chains);
    let drop = Expr::Drop;
    chains.extend(BEYOND.map(|rule| match rule {
        // Nobody is there to be told.
        "inbound" | "invalid" => refusal(rule, &drop),
        _ => refusal(rule, &Expr::goto("reject")),
    }));
    chains.push(chain(
        "reject",
        vec![vec![Expr::L4(TCP), Expr::Reset], vec![Expr::Prohibit]],
    ));
    let mut counters: Vec<String> = BEYOND.map(str::to_owned).into();
    counters.extend(["new", "sent", "received"].map(str::to_owned));
    counters.extend(changing.counters);
    let mut sets = changing.sets;
    for v6 in [false, true].into_iter().take(1 + usize::from(policy.ipv6)) {
        let ranges = never(v6, host).into_iter();
        let ranges = ranges.map(|(cidr, rule)| (cidr, format!("refuse-{rule}")));
        sets.push(Set {
            name: ["never4", "never6"][usize::from(v6)],
            elements: Elements::Chains {
                v6,
                ranges: ranges.collect(),
            },
        });
    }
    for v6 in [false, true] {
        sets.push(Set {
            name: ALLOWED[usize::from(v6)],
            elements: Elements::Timed { v6 },
        });
    }
    Table {
        family: Family::Inet,
        name: TABLE.into(),
        counters,
        sets,
        chains,
    }
}

/// From the guest to its gateway: name resolution and ping.
fn service(policy: &NetworkPolicy, names: Names) -> Vec<Rule> {
    let mut rules = vec![vec![Expr::jump("quota")]];
    let gateways = [
        (IpAddr::V4(GATEWAY4), ICMP, Field::IcmpType, ECHO),
        (IpAddr::V6(GATEWAY6), ICMP6, Field::Icmp6Type, ECHO6),
    ];
    for (gateway, icmp, kind, echo) in gateways.into_iter().take(1 + usize::from(policy.ipv6)) {
        let to = || Expr::is_address(gateway, false);
        for protocol in [UDP, TCP] {
            rules.push(vec![
                to(),
                Expr::L4(protocol),
                Expr::is(Field::Port, DNS[0].to_be_bytes()),
                Expr::Mark(Through::Resolver),
                Expr::Accept,
            ]);
        }
        rules.push(vec![
            to(),
            Expr::L4(icmp),
            Expr::is(kind, [echo]),
            Expr::Rate(10),
            Expr::Mark(Through::Ping),
            Expr::Accept,
        ]);
    }
    if policy.ipv6 {
        for kind in [ASKED, NEIGHBOUR] {
            rules.push(vec![
                Expr::L4(ICMP6),
                Expr::is(Field::Icmp6Type, [kind]),
                Expr::Accept,
            ]);
        }
    }
    // Answers to what our relays sent.
    rules.push(vec![Expr::Ct(State::Known), Expr::Accept]);
    if let Names::Strict(port) = names {
        let to = Expr::is(Field::Port, port.to_be_bytes());
        rules.push(vec![
            Expr::Redirected,
            Expr::L4(TCP),
            to,
            Expr::Mark(Through::Proxy),
            Expr::goto("let-through"),
        ]);
    }
    rules.push(vec![refuse("host")]);
    rules
}

/// A packet that begins a connection.
fn new(policy: &NetworkPolicy) -> Vec<Rule> {
    let mut rules = vec![
        vec![Expr::jump("exceptions")],
        vec![Expr::Nfproto(2), Expr::Map(Field::Ip4Dest, "never4")],
    ];
    rules.push(match policy.ipv6 {
        true => vec![Expr::Nfproto(10), Expr::Map(Field::Ip6Dest, "never6")],
        false => vec![Expr::Nfproto(10), refuse("ipv6")],
    });
    for port in DNS {
        for protocol in [UDP, TCP] {
            let to = Expr::is(Field::Port, port.to_be_bytes());
            rules.push(vec![Expr::L4(protocol), to, refuse("dns")]);
        }
    }
    rules.push(vec![Expr::jump("allowed")]);
    rules.push(vec![refuse("port")]);
    rules
}

fn through() -> Vec<Rule> {
    vec![
        vec![Expr::jump("limits")],
        vec![
            Expr::Counter("new".into()),
            Expr::Log(LOG_NEW.into()),
            Expr::Accept,
        ],
    ]
}

/// Chains for neighbour discovery at the tap: from the guest's own addresses, or
/// before it has any; to its gateway or to whom it may concern; about itself.
fn neighbour6() -> [Chain; 2] {
    let not = |address: Ipv6Addr| Expr::Is(Field::Target6, address.octets().into(), false);
    let from = |address: Ipv6Addr| Expr::is(Field::Ip6Source, address.octets());
    let to = |address: Ipv6Addr| Expr::is(Field::Ip6Dest, address.octets());
    let icmp = |kind| [Expr::L4(ICMP6), Expr::is(Field::Icmp6Type, [kind])];
    let [l4, advertised] = icmp(NEIGHBOUR);
    let others = vec![l4, advertised, not(GUEST6), not(LINK_LOCAL6)];
    let [l4, asked] = icmp(ASKED);
    let own = || Expr::goto("own6");
    [
        chain(
            "neighbour6",
            vec![
                [others, vec![refuse("neighbour")]].concat(),
                vec![to_range(MULTICAST_ON_LINK6), own()],
                vec![to(GATEWAY6), own()],
                vec![to(GATEWAY_LINK_LOCAL6), own()],
                vec![refuse("neighbour")],
            ],
        ),
        chain(
            "own6",
            vec![
                vec![from(GUEST6), Expr::Accept],
                vec![from(LINK_LOCAL6), Expr::Accept],
                // It asks whether somebody has its address (RFC 4862).
                vec![from(Ipv6Addr::UNSPECIFIED), l4, asked, Expr::Drop],
                vec![refuse("ip")],
            ],
        ),
    ]
}
