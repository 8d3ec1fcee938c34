//! The jail of a real QEMU: what holds, what is read back, and what happens
//! where it cannot be made.

mod support;

use std::fs;
use std::process::Command;

use bulkhead::error::Report;
use bulkhead::run::violations;
use bulkhead::spec::{Bytes, Request as Wish};
use serde_json::{Value, json};
use support::{Bulkhead, accel};

/// Options of a small machine.
const SMALL: [&str; 6] = ["--kernel", "tuned", "--memory", "256M", "--cpus", "1"];

/// The findings whose verdict is this, as `layer: what`.
fn with(findings: &Value, verdict: &str) -> Vec<String> {
    let all = findings.as_array().unwrap().iter();
    all.filter(|one| one["verdict"] == verdict)
        .map(|one| {
            format!(
                "{}: {}",
                one["layer"].as_str().unwrap(),
                one["what"].as_str().unwrap()
            )
        })
        .collect()
}

/// `bulkhead --json run` of a small machine that must succeed; gives its layers.
fn layers(bulkhead: &Bulkhead, words: &[&str]) -> Value {
    let fixed = ["--json", "run", "--accel", &accel(), "--image", "base"];
    let text = bulkhead.must(&[&fixed[..], &SMALL, words, &["--", "true"]].concat());
    let outcome: Value = serde_json::from_str(&text).unwrap();
    outcome["layers"].clone()
}

#[test]
fn every_layer_is_read_back_before_a_command_starts() {
    for machine in ["microvm", "q35"] {
        let layers = layers(&Bulkhead::new(), &["--machine", machine]);
        assert_eq!(with(&layers, "fail"), [""; 0], "{layers}");
        assert_eq!(with(&layers, "waived"), [""; 0], "{layers}");
        let passed = with(&layers, "pass");
        for one in [
            "user: Uid",
            "user: CapBnd",
            "user: NoNewPrivs",
            "seccomp: Seccomp",
            "seccomp: Seccomp_filters",
            "namespaces: pid namespace",
            "namespaces: network devices",
            "files: mounts",
            "files: descriptors",
            "hardware: accelerator",
            "hardware: devices",
        ] {
            assert!(
                passed.iter().any(|have| have == one),
                "no {one} in {layers}"
            );
        }
    }
}

#[test]
fn what_is_waived_is_said_and_nothing_else_goes_with_it() {
    let bulkhead = Bulkhead::new();
    for (layer, expected) in [
        ("seccomp", &["seccomp: Seccomp_filters"][..]),
        ("user", &["user: Uid", "user: Gid"]),
        ("landlock", &["landlock: rules"]),
    ] {
        let layers = layers(&bulkhead, &["--waive", layer]);
        assert_eq!(with(&layers, "fail"), [""; 0], "{layer}: {layers}");
        let mut waived = with(&layers, "waived");
        // Where root is in groups.
        waived.retain(|one| one != "user: Groups");
        assert_eq!(waived, expected, "{layer}: {layers}");
    }
    // A user of its own may not open the host's /dev/kvm.
    let files = match accel().as_str() {
        "kvm" => "user,files",
        _ => "files",
    };
    for layer in [
        files,
        "namespaces",
        "cgroup",
        "user,files,namespaces,seccomp,landlock,cgroup",
    ] {
        let layers = layers(&bulkhead, &["--waive", layer]);
        assert_eq!(with(&layers, "fail"), [""; 0], "{layer}: {layers}");
        assert!(!with(&layers, "waived").is_empty(), "{layer}: {layers}");
    }
}

