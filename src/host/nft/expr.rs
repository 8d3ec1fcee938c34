//! From parts of rules to the kernel's expressions.

use nftnl::nftnl_sys::{self as sys, libc};

use super::build::{octets, text};
use super::raw::{self, Raw, Value};
use crate::plan::firewall::{Expr, Extra, Field, LOG_GROUP, State};
use crate::spec::Cidr;

/// Source and destination register of every expression: the first.
const REG: u32 = libc::NFT_REG_1 as u32;
/// linux/netfilter/nf_tables.h.
const NFT_FIB_RESULT_ADDRTYPE: u32 = 3;
const NFTA_FIB_F_DADDR: u32 = 2;
const NFT_CONNLIMIT_F_INV: u32 = 1;
const NFT_EXTHDR_F_PRESENT: u32 = 1;
const NFT_EXTHDR_OP_IPV6: u32 = 0;
const NFT_EXTHDR_OP_IPV4: u32 = 2;
/// Routing header (linux/in6.h); loose and strict source route (linux/ip.h).
const ROUTING: u8 = 43;
const LOOSE_ROUTE: u8 = 131;
const STRICT_ROUTE: u8 = 137;
/// linux/rtnetlink.h.
const RTN_UNICAST: u32 = 1;
/// Bytes of a logged packet that are passed on: its headers.
const LOGGED: u32 = 128;

fn meta(key: i32) -> Raw {
    Raw::new(
        c"meta",
        [
            (sys::NFTNL_EXPR_META_KEY, Value::U32(key as u32)),
            (sys::NFTNL_EXPR_META_DREG, Value::U32(REG)),
        ],
    )
}

/// Sets the mark of the packet, and that of its connection.
fn marked(mark: u32) -> Vec<Raw> {
    let set = |name, key, number, from| {
        let (of, register) = ((key, Value::U32(number)), (from, Value::U32(REG)));
        [
            constant(mark.to_ne_bytes(), REG),
            Raw::new(name, [of, register]),
        ]
    };
    let (meta, ct) = (libc::NFT_META_MARK as u32, libc::NFT_CT_MARK as u32);
    [
        set(
            c"meta",
            sys::NFTNL_EXPR_META_KEY,
            meta,
            sys::NFTNL_EXPR_META_SREG,
        ),
        set(c"ct", sys::NFTNL_EXPR_CT_KEY, ct, sys::NFTNL_EXPR_CT_SREG),
    ]
    .into_iter()
    .flatten()
    .collect()
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
    compare(op, bytes.into())
}

fn compare(op: i32, bytes: Vec<u8>) -> Raw {
    Raw::new(
        c"cmp",
        [
            (sys::NFTNL_EXPR_CMP_SREG, Value::U32(REG)),
            (sys::NFTNL_EXPR_CMP_OP, Value::U32(op as u32)),
            (sys::NFTNL_EXPR_CMP_DATA, Value::Bytes(bytes)),
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
        Field::Target6 => (transport, 8, 16),
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

/// Whether a header or an option is there: one or zero.
fn has(extra: Extra) -> Raw {
    let (op, number) = match extra {
        Extra::Routing6 => (NFT_EXTHDR_OP_IPV6, ROUTING),
        Extra::LooseRoute4 => (NFT_EXTHDR_OP_IPV4, LOOSE_ROUTE),
        Extra::StrictRoute4 => (NFT_EXTHDR_OP_IPV4, STRICT_ROUTE),
    };
    Raw::new(
        c"exthdr",
        [
            (sys::NFTNL_EXPR_EXTHDR_DREG, Value::U32(REG)),
            (sys::NFTNL_EXPR_EXTHDR_TYPE, Value::U8(number)),
            (sys::NFTNL_EXPR_EXTHDR_OFFSET, Value::U32(0)),
            (sys::NFTNL_EXPR_EXTHDR_LEN, Value::U32(1)),
            (
                sys::NFTNL_EXPR_EXTHDR_FLAGS,
                Value::U32(NFT_EXTHDR_F_PRESENT),
            ),
            (sys::NFTNL_EXPR_EXTHDR_OP, Value::U32(op)),
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
pub(super) fn raws(expr: &Expr) -> Vec<Raw> {
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
        // Loading it fails where there is none.
        Expr::Whole => vec![
            meta(libc::NFT_META_L4PROTO),
            compare(libc::NFT_CMP_GTE, vec![0]),
        ],
        Expr::Has(extra) => vec![has(*extra), cmp([1], true)],
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
        Expr::Mark(through) => marked(through.mark()),
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
