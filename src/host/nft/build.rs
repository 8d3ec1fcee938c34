//! From rules as data to messages for the kernel.

use std::ffi::CString;
use std::net::{IpAddr, Ipv4Addr};

use nftnl::nftnl_sys::{self as sys, libc};
use nftnl::{Batch, ChainType, MsgType, Policy, ProtoFamily};

use super::Entry;
use super::expr::raws;
use super::raw;
use crate::plan::firewall::{
    ALLOWED, Base, Chain, Changes, Elements, Family, Hook, Rule, Set, TABLE, Table,
};

/// Types of set elements as nft(8) numbers them; with them it can show a set.
const TYPE_IPV4: u32 = 7;
const TYPE_IPV6: u32 = 8;
const TYPE_SERVICE: u32 = 13;
/// Bits for each part of a concatenated type.
const TYPE_BITS: u32 = 6;
/// Elements in one message: fewer bytes than the 64 KiB an attribute can have.
const AT_ONCE: usize = 500;

pub(super) fn text(text: &str) -> CString {
    // Names are constants of ours.
    CString::new(text).unwrap_or_default()
}

pub(super) fn table(family: Family) -> nftnl::Table {
    table_named(family, TABLE)
}

pub(super) fn table_named(family: Family, name: &str) -> nftnl::Table {
    let family = match family {
        Family::Inet => ProtoFamily::Inet,
        Family::Netdev => ProtoFamily::NetDev,
    };
    nftnl::Table::new(text(name), family)
}

/// Adds all of a table. With `again`, it may be there already: its rules are
/// replaced.
pub(super) fn add_table(batch: &mut Batch, data: &Table, again: bool) {
    let table = table_named(data.family, &data.name);
    batch.add(&table, MsgType::Add);
    add_counters(batch, &data.counters, &table);
    for (id, set) in (1..).zip(&data.sets) {
        batch.add(&declared(set, id, &table), MsgType::Add);
    }
    let chains: Vec<_> = data.chains.iter().map(|one| chain(one, &table)).collect();
    for chain in &chains {
        batch.add(chain, MsgType::Add);
    }
    for (id, set) in (1..).zip(&data.sets) {
        fill(batch, set, id, &table);
    }
    for (data, chain) in data.chains.iter().zip(&chains) {
        if again {
            batch.add(&raw::NoRules(chain), MsgType::Del);
        }
        add_rules(batch, &data.rules, chain);
    }
}

/// Adds counters; those that are there go on counting.
fn add_counters(batch: &mut Batch, names: &[String], table: &nftnl::Table) {
    for name in names {
        let name = text(name);
        batch.add(&raw::Counter { table, name }, MsgType::Add);
    }
}

/// Replaces what can change of a machine's table.
pub(super) fn change(batch: &mut Batch, changes: &Changes) {
    let table = table(Family::Inet);
    add_counters(batch, &changes.counters, &table);
    for (id, set) in (1..).zip(&changes.sets) {
        batch.add(&raw::Emptied(&declared(set, id, &table)), MsgType::Del);
        fill(batch, set, id, &table);
    }
    for data in &changes.chains {
        let chain = chain(data, &table);
        batch.add(&raw::NoRules(&chain), MsgType::Del);
        add_rules(batch, &data.rules, &chain);
    }
}

/// Lets these through for their time, which begins anew for those that are there
/// already. With `only`, nothing else is let through any more.
pub(super) fn let_through(batch: &mut Batch, entries: &[Entry], only: bool) {
    let table = table(Family::Inet);
    for v6 in [false, true] {
        let set = Set {
            name: ALLOWED[usize::from(v6)],
            elements: Elements::Timed { v6 },
        };
        if only {
            batch.add(&raw::Emptied(&declared(&set, 1, &table)), MsgType::Del);
        }
        let entries: Vec<_> = entries
            .iter()
            .filter(|entry| entry.address.is_ipv6() == v6)
            .collect();
        for entries in entries.chunks(AT_ONCE) {
            let made = declared(&set, 1, &table);
            for entry in entries {
                raw::add_element(&made, &entry.element());
            }
            if !only && !times_begin_anew() {
                // It has to go first, and to be there to go.
                batch.add(&raw::Elements(&made), MsgType::Add);
                batch.add(&raw::Elements(&made), MsgType::Del);
            }
            batch.add(&raw::Elements(&made), MsgType::Add);
        }
    }
}

/// Whether the time of an element that is added again begins anew: kernels
/// before 6.12 keep the old one.
fn times_begin_anew() -> bool {
    static ANEW: std::sync::LazyLock<bool> = std::sync::LazyLock::new(|| {
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let mut numbers = release.split(['.', '-']).map(str::parse::<u32>);
        match (numbers.next(), numbers.next()) {
            (Some(Ok(major)), Some(Ok(minor))) => (major, minor) >= (6, 12),
            _ => false,
        }
    });
    *ANEW
}

impl Entry {
    fn element(&self) -> raw::Element {
        // Each part of the key takes whole registers of four bytes.
        let key = [&octets(self.address)[..], &self.port.to_be_bytes(), &[0, 0]].concat();
        raw::Element {
            key,
            timeout_ms: u64::try_from(self.time.as_millis()).ok(),
            ..raw::Element::default()
        }
    }
}

