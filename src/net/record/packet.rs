//! Packets that firewall rules log (linux/netfilter/nfnetlink_log.h).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::netlink::{Message, number16, number32};
use crate::net::event::{Endpoint, Packet};
use crate::net::refusal::{Code, Refusal};

/// Subsystem and message of a logged packet.
pub(super) const PACKET: u16 = 4 << 8;
/// And of an order to log.
pub(super) const CONFIG: u16 = 4 << 8 | 1;
const NFULA_PACKET_HDR: u16 = 1;
const NFULA_MARK: u16 = 2;
const NFULA_PAYLOAD: u16 = 9;
const NFULA_PREFIX: u16 = 10;
const NFULA_SEQ: u16 = 12;
/// Ethernet's types (linux/if_ether.h).
const IP: u16 = 0x0800;
const ARP: u16 = 0x0806;
const IP6: u16 = 0x86dd;
/// What the rules say of what is let through, and of what is not.
const NEW: &str = "new:";
const REFUSED: &str = "refused:";

/// A logged packet.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Logged {
    pub(super) packet: Packet,
    /// Its place in the sequence.
    pub(super) number: Option<u32>,
    /// What the rule that let it through has put on it; zero is nothing.
    pub(super) mark: u32,
}

/// The packet that a message is about.
pub(super) fn read(message: &Message<'_>) -> Option<Logged> {
    let (mut payload, mut prefix, mut number, mut kind) = (&[][..], String::new(), None, 0);
    let mut mark = 0;
    for (attribute, data) in message.attributes() {
        match attribute {
            NFULA_PACKET_HDR => kind = number16(data.get(..2)?)?,
            NFULA_PAYLOAD => payload = data,
            NFULA_PREFIX => {
                let text = data.split(|&byte| byte == 0).next().unwrap_or_default();
                prefix = crate::text::printable(text);
            }
            NFULA_SEQ => number = number32(data),
            NFULA_MARK => mark = number32(data).unwrap_or(0),
            _ => {}
        }
    }
    let mut packet = match kind {
        IP => ip4(payload),
        IP6 => ip6(payload),
        ARP => arp(payload),
        other => Some(bare(format!("{other:#06x}"))),
    }
    // Cut off, or broken on purpose: that it was there is told all the same.
    .unwrap_or_else(|| bare("broken".into()));
    // Of a rule that is not ours, nothing can be said.
    match prefix.strip_prefix(REFUSED) {
        Some(rule) => packet.refusal = Some(refusal(rule.trim(), &packet)),
        None if prefix.starts_with(NEW) => {}
        None => return None,
    }
    Some(Logged {
        packet,
        number,
        mark,
    })
}

fn bare(protocol: String) -> Packet {
    Packet {
        protocol,
        source: None,
        destination: None,
        name: None,
        rule: None,
        refusal: None,
    }
}

/// The name of a protocol over IP.
pub(super) fn protocol(number: u8) -> String {
    match number {
        1 => "icmp".into(),
        6 => "tcp".into(),
        17 => "udp".into(),
        58 => "icmpv6".into(),
        132 => "sctp".into(),
        other => other.to_string(),
    }
}

/// Whether a protocol begins with the two ports.
fn has_ports(number: u8) -> bool {
    matches!(number, 6 | 17 | 33 | 132 | 136)
}

fn ip4(bytes: &[u8]) -> Option<Packet> {
    let header = bytes.first_chunk::<20>()?;
    let address = |at: usize| -> Option<IpAddr> {
        let four: [u8; 4] = header.get(at..at + 4)?.try_into().ok()?;
        Some(Ipv4Addr::from(four).into())
    };
    let length = usize::from(header[0] & 0xf) * 4;
    // Ports are in the first fragment only.
    let first = u16::from_be_bytes([header[6], header[7]]) & 0x1fff == 0;
    let rest = bytes.get(length..).filter(|_| first && length >= 20);
    Some(packet(header[9], address(12)?, address(16)?, rest))
}

fn ip6(bytes: &[u8]) -> Option<Packet> {
    let header = bytes.first_chunk::<40>()?;
    let address = |at: usize| -> Option<IpAddr> {
        let sixteen: [u8; 16] = header.get(at..at + 16)?.try_into().ok()?;
        Some(Ipv6Addr::from(sixteen).into())
    };
    let (mut next, mut rest) = (header[6], bytes.get(40..));
    // More extension headers than these are nobody's that means well.
    for _ in 0..8 {
        let Some(extension) = rest.filter(|rest| rest.len() >= 8) else {
            break;
        };
        let length = match next {
            0 | 43 | 60 => (usize::from(extension[1]) + 1) * 8,
            44 if u16::from_be_bytes([extension[2], extension[3]]) & !7 == 0 => 8,
            44 => {
                next = extension[0];
                rest = None;
                break;
            }
            _ => break,
        };
        next = extension[0];
        rest = extension.get(length..);
    }
    Some(packet(next, address(8)?, address(24)?, rest))
}

fn packet(number: u8, source: IpAddr, destination: IpAddr, rest: Option<&[u8]>) -> Packet {
    let ports = rest
        .filter(|_| has_ports(number))
        .and_then(<[u8]>::first_chunk::<4>);
    let end = |address, at: usize| Endpoint {
        address,
        port: ports.map(|ports| u16::from_be_bytes([ports[at], ports[at + 1]])),
    };
    Packet {
        source: Some(end(source, 0)),
        destination: Some(end(destination, 2)),
        ..bare(protocol(number))
    }
}

