//! Templates and clones against real QEMU, real kernels and the real agent.

mod support;

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::signal::Signal;
use serde_json::Value;
use support::template::{SMALL, build};
use support::{Bulkhead, accel, entries, machines};

/// The program with a state directory of its own: no other test's templates.
fn bulkhead() -> Bulkhead {
    Bulkhead::new().with_own_state()
}

/// Runs a command in a small machine; gives the outcome.
#[track_caller]
fn outcome(bulkhead: &Bulkhead, words: &[&str], script: &str) -> Value {
    let fixed = ["--json", "run", "--accel", &accel()];
    let command = ["--", "sh", "-c", script];
    let ran = bulkhead.raw(&[&fixed, &SMALL[..], words, &command].concat());
    let outcome = serde_json::from_str(&ran.stdout);
    outcome.unwrap_or_else(|_| panic!("{ran:?}"))
}

#[track_caller]
fn fails(bulkhead: &Bulkhead, words: &[&str], code: &str) -> String {
    let fixed = ["run", "--accel", &accel()];
    bulkhead.must_fail(&[&fixed, &SMALL[..], words, &["--", "true"]].concat(), code)
}

fn stdout(outcome: &Value) -> &str {
    outcome["stdout"]["text"].as_str().unwrap()
}

/// Nothing of a machine is left, and nothing half made.
fn left(bulkhead: &Bulkhead) -> Vec<String> {
    let templates = entries(&bulkhead.state().join("templates"));
    let half = templates.into_iter().filter(|name| name.starts_with('.'));
    let mut left: Vec<String> = half.collect();
    left.extend(entries(&bulkhead.state().join("runs")));
    left.extend(entries(bulkhead.runtime()));
    left
}

#[test]
fn what_matches_is_cloned_and_what_does_not_boots() {
    let bulkhead = bulkhead();
    assert_eq!(outcome(&bulkhead, &[], "true")["template"], Value::Null);
    let id = build(&bulkhead, &[]);
    let boot = "cat /proc/sys/kernel/random/boot_id; hostname";
    let first = outcome(&bulkhead, &["--name", "first"], boot);
    // Its names were stored where the template had left room for any.
    let names = "wc -c < /etc/hostname; cat /etc/hostname; grep '^127.0.1.1' /etc/hosts | wc -c";
    let named = outcome(&bulkhead, &["--name", "named"], names);
    assert_eq!(
        stdout(&named).split_whitespace().collect::<Vec<_>>(),
        ["65", "named", "75"]
    );
    assert_eq!(first["template"], id.as_str());
    let memory = first["layers"].as_array().unwrap().iter();
    let memory = memory.filter(|one| one["what"].as_str().unwrap().starts_with("memory of"));
    assert_eq!(
        memory.map(|one| &one["measured"]).collect::<Vec<_>>(),
        ["read-only"]
    );
    // Restored, not booted, and yet another.
    let second = outcome(&bulkhead, &["--name", "second"], boot);
    let ids = [&first, &second].map(|one| stdout(one).lines().next().unwrap());
    assert_eq!(ids[0], ids[1]);
    assert_eq!(stdout(&second).lines().last(), Some("second"));
    for other in [
        &["--cold"][..],
        &["--domain", "other"],
        &["--memory", "300M"],
        &["--machine", "q35"],
    ] {
        let words: Vec<&str> = other.to_vec();
        let fixed = ["--json", "run", "--accel", &accel(), "--image", "base"];
        let rest = ["--kernel", "tuned", "--cpus", "1", "--disk", "64M"];
        let memory: &[&str] = match other[0] {
            "--memory" => &[],
            _ => &["--memory", "256M"],
        };
        let all = [&fixed[..], &rest, memory, &words, &["--", "true"]].concat();
        let ran = bulkhead.raw(&all);
        let outcome: Value = serde_json::from_str(&ran.stdout).unwrap();
        assert_eq!(outcome["template"], Value::Null, "{other:?}");
    }
    // The same again is there already.
    assert_eq!(build(&bulkhead, &[]), id);
    let kept = ["template", "build", "--accel", &accel()];
    let kept = bulkhead.json(&[&kept, &SMALL[..]].concat());
    assert_eq!(
        (&kept["id"], &kept["kept"]),
        (&id.as_str().into(), &true.into())
    );
    let seen = bulkhead.json(&["template", "inspect", &id[..8]]);
    assert_eq!(seen["manifest"], kept["manifest"]);
    assert_eq!(left(&bulkhead), [""; 0]);
}

