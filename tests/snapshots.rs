//! Snapshots and forks of machines against real QEMU and the real agent.

mod support;

use serde_json::Value;
use support::{Bulkhead, Detached, entries};

const DISK: [&str; 2] = ["--disk", "64M"];

fn bulkhead() -> Bulkhead {
    Bulkhead::new().with_own_state()
}

/// A machine that runs.
fn started<'a>(bulkhead: &'a Bulkhead, name: &str, words: &[&str]) -> Detached<'a> {
    bulkhead.create(name, &[&DISK[..], words, &["--start"]].concat())
}

/// Runs a script as root; it must succeed.
#[track_caller]
fn sh(bulkhead: &Bulkhead, vm: &str, script: &str) -> String {
    bulkhead.must(&["exec", "-u", "root", vm, "sh", "-c", script])
}

fn names(bulkhead: &Bulkhead, vm: &str) -> Vec<(String, Value)> {
    let all = bulkhead.json(&["snapshot", "ls", vm]);
    let one = |one: &Value| {
        let manifest = &one["manifest"];
        let name = manifest["name"].as_str().unwrap().to_owned();
        (name, manifest["parent"].clone())
    };
    all.as_array().unwrap().iter().map(one).collect()
}

/// Something that runs on, counts in memory only, and tells the count when asked.
const COUNTER: &str = "cat > /tmp/count.sh <<'X'\n\
     n=0; while :; do n=$((n+1)); \
     [ -e /tmp/ask ] && { echo $n > /tmp/new; rm /tmp/ask; mv /tmp/new /tmp/count; }; \
     sleep 0.05; done\nX\n\
     (sh /tmp/count.sh </dev/null >/dev/null 2>&1 &)";
const ASK: &str = "rm -f /tmp/count; touch /tmp/ask; \
     while [ ! -s /tmp/count ]; do sleep 0.02; done; cat /tmp/count";

fn count(bulkhead: &Bulkhead, vm: &str) -> u64 {
    sh(bulkhead, vm, ASK).trim().parse().unwrap()
}

#[track_caller]
fn saves_and_restores(bulkhead: &Bulkhead, words: &[&str]) {
    let vm = started(bulkhead, "vm", &[&["--label", "team=a"], words].concat());
    let look = "cat /etc/machine-id /proc/sys/kernel/random/boot_id; hostname";
    let first = sh(bulkhead, "vm", look);
    sh(bulkhead, "vm", &format!("{COUNTER}; echo one > /var/mark"));
    bulkhead.must(&[
        "snapshot",
        "save",
        "vm",
        "one",
        "--description",
        "the first",
        "--tag",
        "k=v",
    ]);
    let at = count(bulkhead, "vm");
    sh(bulkhead, "vm", "echo two > /var/mark");
    bulkhead.must(&["snapshot", "save", "vm", "two"]);
    let told = bulkhead.json(&["snapshot", "inspect", "vm", "one"]);
    let manifest = &told["manifest"];
    assert_eq!(manifest["tags"]["k"], "v", "{told}");
    let paused = manifest["saved"]["paused_ms"].as_u64().unwrap();
    assert!(paused < 10_000, "{paused} ms");
    assert!(told["allocated"].as_u64().unwrap() < 128 << 20, "{told}");
    for (name, mark) in [("one", "one\n"), ("two", "two\n"), ("one", "one\n")] {
        // A command that is under way ends with an error, and does not hang.
        let mut open = bulkhead.command(&["exec", "vm", "sleep", "600"]);
        let mut open = open.stderr(std::process::Stdio::null()).spawn().unwrap();
        bulkhead.must(&["snapshot", "restore", "vm", name]);
        assert!(!open.wait().unwrap().success());
        let seen = vm.inspect();
        let told = format!("restored from snapshot {name}");
        assert_eq!(seen["reason"], told.as_str(), "{seen}");
        assert_eq!(
            (&seen["state"], &seen["labels"]["team"]),
            (&"running".into(), &"a".into())
        );
        assert_eq!(sh(bulkhead, "vm", "cat /var/mark"), mark);
        assert_eq!(sh(bulkhead, "vm", look), first);
        // What ran goes on where it was.
        let now = count(bulkhead, "vm");
        assert!(now > 1 && (name == "one" || now >= at), "{now} after {at}");
        let host = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let guest: u64 = sh(bulkhead, "vm", "date +%s").trim().parse().unwrap();
        assert!(host.unwrap().as_secs().abs_diff(guest) < 5);
    }
    // The chain: `two` was made of `one`, and so is what is made now.
    bulkhead.must(&["snapshot", "save", "vm", "three"]);
    let chain = [
        ("one", Value::Null),
        ("two", "one".into()),
        ("three", "one".into()),
    ];
    assert_eq!(
        names(bulkhead, "vm"),
        chain.map(|(name, parent)| (name.to_owned(), parent))
    );
    bulkhead.must(&["verify", "vm"]);
    bulkhead.must(&["snapshot", "rm", "vm", "one", "two"]);
    bulkhead.must_fail(&["snapshot", "restore", "vm", "one"], "snapshot-not-found");
    // Later starts boot, with the disk that it has.
    bulkhead.must(&["restart", "vm"]);
    assert_eq!(vm.inspect()["reason"], "the guest agent answers");
    assert_eq!(sh(bulkhead, "vm", "cat /var/mark"), "one\n");
}

