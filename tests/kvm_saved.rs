//! Snapshots and forks under KVM, with few starts: the lab is slow. All else of
//! them is in tests/snapshots.rs, which the lab can run, too.

mod support;

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;
use support::{Bulkhead, entries};

/// Runs a script as root; gives its lines.
#[track_caller]
fn sh(bulkhead: &Bulkhead, vm: &str, script: &str) -> Vec<String> {
    let text = bulkhead.must(&["exec", "-u", "root", vm, "sh", "-c", script]);
    text.lines().map(str::to_owned).collect()
}

/// Every layer holds, by hardware, too.
#[track_caller]
fn verified(bulkhead: &Bulkhead, vm: &str) {
    let findings = bulkhead.json(&["verify", vm]);
    let all = findings.as_array().unwrap();
    assert!(all.iter().all(|one| one["verdict"] != "fail"), "{findings}");
    let layers = [
        ("hardware", "accelerator"),
        ("hardware", "devices"),
        ("user", "Uid"),
        ("files", "mounts"),
        ("namespaces", "pid namespace"),
        ("seccomp", "Seccomp_filters"),
        ("cgroup", "memory"),
    ];
    for (layer, what) in layers {
        let found = |one: &&Value| one["layer"] == layer && one["what"] == what;
        let one = all.iter().find(found);
        let one = one.unwrap_or_else(|| panic!("no {layer}: {what} in {findings}"));
        assert_eq!(one["verdict"], "pass", "{one}");
        if what == "accelerator" {
            assert_eq!(one["measured"], "kvm", "{one}");
        }
    }
}

fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap().as_secs()
}

/// What it says of itself, and what is in its memory only.
const LOOK: &str = "cat /dev/shm/mark /proc/sys/kernel/random/boot_id /etc/machine-id; hostname; \
                    head -c 16 /dev/urandom | od -An -tx1; date +%s";

#[test]
#[ignore = "needs a KVM host: cargo xtask lab test"]
fn a_machine_is_saved_restored_and_forked_under_kvm() {
    let bulkhead = Bulkhead::new().with_own_state();
    let vm = bulkhead.create("saved", &["--disk", "64M", "--start"]);
    verified(&bulkhead, "saved");
    sh(&bulkhead, "saved", "echo one > /dev/shm/mark; sync");
    bulkhead.must(&["snapshot", "save", "saved", "s"]);
    let saved = sh(&bulkhead, "saved", LOOK);
    sh(&bulkhead, "saved", "echo two > /dev/shm/mark");
    bulkhead.must(&["snapshot", "restore", "saved", "s"]);
    assert_eq!(vm.inspect()["reason"], "restored from snapshot s");
    let before = now();
    let restored = sh(&bulkhead, "saved", LOOK);
    // Memory, boot id, machine id and name are those that were saved.
    assert_eq!(restored[..4], saved[..4]);
    assert_eq!(restored[0], "one");
    assert_ne!(restored[4], saved[4], "it draws the same again");
    let clock: u64 = restored[5].parse().unwrap();
    assert!((before - 1..=now() + 1).contains(&clock), "{clock}");
    verified(&bulkhead, "saved");
    let fork = bulkhead.made("f-1");
    assert_eq!(bulkhead.must(&["fork", "saved", "--name", "f"]), "f-1\n");
    let forked = sh(&bulkhead, "f-1", LOOK);
    assert_eq!(forked[..2], restored[..2]);
    for line in 2..5 {
        assert_ne!(forked[line], restored[line], "{forked:?}");
    }
    assert_eq!(forked[3], "f-1");
    verified(&bulkhead, "f-1");
    assert_eq!(sh(&bulkhead, "saved", LOOK)[..4], restored[..4]);
    drop((fork, vm));
    assert_eq!(entries(&bulkhead.state().join("runs")), [""; 0]);
}
