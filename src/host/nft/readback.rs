//! Rules, read back: how many each chain has, and of which expressions.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;

use nix::libc;
use nix::sys::socket::{MsgFlags, NetlinkAddr, sendto};

use super::{HEADER, NLMSG_ERROR, attributes, connect, expr, messages, receive};
use crate::plan::firewall::{Family, TABLE, Table};

/// linux/netlink.h and linux/netfilter/nf_tables.h.
const NLMSG_DONE: u16 = 3;
const SUBSYSTEM: u16 = 10 << 8;
const GET_RULE: u16 = 7;
const RULE_TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;
const RULE_EXPRESSIONS: u16 = 4;
const EXPR_NAME: u16 = 1;
/// Length of `struct nfgenmsg`, and of an attribute's header.
const GENERAL: usize = 4;

/// The rules of each chain that has some: the names of their expressions.
pub type Shape = BTreeMap<String, Vec<String>>;

/// What a planned table looks like in the kernel.
pub fn planned(table: &Table) -> Shape {
    let chains = table.chains.iter().filter(|chain| !chain.rules.is_empty());
    let shape = chains.map(|chain| {
        let rules = chain.rules.iter().map(expr::names);
        (chain.name.clone(), rules.collect())
    });
    shape.collect()
}

/// What our table of this family looks like, in the namespace of the calling
/// thread; empty where there is no such table.
///
/// # Errors
/// The kernel does not answer.
pub fn rules(family: Family) -> io::Result<Shape> {
    let family = match family {
        Family::Inet => libc::NFPROTO_INET,
        Family::Netdev => libc::NFPROTO_NETDEV,
    };
    let socket = connect()?;
    let mut ask = Vec::with_capacity(HEADER + GENERAL);
    ask.extend(((HEADER + GENERAL) as u32).to_ne_bytes());
    ask.extend((SUBSYSTEM | GET_RULE).to_ne_bytes());
    ask.extend(((libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16).to_ne_bytes());
    ask.extend([0; 8]); // number and port
    ask.extend([family as u8, 0, 0, 0]); // version 0, resource 0
    let to = NetlinkAddr::new(0, 0);
    sendto(socket.as_raw_fd(), &ask, &to, MsgFlags::empty())?;
    let mut shape = Shape::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        let length = receive(&socket, &mut buffer)?;
        for (kind, _, content) in messages(&buffer[..length]) {
            match kind {
                NLMSG_DONE => return Ok(shape),
                NLMSG_ERROR => {
                    let code = content
                        .first_chunk()
                        .map_or(0, |code| i32::from_ne_bytes(*code));
                    return Err(io::Error::from_raw_os_error(-code));
                }
                _ => {
                    if let Some((chain, rule)) = rule(content) {
                        shape.entry(chain).or_default().push(rule);
                    }
                }
            }
        }
    }
}

/// A rule of our table: its chain, and the names of its expressions.
fn rule(content: &[u8]) -> Option<(String, String)> {
    let all = content.get(GENERAL..)?;
    let of = |wanted| {
        let mut found = attributes(all).filter(|(kind, _)| *kind == wanted);
        found.next().map(|(_, whole)| &whole[4..])
    };
    if text(of(RULE_TABLE)?) != TABLE {
        return None;
    }
    let expressions = attributes(of(RULE_EXPRESSIONS).unwrap_or_default());
    let names = expressions.filter_map(|(_, one)| {
        let mut parts = attributes(&one[4..]);
        let (_, name) = parts.find(|(kind, _)| *kind == EXPR_NAME)?;
        Some(text(&name[4..]))
    });
    Some((text(of(RULE_CHAIN)?), names.collect::<Vec<_>>().join(" ")))
}

/// A C string.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0);
    String::from_utf8_lossy(&bytes[..end.unwrap_or(bytes.len())]).into_owned()
}
