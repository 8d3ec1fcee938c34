//! The rules at the host's end, the same for all machines: what a machine's own
//! namespace should let fail it, this catches.

use std::hash::{DefaultHasher, Hash, Hasher};

use super::*;
use crate::plan::network::GROUP;

/// Rules for everything that comes from, or goes to, a machine's link. They
/// take nothing away from the host's own firewall, which sees every packet as
/// well, and allow nothing it does not.
pub fn gate() -> Table {
    let ours = || Expr::InGroup(GROUP);
    let to_ours = || Expr::OutGroup(GROUP, true);
    // Before the host's own address translation: a published port of the host
    // is the host, wherever it leads.
    let prerouting = vec![vec![ours(), Expr::NotToOthers, Expr::goto("refuse")]];
    let input = vec![vec![ours(), Expr::goto("refuse")]];
    let forward = vec![
        vec![ours(), to_ours(), Expr::goto("refuse")],
        vec![to_ours(), Expr::Ct(State::Known), Expr::Accept],
        vec![to_ours(), Expr::Counter("inbound".into()), Expr::Drop],
    ];
    let postrouting = vec![vec![ours(), Expr::OutGroup(GROUP, false), Expr::Masquerade]];
    let refuse = vec![
        vec![Expr::Counter("refused".into())],
        vec![Expr::L4(TCP), Expr::Reset],
        vec![Expr::Prohibit],
    ];
    Table {
        family: Family::Inet,
        name: TABLE.into(),
        counters: ["inbound", "refused"].map(str::to_owned).into(),
        sets: Vec::new(),
        chains: vec![
            // After defragmentation and tracking (-200), before translation (-100).
            base("prerouting", Hook::Prerouting, -150, true, prerouting),
            base("input", Hook::Input, -1, true, input),
            base("forward", Hook::Forward, -1, true, forward),
            nat("postrouting", Hook::Postrouting, 99, postrouting),
            chain("refuse", refuse),
        ],
    }
}

/// What in that table stands for one machine: the table goes with the last.
pub fn gate_member(token: &str) -> String {
    format!("machine-{token}")
}

/// What in that table stands for exactly these rules.
pub fn gate_mark() -> String {
    let mut hasher = DefaultHasher::new();
    gate().to_string().hash(&mut hasher);
    format!("rules-{:016x}", hasher.finish())
}