#[test]
fn a_layer_that_was_changed_behind_our_back_is_found() {
    let bulkhead = Bulkhead::new();
    let machine = bulkhead.create("changed", &["--survivors", "adopt"]);
    machine.start();
    let findings = bulkhead.json(&["verify", "changed"]);
    assert_eq!(with(&findings, "fail"), [""; 0], "{findings}");
    let text = bulkhead.must(&["verify", "changed"]);
    assert!(
        text.contains("pass   user       CapEff: 0000000000000000"),
        "{text}"
    );
    // Somebody who is root raises a limit.
    let group = with(&findings, "pass").into_iter().find_map(|what| {
        let dir = what.strip_prefix("cgroup: processes in ")?.to_owned();
        fs::exists(format!("{dir}/pids.max"))
            .unwrap()
            .then_some(dir)
    });
    let Some(group) = group else {
        println!("skipped: control_group: it has none");
        return;
    };
    let limit = fs::read_to_string(format!("{group}/pids.max")).unwrap();
    fs::write(format!("{group}/pids.max"), "max").unwrap();
    let found = bulkhead.raw(&["--json", "verify", "changed"]);
    assert_eq!(found.code, 1, "{found:?}");
    let findings: Value = serde_json::from_str(&found.stdout).unwrap();
    assert_eq!(with(&findings, "fail"), ["cgroup: threads"], "{findings}");
    // With that, nobody would take it over.
    fs::write(format!("{group}/pids.max"), limit).unwrap();
    // Or lifts the quota, also of one that its second supervisor knows of.
    let limits = [("cpu.max", "max 100000"), ("cpu.cfs_quota_us", "-1")];
    let dirs = with(&findings, "pass").into_iter();
    let dirs = dirs.filter_map(|what| Some(what.strip_prefix("cgroup: processes in ")?.to_owned()));
    let mut files = dirs.flat_map(|dir| limits.map(|(name, free)| (format!("{dir}/{name}"), free)));
    let Some((file, free)) = files.find(|(file, _)| fs::exists(file).unwrap()) else {
        println!("skipped: control_group: it has no limit of CPU time");
        return;
    };
    for round in ["first", "second"] {
        bulkhead.must(&["set", "changed", "--cpu-quota", "20"]);
        let findings = bulkhead.raw(&["--json", "verify", "changed"]).stdout;
        let findings: Value = serde_json::from_str(&findings).unwrap();
        assert!(
            with(&findings, "pass").contains(&"cgroup: cpu".to_owned()),
            "{findings}"
        );
        if round == "first" {
            let supervisor = machine.supervisor();
            nix::sys::signal::kill(supervisor, nix::sys::signal::Signal::SIGKILL).unwrap();
            machine.becomes("lost");
            // Its limit is what it was asked for again.
            fs::write(&file, free).unwrap();
            assert!(bulkhead.must(&["gc"]).contains("took over changed"));
            let findings = bulkhead.raw(&["--json", "verify", "changed"]).stdout;
            let findings: Value = serde_json::from_str(&findings).unwrap();
            assert!(
                with(&findings, "pass").contains(&"cgroup: cpu".to_owned()),
                "{findings}"
            );
        }
        fs::write(&file, free).unwrap();
        let findings = bulkhead.raw(&["--json", "verify", "changed"]).stdout;
        let findings: Value = serde_json::from_str(&findings).unwrap();
        let failed = with(&findings, "fail");
        assert_eq!(failed, ["cgroup: cpu"], "{findings}");
    }
}

#[test]
fn machines_have_users_of_their_own() {
    let bulkhead = Bulkhead::new();
    let machines = [
        bulkhead.create("user-one", &[]),
        bulkhead.create("user-two", &[]),
    ];
    let uids: Vec<String> = machines
        .iter()
        .map(|machine| {
            machine.start();
            let status = fs::read_to_string(format!("/proc/{}/status", machine.vmm())).unwrap();
            let uid = status.lines().find_map(|line| line.strip_prefix("Uid:"));
            uid.unwrap().split_whitespace().next().unwrap().to_owned()
        })
        .collect();
    assert_ne!(uids[0], uids[1]);
    assert_eq!(support::entries(&bulkhead.runtime().join("uids")).len(), 2);
    drop(machines);
    assert_eq!(support::entries(&bulkhead.runtime().join("uids")), [""; 0]);
}

