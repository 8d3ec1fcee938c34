//! From rules as data to messages for the kernel.

use std::ffi::CString;
use std::net::{IpAddr, Ipv4Addr};

use nftnl::nftnl_sys::{self as sys, libc};
use nftnl::{Batch, ChainType, MsgType, Policy, ProtoFamily};

use super::Entry;
use super::raw::{self, Raw, Value};
use crate::plan::firewall::{
    ALLOWED, Base, Chain, Changes, Elements, Expr, Family, Field, Hook, LOG_GROUP, Rule, Set,
    State, TABLE, Table,
};
use crate::spec::Cidr;

/// Types of set elements as nft(8) numbers them; with them it can show a set.
const TYPE_IPV4: u32 = 7;
const TYPE_IPV6: u32 = 8;
const TYPE_SERVICE: u32 = 13;
/// Bits for each part of a concatenated type.
const TYPE_BITS: u32 = 6;
/// Source and destination register of every expression: the first.
const REG: u32 = libc::NFT_REG_1 as u32;
/// linux/netfilter/nf_tables.h.
const NFT_FIB_RESULT_ADDRTYPE: u32 = 3;
const NFTA_FIB_F_DADDR: u32 = 2;
const NFT_CONNLIMIT_F_INV: u32 = 1;
/// linux/rtnetlink.h.
const RTN_UNICAST: u32 = 1;
/// Elements in one message: fewer bytes than the 64 KiB an attribute can have.
const AT_ONCE: usize = 500;
/// Bytes of a logged packet that are passed on: its headers.
const LOGGED: u32 = 128;

pub(super) fn text(text: &str) -> CString {
    // Names are constants of ours.
    CString::new(text).unwrap_or_default()
}

pub(super) fn table(family: Family) -> nftnl::Table {
    let family = match family {
        Family::Inet => ProtoFamily::Inet,
        Family::Netdev => ProtoFamily::NetDev,
    };
    nftnl::Table::new(text(TABLE), family)
}

/// Adds all of a table. With `again`, it may be there already: its rules are
/// replaced.
pub(super) fn add_table(batch: &mut Batch, data: &Table, again: bool) {
    let table = table(data.family);
    batch.add(&table, MsgType::Add);
    for name in &data.counters {
        let name = text(name);
        batch.add(
            &raw::Counter {
                table: &table,
                name,
            },
            MsgType::Add,
        );
    }
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

/// Replaces what can change of a machine's table.
pub(super) fn change(batch: &mut Batch, changes: &Changes) {
    let table = table(Family::Inet);
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
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(['.', '-']).map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor) >= (6, 12),
        _ => false,
    }
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

fn chain<'t>(data: &Chain, table: &'t nftnl::Table) -> nftnl::Chain<'t> {
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
    for exprs in rules {
        let mut rule = nftnl::Rule::new(chain);
        for expr in exprs.iter().flat_map(raws) {
            rule.add_expr(&expr);
        }
        batch.add(&rule, MsgType::Add);
    }
}

fn meta(key: i32) -> Raw {
    Raw::new(
        c"meta",
        [
            (sys::NFTNL_EXPR_META_KEY, Value::U32(key as u32)),
            (sys::NFTNL_EXPR_META_DREG, Value::U32(REG)),
        ],
    )
}

/// Loads what is known of the packet's connection.
fn ct(key: i32) -> Raw {
    Raw::new(
        c"ct",
        [
            (sys::NFTNL_EXPR_CT_KEY, Value::U32(key as u32)),
            (sys::NFTNL_EXPR_CT_DREG, Value::U32(REG)),
        ],
    )
}

fn cmp(bytes: impl Into<Vec<u8>>, equal: bool) -> Raw {
    let op = if equal {
        libc::NFT_CMP_EQ
    } else {
        libc::NFT_CMP_NEQ
    };
    Raw::new(
        c"cmp",
        [
            (sys::NFTNL_EXPR_CMP_SREG, Value::U32(REG)),
            (sys::NFTNL_EXPR_CMP_OP, Value::U32(op as u32)),
            (sys::NFTNL_EXPR_CMP_DATA, Value::Bytes(bytes.into())),
        ],
    )
}

