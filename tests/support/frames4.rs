//! What a guest may try with IPv4, and on its link.

use bulkhead::plan::network::{GATEWAY_MAC, GUEST_MAC, GUEST4};

use super::frames::*;

/// What a guest may try with IPv4, and on its link. `lan` is a host in the host's LAN.
pub(crate) fn four(lan: &str) -> Vec<Try> {
    const WEB: &str = "203.0.113.1";
    const GATEWAY: &str = "198.18.0.1";
    let mut list = List::new("ipv4", 3000, GUEST4.into(), WEB);
    for (port, expected) in [
        (80, "through"),
        (81, "stopped as port"),
        (0, "stopped as port"),
    ] {
        list.add(&format!("TCP to port {port}"), expected, |m| {
            vec![m.frame(TCP, &m.tcp(port, SYN))]
        });
    }
    list.protocols(&[
        (2, "IGMP", "stopped as port"),
        (4, "IPv4", "stopped as port"),
        (41, "IPv6", "stopped as port"),
        (47, "GRE", "stopped as port"),
        (50, "ESP", "stopped as port"),
        (51, "AH", "stopped as port"),
        (33, "DCCP", "stopped as port"),
        (89, "OSPF", "stopped as port"),
        (103, "PIM", "stopped as port"),
        (112, "VRRP", "stopped as port"),
        (115, "L2TP", "stopped as port"),
        (132, "SCTP", "stopped as invalid"),
        (136, "UDP-Lite", "stopped as port"),
        (255, "none", "stopped as port"),
    ]);
    list.flags();
    list.add("TCP ACK alone to the LAN", "stopped as private", |m| {
        let m = m.to(lan);
        vec![m.frame(TCP, &m.tcp(80, ACK))]
    });
    let on = octets(ip(lan));
    let route = |kind: u8| [&[kind, 7, 4][..], &on, &[1]].concat();
    for (kind, name) in [(131, "loose"), (137, "strict")] {
        list.add(&format!("a {name} source route"), "stopped as route", |m| {
            let packet = m.packet4(TCP, &route(kind), 0, &m.tcp(80, SYN));
            vec![frame(IP, &packet)]
        });
        // Routers that are no source routers drop it.
        list.last().sent_on = false;
    }
    // What the rules cannot make out, the router's kernel does not follow.
    let done = [&[131, 7, 8][..], &on, &[1]].concat();
    let beside = [&route(131)[..], &[130, 4, 0, 0]].concat();
    for (option, name) in [(done, "at its end"), (beside, "beside an unknown option")] {
        list.add(&format!("a loose source route {name}"), "stopped", |m| {
            let packet = m.packet4(TCP, &option, 0, &m.tcp(80, SYN));
            vec![frame(IP, &packet)]
        });
        list.last().sent_on = false;
    }
    for (option, name) in [
        (vec![7, 7, 4, 0, 0, 0, 0, 1], "a recorded route"),
        (vec![68, 8, 5, 0, 0, 0, 0, 0], "time stamps"),
        (vec![148, 4, 0, 0], "a router alert"),
    ] {
        for (port, expected) in [(80, "through"), (81, "stopped as port")] {
            let option = option.clone();
            list.add(&format!("{name}, to port {port}"), expected, |m| {
                let packet = m.packet4(TCP, &option, 0, &m.tcp(port, SYN));
                vec![frame(IP, &packet)]
            });
        }
    }
    list.add("a first piece with half a header", "stopped as port", |m| {
        let whole = m.tcp_with(81, SYN, &[&[0; 12], &m.mark()[..]].concat());
        vec![
            frame(IP, &m.packet4(TCP, &[], 0x2000, &whole[..8])),
            frame(IP, &m.packet4(TCP, &[], 1, &whole[8..])),
        ]
    });
    for (kind, name) in [(5, "a redirect"), (13, "a question for the time")] {
        list.add_kept(&format!("{name} to its gateway"), "stopped as host", |m| {
            let m = m.to(GATEWAY);
            m.frame(ICMP, &m.icmp(kind, &[0; 24]))
        });
    }
    let kept = [
        ("127.0.0.1", "stopped"),
        ("255.255.255.255", "stopped as host"),
        ("198.18.0.3", "stopped as host"),
    ];
    list.to(&kept, false);
    list.to(&[("169.254.1.1", "stopped as link-local")], true);
    link4(&mut list, GATEWAY);
    list.all
}

