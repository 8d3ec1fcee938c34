//! What a guest that has IPv6 may try with it.

use bulkhead::plan::network::{GATEWAY_MAC, GUEST_MAC, GUEST6, LINK_LOCAL6};

use super::frames::*;

/// What a guest that has IPv6 may try with it. `host` is an address of the host's,
/// `other` another machine's outside.
pub(crate) fn six(host: &str, other: &str) -> Vec<Try> {
    const WEB: &str = "2001:db8:2::1";
    const GATEWAY: &str = "fd62:756c:6b68::1";
    let mut list = List::new("ipv6", 1000, GUEST6.into(), WEB);
    let one = |m: &Maker, next: u8, body: Vec<u8>| vec![m.frame(next, &body)];
    for (port, expected) in [
        (80, "through"),
        (81, "stopped as port"),
        (0, "stopped as port"),
        (53, "stopped as dns"),
        (853, "stopped as dns"),
    ] {
        list.add(&format!("TCP to port {port}"), expected, |m| {
            one(m, TCP, m.tcp(port, SYN))
        });
    }
    for (port, expected) in [(443, "port"), (53, "dns"), (853, "dns")] {
        let expected = format!("stopped as {expected}");
        list.add(&format!("UDP to port {port}"), &expected, |m| {
            one(m, UDP, m.udp(5, port))
        });
    }
    list.add("echo request", "stopped as port", |m| {
        one(m, ICMP6, m.icmp6(128, &[0, 1, 0, 1]))
    });
    pieces6(&mut list);
    headers6(&mut list, GATEWAY);
    list.protocols(&[
        (4, "IPv4", "stopped as port"),
        (41, "IPv6", "stopped as port"),
        (47, "GRE", "stopped as port"),
        (50, "ESP", "stopped as port"),
        (33, "DCCP", "stopped as port"),
        (89, "OSPF", "stopped as port"),
        (103, "PIM", "stopped as port"),
        (112, "VRRP", "stopped as port"),
        (115, "L2TP", "stopped as port"),
        (132, "SCTP", "stopped as invalid"),
        (135, "Mobility", "stopped as port"),
        (136, "UDP-Lite", "stopped as port"),
        (139, "HIP", "stopped as port"),
        (140, "Shim6", "stopped as port"),
        (59, "no next header", "stopped as invalid"),
        (255, "none", "stopped as port"),
    ]);
    list.flags();
    list.add(
        "TCP ACK alone to a private address",
        "stopped as private",
        |m| {
            let m = m.to("fd00::9");
            one(&m, TCP, m.tcp(80, ACK))
        },
    );
    let kept = [
        (GATEWAY, "stopped as host"),
        (other, "stopped as private"),
        ("fe80::1", "stopped as neighbour"),
        ("fe80::9", "stopped as neighbour"),
        ("ff02::1", "stopped as broadcast"),
        ("ff0e::1", "stopped as broadcast"),
        ("::1", "stopped"),
    ];
    list.to(&kept, false);
    let others = [
        (host, "stopped as host"),
        ("fd00::9", "stopped as private"),
        ("fc00::1", "stopped as private"),
        ("fec0::1", "stopped as private"),
        ("fd62:756c:6b68::9", "stopped as private"),
        ("fd00:ec2::254", "stopped as metadata"),
        ("fd20:ce::254", "stopped as metadata"),
        ("::ffff:10.77.0.9", "stopped as special"),
        ("::ffff:169.254.169.254", "stopped as special"),
        ("::ffff:0:10.77.0.9", "stopped as special"),
        ("::10.77.0.9", "stopped as special"),
        ("64:ff9b::10.77.0.9", "stopped as special"),
        ("64:ff9b::169.254.169.254", "stopped as special"),
        ("64:ff9b:1::10.77.0.9", "stopped as special"),
        ("2002:a4d:9::1", "stopped as special"),
        ("2001:0:a4d:9::1", "stopped as special"),
        ("2001:20::1", "stopped as special"),
        ("100::1", "stopped as special"),
        ("200::1", "stopped as special"),
        ("4000::1", "stopped as special"),
        ("5f00::1", "stopped as special"),
    ];
    list.to(&others, true);
    others6(&mut list, other);
    discovery6(&mut list, GATEWAY);
    list.all
}