/// Loads a field into a register.
fn payload(field: Field, register: u32) -> Raw {
    let [link, network, transport] = [
        libc::NFT_PAYLOAD_LL_HEADER,
        libc::NFT_PAYLOAD_NETWORK_HEADER,
        libc::NFT_PAYLOAD_TRANSPORT_HEADER,
    ];
    let (base, offset, length) = match field {
        Field::EtherSource => (link, 6, 6),
        Field::EtherType => (link, 12, 2),
        Field::ArpEther => (network, 8, 6),
        Field::ArpIp => (network, 14, 4),
        Field::Ip4Source => (network, 12, 4),
        Field::Ip4Dest => (network, 16, 4),
        Field::Ip6Source => (network, 8, 16),
        Field::Ip6Dest => (network, 24, 16),
        Field::SourcePort => (transport, 0, 2),
        Field::Port => (transport, 2, 2),
        Field::IcmpType | Field::Icmp6Type => (transport, 0, 1),
    };
    Raw::new(
        c"payload",
        [
            (sys::NFTNL_EXPR_PAYLOAD_BASE, Value::U32(base as u32)),
            (sys::NFTNL_EXPR_PAYLOAD_OFFSET, Value::U32(offset)),
            (sys::NFTNL_EXPR_PAYLOAD_LEN, Value::U32(length)),
            (sys::NFTNL_EXPR_PAYLOAD_DREG, Value::U32(register)),
        ],
    )
}

/// Loads the destination, and the register after it: registers have four bytes.
fn destination(v6: bool) -> (Raw, u32) {
    let (field, registers) = match v6 {
        false => (Field::Ip4Dest, 1),
        true => (Field::Ip6Dest, 4),
    };
    (payload(field, REG), libc::NFT_REG32_00 as u32 + registers)
}

/// Loads a constant into a register.
fn constant(bytes: impl Into<Vec<u8>>, register: u32) -> Raw {
    Raw::new(
        c"immediate",
        [
            (sys::NFTNL_EXPR_IMM_DREG, Value::U32(register)),
            (sys::NFTNL_EXPR_IMM_DATA, Value::Bytes(bytes.into())),
        ],
    )
}

fn mask(mask: Vec<u8>) -> Raw {
    let none = vec![0; mask.len()];
    Raw::new(
        c"bitwise",
        [
            (sys::NFTNL_EXPR_BITWISE_SREG, Value::U32(REG)),
            (sys::NFTNL_EXPR_BITWISE_DREG, Value::U32(REG)),
            (sys::NFTNL_EXPR_BITWISE_LEN, Value::U32(mask.len() as u32)),
            (sys::NFTNL_EXPR_BITWISE_MASK, Value::Bytes(mask)),
            (sys::NFTNL_EXPR_BITWISE_XOR, Value::Bytes(none)),
        ],
    )
}

fn within(cidr: &Cidr) -> [Raw; 2] {
    let first = octets(cidr.first());
    let bit = |at: usize| u8::from(at < usize::from(cidr.length()));
    let byte = |at: usize| (0..8).fold(0, |byte, shift| byte << 1 | bit(at * 8 + shift));
    [mask((0..first.len()).map(byte).collect()), cmp(first, true)]
}

fn lookup(set: &str, map: bool) -> Raw {
    let mut raw = Raw::new(
        c"lookup",
        [
            (sys::NFTNL_EXPR_LOOKUP_SREG, Value::U32(REG)),
            (sys::NFTNL_EXPR_LOOKUP_SET, Value::Text(text(set))),
        ],
    );
    if map {
        let verdict = Value::U32(libc::NFT_REG_VERDICT as u32);
        raw.attributes.push((sys::NFTNL_EXPR_LOOKUP_DREG, verdict));
    }
    raw
}

fn limit(rate: u32, over: bool) -> Raw {
    let flags = if over { libc::NFT_LIMIT_F_INV } else { 0 };
    Raw::new(
        c"limit",
        [
            (sys::NFTNL_EXPR_LIMIT_RATE, Value::U64(rate.into())),
            (sys::NFTNL_EXPR_LIMIT_UNIT, Value::U64(1)),
            (sys::NFTNL_EXPR_LIMIT_BURST, Value::U32(rate)),
            (
                sys::NFTNL_EXPR_LIMIT_TYPE,
                Value::U32(libc::NFT_LIMIT_PKTS as u32),
            ),
            (sys::NFTNL_EXPR_LIMIT_FLAGS, Value::U32(flags as u32)),
        ],
    )
}