#[test]
fn a_template_that_does_not_match_is_refused_with_the_difference() {
    let bulkhead = bulkhead();
    let id = build(&bulkhead, &["--domain", "ci"]);
    let told = fails(&bulkhead, &["--template", &id], "template-mismatch");
    assert!(
        told.contains("domain is default, and ci in the template"),
        "{told}"
    );
    let words = ["--template", &id[..6], "--domain", "ci", "--machine", "q35"];
    let told = fails(&bulkhead, &words, "template-mismatch");
    assert!(
        told.contains("machine is q35") && told.contains("devices"),
        "{told}"
    );
    let words = ["--template", &id[..6], "--domain", "ci"];
    assert_eq!(outcome(&bulkhead, &words, "true")["template"], id.as_str());
    fails(&bulkhead, &["--template", "0000"], "template-not-found");
}

/// Waits until the guest has the file, then shows it.
const ASK: &str = "echo ready; read go; touch /tmp/go; hostname; cat /etc/machine-id; \
     head -c 16 /dev/urandom | od -An -tx1; \
     while [ ! -s /tmp/drawn ]; do sleep 0.05; done; cat /tmp/drawn; echo over; cat";
/// A process that is there when the machine is saved, and draws when it is told.
const DRAWER: &str = "(while [ ! -e /tmp/go ]; do sleep 0.05; done; \
     head -c 16 /dev/urandom | od -An -tx1 > /tmp/new; mv /tmp/new /tmp/drawn) \
     </dev/null >/dev/null 2>&1 &";

#[test]
fn clones_at_once_differ_and_share_their_memory() {
    let bulkhead = bulkhead();
    let id = build(&bulkhead, &["--warm", DRAWER]);
    let words = [&SMALL[2..], &["--template", &id, "--", "sh", "-c", ASK]].concat();
    let names = ["one", "two"];
    let mut clones = names.map(|name| bulkhead.start(name, &words));
    // Removed meanwhile, they live on.
    bulkhead.must(&["template", "rm", &id]);
    let told = clones.each_mut().map(|clone| {
        let mut lines = vec![clone.ask("go")];
        while lines.last().unwrap() != "over\n" {
            let line = clone.line();
            assert_ne!(line, "", "{lines:?}");
            lines.push(line);
        }
        lines
    });
    for (line, (one, two)) in told[0].iter().zip(&told[1]).enumerate().take(4) {
        assert_ne!(one, two, "line {line}");
        assert!(one.len() > 3, "{one}");
    }
    // While both of them are there.
    for [private, shared] in names.map(memory) {
        assert!(shared > 10 << 10, "{shared} KiB are shared");
        assert!(private < 24 << 10, "{private} KiB are private");
    }
    for clone in clones {
        assert_eq!(clone.finish().code, 0);
    }
    assert_eq!(left(&bulkhead), [""; 0]);
}

/// Private and shared KiB of the guest's memory, in use (proc(5), smaps).
fn memory(name: &str) -> [u64; 2] {
    let marker = format!("{name},debug-threads=on");
    let smaps = std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .find_map(|one| {
            let line = std::fs::read(one.path().join("cmdline")).ok()?;
            let found = String::from_utf8_lossy(&line).contains(&marker);
            found.then(|| std::fs::read_to_string(one.path().join("smaps")).unwrap())
        });
    let smaps = smaps.unwrap();
    let (mut inside, mut sums) = (false, [0; 2]);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        match (words.next().unwrap(), words.next()) {
            (range, _) if range.contains('-') => inside = line.contains("/ram"),
            ("Private_Dirty:", Some(kib)) if inside => sums[0] += kib.parse::<u64>().unwrap(),
            ("Shared_Clean:" | "Shared_Dirty:", Some(kib)) if inside => {
                sums[1] += kib.parse::<u64>().unwrap();
            }
            _ => {}
        }
    }
    sums
}

fn now() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs_f64()
}