/// In pieces.
fn pieces6(list: &mut List) {
    let long = |m: &Maker, port| m.tcp_with(port, SYN, &[&[1; 1276], &m.mark()[..]].concat());
    list.add("a piece that is all of it, to port 80", "through", |m| {
        vec![m.piece(TCP, 0, false, &m.tcp(80, SYN))]
    });
    for (port, expected) in [(81, "stopped as port"), (853, "stopped as dns")] {
        let case = format!("a piece that is all of it, to port {port}");
        list.add(&case, expected, |m| {
            vec![m.piece(TCP, 0, false, &m.tcp(port, SYN))]
        });
    }
    for (port, expected) in [(80, "through"), (81, "stopped as port")] {
        list.add(&format!("two pieces to port {port}"), expected, |m| {
            let whole = long(m, port);
            vec![
                m.piece(TCP, 0, true, &whole[..1240]),
                m.piece(TCP, 155, false, &whole[1240..]),
            ]
        });
    }
    list.add(
        "a first piece with half a header",
        "stopped as invalid",
        |m| {
            let whole = m.tcp(81, SYN);
            vec![
                m.piece(TCP, 0, true, &whole[..8]),
                m.piece(TCP, 1, false, &whole[8..]),
            ]
        },
    );
    list.add("a first piece without ports", "stopped as invalid", |m| {
        vec![
            m.piece(DESTINATION, 0, true, &padding(TCP)),
            m.piece(DESTINATION, 1, false, &m.tcp(81, SYN)),
        ]
    });
    list.add("pieces that overlap", "stopped", |m| {
        let (good, bad) = (long(m, 80), long(m, 81));
        vec![
            m.piece(TCP, 0, true, &good[..1240]),
            m.piece(TCP, 100, false, &bad[800..]),
        ]
    });
    list.add("a later piece alone", "stopped", |m| {
        vec![m.piece(TCP, 1, false, &m.tcp(81, SYN))]
    });
    list.add("pieces in pieces, to port 81", "stopped as port", |m| {
        let inner = m.fragment(TCP, 0, false, &m.tcp(81, SYN));
        vec![m.piece(FRAGMENT, 0, false, &inner)]
    });
    list.add("a piece to a private address", "stopped as private", |m| {
        let m = m.to("fd00::9");
        vec![m.piece(TCP, 0, false, &m.tcp(80, SYN))]
    });
}