#[test]
fn a_machine_goes_on_from_what_was_saved() {
    saves_and_restores(&bulkhead(), &[]);
}

#[test]
fn it_does_so_on_q35() {
    saves_and_restores(&bulkhead(), &["--machine", "q35"]);
}

#[test]
fn it_does_so_with_qemu_10() {
    let qemu = std::env::var("BULKHEAD_QEMU10")
        .expect("BULKHEAD_QEMU10 names no QEMU 10: see `cargo xtask qemu10`");
    let bulkhead = bulkhead();
    // The option of every verb, by its variable.
    saves_and_restores(&bulkhead.with_qemu(&qemu), &[]);
}

#[test]
fn restoring_ten_times_in_a_row_works() {
    let bulkhead = bulkhead();
    let _vm = started(&bulkhead, "vm", &[]);
    sh(&bulkhead, "vm", COUNTER);
    bulkhead.must(&["snapshot", "save", "vm", "s"]);
    for round in 0..10 {
        bulkhead.must(&["snapshot", "restore", "vm", "s"]);
        sh(
            &bulkhead,
            "vm",
            "test ! -e /var/mark; touch /var/mark; sync",
        );
        assert!(count(&bulkhead, "vm") > 0, "{round}");
    }
}

#[test]
fn a_disk_alone_is_saved_and_restored() {
    let bulkhead = bulkhead();
    let vm = started(&bulkhead, "vm", &[]);
    sh(&bulkhead, "vm", "echo one > /var/mark");
    bulkhead.must(&["snapshot", "save", "--disk-only", "vm", "live"]);
    sh(&bulkhead, "vm", "echo two > /var/mark");
    bulkhead.must(&["snapshot", "restore", "vm", "live"]);
    assert_eq!(vm.state(), "running");
    assert_eq!(sh(&bulkhead, "vm", "cat /var/mark"), "one\n");
    bulkhead.must(&["stop", "vm"]);
    bulkhead.must_fail(&["snapshot", "save", "vm", "x"], "nothing-to-save");
    bulkhead.must(&["snapshot", "save", "--disk-only", "vm", "still"]);
    bulkhead.must_fail(
        &["snapshot", "save", "--disk-only", "vm", "still"],
        "snapshot-exists",
    );
    vm.start();
    sh(&bulkhead, "vm", "echo three > /var/mark");
    bulkhead.must(&["stop", "vm"]);
    bulkhead.must(&["snapshot", "restore", "vm", "still"]);
    assert_eq!(vm.state(), "stopped");
    vm.start();
    assert_eq!(sh(&bulkhead, "vm", "cat /var/mark"), "one\n");
}

#[test]
fn what_cannot_be_saved_is_refused_and_runs_on() {
    let bulkhead = bulkhead();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    let _vm = started(
        &bulkhead,
        "vm",
        &["--workspace", path, "--workspace-mode", "share"],
    );
    let told = bulkhead.must_fail(&["snapshot", "save", "vm", "s"], "machine-unsavable");
    assert!(told.contains("--workspace-mode copy"), "{told}");
    assert_eq!(bulkhead.exec(&["vm", "echo", "fine"]).stdout, "fine\n");
    assert!(names(&bulkhead, "vm").is_empty());
    bulkhead.must(&["snapshot", "save", "--disk-only", "vm", "s"]);
}