/// On the link itself.
fn link4(list: &mut List, gateway: &str) {
    const ALL: [u8; 6] = [0xff; 6];
    let gateway = octets(ip(gateway));
    let guest = octets(GUEST4.into());
    let arp = |kind: u8, mac: [u8; 6], sender: &[u8], target: &[u8]| {
        let head = [0, 1, 8, 0, 6, 4, 0, kind];
        [&head[..], &mac, sender, &[0; 6], target].concat()
    };
    for (kind, name) in [(1, "asks"), (2, "says")] {
        for to in [ALL, GATEWAY_MAC] {
            let whom = if to == ALL { "all" } else { "its gateway" };
            let case = format!("ARP {name} {whom} as the gateway, of the gateway");
            list.add_kept(&case, "stopped as arp", |m| {
                let body = [arp(kind, GUEST_MAC, &gateway, &gateway), m.mark()].concat();
                ethernet(to, GUEST_MAC, ARP, &body)
            });
        }
    }
    for (mac, sender, name) in [
        (GUEST_MAC, vec![198, 18, 0, 3], "a neighbour"),
        (GUEST_MAC, vec![0; 4], "nobody"),
        (GATEWAY_MAC, guest.clone(), "another hardware address"),
    ] {
        list.add_kept(&format!("ARP as {name}"), "stopped as arp", |m| {
            let body = [arp(2, mac, &sender, &gateway), m.mark()].concat();
            ethernet(ALL, GUEST_MAC, ARP, &body)
        });
    }
    let from_nobody = |m: &Maker, to: &str| m.from(ip("0.0.0.0")).to(to);
    list.add_kept("a DHCP offer to all", "stopped as broadcast", |m| {
        let m = m.to("255.255.255.255");
        ethernet(ALL, GUEST_MAC, IP, &m.packet(UDP, &m.udp(67, 68)))
    });
    list.add_kept("a DHCP offer to its gateway", "stopped as host", |m| {
        let m = m.to("198.18.0.1");
        m.frame(UDP, &m.udp(67, 68))
    });
    list.add_kept("a question for DHCP", "stopped as ip", |m| {
        let m = from_nobody(m, "255.255.255.255");
        ethernet(ALL, GUEST_MAC, IP, &m.packet(UDP, &m.udp(68, 67)))
    });
    // With a packet in it that would get through.
    let tagged: [(&str, &[u16]); 6] = [
        ("a tag (802.1Q)", &[0x8100, 5]),
        ("a tag of network 0", &[0x8100, 0]),
        ("an outer tag (802.1ad)", &[0x88a8, 5]),
        ("two tags (802.1ad, 802.1Q)", &[0x88a8, 5, 0x8100, 6]),
        ("two tags (802.1Q)", &[0x8100, 5, 0x8100, 6]),
        ("three tags", &[0x88a8, 5, 0x8100, 6, 0x8100, 7]),
    ];
    for (name, tags) in tagged {
        list.add_kept(name, "stopped as type", |m| {
            let (kind, tags) = (tags[0], &tags[1..]);
            let tags: Vec<u8> = tags.iter().flat_map(|tag| tag.to_be_bytes()).collect();
            let packet = m.packet(TCP, &m.tcp(80, SYN));
            frame(kind, &[&tags[..], &IP.to_be_bytes(), &packet].concat())
        });
    }
    for (kind, name) in [
        (0x8035, "RARP"),
        (0x88cc, "LLDP"),
        (0x8809, "LACP"),
        (0x888e, "802.1X"),
        (0x8863, "PPPoE, to find"),
        (0x8864, "PPPoE"),
        (0x8847, "MPLS"),
        (0x88f7, "PTP"),
        (0x88e5, "MACsec"),
        (0x8906, "FCoE"),
        (0x88a2, "AoE"),
        (0x9000, "loopback test"),
        (0, "none"),
    ] {
        list.add_kept(&format!("{name} ({kind:#06x})"), "stopped as type", |m| {
            frame(kind, &m.packet(TCP, &m.tcp(80, SYN)))
        });
    }
    list.add_kept("STP", "stopped as type", |m| {
        let body = [&[0x42, 0x42, 3][..], &[0; 35], &m.mark()].concat();
        let length = body.len() as u16;
        ethernet([1, 0x80, 0xc2, 0, 0, 0], GUEST_MAC, length, &body)
    });
    list.add_kept("IPv4 behind a length (SNAP)", "stopped as type", |m| {
        let packet = m.packet(TCP, &m.tcp(80, SYN));
        let body = [&[0xaa, 0xaa, 3, 0, 0, 0, 8, 0][..], &packet].concat();
        frame(body.len() as u16, &body)
    });
    list.add_kept("IPv4 that says it is ARP", "stopped as arp", |m| {
        frame(ARP, &m.packet(TCP, &m.tcp(80, SYN)))
    });
    for (to, name) in [
        ([2, 0, 0, 0, 0, 9], "somebody's hardware address"),
        ([1, 0, 0x5e, 0, 0, 1], "a group"),
        (ALL, "all"),
    ] {
        list.add_kept(&format!("IPv4 to {name}"), "stopped as broadcast", |m| {
            ethernet(to, GUEST_MAC, IP, &m.packet(TCP, &m.tcp(80, SYN)))
        });
    }
}