fn verdict(code: i32, chain: Option<&str>) -> Raw {
    let mut raw = Raw::new(
        c"immediate",
        [
            (
                sys::NFTNL_EXPR_IMM_DREG,
                Value::U32(libc::NFT_REG_VERDICT as u32),
            ),
            (sys::NFTNL_EXPR_IMM_VERDICT, Value::U32(code as u32)),
        ],
    );
    if let Some(chain) = chain {
        raw.attributes
            .push((sys::NFTNL_EXPR_IMM_CHAIN, Value::Text(text(chain))));
    }
    raw
}

fn reject(kind: i32, code: i32) -> Raw {
    Raw::new(
        c"reject",
        [
            (sys::NFTNL_EXPR_REJECT_TYPE, Value::U32(kind as u32)),
            (sys::NFTNL_EXPR_REJECT_CODE, Value::U8(code as u8)),
        ],
    )
}

fn device(name: &str) -> Vec<u8> {
    // With its end: the whole name, not a beginning.
    text(name).into_bytes_with_nul()
}

/// The kernel's expressions for one of ours.
/// The names of a rule's expressions, as the kernel has them.
pub(super) fn names(rule: &Rule) -> String {
    let raws = rule.iter().flat_map(raws);
    let names = raws.map(|raw| raw.name.to_string_lossy().into_owned());
    names.collect::<Vec<_>>().join(" ")
}