#[test]
fn what_is_damaged_or_does_not_fit_leaves_the_machine_alone() {
    let bulkhead = bulkhead();
    let vm = started(&bulkhead, "vm", &[]);
    bulkhead.must(&["snapshot", "save", "vm", "s"]);
    let state = bulkhead.state().join("runs/vm/snapshots/s/state");
    let whole = std::fs::read(&state).unwrap();
    let mut torn = whole.clone();
    *torn.last_mut().unwrap() ^= 1;
    for bad in [&torn, &whole[..whole.len() / 2].to_vec()] {
        std::fs::remove_file(&state).unwrap();
        std::fs::write(&state, bad).unwrap();
        bulkhead.must_fail(&["snapshot", "restore", "vm", "s"], "snapshot-corrupt");
    }
    std::fs::remove_file(&state).unwrap();
    std::fs::write(&state, &whole).unwrap();
    let qemu = std::env::var("BULKHEAD_QEMU10").expect("BULKHEAD_QEMU10 names no QEMU 10");
    let words = ["--qemu", &qemu, "snapshot", "restore", "vm", "s"];
    let told = bulkhead.must_fail(&words, "snapshot-mismatch");
    assert!(
        told.contains("qemu is") && told.contains("--disk-only"),
        "{told}"
    );
    assert_eq!(vm.state(), "running");
    bulkhead.must(&["snapshot", "restore", "vm", "s"]);
}

/// A program of the guest that runs when it becomes another, and fails.
const BAD_HOOK: &str = "mkdir -p /etc/bulkhead/restore.d; cd /etc/bulkhead/restore.d; \
     printf '#!/bin/sh\\necho no keys; exit 3\\n' > 10-fail; chmod 755 10-fail; sync";

#[test]
fn a_hook_that_fails_is_a_clone_s_and_not_that_of_the_machine_saved() {
    let bulkhead = bulkhead();
    let vm = started(&bulkhead, "vm", &[]);
    sh(&bulkhead, "vm", &format!("{COUNTER}; {BAD_HOOK}"));
    let at = count(&bulkhead, "vm");
    bulkhead.must(&["snapshot", "save", "vm", "s"]);
    // It is no clone: it goes on as before, and is saved again.
    assert!(count(&bulkhead, "vm") >= at);
    bulkhead.must(&["snapshot", "save", "vm", "again"]);
    let told = bulkhead.must_fail(&["fork", "vm", "--name", "f"], "clone-not-unique");
    assert!(
        told.contains("10-fail") && told.contains("no keys"),
        "{told}"
    );
    bulkhead.must(&["rm", "--force", "f-1"]);
    assert_eq!(vm.state(), "running");
    assert!(count(&bulkhead, "vm") >= at);
    bulkhead.must_fail(&["snapshot", "restore", "vm", "s"], "clone-not-unique");
    bulkhead.must(&["snapshot", "restore", "--disk-only", "vm", "s"]);
    vm.start();
    assert_eq!(bulkhead.exec(&["vm", "echo", "fine"]).stdout, "fine\n");
}

#[test]
fn a_reset_leads_to_a_named_snapshot_too() {
    let bulkhead = bulkhead();
    let vm = started(&bulkhead, "vm", &[]);
    assert_eq!(vm.inspect()["snapshot"], Value::Null);
    sh(&bulkhead, "vm", "echo one > /tmp/mark");
    bulkhead.must(&["snapshot", "save", "vm", "one"]);
    sh(&bulkhead, "vm", "echo two > /tmp/mark");
    bulkhead.must(&["snapshot", "save", "vm", "two"]);
    assert_eq!(vm.inspect()["snapshot"], "two");
    let id = sh(&bulkhead, "vm", "cat /etc/machine-id");
    bulkhead.must(&["reset", "vm", "--to", "one"]);
    assert_eq!(vm.inspect()["snapshot"], "one");
    let shown = bulkhead.must(&["inspect", "vm"]);
    assert!(
        shown.lines().any(|line| line == "snapshot    one"),
        "{shown}"
    );
    assert_eq!(sh(&bulkhead, "vm", "cat /tmp/mark"), "one\n");
    assert_eq!(sh(&bulkhead, "vm", "cat /etc/machine-id"), id);
    bulkhead.must_fail(&["reset", "vm", "--to", "three"], "snapshot-not-found");
    // A fork is at its own snapshot, and leaves its parent where it was.
    bulkhead.must(&["fork", "vm", "--name", "f"]);
    assert_eq!(vm.inspect()["snapshot"], "one");
    let fork = bulkhead.json(&["inspect", "f-1"]);
    assert!(
        fork["snapshot"].as_str().unwrap().starts_with("fork-"),
        "{fork}"
    );
    bulkhead.must(&["rm", "--force", "f-1"]);
    bulkhead.must(&["reset", "vm"]);
    assert_eq!(vm.inspect()["snapshot"], Value::Null);
    assert_eq!(bulkhead.exec(&["vm", "cat", "/tmp/mark"]).code, 1);
}

