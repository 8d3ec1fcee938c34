//! Ending a command and what it started where there are no control groups.

use std::collections::HashSet;
use std::fs;

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

/// Kills the group, the session and the descendants of `leader`. Something
/// that left all three escapes; in a machine a control group prevents that.
pub(super) fn kill_tree(leader: i32) {
    // Parents that fork while they are being counted leave some for the next round.
    for _ in 0..3 {
        let members = members_of(leader);
        let _ = killpg(Pid::from_raw(leader), Signal::SIGKILL);
        if members.is_empty() {
            return;
        }
        for pid in members {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

fn members_of(leader: i32) -> HashSet<i32> {
    let all: Vec<Stat> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|pid: i32| Stat::parse(pid, &fs::read(format!("/proc/{pid}/stat")).ok()?))
        .filter(|stat| stat.state != b'Z')
        .collect();
    let mut members = HashSet::from([leader]);
    loop {
        let before = members.len();
        for stat in &all {
            if stat.session == leader || members.contains(&stat.parent) {
                members.insert(stat.pid);
            }
        }
        if members.len() == before {
            break;
        }
    }
    if !all.iter().any(|stat| stat.pid == leader) {
        members.remove(&leader);
    }
    members
}

#[derive(Debug, PartialEq, Eq)]
struct Stat {
    pid: i32,
    state: u8,
    parent: i32,
    session: i32,
}

impl Stat {
    fn parse(pid: i32, text: &[u8]) -> Option<Self> {
        // The name is in parentheses and may itself have any byte.
        let end = text.iter().rposition(|byte| *byte == b')')?;
        let rest = std::str::from_utf8(&text[end + 1..]).ok()?;
        let fields: Vec<&str> = rest.split_whitespace().take(4).collect();
        let [state, parent, _group, session] = fields[..] else {
            return None;
        };
        Some(Self {
            pid,
            state: *state.as_bytes().first()?,
            parent: parent.parse().ok()?,
            session: session.parse().ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_forge_fields() {
        let stat = Stat::parse(5, b"5 (a) R 1 1 1) S 2 3 4 0 0").unwrap();
        assert_eq!((stat.state, stat.parent, stat.session), (b'S', 2, 4));
    }
}