/// Ethernet and IPv4: who asks for whom.
fn arp(bytes: &[u8]) -> Option<Packet> {
    let end = |at: usize| -> Option<Endpoint> {
        let four: [u8; 4] = bytes.get(at..at + 4)?.try_into().ok()?;
        Some(Endpoint {
            address: Ipv4Addr::from(four).into(),
            port: None,
        })
    };
    Some(Packet {
        source: Some(end(14)?),
        destination: Some(end(24)?),
        ..bare("arp".into())
    })
}

/// What a firewall rule's refusal means, by the rule's name.
fn refusal(rule: &str, packet: &Packet) -> Refusal {
    let to = match packet.destination {
        Some(Endpoint {
            address,
            port: Some(port),
        }) => format!("{address} port {port}"),
        Some(Endpoint {
            address,
            port: None,
        }) => address.to_string(),
        None => "somebody".into(),
    };
    let exception = || {
        let port = packet.destination.and_then(|to| to.port);
        let address = packet.destination.map(|to| to.address.to_string());
        let address = address.unwrap_or_else(|| "ADDRESS".into());
        match port {
            Some(port) => format!("--allow-cidr {address}:{port}"),
            None => format!("--allow-cidr {address}"),
        }
    };
    let (why, remedy) = match rule {
        "private" | "cgnat" | "link-local" | "special" | "metadata" => (
            "is not on the public internet",
            format!("Allow it with `{}`, if it should be reached.", exception()),
        ),
        "host" => (
            "is the host",
            "Use `--publish` or `bulkhead forward`.".into(),
        ),
        "dns" => (
            "is name resolution past the machine's resolver",
            "Use the resolver that /etc/resolv.conf names.".into(),
        ),
        "port" => (
            "is at a port that is not allowed",
            "Allow it with `--allow-port`, if it should be reached.".into(),
        ),
        "address" | "name" => (
            "is no address of an allowed host",
            "Connect by an allowed host's name; allow one with `--allow-host`.".into(),
        ),
        "ipv6" => (
            "is IPv6, which is off",
            "Use IPv4, or switch IPv6 on.".into(),
        ),
        "rate" | "connections" | "quota" => (
            "is more than the machine may use",
            "Wait, or give the machine more.".into(),
        ),
        "inbound" => (
            "comes from outside",
            "Use `--publish` or `bulkhead forward`.".into(),
        ),
        _ => ("is not allowed", "Leave it out.".into()),
    };
    Refusal {
        code: Code::Packet,
        cause: format!("{} to {to} {why}", packet.protocol),
        remedy,
        rule: format!("packet:{rule}"),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::netlink::messages;
    use super::super::netlink::tests::told;
    use super::*;

    /// A logged TCP packet.
    pub(crate) fn logged(prefix: &[u8], to: [u8; 4], sequence: u32, mark: u32) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0, 198, 18, 0, 2];
        packet.extend(to);
        packet.extend([0x9c, 0x40, 1, 0xbb]);
        let prefix = [prefix, b"\0"].concat();
        let (sequence, mark) = (sequence.to_be_bytes(), mark.to_be_bytes());
        let mut attributes = vec![
            (1, &[8, 0, 2, 0][..]),
            (10, &prefix),
            (12, &sequence),
            (9, &packet),
        ];
        // The kernel leaves it out where it is zero.
        if mark != [0; 4] {
            attributes.insert(1, (2, &mark));
        }
        told(PACKET, &attributes)
    }

    fn one(bytes: &[u8]) -> Option<Logged> {
        read(&messages(bytes).next().unwrap())
    }

    #[test]
    fn what_the_rules_say_is_read() {
        let Logged {
            packet,
            number,
            mark,
        } = one(&logged(b"new:", [1, 2, 3, 4], 9, 0x8000_0001)).unwrap();
        assert_eq!((packet.protocol.as_str(), number), ("tcp", Some(9)));
        assert_eq!(mark, 0x8000_0001);
        let to = packet.destination.unwrap();
        assert_eq!(
            (to.address.to_string().as_str(), to.port),
            ("1.2.3.4", Some(443))
        );
        assert_eq!(packet.source.unwrap().port, Some(40000));
        assert_eq!(packet.refusal, None);
        let refused = one(&logged(b"refused:private", [10, 0, 0, 1], 1, 0)).unwrap();
        assert_eq!(refused.mark, 0);
        let refusal = refused.packet.refusal.unwrap();
        assert_eq!(
            (refusal.code, refusal.rule.as_str()),
            (Code::Packet, "packet:private")
        );
        assert!(
            refusal.remedy.contains("--allow-cidr 10.0.0.1:443"),
            "{}",
            refusal.remedy
        );
        assert_eq!(one(&logged(b"somebody else's", [1, 2, 3, 4], 1, 0)), None);
    }

    #[test]
    fn fragments_and_extension_headers_hide_no_address() {
        let mut packet = vec![
            0x45, 0, 0, 40, 0, 0, 0, 9, 64, 17, 0, 0, 198, 18, 0, 2, 9, 9, 9, 9,
        ];
        packet.extend([0; 8]);
        let later = ip4(&packet).unwrap();
        assert_eq!(
            (later.protocol.as_str(), later.destination.unwrap().port),
            ("udp", None)
        );
        let mut six = vec![0x60, 0, 0, 0, 0, 32, 0, 64];
        six.extend([0x20; 32]);
        six.extend([43, 0, 0, 0, 0, 0, 0, 0]);
        six.extend([44, 0, 0, 0, 0, 0, 0, 0]);
        six.extend([6, 0, 0, 0, 0, 0, 0, 0]);
        six.extend([0, 22, 1, 0xbb]);
        let packet = ip6(&six).unwrap();
        assert_eq!(
            (packet.protocol.as_str(), packet.destination.unwrap().port),
            ("tcp", Some(443))
        );
        assert_eq!(ip4(&[0x45]), None);
    }
}
