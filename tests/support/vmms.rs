//! The QEMUs of machines on record, whatever Bulkhead says of them.

use std::fs;
use std::path::Path;

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

/// CPU time of a process, threads that ended included, in nanoseconds.
pub(crate) fn cpu(pid: i32) -> u64 {
    let clock = nix::time::clock_getcpuclockid(nix::unistd::Pid::from_raw(pid)).unwrap();
    let time = std::time::Duration::from(nix::time::clock_gettime(clock).unwrap());
    u64::try_from(time.as_nanos()).unwrap()
}
