//! Tables, read back: where packets enter each chain, what each of its rules
//! says, and what is in a map.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;

use nftnl::{MsgType, NlMsg};
use nix::libc;

use super::{HEADER, attributes, build, connect, operands, raw};
use crate::plan::firewall::{Family, Table};

/// linux/netfilter/nf_tables.h.
const SUBSYSTEM: u16 = 10 << 8;
const GET_TABLE: u16 = 1;
const GET_CHAIN: u16 = 4;
const GET_RULE: u16 = 7;
const GET_ELEMENTS: u16 = 13;
const TABLE_NAME: u16 = 1;
const TABLE_FLAGS: u16 = 2;
const DORMANT: u32 = 1;
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const CHAIN_TYPE: u16 = 7;
const HOOK_NUMBER: u16 = 1;
const HOOK_PRIORITY: u16 = 2;
const HOOK_DEVICE: u16 = 3;
const RULE_TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;
const RULE_EXPRESSIONS: u16 = 4;
const ELEMENTS_TABLE: u16 = 1;
const ELEMENTS_SET: u16 = 2;
const ELEMENTS: u16 = 3;
const ELEMENT_KEY: u16 = 1;
const ELEMENT_DATA: u16 = 2;
const ELEMENT_FLAGS: u16 = 3;
const DATA_VALUE: u16 = 1;
const INTERVAL_END: u32 = 1;
/// Length of `struct nfgenmsg`, and of an attribute's header.
const GENERAL: usize = 4;

/// What a chain is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ChainShape {
    /// Where packets enter it, and what becomes of those no rule decides; absent
    /// where others jump to it.
    pub base: Option<String>,
    /// Its rules: every expression with its operands.
    pub rules: Vec<String>,
}

/// Each chain that has a rule, or a hook.
pub type Shape = BTreeMap<String, ChainShape>;

/// What a planned table looks like in the kernel.
pub fn planned(table: &Table) -> Shape {
    let of = build::table_named(table.family, &table.name);
    let mut shape = Shape::new();
    let mut buffer = raw::buffer();
    let mut write = |message: &dyn NlMsg| raw::written(message, MsgType::Add, &mut buffer);
    for data in &table.chains {
        let chain = build::chain(data, &of);
        take_chain(&mut shape, &table.name, content(&write(&chain)));
        for rule in &data.rules {
            let rule = build::rule(rule, &chain);
            take_rule(&mut shape, &table.name, content(&write(&rule)));
        }
    }
    shape
}

/// A message without its header.
fn content(message: &[u8]) -> &[u8] {
    message.get(HEADER..).unwrap_or_default()
}

/// What the table of this family and name looks like, in the namespace of the
/// calling thread; empty where there is no such table, or no packet enters it.
///
/// # Errors
/// The kernel does not answer.
pub fn rules(family: Family, table: &str) -> io::Result<Shape> {
    let mut shape = Shape::new();
    dump(GET_CHAIN, family, &[], |content| {
        take_chain(&mut shape, table, content)
    })?;
    // Of this table only: the kernel begins anew where others' change.
    dump(
        GET_RULE,
        family,
        &strings(&[(RULE_TABLE, table)]),
        |content| take_rule(&mut shape, table, content),
    )?;
    let mut dormant = false;
    dump(GET_TABLE, family, &[], |content| {
        let all = content.get(GENERAL..).unwrap_or_default();
        let name = attribute(all, TABLE_NAME).map(text);
        let flags = attribute(all, TABLE_FLAGS).map_or(0, number32);
        dormant |= name.as_deref() == Some(table) && flags & DORMANT != 0;
    })?;
    if dormant {
        shape.clear();
    }
    Ok(shape)
}

/// A range of addresses in a map, and where it leads: a verdict.
pub type Leading = (IpAddr, IpAddr, String);

/// The ranges of addresses in a map to verdicts, by address, in the namespace of
/// the calling thread.
///
/// # Errors
/// The kernel does not answer; there is no such map.
pub fn ranges(family: Family, table: &str, map: &str) -> io::Result<Vec<Leading>> {
    let ask = strings(&[(ELEMENTS_TABLE, table), (ELEMENTS_SET, map)]);
    let mut all = Vec::new();
    dump(GET_ELEMENTS, family, &ask, |content| {
        let list = attribute(content.get(GENERAL..).unwrap_or_default(), ELEMENTS);
        let elements = attributes(list.unwrap_or_default());
        all.extend(elements.filter_map(|(_, one)| element(&one[GENERAL..])));
    })?;
    // What ends a range comes before what begins the next at the same address.
    all.sort();
    let ends = all.iter().skip(1).map(|(key, _)| *key);
    let ends: Vec<Option<u128>> = ends.map(|key| key.checked_sub(1)).chain([None]).collect();
    let ranges = all.iter().zip(ends).filter_map(|((key, leads), end)| {
        let Some((v6, verdict)) = leads else {
            return None;
        };
        let most = if *v6 { u128::MAX } else { u32::MAX.into() };
        let address = |number: u128| match v6 {
            true => IpAddr::V6(number.into()),
            false => IpAddr::V4(u32::try_from(number).unwrap_or(u32::MAX).into()),
        };
        let last = address(end.unwrap_or(most));
        Some((address(*key), last, verdict.clone()))
    });
    Ok(ranges.collect())
}

