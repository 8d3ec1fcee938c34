//! Machines whose control group has too little memory for their QEMU.

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use support::{Bulkhead, entries, machines};

/// More than the group has left, and less than the guest has.
const FILL: &str = "head -c 100M /dev/zero > /dev/shm/f";
const LEFT: u64 = 16 << 20;

/// Has the group of the machine `name` allow little more than is used now;
/// gives the new limit, or none where the host has no groups for us.
fn tighten(bulkhead: &Bulkhead, name: &str) -> Option<u64> {
    let record = bulkhead.state().join("runs").join(name);
    let text = fs::read_to_string(record.join("leases.json")).unwrap();
    let leases: Vec<Value> = serde_json::from_str(&text).unwrap();
    let dirs = leases.iter().filter(|lease| lease["kind"] == "cgroup");
    let dirs: Vec<PathBuf> = dirs
        .map(|lease| lease["path"].as_str().unwrap().into())
        .collect();
    if dirs.is_empty() {
        println!("skipped: control_group: it has none");
        return None;
    }
    let find = |name: &str| {
        let files = dirs.iter().map(|dir| dir.join(name));
        files.into_iter().find(|file| file.exists())
    };
    let v2 = ["memory.current", "memory.max"].map(find);
    let v1 = ["memory.usage_in_bytes", "memory.limit_in_bytes"].map(find);
    let [Some(used), Some(limit)] = (if v2[0].is_some() { v2 } else { v1 }) else {
        panic!("no limit of memory in {dirs:?}");
    };
    let number = |file: &Path| -> u64 { fs::read_to_string(file).unwrap().trim().parse().unwrap() };
    let least = number(&used) + LEFT;
    // The kernel counts whole pages.
    let least = least - least % 4096;
    fs::write(&limit, least.to_string()).unwrap();
    assert_eq!(number(&limit), least);
    // Nor may it swap: v1 counts that together with memory.
    let swap = [
        ("memory.swap.max", 0),
        ("memory.memsw.limit_in_bytes", least),
    ];
    for (name, most) in swap {
        if let Some(file) = find(name) {
            fs::write(file, most.to_string()).unwrap();
        }
    }
    Some(least)
}

#[test]
fn a_run_whose_vmm_is_killed_for_its_memory_says_so() {
    let bulkhead = Bulkhead::new().with_own_state();
    let script = format!("echo ready; read go; {FILL}; echo filled");
    let words = ["--kernel", "tuned", "--memory", "256M", "--cpus", "1"];
    let command = ["--disk", "64M", "--", "sh", "-c", &script];
    let mut run = bulkhead.start("short-run", &[&words[..], &command].concat());
    let Some(limit) = tighten(&bulkhead, "short-run") else {
        return;
    };
    assert_eq!(run.ask("go"), "");
    let ran = run.finish();
    assert_eq!(ran.code, 125, "{ran:?}");
    assert!(ran.stderr.contains("error [qemu-out-of-memory]"), "{ran:?}");
    let told = bulkhead::spec::Bytes(limit).to_string();
    let told = format!("used more than the {told} of memory its control group allows");
    assert!(ran.stderr.contains(&told), "{ran:?}");
    // It went as any other.
    assert_eq!(machines("short-run"), [""; 0]);
    assert_eq!(entries(&bulkhead.state().join("runs")), [""; 0]);
}

#[test]
fn a_detached_machine_that_is_killed_for_its_memory_says_so() {
    let bulkhead = Bulkhead::new().with_own_state();
    let vm = bulkhead.create("short-vm", &["--disk", "64M", "--start"]);
    if tighten(&bulkhead, "short-vm").is_none() {
        return;
    }
    let filled = bulkhead.exec(&["short-vm", "sh", "-c", FILL]);
    assert_eq!(filled.code, 125, "{filled:?}");
    let seen = vm.becomes("failed");
    let reason = seen["reason"].as_str().unwrap();
    let told = reason.contains("used more than the") && reason.contains("its control group allows");
    assert!(told, "{seen}");
    // The next start has the limit that was planned.
    vm.start();
    bulkhead.must(&["exec", "short-vm", "sh", "-c", FILL]);
}
