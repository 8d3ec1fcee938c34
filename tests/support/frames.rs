//! Frames made by hand: what root in a guest can send, whatever its kernel's sockets
//! would, and what somebody outside can.
#![allow(dead_code)] // each test file uses a part of it

use std::net::IpAddr;

use bulkhead::plan::network::{GATEWAY_MAC, GUEST_MAC};

/// Numbers of protocols.
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const ICMP: u8 = 1;
pub(crate) const ICMP6: u8 = 58;
pub(crate) const FRAGMENT: u8 = 44;
pub(crate) const HOP_BY_HOP: u8 = 0;
pub(crate) const ROUTING: u8 = 43;
pub(crate) const DESTINATION: u8 = 60;
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

    pub(crate) fn fragment(&self, next: u8, at: u16, more: bool, body: &[u8]) -> Vec<u8> {
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
pub(crate) fn padding(next: u8) -> [u8; 8] {
    [next, 0, 1, 4, 0, 0, 0, 0]
}

/// A routing header of this type that goes on to an address.
pub(crate) fn routing(next: u8, kind: u8, left: u8, on: &str) -> Vec<u8> {
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
    pub(crate) fn add_kept(
        &mut self,
        case: &str,
        expected: &str,
        make: impl FnOnce(&Maker) -> Vec<u8>,
    ) {
        self.add(case, expected, |m| vec![make(m)]);
        self.last().sent_on = false;
    }

    pub(crate) fn protocols(&mut self, all: &[(u8, &str, &str)]) {
        for (number, name, expected) in all {
            let case = format!("{name} (protocol {number}) to an allowed host");
            // Longer than any header of theirs; as ports, 80 and 443.
            self.add(&case, expected, |m| {
                vec![m.frame(*number, &m.udp_with(80, 443, &[0; 24]))]
            });
        }
    }

    /// Flags that are no beginning of a connection.
    pub(crate) fn flags(&mut self) {
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

    pub(crate) fn to(&mut self, destinations: &[(&str, &str)], sent_on: bool) {
        for (to, expected) in destinations {
            self.add(&format!("TCP to {to}"), expected, |m| {
                let m = m.to(to);
                vec![m.frame(TCP, &m.tcp(80, SYN))]
            });
            self.last().sent_on = sent_on;
        }
    }

    pub(crate) fn last(&mut self) -> &mut Try {
        self.all.last_mut().unwrap()
    }
}