#[test]
fn without_a_free_user_id_nothing_runs() {
    let bulkhead = Bulkhead::new();
    let run = |name: &str| {
        let words = [
            "--uids",
            "1900200000-1900200000",
            "run",
            "--accel",
            &accel(),
            "--image",
            "base",
        ];
        let words = [&words[..], &["--name", name], &SMALL, &["--", "true"]].concat();
        bulkhead.raw(&words)
    };
    assert_eq!(run("only").code, 0);
    // Somebody else has the only one.
    fs::create_dir_all(bulkhead.runtime().join("uids")).unwrap();
    let taken = bulkhead.runtime().join("uids/1900200000");
    std::os::unix::fs::symlink("another", &taken).unwrap();
    let refused = run("refused");
    assert_eq!(refused.code, 125, "{refused:?}");
    assert!(refused.stderr.contains("no user id of"), "{refused:?}");
    assert!(taken.is_symlink(), "what is another's was released");
}

#[test]
fn without_control_groups_nothing_runs_unless_they_are_waived() {
    let bulkhead = Bulkhead::new();
    let run = |waive: &[&str]| {
        let words = ["run", "--accel", &accel(), "--image", "base"];
        let words = [&words[..], waive, &SMALL, &["--", "echo", "ran"]].concat();
        let inner = bulkhead.command(&words);
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c"]);
        command.args([
            "umount -R /sys/fs/cgroup 2>/dev/null || umount -l /sys/fs/cgroup; exec \"$@\"",
            "sh",
        ]);
        command.arg(inner.get_program()).args(inner.get_args());
        for (name, value) in inner.get_envs() {
            command.env(name, value.unwrap());
        }
        support::ran(command.output().unwrap())
    };
    let refused = run(&[]);
    assert_eq!(
        (refused.code, refused.stdout.as_str()),
        (125, ""),
        "{refused:?}"
    );
    assert!(refused.stderr.contains("cgroup-unavailable"), "{refused:?}");
    let waived = run(&["--waive", "cgroup"]);
    assert_eq!(
        (waived.code, waived.stdout.as_str()),
        (0, "ran\n"),
        "{waived:?}"
    );
}