#[test]
fn hooks_run_before_it_is_handed_out_and_the_clock_is_right() {
    let bulkhead = bulkhead();
    // An hour behind when it is saved, as a template that has aged.
    let warm = "mkdir -p /etc/bulkhead/restore.d; cd /etc/bulkhead/restore.d; \
        printf '#!/bin/sh\\nhostname > /var/hook; date +%%s >> /var/hook\\n' > 10-mark; \
        chmod 755 10-mark; date -s @$(( $(date +%s) - 3600 ))";
    build(&bulkhead, &["-u", "root", "--warm", warm]);
    let before = now();
    let script = "cat /var/hook; date +%s.%N";
    let outcome = outcome(&bulkhead, &["--name", "hooked"], script);
    let lines: Vec<&str> = stdout(&outcome).lines().collect();
    assert_eq!(lines[0], "hooked", "{outcome}");
    for time in &lines[1..] {
        let seen: f64 = time.parse().unwrap();
        // Whole seconds are cut.
        assert!(
            (before - 1.1..now() + 0.1).contains(&seen),
            "{seen} and {before}"
        );
    }
}

#[test]
fn a_clone_that_is_not_unique_is_not_handed_out() {
    let bulkhead = bulkhead();
    let warm = "mkdir -p /etc/bulkhead/restore.d; cd /etc/bulkhead/restore.d; \
        printf '#!/bin/sh\\necho no keys; exit 3\\n' > 10-fail; chmod 755 10-fail";
    let id = build(&bulkhead, &["-u", "root", "--warm", warm]);
    let told = fails(&bulkhead, &[], "clone-not-unique");
    assert!(
        told.contains("10-fail") && told.contains("no keys"),
        "{told}"
    );
    assert_eq!(outcome(&bulkhead, &["--cold"], "true")["exit_code"], 0);
    assert_eq!(left(&bulkhead), [""; 0]);
    // What fails in the guest before it is saved makes no template.
    let fixed = ["template", "build", "--accel", &accel(), "--domain", "x"];
    let words = [&fixed[..], &SMALL, &["--warm", "exit 4"]].concat();
    let told = bulkhead.must_fail(&words, "warm-up-failed");
    assert!(told.contains("exit code 4"), "{told}");
    let ids = bulkhead.json(&["template", "ls"]);
    assert_eq!(ids.as_array().unwrap().len(), 1);
    assert_eq!(ids[0]["id"], id.as_str());
    assert_eq!(left(&bulkhead), [""; 0]);
}

#[test]
fn workspaces_go_in_and_out_of_clones() {
    let bulkhead = bulkhead();
    let ids = [build(&bulkhead, &[]), build(&bulkhead, &["--share"])];
    assert_ne!(ids[0], ids[1]);
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("in"), "from the host\n").unwrap();
    let path = dir.path().to_str().unwrap();
    for (mode, apply, id) in [("copy", Some("--apply"), &ids[0]), ("share", None, &ids[1])] {
        let mut words = vec!["-u", "root", "--workspace", path, "--workspace-mode", mode];
        words.extend(apply);
        let script = format!("cat in; echo {mode} > {mode}");
        let outcome = outcome(&bulkhead, &words, &script);
        assert_eq!(outcome["template"], id.as_str(), "{mode}");
        assert_eq!(stdout(&outcome), "from the host\n", "{mode}");
        let written = std::fs::read_to_string(dir.path().join(mode)).unwrap();
        assert_eq!(written, format!("{mode}\n"));
    }
}

#[test]
fn a_damaged_template_is_not_used() {
    let bulkhead = bulkhead();
    let id = build(&bulkhead, &[]);
    let dir = bulkhead.state().join("templates").join(&id);
    // What was checked is known by its time of change: a copy is checked anew.
    let copy = |name: &str| {
        let (from, to) = (dir.join(name), dir.join("copy"));
        let mut command = std::process::Command::new("cp");
        assert!(
            command
                .args(["--sparse=always"])
                .arg(&from)
                .arg(&to)
                .status()
                .unwrap()
                .success()
        );
        std::fs::rename(to, from).unwrap();
    };
    copy("ram");
    assert_eq!(outcome(&bulkhead, &[], "true")["template"], id.as_str());
    for name in ["ram", "state", "disk"] {
        flip(&dir.join(name));
        let told = fails(&bulkhead, &[], "template-corrupt");
        assert!(told.contains(name), "{told}");
        flip(&dir.join(name));
    }
    assert_eq!(outcome(&bulkhead, &[], "true")["template"], id.as_str());
    flip(&dir.join("state"));
    // Built again, it is whole.
    assert_eq!(build(&bulkhead, &[]), id);
    assert_eq!(outcome(&bulkhead, &[], "true")["template"], id.as_str());
}

