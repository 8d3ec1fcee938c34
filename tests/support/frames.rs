//! Frames made by hand: what root in a guest can send, whatever its kernel's sockets
//! would, and what somebody outside can.
#![allow(dead_code)] // each test file uses a part of it

use std::net::IpAddr;

use bulkhead::plan::network::{GATEWAY_MAC, GUEST_MAC, GUEST4, GUEST6, LINK_LOCAL6};

/// Numbers of protocols.
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const ICMP: u8 = 1;
pub(crate) const ICMP6: u8 = 58;
const FRAGMENT: u8 = 44;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const DESTINATION: u8 = 60;
/// Ethernet's.
pub(crate) const IP: u16 = 0x800;
pub(crate) const IP6: u16 = 0x86dd;
pub(crate) const ARP: u16 = 0x806;
/// Flags of TCP.
pub(crate) const SYN: u8 = 2;
pub(crate) const ACK: u8 = 16;

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(crate) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().into(),
        IpAddr::V6(address) => address.octets().into(),
    }
}

fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2);
    let words = words.map(|two| u32::from(two[0]) << 8 | u32::from(*two.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum >> 16 != 0 {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    !(sum as u16)
}

/// Puts the checksum of a transport header in its place.
fn summed(from: IpAddr, to: IpAddr, protocol: u8, at: usize, mut whole: Vec<u8>) -> Vec<u8> {
    let length = whole.len() as u32;
    let pseudo = [
        &octets(from)[..],
        &octets(to),
        &length.to_be_bytes(),
        &[0, 0, 0, protocol],
        &whole,
    ];
    let sum = sum(&pseudo.concat());
    whole[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    whole
}

/// Who sends, to whom, and what tells this try from all others.
#[derive(Debug, Clone)]
pub(crate) struct Maker {
    pub(crate) from: IpAddr,
    pub(crate) to: IpAddr,
    pub(crate) number: u16,
}

impl Maker {
    pub(crate) fn mark(&self) -> Vec<u8> {
        format!("<bh{:06}>", self.number).into_bytes()
    }

    pub(crate) fn to(&self, to: &str) -> Self {
        let to = ip(to);
        Self { to, ..self.clone() }
    }

    pub(crate) fn from(&self, from: IpAddr) -> Self {
        Self {
            from,
            ..self.clone()
        }
    }

    /// A TCP header; its source port is this try's own.
    pub(crate) fn tcp(&self, port: u16, flags: u8) -> Vec<u8> {
        self.tcp_with(port, flags, &self.mark())
    }

    pub(crate) fn tcp_with(&self, port: u16, flags: u8, data: &[u8]) -> Vec<u8> {
        let mut whole = [20_000 + self.number, port]
            .map(u16::to_be_bytes)
            .as_flattened()
            .to_vec();
        whole.extend([0, 0, 0, 7, 0, 0, 0, 0, 5 << 4, flags, 0xfa, 0, 0, 0, 0, 0]);
        whole.extend(data);
        summed(self.from, self.to, TCP, 16, whole)
    }

    pub(crate) fn udp(&self, source: u16, port: u16) -> Vec<u8> {
        self.udp_with(source, port, &[])
    }

    pub(crate) fn udp_with(&self, source: u16, port: u16, data: &[u8]) -> Vec<u8> {
        let data = [data, &self.mark()].concat();
        let head = [source, port, 8 + data.len() as u16, 0].map(u16::to_be_bytes);
        let whole = [head.as_flattened(), &data].concat();
        summed(self.from, self.to, UDP, 6, whole)
    }

    pub(crate) fn icmp(&self, kind: u8, body: &[u8]) -> Vec<u8> {
        let mut whole = [&[kind, 0, 0, 0], body, &self.mark()].concat();
        let sum = sum(&whole);
        whole[2..4].copy_from_slice(&sum.to_be_bytes());
        whole
    }

    /// The mark is in an option that nobody knows, which is skipped.
    pub(crate) fn icmp6(&self, kind: u8, body: &[u8]) -> Vec<u8> {
        let option = [&[253, 2][..], &self.mark(), &[0; 4]].concat();
        let whole = [&[kind, 0, 0, 0], body, &option].concat();
        summed(self.from, self.to, ICMP6, 2, whole)
    }

    /// A packet of these two.
    pub(crate) fn packet(&self, protocol: u8, body: &[u8]) -> Vec<u8> {
        match self.from {
            IpAddr::V4(_) => self.packet4(protocol, &[], 0, body),
            IpAddr::V6(_) => {
                let [high, low] = (body.len() as u16).to_be_bytes();
                let head = [0x60, 0, 0, 0, high, low, protocol, 255];
                [&head, &octets(self.from)[..], &octets(self.to), body].concat()
            }
        }
    }

    /// IPv4, with options and the field of fragments.
    pub(crate) fn packet4(&self, protocol: u8, options: &[u8], field: u16, body: &[u8]) -> Vec<u8> {
        let words = 5 + options.len() / 4;
        let length = (4 * words + body.len()) as u16;
        let mut head = vec![0x40 | words as u8, 0];
        for number in [length, self.number, field] {
            head.extend(number.to_be_bytes());
        }
        head.extend([64, protocol, 0, 0]);
        head.extend([octets(self.from), octets(self.to), options.into()].concat());
        let sum = sum(&head);
        head[10..12].copy_from_slice(&sum.to_be_bytes());
        [head, body.into()].concat()
    }

    /// A frame of the guest's to its gateway.
    pub(crate) fn frame(&self, protocol: u8, body: &[u8]) -> Vec<u8> {
        let kind = if self.from.is_ipv4() { IP } else { IP6 };
        frame(kind, &self.packet(protocol, body))
    }

    /// A piece of an IPv6 packet: where it begins, in units of eight bytes, and
    /// whether more come.
    pub(crate) fn piece(&self, next: u8, at: u16, more: bool, body: &[u8]) -> Vec<u8> {
        self.frame(FRAGMENT, &self.fragment(next, at, more, body))
    }

    fn fragment(&self, next: u8, at: u16, more: bool, body: &[u8]) -> Vec<u8> {
        let mut head = vec![next, 0];
        head.extend((at << 3 | u16::from(more)).to_be_bytes());
        head.extend(u32::from(self.number).to_be_bytes());
        [head, body.into()].concat()
    }
}

/// A frame of the guest's to its gateway.
pub(crate) fn frame(kind: u16, body: &[u8]) -> Vec<u8> {
    ethernet(GATEWAY_MAC, GUEST_MAC, kind, body)
}

pub(crate) fn ethernet(to: [u8; 6], from: [u8; 6], kind: u16, body: &[u8]) -> Vec<u8> {
    let mut frame = [&to[..], &from, &kind.to_be_bytes(), body].concat();
    frame.resize(frame.len().max(60), 0);
    frame
}

/// A header of options, eight bytes of nothing.
fn padding(next: u8) -> [u8; 8] {
    [next, 0, 1, 4, 0, 0, 0, 0]
}

/// A routing header of this type that goes on to an address.
fn routing(next: u8, kind: u8, left: u8, on: &str) -> Vec<u8> {
    [&[next, 2, kind, left, 0, 0, 0, 0][..], &octets(ip(on))].concat()
}

/// One try: what is sent, and what must come of it.
#[derive(Debug)]
pub(crate) struct Try {
    pub(crate) case: String,
    pub(crate) mark: Vec<u8>,
    pub(crate) frames: Vec<Vec<u8>>,
    /// `through`; `stopped as RULE`; `stopped`, by the kernel, which thinks nothing
    /// of it and tells nobody.
    pub(crate) expected: String,
    /// Whether a router that has no rules sends it on.
    pub(crate) sent_on: bool,
}

/// A list of tries.
pub(crate) struct List {
    maker: Maker,
    about: &'static str,
    pub(crate) all: Vec<Try>,
}

impl List {
    /// Marks begin with this number.
    pub(crate) fn new(about: &'static str, number: u16, from: IpAddr, to: &str) -> Self {
        let to = ip(to);
        Self {
            maker: Maker { from, to, number },
            about,
            all: Vec::new(),
        }
    }

    pub(crate) fn add(
        &mut self,
        case: &str,
        expected: &str,
        make: impl FnOnce(&Maker) -> Vec<Vec<u8>>,
    ) {
        self.maker.number += 1;
        let frames = make(&self.maker);
        self.all.push(Try {
            case: format!("{}: {case}", self.about),
            mark: self.maker.mark(),
            frames,
            expected: expected.into(),
            sent_on: true,
        });
    }

    /// As [`List::add`], one frame that no router sends on, rules or none.
    fn add_kept(&mut self, case: &str, expected: &str, make: impl FnOnce(&Maker) -> Vec<u8>) {
        self.add(case, expected, |m| vec![make(m)]);
        self.last().sent_on = false;
    }

    fn protocols(&mut self, all: &[(u8, &str, &str)]) {
        for (number, name, expected) in all {
            let case = format!("{name} (protocol {number}) to an allowed host");
            // Longer than any header of theirs; as ports, 80 and 443.
            self.add(&case, expected, |m| {
                vec![m.frame(*number, &m.udp_with(80, 443, &[0; 24]))]
            });
        }
    }

    /// Flags that are no beginning of a connection.
    fn flags(&mut self) {
        for (flags, name) in [
            (0, "NULL"),
            (0x29, "XMAS"),
            (0x3f, "all flags"),
            (1, "FIN"),
            (4, "RST"),
            (3, "SYN and FIN"),
            (6, "SYN and RST"),
            (0x12, "SYN and ACK"),
        ] {
            let case = format!("TCP {name} to an allowed port");
            self.add(&case, "stopped as invalid", |m| {
                vec![m.frame(TCP, &m.tcp(80, flags))]
            });
        }
        // Taken for one that was there before: as a beginning, by the same rules.
        for (port, expected) in [(80, "through"), (81, "stopped as port")] {
            self.add(&format!("TCP ACK alone to port {port}"), expected, |m| {
                vec![m.frame(TCP, &m.tcp(port, ACK))]
            });
        }
    }

    fn to(&mut self, destinations: &[(&str, &str)], sent_on: bool) {
        for (to, expected) in destinations {
            self.add(&format!("TCP to {to}"), expected, |m| {
                let m = m.to(to);
                vec![m.frame(TCP, &m.tcp(80, SYN))]
            });
            self.last().sent_on = sent_on;
        }
    }

    fn last(&mut self) -> &mut Try {
        self.all.last_mut().unwrap()
    }
}

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
