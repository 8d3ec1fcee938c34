//! The QEMUs of machines on record, whatever Bulkhead says of them.

use std::fs;
use std::path::{Path, PathBuf};

use super::entries;

/// Living processes among the leases of the machines in this directory.
pub(crate) fn vmms(runs: &Path) -> Vec<i32> {
    let mut pids = Vec::new();
    for run in entries(runs) {
        let leases = fs::read(runs.join(run).join("leases.json")).unwrap_or_default();
        let leases: serde_json::Value = serde_json::from_slice(&leases).unwrap_or_default();
        let text = leases.to_string();
        for part in text.split("\"pid\":").skip(1) {
            let digits: String = part.chars().take_while(char::is_ascii_digit).collect();
            let pid: i32 = digits.parse().unwrap();
            if is_alive(pid) {
                pids.push(pid);
            }
        }
    }
    pids
}

/// Whether there is such a process, and not only its status.
pub(crate) fn is_alive(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.is_ok_and(|stat| !stat.contains(") Z "))
}

/// CPU time of all threads of a process, in nanoseconds.
pub(crate) fn cpu(pid: i32) -> u64 {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let one = |path: PathBuf| fs::read_to_string(path.join("schedstat")).unwrap();
    let all = tasks.map(|task| one(task.path()));
    all.map(|text| text.split(' ').next().unwrap().parse::<u64>().unwrap())
        .sum()
}
