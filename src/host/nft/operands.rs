//! Expressions with their operands, in one form: as libnftnl writes them to the
//! kernel, and as the kernel gives them back, which says some things besides that
//! nobody asked for.

use super::attributes;
use super::readback::{attribute, number32, text};

/// linux/netfilter/nf_tables.h.
const EXPR_NAME: u16 = 1;
const EXPR_DATA: u16 = 2;
const DATA_VERDICT: u16 = 2;
const VERDICT_CODE: u16 = 1;
const VERDICT_CHAIN: u16 = 2;
const NFT_REG32_00: u32 = 8;
/// Registers of four bytes in one of sixteen.
const REGISTERS: u32 = 4;
/// Length of an attribute's header.
const GENERAL: usize = 4;

/// What is known of an expression's attributes.
struct Known {
    name: &'static str,
    /// Those that are registers.
    registers: &'static [u16],
    /// Those that have data in them: a value, or a verdict.
    data: &'static [u16],
    /// The last. What is after it is of a later kernel's, and was never asked for.
    last: u16,
}

const fn known(
    name: &'static str,
    registers: &'static [u16],
    data: &'static [u16],
    last: u16,
) -> Known {
    Known {
        name,
        registers,
        data,
        last,
    }
}

/// Every expression that our rules have.
const KNOWN: [Known; 18] = [
    known("bitwise", &[1, 2], &[4, 5, 7], 7),
    known("cmp", &[1], &[3], 3),
    known("connlimit", &[], &[], 2),
    known("ct", &[1, 4], &[], 4),
    known("exthdr", &[1, 7], &[], 7),
    known("fib", &[1], &[], 3),
    known("immediate", &[1], &[2], 2),
    known("limit", &[], &[], 5),
    known("log", &[], &[], 6),
    known("lookup", &[2, 3], &[], 5),
    known("masq", &[2, 3], &[], 3),
    known("meta", &[1, 3], &[], 3),
    known("objref", &[3], &[], 5),
    known("payload", &[1, 5], &[], 8),
    known("quota", &[], &[], 4),
    known("range", &[1], &[3, 4], 4),
    known("redir", &[1, 2], &[], 3),
    known("reject", &[], &[], 2),
];

/// An expression, by its attributes' numbers: `cmp(1:4 3:c0000201)`. What is zero
/// is as good as not there.
pub(super) fn expression(bytes: &[u8]) -> String {
    let name = attribute(bytes, EXPR_NAME).map(text).unwrap_or_default();
    let mut all: Vec<_> = attributes(attribute(bytes, EXPR_DATA).unwrap_or_default())
        .map(|(kind, whole)| (kind, &whole[GENERAL..]))
        .collect();
    all.sort_unstable_by_key(|(kind, _)| *kind);
    let known = KNOWN.iter().find(|known| known.name == name);
    let shown = all.iter().filter_map(|&(kind, bytes)| {
        if known.is_some_and(|known| kind > known.last) || is_besides(&name, kind, &all) {
            return None;
        }
        let shown = match known {
            Some(known) if known.data.contains(&kind) => value(bytes),
            Some(known) if known.registers.contains(&kind) => register(number32(bytes)),
            _ => hex(significant(&name, kind, bytes)),
        };
        (!shown.is_empty()).then(|| format!("{kind}:{shown}"))
    });
    let shown: Vec<_> = shown.collect();
    format!("{name}({})", shown.join(" "))
}

/// Whether the kernel says this by itself: how much of a quota is used, and where
/// a range of one port ends, that it is of ports; and what names a set that is
/// made in the same batch.
fn is_besides(name: &str, kind: u16, all: &[(u16, &[u8])]) -> bool {
    let of = |wanted| all.iter().find(|(kind, _)| *kind == wanted);
    match (name, kind) {
        ("quota", 4) | ("lookup", 4) => true,
        ("redir", 2) => of(1).map(|(_, bytes)| bytes) == of(2).map(|(_, bytes)| bytes),
        // NF_NAT_RANGE_PROTO_SPECIFIED.
        ("redir", 3) => of(3).is_some_and(|(_, bytes)| number32(bytes) & !2 == 0),
        _ => false,
    }
}

/// A number or a name without the zeroes at its end.
fn significant<'b>(name: &str, kind: u16, bytes: &'b [u8]) -> &'b [u8] {
    // A quota that is used up says so in its flags (NFT_QUOTA_F_DEPLETED).
    if (name, kind) == ("quota", 2) && number32(bytes) == 3 {
        return &[0, 0, 0, 1];
    }
    let length = bytes.iter().rposition(|byte| *byte != 0);
    &bytes[..length.map_or(0, |last| last + 1)]
}

/// A register, as the number of its first four bytes: the first of sixteen bytes
/// is also the first of four. That for verdicts is zero.
fn register(number: u32) -> String {
    match number {
        0 => String::new(),
        1..NFT_REG32_00 => (number * REGISTERS).to_string(),
        _ => (number - NFT_REG32_00 + REGISTERS).to_string(),
    }
}

/// A value, or a verdict.
fn value(bytes: &[u8]) -> String {
    match attribute(bytes, DATA_VERDICT) {
        Some(_) => verdict(bytes),
        None => attributes(bytes)
            .map(|(_, whole)| hex(&whole[GENERAL..]))
            .collect(),
    }
}

/// A verdict, by its number, and the chain it leads to.
pub(super) fn verdict(data: &[u8]) -> String {
    let inner = attribute(data, DATA_VERDICT).unwrap_or_default();
    let code = attribute(inner, VERDICT_CODE).map_or(0, number32);
    let code = code.cast_signed();
    match attribute(inner, VERDICT_CHAIN) {
        Some(chain) => format!("{code} {}", text(chain)),
        None => code.to_string(),
    }
}

/// As [`verdict`], of what goes on in a chain and does not come back.
pub(super) fn goto(chain: &str) -> String {
    format!("{} {chain}", nix::libc::NFT_GOTO)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