/// With headers before the one that counts.
fn headers6(list: &mut List, gateway: &str) {
    for (kind, name) in [(HOP_BY_HOP, "hop-by-hop"), (DESTINATION, "destination")] {
        for (port, expected) in [(80, "through"), (81, "stopped as port")] {
            let case = format!("{name} options, to port {port}");
            list.add(&case, expected, |m| {
                let body = [&padding(TCP)[..], &m.tcp(port, SYN)].concat();
                vec![m.frame(kind, &body)]
            });
        }
    }
    list.add(
        "eight headers of options, to port 81",
        "stopped as port",
        |m| {
            let more = [padding(DESTINATION); 7];
            let body = [more.as_flattened(), &padding(TCP), &m.tcp(81, SYN)].concat();
            vec![m.frame(DESTINATION, &body)]
        },
    );
    for kind in [0, 2, 3, 4] {
        // As the host it names first would see it, and as the last.
        for (last, case) in [(false, "allowed"), (true, "forbidden")] {
            let case = format!("routing header {kind} to fd00::9, summed for the {case} host");
            list.add(&case, "stopped as route", |m| {
                let tcp = if last { m.to("fd00::9") } else { m.clone() }.tcp(80, SYN);
                let body = [routing(TCP, kind, 1, "fd00::9"), tcp].concat();
                vec![m.frame(ROUTING, &body)]
            });
        }
    }
    list.add("routing header 4 behind options", "stopped as route", |m| {
        let body = [
            &padding(ROUTING)[..],
            &routing(TCP, 4, 1, "fd00::9"),
            &m.tcp(80, SYN),
        ];
        vec![m.frame(DESTINATION, &body.concat())]
    });
    list.add("routing header 4 in a piece", "stopped as route", |m| {
        let body = [routing(TCP, 4, 1, "fd00::9"), m.tcp(80, SYN)].concat();
        vec![m.piece(ROUTING, 0, false, &body)]
    });
    list.add(
        "an authentication header, to port 80",
        "stopped as port",
        |m| {
            let head = [TCP, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1];
            vec![m.frame(51, &[&head[..], &m.tcp(80, SYN)].concat())]
        },
    );
    list.add_kept("routing header 0 by the gateway", "stopped as route", |m| {
        let m = m.to(gateway);
        let body = [routing(TCP, 0, 1, "fd00::9"), m.tcp(53, SYN)].concat();
        m.frame(ROUTING, &body)
    });
}

/// As somebody else.
fn others6(list: &mut List, other: &str) {
    for (from, name) in [
        ("2001:db8:9::9", "an address of the internet"),
        (other, "another machine"),
        ("fd62:756c:6b68::1", "its gateway"),
        ("fd00::9", "a private address"),
    ] {
        list.add(&format!("TCP from {name}"), "stopped as ip", |m| {
            let m = m.from(ip(from));
            vec![m.frame(TCP, &m.tcp(80, SYN))]
        });
        // A router drops what comes from its own address, or from where it is itself.
        list.last().sent_on = from != "fd62:756c:6b68::1" && from != other;
    }
    for (from, name) in [("::", "no address"), ("fe80::62:68ff:fe00:2", "the link's")] {
        list.add_kept(&format!("TCP from {name}"), "stopped as ip", |m| {
            let m = m.from(ip(from));
            m.frame(TCP, &m.tcp(80, SYN))
        });
    }
    list.add("TCP from another hardware address", "stopped as mac", |m| {
        let packet = m.packet(TCP, &m.tcp(80, SYN));
        vec![ethernet(GATEWAY_MAC, [2, 0, 0, 0, 0, 9], IP6, &packet)]
    });
}

