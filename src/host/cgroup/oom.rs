//! Whose limit it was that the kernel killed at for want of memory.

use super::Cgroup;
use crate::spec::Bytes;

/// What there was too little of when the kernel killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shortage {
    /// The group used all that it is allowed: its limit then.
    Group(Bytes),
    /// The host has no more, or a group above ours: this one kept to its limit.
    Host,
}

impl Cgroup {
    /// Why the kernel killed in it for want of memory, if it has (cgroup-v2 and
    /// cgroup-v1/memory of the kernel's documentation).
    pub fn shortage(&self) -> Option<Shortage> {
        let kills = self
            .counted("memory.events", "oom_kill")
            .or_else(|| self.counted("memory.oom_control", "oom_kill"))?;
        // Whether it met its own limit: v2 tells when it was to no avail.
        let met = match self.counted("memory.events", "oom") {
            Some(times) => times > 0,
            None => self.was_full("memory") || self.was_full("memory.memsw"),
        };
        let limit = self.read(["memory.max", "memory.limit_in_bytes"]);
        let limit = limit.and_then(|text| text.parse().ok().map(Bytes));
        (kills > 0).then_some(match limit {
            Some(limit) if met => Shortage::Group(limit),
            _ => Shortage::Host,
        })
    }

    /// Whether a group of v1 ever used what it may. Of memory and swap together
    /// some kernels count no failures, and only what was used at most tells.
    fn was_full(&self, of: &str) -> bool {
        let number = |what: &str| {
            let file = format!("{of}.{what}");
            self.read([&file, &file])?.parse::<u64>().ok()
        };
        let most = number("max_usage_in_bytes");
        let failed = number("failcnt").is_some_and(|times| times > 0);
        failed || most.is_some() && most >= number("limit_in_bytes")
    }

    /// The number of this name in a file with one in each line.
    fn counted(&self, file: &str, name: &str) -> Option<u64> {
        let text = self.read([file, file])?;
        let mut pairs = text.lines().filter_map(|line| line.split_once(' '));
        let (_, number) = pairs.find(|(found, _)| *found == name)?;
        number.parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::{Command, Stdio};

    use super::*;

    /// A limit that a small program meets soon.
    const LITTLE: Bytes = Bytes::mib(24);

    /// Has a program in `group` use memory without end; it must be killed.
    fn fill(group: &Cgroup) {
        let mut shell = Command::new("sh");
        shell.args(["-c", "read go; exec tail /dev/zero"]);
        let mut child = shell.stdin(Stdio::piped()).spawn().unwrap();
        group.add(child.id());
        child.stdin.take().unwrap().write_all(b"go\n").unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(9));
    }

    /// What is said of a group when it, or what is above it, allows little.
    fn said(limited: fn(&[Cgroup; 2]) -> &Cgroup) -> [Option<Shortage>; 2] {
        let outer = Cgroup::choose(&"cgroup-oom".parse().unwrap()).unwrap();
        let dirs = outer.dirs.iter().map(|dir| dir.join("inner")).collect();
        let groups = [outer, Cgroup { dirs }];
        groups.iter().for_each(|group| group.make().unwrap());
        limited(&groups).limit(LITTLE, 100).unwrap();
        let before = groups[1].shortage();
        fill(&groups[1]);
        let after = groups[1].shortage();
        let leases = groups.iter().rev().flat_map(Cgroup::leases);
        leases.for_each(|lease| lease.release().unwrap());
        [before, after]
    }

    #[test]
    fn a_group_that_used_all_it_may_is_told_from_one_that_did_not() {
        if let Err(error) = Cgroup::choose(&"cgroup-oom".parse().unwrap()) {
            println!("skipped: control_group: {error}");
            return;
        }
        let own = said(|[_, inner]| inner);
        assert_eq!(own, [None, Some(Shortage::Group(LITTLE))]);
        // What is above it stands for the host.
        assert_eq!(said(|[outer, _]| outer), [None, Some(Shortage::Host)]);
    }
}
