//! The rules of a machine on a bridge of the host's: only that it is who it is.

use super::machine::{ARP, IP, refusal, refuse};
use super::*;
use crate::plan::network::TAP;
use crate::spec::Bridge;

/// Kinds of packets (linux/if_packet.h): broadcast and multicast.
const TO_MANY: [u8; 2] = [1, 2];
/// Where DHCP servers send from (RFC 2131).
const DHCP_SERVER: u16 = 67;
const RULES: [&str; 6] = ["mac", "arp", "ip", "type", "broadcast", "dhcp"];

/// All rules of a machine that is on a bridge. IPv4 and ARP by its own addresses
/// and nothing else: no tags, no IPv6, and so no router advertisements.
pub fn bridged(bridge: &Bridge) -> Ruleset {
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
    ip4.extend([
        vec![
            from_guest(),
            Expr::L4(UDP),
            Expr::is(Field::SourcePort, DHCP_SERVER.to_be_bytes()),
            refuse("dhcp"),
        ],
        vec![from_guest(), Expr::Accept],
        vec![refuse("ip")],
    ]);
    let mut chains = vec![base("ingress", Hook::Ingress(TAP), -500, false, ingress)];
    chains.extend([chain("own", own), chain("ip4", ip4), chain("arp", arp)]);
    chains.extend(RULES.map(|rule| refusal(rule, &Expr::Drop)));
    Ruleset {
        tables: vec![Table {
            family: Family::Netdev,
            counters: RULES.map(str::to_owned).into(),
            sets: Vec::new(),
            chains,
        }],
    }
}