fn raws(expr: &Expr) -> Vec<Raw> {
    match expr {
        Expr::In(name) => vec![meta(libc::NFT_META_IIFNAME), cmp(device(name), true)],
        Expr::Out(name) => vec![meta(libc::NFT_META_OIFNAME), cmp(device(name), true)],
        Expr::InGroup(group) => vec![
            meta(libc::NFT_META_IIFGROUP),
            cmp(group.to_ne_bytes(), true),
        ],
        Expr::OutGroup(group, is) => {
            vec![meta(libc::NFT_META_OIFGROUP), cmp(group.to_ne_bytes(), *is)]
        }
        // PACKET_HOST (linux/if_packet.h).
        Expr::NotForHost => vec![meta(libc::NFT_META_PKTTYPE), cmp([0], false)],
        Expr::Cast(kind) => vec![meta(libc::NFT_META_PKTTYPE), cmp([*kind], true)],
        Expr::Nfproto(family) => vec![meta(libc::NFT_META_NFPROTO), cmp([*family], true)],
        Expr::L4(number) => vec![meta(libc::NFT_META_L4PROTO), cmp([*number], true)],
        Expr::Is(field, bytes, equal) => vec![payload(*field, REG), cmp(&bytes[..], *equal)],
        Expr::Between(field, first, last) => vec![
            payload(*field, REG),
            Raw::new(
                c"range",
                [
                    (sys::NFTNL_EXPR_RANGE_SREG, Value::U32(REG)),
                    (
                        sys::NFTNL_EXPR_RANGE_OP,
                        Value::U32(libc::NFT_RANGE_EQ as u32),
                    ),
                    (sys::NFTNL_EXPR_RANGE_FROM_DATA, Value::Bytes(first.clone())),
                    (sys::NFTNL_EXPR_RANGE_TO_DATA, Value::Bytes(last.clone())),
                ],
            ),
        ],
        Expr::Within(field, cidr) => {
            let mut list = vec![payload(*field, REG)];
            list.extend(within(cidr));
            list
        }
        Expr::InSet(field, set) => vec![payload(*field, REG), lookup(set, false)],
        Expr::DestInSet(v6, set) => {
            let (address, after) = destination(*v6);
            vec![address, payload(Field::Port, after), lookup(set, false)]
        }
        Expr::DestAnyPort(v6, set) => {
            let (address, after) = destination(*v6);
            vec![address, constant([0; 4], after), lookup(set, false)]
        }
        Expr::Map(field, map) => vec![payload(*field, REG), lookup(map, true)],
        Expr::NotToOthers => vec![
            Raw::new(
                c"fib",
                [
                    (sys::NFTNL_EXPR_FIB_DREG, Value::U32(REG)),
                    (
                        sys::NFTNL_EXPR_FIB_RESULT,
                        Value::U32(NFT_FIB_RESULT_ADDRTYPE),
                    ),
                    (sys::NFTNL_EXPR_FIB_FLAGS, Value::U32(NFTA_FIB_F_DADDR)),
                ],
            ),
            cmp(RTN_UNICAST.to_ne_bytes(), false),
        ],
        Expr::Ct(state) => {
            // linux/netfilter/nf_conntrack_common.h: invalid, established, related.
            let bits: u32 = match state {
                State::Known => 2 | 4,
                State::Invalid => 1,
            };
            vec![
                ct(libc::NFT_CT_STATE),
                mask(bits.to_ne_bytes().into()),
                cmp([0; 4], false),
            ]
        }
        // IPS_DST_NAT.
        Expr::Redirected => vec![
            ct(libc::NFT_CT_STATUS),
            mask(32u32.to_ne_bytes().into()),
            cmp([0; 4], false),
        ],
        Expr::Redirect(port) => vec![
            constant(port.to_be_bytes(), REG),
            Raw::new(
                c"redir",
                [(sys::NFTNL_EXPR_REDIR_REG_PROTO_MIN, Value::U32(REG))],
            ),
        ],
        Expr::CountOver(count) => vec![Raw::new(
            c"connlimit",
            [
                (sys::NFTNL_EXPR_CONNLIMIT_COUNT, Value::U32(*count)),
                (
                    sys::NFTNL_EXPR_CONNLIMIT_FLAGS,
                    Value::U32(NFT_CONNLIMIT_F_INV),
                ),
            ],
        )],
        Expr::RateOver(rate) => vec![limit(*rate, true)],
        Expr::Rate(rate) => vec![limit(*rate, false)],
        Expr::QuotaOver(bytes, used) => vec![Raw::new(
            c"quota",
            [
                (sys::NFTNL_EXPR_QUOTA_BYTES, Value::U64(*bytes)),
                (sys::NFTNL_EXPR_QUOTA_CONSUMED, Value::U64(*used)),
                (
                    sys::NFTNL_EXPR_QUOTA_FLAGS,
                    Value::U32(libc::NFT_QUOTA_F_INV as u32),
                ),
            ],
        )],
        Expr::Counter(name) => vec![Raw::new(
            c"objref",
            [
                (
                    sys::NFTNL_EXPR_OBJREF_IMM_TYPE,
                    Value::U32(raw::NFT_OBJECT_COUNTER),
                ),
                (sys::NFTNL_EXPR_OBJREF_IMM_NAME, Value::Text(text(name))),
            ],
        )],
        Expr::Log(prefix) => vec![Raw::new(
            c"log",
            [
                (sys::NFTNL_EXPR_LOG_PREFIX, Value::Text(text(prefix))),
                (sys::NFTNL_EXPR_LOG_GROUP, Value::U16(LOG_GROUP)),
                (sys::NFTNL_EXPR_LOG_SNAPLEN, Value::U32(LOGGED)),
            ],
        )],
        Expr::Accept => vec![verdict(libc::NF_ACCEPT, None)],
        Expr::Drop => vec![verdict(libc::NF_DROP, None)],
        Expr::Return => vec![verdict(libc::NFT_RETURN, None)],
        Expr::Jump(chain) => vec![verdict(libc::NFT_JUMP, Some(chain))],
        Expr::Goto(chain) => vec![verdict(libc::NFT_GOTO, Some(chain))],
        Expr::Reset => vec![reject(libc::NFT_REJECT_TCP_RST, 0)],
        Expr::Prohibit => vec![reject(
            libc::NFT_REJECT_ICMPX_UNREACH,
            libc::NFT_REJECT_ICMPX_ADMIN_PROHIBITED,
        )],
        Expr::Masquerade => vec![Raw::new(c"masq", [])],
    }
}