#[test]
fn the_clock_is_right_after_an_hour_that_nobody_saw() {
    let bulkhead = bulkhead();
    let _vm = started(&bulkhead, "vm", &[]);
    // How far the guest is from whenever it was asked.
    let off = || {
        let now = || {
            let host = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            host.unwrap().as_secs_f64()
        };
        let before = now();
        let guest: f64 = sh(&bulkhead, "vm", "date +%s.%N").trim().parse().unwrap();
        (before - guest).max(guest - now())
    };
    // An hour behind when it is saved; it is right again when it was saved.
    for name in ["one", "two"] {
        sh(&bulkhead, "vm", "date -s @$(( $(date +%s) - 3600 ))");
        assert!(off() > 3500.0);
        bulkhead.must(&["snapshot", "save", "vm", name]);
        assert!(off() < 0.5, "{}", off());
    }
    for name in ["one", "two"] {
        bulkhead.must(&["snapshot", "restore", "vm", name]);
        assert!(off() < 0.5, "{}", off());
    }
}

#[test]
fn forks_have_what_it_had_and_are_unlike_each_other() {
    let bulkhead = bulkhead();
    let vm = started(&bulkhead, "vm", &[]);
    sh(
        &bulkhead,
        "vm",
        &format!("{COUNTER}; echo mine > /tmp/mark; echo kept > /var/mark"),
    );
    let names = bulkhead.must(&["fork", "vm", "-n", "2", "--name", "f"]);
    assert_eq!(names, "f-1\nf-2\n");
    // A fork of a fork.
    assert_eq!(bulkhead.must(&["fork", "f-1"]), "f-1-1\n");
    let all = ["vm", "f-1", "f-2", "f-1-1"];
    let mut seen = Vec::new();
    for name in all {
        let script = "cat /tmp/mark /var/mark; cat /etc/machine-id; hostname; \
                      head -c 16 /dev/urandom | od -An -tx1";
        let told = sh(&bulkhead, name, script);
        let lines: Vec<String> = told.lines().map(str::to_owned).collect();
        assert_eq!(lines[..2], ["mine", "kept"], "{name}");
        assert_eq!(lines[3], name);
        assert!(count(&bulkhead, name) > 0);
        seen.push(lines);
    }
    for line in [2, 3, 4] {
        let distinct: std::collections::BTreeSet<_> = seen.iter().map(|one| &one[line]).collect();
        assert_eq!(distinct.len(), all.len(), "line {line}: {seen:?}");
    }
    assert_eq!(vm.state(), "running");
    assert_eq!(
        bulkhead.json(&["snapshot", "ls", "vm"]),
        serde_json::json!([])
    );
    bulkhead.must_fail(&["fork", "vm", "--name", "f"], "name-in-use");
    for name in &all[1..] {
        bulkhead.must(&["rm", "--force", name]);
    }
    assert_eq!(entries(&bulkhead.state().join("runs")), ["vm"]);
}

#[test]
fn a_clone_of_a_template_is_saved_and_forked_too() {
    let bulkhead = bulkhead();
    let words = [
        "--image", "base", "--kernel", "tuned", "--memory", "256M", "--cpus", "1",
    ];
    let fixed = [
        "template",
        "build",
        "--accel",
        &support::accel(),
        "--disk",
        "64M",
    ];
    let id = bulkhead.must(&[&fixed[..], &words].concat());
    let vm = started(&bulkhead, "vm", &[]);
    let told = format!("cloned from template {}", id.trim());
    assert_eq!(vm.inspect()["reason"], told.as_str());
    sh(&bulkhead, "vm", "echo mine > /tmp/mark");
    bulkhead.must(&["snapshot", "save", "vm", "s"]);
    bulkhead.must(&["fork", "vm", "--name", "f"]);
    bulkhead.must(&["template", "rm", "--all"]);
    bulkhead.must(&["snapshot", "restore", "vm", "s"]);
    for name in ["vm", "f-1"] {
        assert_eq!(sh(&bulkhead, name, "cat /tmp/mark"), "mine\n");
    }
    bulkhead.must(&["rm", "--force", "f-1"]);
}