/// Changes one bit in the middle.
fn flip(path: &Path) {
    use std::os::unix::fs::{FileExt, PermissionsExt};
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let (at, mut byte) = (file.metadata().unwrap().len() / 2, [0]);
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

#[test]
fn a_detached_machine_starts_as_a_clone_and_boots_with_its_disk_later() {
    let bulkhead = bulkhead();
    let id = build(&bulkhead, &[]);
    let vm = bulkhead.create("kept", &["--disk", "64M", "--start"]);
    let seen = vm.inspect();
    let told = format!("cloned from template {id}");
    assert_eq!(seen["reason"], told.as_str(), "{seen}");
    let look = ["kept", "sh", "-c", "cat /etc/machine-id; hostname"];
    let first = bulkhead.exec(&look).stdout;
    bulkhead.must(&[
        "exec",
        "-u",
        "root",
        "kept",
        "sh",
        "-c",
        "echo mine > /var/mark; sync",
    ]);
    bulkhead.must(&["verify", "kept"]);
    bulkhead.must(&["restart", "kept"]);
    assert_eq!(vm.inspect()["reason"], "the guest agent answers");
    assert_eq!(bulkhead.exec(&look).stdout, first);
    assert_eq!(
        bulkhead.exec(&["kept", "cat", "/var/mark"]).stdout,
        "mine\n"
    );
}

/// What each clone did of itself in its first seconds, and need not: what the
/// kernel and the agent leave for later after a boot (decision 0046).
#[test]
fn a_clone_has_nothing_left_to_do_from_the_boot() {
    let bulkhead = bulkhead();
    build(&bulkhead, &[]);
    let vm = bulkhead.create("idle", &["--disk", "64M", "--start"]);
    let reason = vm.inspect()["reason"].to_string();
    assert!(reason.contains("cloned from"), "{reason}");
    let look = "dmesg | grep -c -e clocksource -e EXT4; \
        for disk in /sys/block/vd*; do set -- $(cat $disk/stat); echo $disk wrote $5; done; \
        for p in /proc/[0-9]*; do \
            case $(cat $p/comm) in init) echo init has $(ls $p/task | wc -l);; esac; done";
    let look = || bulkhead.must(&["exec", "-u", "root", "idle", "sh", "-c", look]);
    let first = look();
    println!("{first}");
    // The agent is PID 1 and the process that serves.
    let threads: Vec<_> = first.lines().filter(|line| line.contains("init")).collect();
    assert_eq!(threads, ["init has 1"; 2], "{first}");
    assert!(first.contains("/vdb wrote "), "{first}");
    std::thread::sleep(std::time::Duration::from_secs(8));
    // Its names, which reach the disk half a minute later, are its own.
    assert_eq!(look(), first);
}

#[test]
fn a_reset_machine_is_fresh_and_the_same() {
    let bulkhead = bulkhead();
    let id = build(&bulkhead, &[]);
    let mark = "date +%s%N > /var/mark; sync";
    let words = [
        "--label",
        "team=a",
        "--cold",
        "--",
        "sh",
        "-c",
        "echo main; sleep 600",
    ];
    // Booted the first time, to tell that a reset makes it a clone is no part of it.
    let cold = bulkhead.create("cold", &[&["--disk", "64M"][..], &words].concat());
    cold.start();
    let words = ["--disk", "64M", "--label", "team=a", "--survivors", "adopt"];
    let vm = bulkhead.create("vm", &[&words[..], &["--start"]].concat());
    for (vm, reason) in [
        (&cold, "the guest agent answers".to_owned()),
        (&vm, format!("cloned from template {id}")),
    ] {
        let name = vm.inspect()["id"].as_str().unwrap().to_owned();
        let look = [name.as_str(), "sh", "-c", "cat /etc/machine-id; hostname"];
        let first = bulkhead.exec(&look).stdout;
        bulkhead.must(&["exec", "-u", "root", &name, "sh", "-c", mark]);
        bulkhead.must(&["reset", &name]);
        let seen = vm.inspect();
        assert_eq!(
            (&seen["state"], &seen["reason"]),
            (&"running".into(), &reason.as_str().into())
        );
        assert_eq!(seen["labels"]["team"], "a");
        assert_eq!(bulkhead.exec(&look).stdout, first);
        assert_eq!(
            bulkhead.exec(&[&name, "cat", "/var/mark"]).code,
            1,
            "{name}"
        );
    }
    // One that does not run has a new disk at its next start.
    bulkhead.must(&["exec", "-u", "root", "vm", "sh", "-c", mark]);
    bulkhead.must(&["stop", "vm"]);
    bulkhead.must(&["reset", "vm"]);
    assert_eq!(vm.state(), "stopped");
    vm.start();
    assert_eq!(bulkhead.exec(&["vm", "cat", "/var/mark"]).code, 1);
}

#[test]
fn every_machine_type_and_qemu_is_cloned() {
    let own = std::env::var_os("BULKHEAD_QEMU10");
    let qemus = [None, own.as_ref().and_then(|path| path.to_str())];
    assert!(
        own.is_some(),
        "BULKHEAD_QEMU10 names no QEMU 10: see `cargo xtask qemu10`"
    );
    let bulkhead = bulkhead();
    let mut ids = Vec::new();
    for qemu in qemus {
        for machine in ["microvm", "q35"] {
            let mut words = vec!["--machine", machine];
            words.extend(qemu.into_iter().flat_map(|path| ["--qemu", path]));
            let id = build(&bulkhead, &words);
            let outcome = outcome(&bulkhead, &words, "echo fine");
            assert_eq!(outcome["template"], id.as_str(), "{words:?}: {outcome}");
            assert_eq!(stdout(&outcome), "fine\n");
            ids.push(id);
        }
    }
    let distinct: std::collections::BTreeSet<_> = ids.iter().collect();
    assert_eq!(distinct.len(), 4);
}

#[test]
fn a_builder_that_dies_leaves_nothing() {
    let bulkhead = bulkhead();
    let fixed = ["template", "build", "--accel", &accel()];
    let words = [&fixed[..], &SMALL, &["--warm", "echo warm; sleep 600"]].concat();
    let mut command = bulkhead.command(&words);
    command.stderr(std::process::Stdio::piped());
    let mut child = command.spawn().unwrap();
    let stderr = std::io::BufReader::new(child.stderr.take().unwrap());
    let mut lines = std::io::BufRead::lines(stderr).map(Result::unwrap);
    let told = lines.next().unwrap();
    assert!(told.contains("65 minutes behind"), "{told}");
    assert_eq!(lines.next().unwrap(), "warm");
    let templates = bulkhead.state().join("templates");
    let staged = || {
        entries(&templates)
            .into_iter()
            .filter(|name| name.starts_with('.'))
    };
    assert_eq!(staged().count(), 1);
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    nix::sys::signal::kill(pid, Signal::SIGKILL).unwrap();
    child.wait().unwrap();
    std::thread::sleep(Duration::from_millis(200));
    bulkhead.must(&["gc"]);
    assert_eq!(left(&bulkhead), [""; 0]);
    assert_eq!(machines("template"), [""; 0]);
    assert_eq!(entries(&templates), [""; 0]);
}

#[test]
#[ignore = "needs a KVM host: cargo xtask lab test a_template_is_cloned_under_kvm"]
fn a_template_is_cloned_under_kvm() {
    let bulkhead = bulkhead();
    let id = build(&bulkhead, &[]);
    let script = "hostname; head -c 16 /dev/urandom | od -An -tx1; cat /etc/machine-id";
    let told = ["one", "two"].map(|name| {
        let outcome = outcome(&bulkhead, &["--name", name], script);
        assert_eq!(outcome["template"], id.as_str(), "{outcome}");
        // Although this host has vsock: decision 0040.
        assert_eq!(outcome["channel"], "serial");
        assert_eq!(outcome["hardware_isolation"], true);
        stdout(&outcome).to_owned()
    });
    for (one, two) in told[0].lines().zip(told[1].lines()) {
        assert_ne!(one, two);
    }
    assert_eq!(told[0].lines().next(), Some("one"));
    // Who asks for vsock boots.
    let outcome = outcome(&bulkhead, &["--channel", "vsock"], "true");
    assert_eq!(outcome["template"], Value::Null);
    assert_eq!(outcome["channel"], "vsock");
}