/// Routers, neighbours, groups and DHCP.
fn discovery6(list: &mut List, gateway: &str) {
    const ALL: &str = "ff02::1";
    let link = |m: &Maker, to: &str| m.from(LINK_LOCAL6.into()).to(to);
    let cast = |m: &Maker, next: u8, body: &[u8]| {
        let [.., a, b, c, d] = octets(m.to)[..] else {
            return Vec::new();
        };
        ethernet(
            [0x33, 0x33, a, b, c, d],
            GUEST_MAC,
            IP6,
            &m.packet(next, body),
        )
    };
    let router = [64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0];
    list.add_kept("a router advertisement", "stopped as router", |m| {
        let m = link(m, ALL);
        cast(&m, ICMP6, &m.icmp6(134, &router))
    });
    list.add_kept(
        "a router advertisement behind options",
        "stopped as router",
        |m| {
            let m = link(m, ALL);
            let body = [&padding(ICMP6)[..], &m.icmp6(134, &router)].concat();
            cast(&m, HOP_BY_HOP, &body)
        },
    );
    list.add_kept(
        "a router advertisement as a piece",
        "stopped as router",
        |m| {
            let m = link(m, ALL);
            let body = m.fragment(ICMP6, 0, false, &m.icmp6(134, &router));
            cast(&m, FRAGMENT, &body)
        },
    );
    list.add_kept(
        "a router advertisement to the gateway alone",
        "stopped as router",
        |m| {
            let m = link(m, gateway);
            m.frame(ICMP6, &m.icmp6(134, &router))
        },
    );
    list.add(
        "a router advertisement in two pieces",
        "stopped as ip",
        |m| {
            let m = link(m, ALL);
            let whole = [&padding(ICMP6)[..], &m.icmp6(134, &router)].concat();
            let pieces = [(0, true, &whole[..8]), (1, false, &whole[8..])];
            let frames = pieces.map(|(at, more, body)| {
                let body = m.fragment(DESTINATION, at, more, body);
                cast(&m, FRAGMENT, &body)
            });
            frames.into()
        },
    );
    list.last().sent_on = false;
    list.add_kept("a redirect", "stopped as router", |m| {
        let m = link(m, gateway);
        let there = [
            &[0; 4],
            &octets(ip(gateway))[..],
            &octets(ip("2001:db8:2::1")),
        ]
        .concat();
        m.frame(ICMP6, &m.icmp6(137, &there))
    });
    let about = |address: &str, flags: u8| [&[flags, 0, 0, 0], &octets(ip(address))[..]].concat();
    for (address, name) in [
        (gateway, "the gateway"),
        ("fe80::62:68ff:fe00:1", "the gateway, by its other address"),
        ("fd62:756c:6b68::9", "a neighbour"),
        ("2001:db8:2::1", "a host of the internet"),
    ] {
        for to in [ALL, gateway] {
            let whom = if to == ALL { "all" } else { "its gateway" };
            let case = format!("it says to {whom} that it is {name}");
            list.add_kept(&case, "stopped as neighbour", |m| {
                let m = link(m, to);
                let body = m.icmp6(136, &about(address, 0x60));
                match to {
                    ALL => cast(&m, ICMP6, &body),
                    _ => m.frame(ICMP6, &body),
                }
            });
        }
    }
    list.add_kept("it asks as somebody else", "stopped as ip", |m| {
        let m = m.from(ip("fd62:756c:6b68::9")).to(gateway);
        m.frame(ICMP6, &m.icmp6(135, &about(gateway, 0)))
    });
    list.add_kept("it asks nobody of the link", "stopped as neighbour", |m| {
        let m = m.to("fe80::1:9");
        m.frame(ICMP6, &m.icmp6(135, &about(gateway, 0)))
    });
    for (kind, name) in [
        (130, "a listener query"),
        (131, "a listener report"),
        (132, "a listener's end"),
        (139, "a node information query"),
        (141, "an inverse solicitation"),
        (146, "a mobile prefix solicitation"),
        (148, "a certification path"),
    ] {
        list.add_kept(name, "stopped as ip", |m| {
            let m = link(m, ALL);
            cast(&m, ICMP6, &m.icmp6(kind, &[0; 20]))
        });
    }
    list.add_kept("echo request to all", "stopped as broadcast", |m| {
        let m = m.to(ALL);
        cast(&m, ICMP6, &m.icmp6(128, &[0, 1, 0, 1]))
    });
    list.add_kept("mDNS", "stopped as broadcast", |m| {
        let m = m.to("ff02::fb");
        cast(&m, UDP, &m.udp(5353, 5353))
    });
    for (from, expected) in [
        (LINK_LOCAL6, "stopped as ip"),
        (GUEST6, "stopped as broadcast"),
    ] {
        let case = format!("a DHCPv6 advertisement from {from}");
        list.add_kept(&case, expected, |m| {
            let m = m.from(from.into()).to(ALL);
            cast(&m, UDP, &m.udp_with(547, 546, &[2, 0, 0, 1]))
        });
    }
    list.add_kept("a DHCPv6 reply to its gateway", "stopped as host", |m| {
        let m = m.to(gateway);
        m.frame(UDP, &m.udp_with(547, 546, &[7, 0, 0, 1]))
    });
}