/// Attributes that are strings.
fn strings(all: &[(u16, &str)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (kind, text) in all {
        let length = (GENERAL + text.len() + 1) as u16;
        bytes.extend([length.to_ne_bytes(), kind.to_ne_bytes()].concat());
        bytes.extend(text.as_bytes());
        bytes.push(0);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

/// Where a range begins, of which family, and its verdict; or where it ends.
fn element(bytes: &[u8]) -> Option<(u128, Option<(bool, String)>)> {
    let key = attribute(attribute(bytes, ELEMENT_KEY)?, DATA_VALUE)?;
    let number = key
        .iter()
        .fold(0, |number, byte| number << 8 | u128::from(*byte));
    let flags = attribute(bytes, ELEMENT_FLAGS).map_or(0, number32);
    let verdict = || {
        let data = attribute(bytes, ELEMENT_DATA).unwrap_or_default();
        (key.len() > 4, operands::verdict(data))
    };
    Some((number, (flags & INTERVAL_END == 0).then(verdict)))
}

/// Asks for all there is of a kind, one message each.
fn dump(kind: u16, family: Family, wanted: &[u8], each: impl FnMut(&[u8])) -> io::Result<()> {
    let family = match family {
        Family::Inet => libc::NFPROTO_INET,
        Family::Netdev => libc::NFPROTO_NETDEV,
    };
    let mut ask = Vec::with_capacity(HEADER + GENERAL + wanted.len());
    ask.extend(((HEADER + GENERAL + wanted.len()) as u32).to_ne_bytes());
    ask.extend((SUBSYSTEM | kind).to_ne_bytes());
    ask.extend(((libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16).to_ne_bytes());
    ask.extend([0; 8]); // number and port
    ask.extend([family as u8, 0, 0, 0]); // version 0, resource 0
    ask.extend(wanted);
    let messages = super::dump(&connect()?, &ask)?;
    messages
        .iter()
        .map(|message| content(message))
        .for_each(each);
    Ok(())
}

/// Takes in a chain that packets enter by themselves, if it is one of this table.
fn take_chain(shape: &mut Shape, table: &str, content: &[u8]) {
    let all = content.get(GENERAL..).unwrap_or_default();
    let (Some(of), Some(name)) = (attribute(all, CHAIN_TABLE), attribute(all, CHAIN_NAME)) else {
        return;
    };
    let Some(hook) = attribute(all, CHAIN_HOOK).filter(|_| text(of) == table) else {
        return;
    };
    let number = |bytes, kind| attribute(bytes, kind).map_or(0, number32);
    let word = |bytes, kind| attribute(bytes, kind).map(text).unwrap_or_default();
    let accepts = number(all, CHAIN_POLICY) == libc::NF_ACCEPT as u32;
    let base = format!(
        "{} hook {} {} priority {} policy {}",
        word(all, CHAIN_TYPE),
        number(hook, HOOK_NUMBER),
        word(hook, HOOK_DEVICE),
        number(hook, HOOK_PRIORITY).cast_signed(),
        if accepts { "accept" } else { "drop" },
    );
    shape.entry(text(name)).or_default().base = Some(base);
}

/// Takes in a rule, if it is one of this table.
fn take_rule(shape: &mut Shape, table: &str, content: &[u8]) {
    let all = content.get(GENERAL..).unwrap_or_default();
    let (Some(of), Some(chain)) = (attribute(all, RULE_TABLE), attribute(all, RULE_CHAIN)) else {
        return;
    };
    if text(of) != table {
        return;
    }
    let expressions = attribute(all, RULE_EXPRESSIONS).unwrap_or_default();
    let all = attributes(expressions).map(|(_, one)| operands::expression(&one[GENERAL..]));
    let rule = all.collect::<Vec<_>>().join(" ");
    shape.entry(text(chain)).or_default().rules.push(rule);
}

/// One attribute of a kind among some, without its header.
pub(super) fn attribute(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    let mut found = attributes(bytes).filter(|(kind, _)| *kind == wanted);
    found.next().map(|(_, whole)| &whole[GENERAL..])
}

/// A number in network order; zero where it is none.
pub(super) fn number32(bytes: &[u8]) -> u32 {
    bytes.try_into().map_or(0, u32::from_be_bytes)
}

/// A C string.
pub(super) fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0);
    String::from_utf8_lossy(&bytes[..end.unwrap_or(bytes.len())]).into_owned()
}