#[test]
fn a_script_in_the_place_of_qemu_is_refused() {
    let bulkhead = Bulkhead::new();
    let qemu = bulkhead.runtime().join("qemu");
    fs::write(&qemu, "#!/bin/sh\nexec qemu-system-x86_64 \"$@\"\n").unwrap();
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(&qemu, executable).unwrap();
    let run = bulkhead.run(&["--qemu", qemu.to_str().unwrap(), "--", "true"]);
    assert_eq!(run.code, 125, "{run:?}");
    assert!(
        run.stderr.contains("jail-files") && run.stderr.contains("script"),
        "{run:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_is_not_allowed_is_named_and_written_down_once() {
    let _unlimited = Unlimited::new();
    let live = support::live::Live::new();
    let machine = live.start(Wish::default()).await;
    let socket = json!({ "id": "out", "backend": { "type": "socket", "data": {
        "addr": { "type": "inet", "data": { "host": "127.0.0.1", "port": "9" } }, "server": false
    } } });
    let asked = machine.monitor().execute_raw("chardev-add", socket).await;
    assert!(asked.is_err(), "{asked:?}");
    machine.process().wait().await.unwrap();
    // Whoever asks again is told the same.
    for _ in 0..2 {
        let reason = Report::of(&machine.end_reason().await.unwrap());
        assert_eq!(reason.code, "system-call-violation", "{reason:?}");
        assert_eq!(reason.system_call.as_deref(), Some("socket(2)"));
    }
    let found = violations(&live.host.dirs.violations());
    assert_eq!(found.len(), 1, "{found:?}");
    let one = &found[0];
    assert_eq!((&one.machine, one.number), (&machine.plan().id, Some(41)));
    assert_eq!(one.pid, machine.process().pid());
    machine.kill().await.unwrap();
    let kept = violations(&live.host.dirs.violations());
    assert_eq!(kept, found, "it outlives the machine");
}

/// The kernel drops records when there were many before: not while this lives.
struct Unlimited;

/// How many of them live, and what was before.
static UNLIMITED: std::sync::Mutex<(usize, String)> = std::sync::Mutex::new((0, String::new()));

impl Unlimited {
    const FILE: &str = "/proc/sys/kernel/printk_ratelimit";

    fn new() -> Self {
        let mut held = UNLIMITED.lock().unwrap();
        if held.0 == 0 {
            held.1 = fs::read_to_string(Self::FILE).unwrap_or_default();
            let _ = fs::write(Self::FILE, "0");
        }
        held.0 += 1;
        Self
    }
}

impl Drop for Unlimited {
    fn drop(&mut self) {
        let mut held = UNLIMITED.lock().unwrap();
        held.0 -= 1;
        if held.0 == 0 {
            let _ = fs::write(Self::FILE, &held.1);
        }
    }
}

#[test]
fn violations_are_shown_with_their_machine() {
    let _unlimited = Unlimited::new();
    let bulkhead = Bulkhead::new().with_own_state();
    // A shell in QEMU's place asks for much that QEMU never does.
    let shell = ["--qemu", "/bin/bash", "--json"];
    let run = bulkhead.raw(
        &[
            &shell[..],
            &["run", "--accel", "tcg", "--image", "base", "--", "true"],
        ]
        .concat(),
    );
    assert_eq!(run.code, 125, "{run:?}");
    let failed: Value = serde_json::from_str(&run.stderr).unwrap();
    assert_eq!(failed["error"]["code"], "system-call-violation", "{failed}");
    let call = failed["error"]["system_call"].as_str().unwrap();
    assert!(call.ends_with("(2)"), "{failed}");
    // Under KVM that would be the machine that proves it.
    let create = ["create", "--accel", "tcg", "--image", "base"];
    bulkhead.must(&[&create[..], &["--name", "stopped"]].concat());
    let machine = bulkhead.made("stopped");
    let none: [Value; 0] = [];
    assert_eq!(machine.inspect()["violations"], json!(none));
    for count in 1..=2 {
        let start = bulkhead.raw(&[&shell[..], &["start", "stopped"]].concat());
        assert_eq!(start.code, 125, "{start:?}");
        let shown = machine.inspect();
        assert_eq!(shown["state"], "failed", "{shown}");
        assert_eq!(
            shown["violations"].as_array().unwrap().len(),
            count,
            "{shown}"
        );
        assert_eq!(shown["violations"][0]["call"], call, "{shown}");
    }
    let text = bulkhead.must(&["inspect", "stopped"]);
    assert!(
        text.contains(&format!("stopped for calling {call}")),
        "{text}"
    );
    let doctor: Value = serde_json::from_str(&bulkhead.raw(&["--json", "doctor"]).stdout).unwrap();
    let check = |name: &str| {
        let all = doctor.as_array().unwrap();
        all.iter().find(|one| one["name"] == name).unwrap().clone()
    };
    let seen = check("violations")["seen"].as_str().unwrap().to_owned();
    assert!(seen.contains("3 times") && seen.contains(call), "{seen}");
}

/// Attackers' ways to fill the host's disk: what QEMU writes ends with its disk,
/// also when that has grown.
#[tokio::test(flavor = "multi_thread")]
async fn no_file_of_a_machine_grows_past_its_disk() {
    let live = support::live::Live::new();
    let machine = live.start(Wish::default()).await;
    let limit = || {
        let text = fs::read_to_string(format!("/proc/{}/limits", machine.process().pid())).unwrap();
        let line = text
            .lines()
            .find(|line| line.starts_with("Max file size"))
            .unwrap();
        line.split_whitespace()
            .nth(3)
            .unwrap()
            .parse::<u64>()
            .unwrap()
    };
    if machine.plan().jail.file_size.is_none() {
        println!(
            "skipped: no_file_grows: without CAP_SYS_RESOURCE it could not grow with the disk"
        );
        return;
    }
    let planned = limit();
    assert!((2 << 30..3 << 30).contains(&planned), "{planned}");
    machine.grow_disk(Bytes::gib(5)).await.unwrap();
    let grown = limit();
    assert!((5 << 30..6 << 30).contains(&grown), "{grown}");
    // Further than that it does not get, whoever asks. It is process 1 of its
    // namespace, which the signal for it does not end.
    let resize = json!({ "node-name": "scratch", "size": 8u64 << 30 });
    let asked = machine.monitor().execute_raw("block_resize", resize).await;
    assert!(asked.is_err(), "{asked:?}");
    let found = fs::metadata(machine.dir().join("disk.img")).unwrap();
    assert_eq!(found.len(), 5 << 30);
    machine.kill().await.unwrap();
}
