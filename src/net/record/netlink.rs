//! Messages of netfilter's netlink families, as bytes.
//!
//! Own code of a few dozen lines: netlink-packet-netfilter has neither the
//! counters of conntrack nor a reader that passes over what it does not know.

use nix::libc;

/// Length of `struct nlmsghdr`.
const HEADER: usize = 16;
/// Length of `struct nfgenmsg`, in front of the attributes.
const GENERAL: usize = 4;
/// Bits of an attribute's type that are flags.
const FLAGS: u16 = 0xc000;

/// A message: its type, and what follows the two headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Message<'a> {
    pub(super) kind: u16,
    pub(super) body: &'a [u8],
}

/// The messages in what was received. What makes no sense ends them.
pub(super) fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let header = bytes.first_chunk::<HEADER>()?;
        let [a, b, c, d, e, f, ..] = *header;
        let length = u32::from_ne_bytes([a, b, c, d]) as usize;
        let body = bytes.get(HEADER..length)?;
        let next = length.next_multiple_of(4).min(bytes.len());
        bytes = &bytes[next..];
        Some(Message {
            kind: u16::from_ne_bytes([e, f]),
            body,
        })
    })
}

impl<'a> Message<'a> {
    /// Its attributes.
    pub(super) fn attributes(&self) -> impl Iterator<Item = (u16, &'a [u8])> + use<'a> {
        attributes(self.body.get(GENERAL..).unwrap_or_default())
    }
}

/// Attributes, one behind the other. What makes no sense ends them.
pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let [a, b, c, d] = *bytes.first_chunk::<4>()?;
        let length = usize::from(u16::from_ne_bytes([a, b]));
        let data = bytes.get(4..length)?;
        let next = length.next_multiple_of(4).min(bytes.len());
        bytes = &bytes[next..];
        Some((u16::from_ne_bytes([c, d]) & !FLAGS, data))
    })
}

/// One attribute of a type among some.
pub(super) fn find(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes)
        .find(|(one, _)| *one == kind)
        .map(|(_, data)| data)
}

/// A number in network order.
pub(super) fn number16(bytes: &[u8]) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.try_into().ok()?))
}

/// A number in network order.
pub(super) fn number32(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.try_into().ok()?))
}

/// A number in network order.
pub(super) fn number64(bytes: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(bytes.try_into().ok()?))
}

/// A request that is answered with an acknowledgement.
pub(super) fn request(kind: u16, resource: u16, attributes: &[(u16, &[u8])]) -> Vec<u8> {
    let mut body = vec![0, 0];
    body.extend(resource.to_be_bytes());
    for (kind, data) in attributes {
        let length = 4 + data.len();
        body.extend(u16::try_from(length).unwrap_or(u16::MAX).to_ne_bytes());
        body.extend(kind.to_ne_bytes());
        body.extend(*data);
        body.resize(body.len().next_multiple_of(4), 0);
    }
    let length = u32::try_from(HEADER + body.len()).unwrap_or(u32::MAX);
    let flags = u16::try_from(libc::NLM_F_REQUEST | libc::NLM_F_ACK).unwrap_or_default();
    let mut message = Vec::new();
    message.extend(length.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend([0; 8]);
    message.extend(body);
    message
}

/// What an acknowledgement says: zero, or a negative error number.
pub(super) fn acknowledged(bytes: &[u8]) -> Option<i32> {
    const NLMSG_ERROR: u16 = 2;
    let message = messages(bytes).find(|message| message.kind == NLMSG_ERROR)?;
    Some(i32::from_ne_bytes(*message.body.first_chunk()?))
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A message from the kernel.
    pub(crate) fn told(kind: u16, attributes: &[(u16, &[u8])]) -> Vec<u8> {
        request(kind, 1, attributes)
    }

    /// Attributes inside of one.
    pub(crate) fn nested(attributes: &[(u16, &[u8])]) -> Vec<u8> {
        request(0, 0, attributes)[HEADER + GENERAL..].to_vec()
    }

    #[test]
    fn what_is_written_is_read() {
        let bytes = [told(7, &[(1, b"a"), (0x8002, b"bcdef")]), told(8, &[])].concat();
        let all: Vec<_> = messages(&bytes).collect();
        assert_eq!((all.len(), all[0].kind, all[1].kind), (2, 7, 8));
        let attributes: Vec<_> = all[0].attributes().collect();
        assert_eq!(attributes, [(1, &b"a"[..]), (2, b"bcdef")]);
        assert_eq!(find(&all[0].body[4..], 2), Some(&b"bcdef"[..]));
    }

    proptest! {
        #[test]
        fn any_bytes_come_to_an_end(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            for message in messages(&bytes) {
                prop_assert!(message.attributes().count() <= bytes.len() / 4);
            }
            prop_assert!(messages(&bytes).count() <= bytes.len() / HEADER);
        }
    }
}