pub(super) fn chain<'t>(data: &Chain, table: &'t nftnl::Table) -> nftnl::Chain<'t> {
    let mut chain = nftnl::Chain::new(text(&data.name), table);
    if let Some(Base {
        nat,
        hook,
        priority,
        accept,
    }) = &data.base
    {
        chain.set_type(if *nat {
            ChainType::Nat
        } else {
            ChainType::Filter
        });
        let number = match hook {
            Hook::Prerouting => nftnl::Hook::PreRouting,
            Hook::Input => nftnl::Hook::In,
            Hook::Forward => nftnl::Hook::Forward,
            Hook::Output => nftnl::Hook::Out,
            Hook::Postrouting => nftnl::Hook::PostRouting,
            // The family's own numbers: its first hook.
            Hook::Ingress(device) => {
                chain.set_device(text(device));
                nftnl::Hook::PreRouting
            }
        };
        chain.set_hook(number, *priority);
        chain.set_policy(if *accept {
            Policy::Accept
        } else {
            Policy::Drop
        });
    }
    chain
}

/// A set without its elements. Its type of key is set by number.
pub(super) fn declared<'t>(
    set: &Set,
    id: u32,
    table: &'t nftnl::Table,
) -> nftnl::set::Set<'t, Ipv4Addr> {
    let family = table.get_family();
    let made = nftnl::set::Set::<Ipv4Addr>::new_named(&text(set.name), id, table, family);
    let address = |v6| if v6 { (TYPE_IPV6, 16) } else { (TYPE_IPV4, 4) };
    let (flags, (kind, length)) = match set.elements {
        Elements::Ports(_) => (libc::NFT_SET_INTERVAL, (TYPE_SERVICE, 2)),
        Elements::Chains { v6, .. } => {
            raw::set_attribute(&made, sys::NFTNL_SET_DATA_TYPE, libc::NFT_DATA_VERDICT);
            raw::set_attribute(&made, sys::NFTNL_SET_DATA_LEN, 0);
            (libc::NFT_SET_INTERVAL | libc::NFT_SET_MAP, address(v6))
        }
        Elements::Timed { v6 } => {
            let (kind, length) = address(v6);
            // Each part is padded to a register.
            (
                libc::NFT_SET_TIMEOUT,
                (kind << TYPE_BITS | TYPE_SERVICE, length + 4),
            )
        }
    };
    raw::set_attribute(&made, sys::NFTNL_SET_FLAGS, flags as u32);
    raw::set_attribute(&made, sys::NFTNL_SET_KEY_TYPE, kind);
    raw::set_attribute(&made, sys::NFTNL_SET_KEY_LEN, length);
    made
}

fn fill(batch: &mut Batch, set: &Set, id: u32, table: &nftnl::Table) {
    let made = declared(set, id, table);
    let elements = elements(&set.elements);
    if elements.is_empty() {
        return;
    }
    for element in &elements {
        raw::add_element(&made, element);
    }
    batch.add(&raw::Elements(&made), MsgType::Add);
}

/// Intervals as the kernel wants them: where each begins, and where what is not
/// in it begins.
fn elements(elements: &Elements) -> Vec<raw::Element> {
    let mut list = Vec::new();
    match elements {
        Elements::Timed { .. } => {}
        Elements::Ports(ranges) => {
            for (first, last) in ranges {
                list.push(raw::Element {
                    key: first.to_be_bytes().into(),
                    ..raw::Element::default()
                });
                list.extend(
                    last.checked_add(1)
                        .map(|next| end(next.to_be_bytes().into())),
                );
            }
        }
        Elements::Chains { ranges, .. } => {
            for (cidr, chain) in ranges {
                list.push(raw::Element {
                    key: octets(cidr.first()),
                    chain: Some(text(chain)),
                    ..raw::Element::default()
                });
                let next = match cidr.last() {
                    IpAddr::V4(last) => u32::from(last)
                        .checked_add(1)
                        .map(|next| next.to_be_bytes().into()),
                    IpAddr::V6(last) => u128::from(last)
                        .checked_add(1)
                        .map(|next| next.to_be_bytes().into()),
                };
                list.extend(next.map(end));
            }
        }
    }
    list
}

fn end(key: Vec<u8>) -> raw::Element {
    raw::Element {
        key,
        end: true,
        ..raw::Element::default()
    }
}

pub(super) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().into(),
        IpAddr::V6(address) => address.octets().into(),
    }
}

fn add_rules(batch: &mut Batch, rules: &[Rule], chain: &nftnl::Chain<'_>) {
    for data in rules {
        batch.add(&rule(data, chain), MsgType::Add);
    }
}

pub(super) fn rule<'c>(exprs: &Rule, chain: &'c nftnl::Chain<'c>) -> nftnl::Rule<'c> {
    let mut rule = nftnl::Rule::new(chain);
    for expr in exprs.iter().flat_map(raws) {
        rule.add_expr(&expr);
    }
    rule
}
