//! Connections that conntrack has done with (linux/netfilter/nfnetlink_conntrack.h).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::netlink::{Message, attributes, find, number16, number32, number64};
use super::packet::protocol;
use crate::net::event::{Endpoint, Flow};

/// Subsystem and message of a connection that is over.
pub(super) const DELETE: u16 = 1 << 8 | 2;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_MARK: u16 = 8;
const CTA_COUNTERS_ORIG: u16 = 9;
const CTA_COUNTERS_REPLY: u16 = 10;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;
const CTA_COUNTERS_BYTES: u16 = 2;

/// The connection that a message is about, and the mark of the rule that let it
/// through; zero is none.
pub(super) fn read(message: &Message<'_>) -> Option<(Flow, u32)> {
    let (mut tuple, mut sent, mut received, mut mark) = (None, None, None, 0);
    for (kind, data) in message.attributes() {
        match kind {
            CTA_TUPLE_ORIG => tuple = Some(data),
            CTA_MARK => mark = number32(data).unwrap_or(0),
            CTA_COUNTERS_ORIG => sent = bytes(data),
            CTA_COUNTERS_REPLY => received = bytes(data),
            _ => {}
        }
    }
    let tuple = tuple?;
    let (mut source, mut destination) = (None, None);
    for (kind, data) in attributes(find(tuple, CTA_TUPLE_IP)?) {
        match kind {
            1 | 3 => source = address(data),
            2 | 4 => destination = address(data),
            _ => {}
        }
    }
    let ports = find(tuple, CTA_TUPLE_PROTO)?;
    let number = *find(ports, CTA_PROTO_NUM)?.first()?;
    let end = |address, kind| Endpoint {
        address,
        port: find(ports, kind).and_then(number16),
    };
    let flow = Flow {
        protocol: protocol(number),
        source: end(source?, CTA_PROTO_SRC_PORT),
        destination: end(destination?, CTA_PROTO_DST_PORT),
        name: None,
        rule: None,
        sent: sent.unwrap_or(0),
        received: received.unwrap_or(0),
        counted: sent.is_some() && received.is_some(),
    };
    Some((flow, mark))
}

fn bytes(counters: &[u8]) -> Option<u64> {
    find(counters, CTA_COUNTERS_BYTES).and_then(number64)
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    match *bytes {
        [a, b, c, d] => Some(Ipv4Addr::new(a, b, c, d).into()),
        _ => Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).into()),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::netlink::messages;
    use super::super::netlink::tests::{nested, told};
    use super::*;

    /// A connection that is over.
    pub(crate) fn over(to: [u8; 4], counted: bool, mark: u32) -> Vec<u8> {
        let ip = nested(&[(1, &[198, 18, 0, 2]), (2, &to)]);
        let proto = nested(&[(1, &[6]), (2, &[0x9c, 0x40]), (3, &[1, 0xbb])]);
        let tuple = nested(&[(0x8001, &ip), (0x8002, &proto)]);
        let counter = |bytes: u64| nested(&[(1, &5_u64.to_be_bytes()), (2, &bytes.to_be_bytes())]);
        let (sent, received) = (counter(700), counter(90_000));
        let mark = mark.to_be_bytes();
        let mut attributes = vec![(0x8001, &tuple[..]), (8, &mark)];
        if counted {
            attributes.extend([(0x8009, &sent[..]), (0x800a, &received[..])]);
        }
        told(DELETE, &attributes)
    }

    #[test]
    fn bytes_of_both_directions_are_read() {
        let bytes = over([1, 2, 3, 4], true, 0x8000_0001);
        let (flow, mark) = read(&messages(&bytes).next().unwrap()).unwrap();
        assert_eq!(mark, 0x8000_0001);
        assert_eq!(
            (flow.sent, flow.received, flow.counted),
            (700, 90_000, true)
        );
        assert_eq!(
            (flow.protocol.as_str(), flow.destination.port),
            ("tcp", Some(443))
        );
        let bytes = over([1, 2, 3, 4], false, 0);
        let (flow, mark) = read(&messages(&bytes).next().unwrap()).unwrap();
        assert!(!flow.counted && mark == 0);
    }
}
