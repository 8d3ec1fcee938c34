//! Connections the kernel keeps for a machine, forgotten with it.

use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;

use nix::libc;
use nix::sys::socket::{MsgFlags, NetlinkAddr, sendto};

use crate::host::nft::{HEADER, NESTED, attributes, connect, dump, messages, receive};

// linux/netfilter/nfnetlink.h and nfnetlink_conntrack.h.
const SUBSYSTEM: u16 = 1 << 8;
const GET: u16 = 1;
const DELETE: u16 = 2;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_ZONE: u16 = 18;
const CTA_ID: u16 = 12;
const CTA_FILTER: u16 = 25;
const CTA_TUPLE_IP: u16 = 1;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_FILTER_ORIG_FLAGS: u16 = 1;
const CTA_FILTER_REPLY_FLAGS: u16 = 2;
/// Only the source address of what is asked for counts.
const BY_SOURCE: u32 = 1;
/// Length of `struct nfgenmsg`.
const GENERAL: usize = 4;
const NLMSG_ERROR: u16 = 2;

/// Forgets every connection that began at this address.
pub(super) fn forget(address: IpAddr) -> io::Result<()> {
    // To look through the kernel's table takes a few milliseconds.
    let count = std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count");
    if count.is_ok_and(|count| count.trim() == "0") {
        return Ok(());
    }
    let socket = connect()?;
    let family = if address.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    let source = match address {
        IpAddr::V4(address) => attribute(CTA_IP_V4_SRC, &address.octets()),
        IpAddr::V6(address) => attribute(CTA_IP_V6_SRC, &address.octets()),
    };
    let tuple = attribute(
        CTA_TUPLE_ORIG | NESTED,
        &attribute(CTA_TUPLE_IP | NESTED, &source),
    );
    let flags = [
        attribute(CTA_FILTER_ORIG_FLAGS, &BY_SOURCE.to_ne_bytes()),
        attribute(CTA_FILTER_REPLY_FLAGS, &0u32.to_ne_bytes()),
    ];
    let filter = attribute(CTA_FILTER | NESTED, &flags.concat());
    let ask = message(GET, libc::NLM_F_DUMP, family, &[tuple, filter].concat());
    let told = dump(&socket, &ask)?;
    let found = told
        .iter()
        .filter_map(|message| of(&message[HEADER..], address));
    let to = NetlinkAddr::new(0, 0);
    let mut buffer = vec![0; 1 << 16];
    for one in found {
        let ask = message(DELETE, libc::NLM_F_ACK, family, &one);
        sendto(socket.as_raw_fd(), &ask, &to, MsgFlags::empty())?;
        let length = receive(&socket, &mut buffer)?;
        for (kind, _, content) in messages(&buffer[..length]) {
            let error = code(content);
            let ended = [Some(0), Some(libc::ENOENT)].contains(&error.raw_os_error());
            if kind == NLMSG_ERROR && !ended {
                return Err(error);
            }
        }
    }
    Ok(())
}

fn code(content: &[u8]) -> io::Error {
    let code = content
        .first_chunk()
        .map_or(0, |code| i32::from_ne_bytes(*code));
    io::Error::from_raw_os_error(-code)
}

/// What names a connection in a request: its first direction, and its own id,
/// so that no later one is meant. None where it began elsewhere: older kernels
/// do not filter.
fn of(content: &[u8], address: IpAddr) -> Option<Vec<u8>> {
    let all = content.get(GENERAL..)?;
    let of_kind = |wanted| attributes(all).find(move |(kind, _)| *kind == wanted);
    let (_, tuple) = of_kind(CTA_TUPLE_ORIG)?;
    let (_, ip) = attributes(&tuple[4..]).find(|(kind, _)| *kind == CTA_TUPLE_IP)?;
    let source = attributes(&ip[4..]).find_map(|(kind, bytes)| match (kind, bytes.get(4..)?) {
        (CTA_IP_V4_SRC, bytes) => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        (CTA_IP_V6_SRC, bytes) => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    })?;
    let parts = [CTA_TUPLE_ORIG, CTA_ID, CTA_ZONE]
        .into_iter()
        .filter_map(of_kind);
    let parts = parts.flat_map(|(_, bytes)| {
        let padding = bytes.len().next_multiple_of(4) - bytes.len();
        bytes.iter().copied().chain(std::iter::repeat_n(0, padding))
    });
    (source == address).then(|| parts.collect())
}

fn attribute(kind: u16, content: &[u8]) -> Vec<u8> {
    let length = 4 + content.len();
    let mut bytes = Vec::with_capacity(length.next_multiple_of(4));
    // Addresses and flags: far below 64 KiB.
    bytes.extend((length as u16).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(content);
    bytes.resize(length.next_multiple_of(4), 0);
    bytes
}

fn message(kind: u16, flags: i32, family: i32, attributes: &[u8]) -> Vec<u8> {
    let length = HEADER + GENERAL + attributes.len();
    let mut bytes = Vec::with_capacity(length);
    bytes.extend((length as u32).to_ne_bytes());
    bytes.extend((SUBSYSTEM | kind).to_ne_bytes());
    bytes.extend(((libc::NLM_F_REQUEST | flags) as u16).to_ne_bytes());
    bytes.extend([0; 8]); // number and port
    bytes.extend([family as u8, 0, 0, 0]); // version 0, resource 0
    bytes.extend(attributes);
    bytes
}
