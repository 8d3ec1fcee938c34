//! The system calls QEMU may make: a list that is data, made into filters.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{BpfProgram, TargetArch, compile_from_json};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::spec::Accel;

/// The list, with a reason for each call.
pub const LIST: &str = include_str!("seccomp.toml");

/// Calls and the reason for each.
type Calls = BTreeMap<String, String>;

/// The list as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    allow: Calls,
    refuse: Calls,
    when: Vec<When>,
    tcg: Table,
    kvm: Table,
    share: Table,
    adopt: Table,
    ram: Table,
    host_files: Table,
    host_pids: Table,
}

/// What some machines need besides.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Table {
    allow: Calls,
    when: Vec<When>,
}

/// A call that is allowed with some values of one argument only.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct When {
    call: String,
    why: String,
    argument: u8,
    /// The bits that count; all when absent.
    mask: Option<u32>,
    /// All 64 bits count, not the lower 32.
    #[serde(default)]
    pointer: bool,
    values: Vec<u32>,
}

/// What a machine needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// What executes the guest's instructions.
    pub accel: Accel,
    /// It has a shared workspace.
    pub share: bool,
    /// It may outlive its supervisor.
    pub adopt: bool,
    /// Its memory is in a file.
    pub ram: bool,
    /// It sees the host's files.
    pub host_files: bool,
    /// It has no process ids of its own.
    pub host_pids: bool,
}

/// The calls a machine may make, and why. A call with conditions comes once
/// for each reason.
///
/// # Errors
/// The list is malformed: a bug.
pub fn calls(wanted: Wanted) -> io::Result<Vec<(String, String)>> {
    let (allow, when, _) = select(wanted)?;
    let when = when.into_iter().map(|when| (when.call, when.why));
    Ok(allow.into_iter().chain(when).collect())
}

fn select(wanted: Wanted) -> io::Result<(Calls, Vec<When>, Calls)> {
    let List {
        allow,
        refuse,
        when,
        tcg,
        kvm,
        share,
        adopt,
        ram,
        host_files,
        host_pids,
    } = toml::from_str(LIST).map_err(io::Error::other)?;
    let accel = match wanted.accel {
        Accel::Tcg => tcg,
        Accel::Kvm => kvm,
    };
    let tables = [
        Some(accel),
        wanted.share.then_some(share),
        wanted.adopt.then_some(adopt),
        wanted.ram.then_some(ram),
        wanted.host_files.then_some(host_files),
        wanted.host_pids.then_some(host_pids),
    ];
    let (mut allow, mut when) = (allow, when);
    for table in tables.into_iter().flatten() {
        allow.extend(table.allow);
        when.extend(table.when);
    }
    // The compiler would take the conditions, and forget that it is allowed.
    when.retain(|one| !allow.contains_key(&one.call));
    Ok((allow, when, refuse))
}

/// The filters: the first ends whoever calls what is not listed, the second
/// answers `ENOSYS` to what is refused. The kernel asks both, and the harder
/// answer counts.
///
/// # Errors
/// The list is malformed: a bug.
pub fn filters(wanted: Wanted) -> io::Result<Vec<BpfProgram>> {
    let (allow, when, refuse) = select(wanted)?;
    let plain = |calls: &Calls| {
        let rules = calls.keys().map(|call| json!({ "syscall": call }));
        rules.collect::<Vec<Value>>()
    };
    let mut rules = plain(&allow);
    rules.extend(plain(&refuse));
    for When {
        call,
        argument,
        mask,
        pointer,
        values,
        ..
    } in when
    {
        let width = if pointer { "qword" } else { "dword" };
        for value in values {
            let op = mask.map_or(json!("eq"), |mask| json!({ "masked_eq": mask }));
            rules.push(json!({
                "syscall": call,
                "args": [{ "index": argument, "type": width, "op": op, "val": value }],
            }));
        }
    }
    let filters = json!({
        "allow": {
            "mismatch_action": "kill_process",
            "match_action": "allow",
            "filter": rules,
        },
        "refuse": {
            "mismatch_action": "allow",
            "match_action": { "errno": nix::libc::ENOSYS },
            "filter": plain(&refuse),
        },
    });
    let text = filters.to_string();
    let mut made =
        compile_from_json(text.as_bytes(), TargetArch::x86_64).map_err(io::Error::other)?;
    let both = [made.remove("allow"), made.remove("refuse")];
    Ok(both.into_iter().flatten().collect())
}

/// Name of a system call of this architecture, for people.
pub fn name(number: i64) -> Option<&'static str> {
    syscalls::Sysno::new(usize::try_from(number).ok()?).map(|call| call.name())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: Wanted = Wanted {
        accel: Accel::Tcg,
        share: false,
        adopt: false,
        ram: false,
        host_files: false,
        host_pids: false,
    };
    const ALL: [Wanted; 8] = [
        NONE,
        Wanted {
            share: true,
            ..NONE
        },
        Wanted {
            accel: Accel::Kvm,
            ..NONE
        },
        Wanted {
            accel: Accel::Kvm,
            share: true,
            ..NONE
        },
        Wanted {
            adopt: true,
            ..NONE
        },
        Wanted { ram: true, ..NONE },
        Wanted {
            host_files: true,
            ..NONE
        },
        Wanted {
            host_pids: true,
            ..NONE
        },
    ];

    #[test]
    fn every_list_compiles_and_gives_reasons() {
        for wanted in ALL {
            assert_eq!(filters(wanted).unwrap().len(), 2, "{wanted:?}");
            for (call, why) in calls(wanted).unwrap() {
                assert!(why.len() > 3, "no reason for {call}");
            }
        }
    }

    #[test]
    fn the_lists_are_these() {
        let lines = |wanted| {
            let calls = calls(wanted).unwrap().into_iter().map(|(call, _)| call);
            let mut calls: Vec<_> = calls.collect();
            calls.sort();
            calls.dedup();
            calls.join(" ")
        };
        let text = ALL.map(|wanted| format!("{wanted:?}\n{}", lines(wanted)));
        insta::assert_snapshot!(text.join("\n\n"));
    }

    #[test]
    fn numbers_have_names() {
        assert_eq!(name(41), Some("socket"));
        assert_eq!(name(-1), None);
    }
}
