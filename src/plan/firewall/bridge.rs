//! The rules of a machine on a bridge, or a tap, of the host's: only that it is
//! who it is.

use super::machine::{ARP, IP, refusal, refuse};
use super::*;
use crate::plan::network::TAP;
use crate::spec::Bridge;

/// Kinds of packets (linux/if_packet.h): broadcast and multicast.
const TO_MANY: [u8; 2] = [1, 2];
/// Where DHCP servers send from, and to (RFC 2131). Clients mind the second alone.
const DHCP_SERVER: u16 = 67;
const DHCP_CLIENT: u16 = 68;
const RULES: [&str; 6] = ["mac", "arp", "ip", "type", "broadcast", "dhcp"];

/// All rules of a machine that is on a bridge. IPv4 and ARP by its own addresses
/// and nothing else: no tags, no IPv6, and so no router advertisements.
pub fn bridged(bridge: &Bridge) -> Ruleset {
    let chains = own_alone(bridge, TAP);
    ruleset(TABLE, chains, RULES.map(|rule| refusal(rule, &Expr::Drop)))
}

/// The same at a tap of the host's. The table is among the host's own, by a name
/// of the machine's; what it stops is counted and not logged, for the host's log
/// is others' to read.
pub fn guard(bridge: &Bridge, token: &str) -> Ruleset {
    let chains = own_alone(bridge, &bridge.device);
    let stopped = |rule: &str| {
        let counted = vec![Expr::Counter(rule.to_owned()), Expr::Drop];
        chain(&format!("refuse-{rule}"), vec![counted])
    };
    ruleset(&guard_name(token), chains, RULES.map(stopped))
}

/// Name of the table of [`guard`].
pub fn guard_name(token: &str) -> String {
    format!("{TABLE}-{token}")
}

fn ruleset(name: &str, mut chains: Vec<Chain>, stopped: [Chain; RULES.len()]) -> Ruleset {
    chains.extend(stopped);
    Ruleset {
        tables: vec![Table {
            family: Family::Netdev,
            name: name.to_owned(),
            counters: RULES.map(str::to_owned).into(),
            sets: Vec::new(),
            chains,
        }],
    }
}

/// What comes in at the device and is not the machine's own goes to a chain that
/// is called after what is wrong with it.
fn own_alone(bridge: &Bridge, device: &str) -> Vec<Chain> {
    let (mac, address) = (bridge.mac(), bridge.address.octets());
    let ingress = vec![
        vec![Expr::is(Field::EtherSource, mac), Expr::goto("own")],
        vec![refuse("mac")],
    ];
    let own = vec![
        vec![Expr::is(Field::EtherType, IP), Expr::goto("ip4")],
        vec![Expr::is(Field::EtherType, ARP), Expr::goto("arp")],
        vec![refuse("type")],
    ];
    let arp = vec![
        vec![
            Expr::is(Field::ArpEther, mac),
            Expr::is(Field::ArpIp, address),
            Expr::Accept,
        ],
        vec![refuse("arp")],
    ];
    let from_guest = || Expr::is(Field::Ip4Source, address);
    let mut ip4: Vec<Rule> = TO_MANY
        .map(|kind| vec![from_guest(), Expr::Cast(kind), refuse("broadcast")])
        .into();
    let dhcp = [(Field::SourcePort, DHCP_SERVER), (Field::Port, DHCP_CLIENT)];
    ip4.extend(dhcp.map(|(field, port)| {
        let is = Expr::is(field, port.to_be_bytes());
        vec![from_guest(), Expr::L4(UDP), is, refuse("dhcp")]
    }));
    ip4.extend([
        // What hides its ports by lengths that are wrong is read by some all the same.
        vec![from_guest(), Expr::Whole, Expr::Accept],
        vec![refuse("ip")],
    ]);
    let hook = Hook::Ingress(device.to_owned());
    vec![
        base("ingress", hook, -500, false, ingress),
        chain("own", own),
        chain("ip4", ip4),
        chain("arp", arp),
    ]
}