#[test]
fn a_machine_that_outlives_its_supervisor_while_it_is_saved_goes_on() {
    use nix::sys::signal::{Signal, kill};
    let bulkhead = bulkhead();
    let vm = started(&bulkhead, "vm", &["--survivors", "adopt"]);
    let save = ["snapshot", "save", "vm", "new"];
    let disk_only = ["snapshot", "save", "--disk-only", "vm", "new"];
    let saves = [(30, &save[..]), (80, &save), (150, &save), (50, &disk_only)];
    for (pause, save) in saves {
        let supervisor = vm.supervisor();
        let mut saving = bulkhead.command(save);
        let saving = saving.stdout(std::process::Stdio::null());
        let mut saving = saving.stderr(std::process::Stdio::null()).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(pause));
        kill(supervisor, Signal::SIGKILL).unwrap();
        saving.wait().unwrap();
        assert!(bulkhead.must(&["gc"]).contains("took over vm"));
        assert_eq!(sh(&bulkhead, "vm", "echo fine"), "fine\n");
        // That it stands still is its user's wish now, and stays.
        bulkhead.must(&["pause", "vm"]);
        kill(vm.supervisor(), Signal::SIGKILL).unwrap();
        assert!(bulkhead.must(&["gc"]).contains("took over vm"));
        let told: Value = bulkhead.json(&["inspect", "vm"]);
        assert_eq!(told["live"]["state"], "paused", "{told}");
        bulkhead.must(&["resume", "vm"]);
        bulkhead.must(&["gc"]);
        for name in entries(&bulkhead.state().join("runs/vm/snapshots")) {
            bulkhead.must(&["snapshot", "rm", "vm", &name]);
        }
    }
}

#[test]
fn a_save_that_dies_leaves_nothing_that_is_used() {
    use nix::sys::signal::{Signal, kill};
    let bulkhead = bulkhead();
    let vm = started(&bulkhead, "vm", &[]);
    bulkhead.must(&["snapshot", "save", "vm", "old"]);
    for pause in [20, 120, 300] {
        let supervisor = vm.supervisor();
        let mut saving = bulkhead.command(&["snapshot", "save", "vm", "new"]);
        let saving = saving.stdout(std::process::Stdio::null());
        let mut saving = saving.stderr(std::process::Stdio::null()).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(pause));
        kill(supervisor, Signal::SIGKILL).unwrap();
        saving.wait().unwrap();
        bulkhead.must(&["gc"]);
        let all = entries(&bulkhead.state().join("runs/vm/snapshots"));
        assert!(all == ["old"] || all == ["new", "old"], "{all:?}");
        for name in &all {
            bulkhead.must(&["snapshot", "inspect", "vm", name]);
        }
        bulkhead.must(&["snapshot", "restore", "vm", "old"]);
        if all.len() == 2 {
            bulkhead.must(&["snapshot", "rm", "vm", "new"]);
        }
    }
}

#[test]
fn a_save_that_was_told_to_have_failed_is_not_there() {
    use nix::sys::signal::{Signal, kill};
    use std::os::unix::fs::MetadataExt as _;
    let bulkhead = bulkhead();
    let vm = started(&bulkhead, "vm", &[]);
    // So that it takes long to measure.
    let fill = "head -c 80M /dev/urandom > /dev/shm/fill";
    sh(&bulkhead, "vm", fill);
    let (supervisor, vmm) = (vm.supervisor(), vm.vmm());
    let snapshots = bulkhead.state().join("runs/vm/snapshots");
    let mut saving = bulkhead.command(&["snapshot", "save", "vm", "new"]);
    let saving = saving.stdout(std::process::Stdio::null());
    let mut saving = saving.stderr(std::process::Stdio::null()).spawn().unwrap();
    // Everything was taken: the first of its files is measured.
    let measured = || {
        let disks = entries(&snapshots).into_iter().map(|name| name + "/disk");
        let mut disks = disks.filter_map(|disk| snapshots.join(disk).metadata().ok());
        disks.any(|disk| disk.mode() & 0o777 == 0o400)
    };
    while !measured() && saving.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    kill(vmm, Signal::SIGKILL).unwrap();
    let told = saving.wait().unwrap().success();
    // It waits for what the save began.
    let begin = std::time::Instant::now();
    while support::vmms::is_alive(supervisor.as_raw()) {
        assert!(begin.elapsed() < std::time::Duration::from_secs(120));
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let there = entries(&snapshots);
    assert_eq!(
        there.is_empty(),
        !told,
        "told {told}, and there is {there:?}"
    );
    vm.becomes("failed");
}
