//! Forks that are interrupted, forks with a network, and what runs in them.

mod support;

#[path = "support/dns.rs"]
mod dns;
#[path = "support/internet.rs"]
mod internet;

use std::time::{Duration, Instant};

use internet::Internet;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::{Bulkhead, entries};

const DISK: [&str; 2] = ["--disk", "64M"];

/// Names of a machine's snapshots, as they are on disk.
fn snapshots(bulkhead: &Bulkhead, vm: &str) -> Vec<String> {
    let mut all = entries(&bulkhead.state().join(format!("runs/{vm}/snapshots")));
    all.retain(|name| !name.starts_with('.'));
    all
}

/// Forks the machine, and kills that as soon as the first fork is begun.
fn fork_and_die(bulkhead: &Bulkhead, prefix: &str) {
    let mut fork = bulkhead.command(&["fork", "vm", "-n", "2", "--name", prefix]);
    let mut fork = fork.stderr(std::process::Stdio::null()).spawn().unwrap();
    let begin = Instant::now();
    let first = bulkhead.state().join(format!("runs/{prefix}-1"));
    while !first.exists() {
        assert!(begin.elapsed() < Duration::from_secs(60), "nothing is made");
        std::thread::sleep(Duration::from_millis(1));
    }
    let pid = Pid::from_raw(i32::try_from(fork.id()).unwrap());
    kill(pid, Signal::SIGKILL).unwrap();
    fork.wait().unwrap();
    // Who was made of it is whole, half made, or was not begun.
    for number in 1..=2 {
        bulkhead.raw(&["rm", "--force", &format!("{prefix}-{number}")]);
    }
}

#[test]
fn a_fork_that_is_killed_leaves_no_snapshot_for_long() {
    let bulkhead = Bulkhead::new().with_own_state();
    let vm = bulkhead.create("vm", &[&DISK[..], &["--start"]].concat());
    fork_and_die(&bulkhead, "a");
    assert_eq!(snapshots(&bulkhead, "vm").len(), 1);
    bulkhead.must(&["gc"]);
    assert_eq!(snapshots(&bulkhead, "vm"), [""; 0]);
    // Whoever saves or forks next clears it away, too.
    fork_and_die(&bulkhead, "b");
    bulkhead.must(&["snapshot", "save", "vm", "mine"]);
    assert_eq!(snapshots(&bulkhead, "vm"), ["mine"]);
    bulkhead.must(&["snapshot", "rm", "vm", "mine"]);
    fork_and_die(&bulkhead, "c");
    bulkhead.must(&["fork", "vm", "--name", "g"]);
    assert_eq!(snapshots(&bulkhead, "vm"), [""; 0]);
    // A fork's own is not taken for one: it can go back there.
    bulkhead.must(&["gc"]);
    let own = snapshots(&bulkhead, "g-1");
    assert_eq!(own.len(), 1, "{own:?}");
    bulkhead.must(&["snapshot", "restore", "g-1", &own[0]]);
    bulkhead.must(&["rm", "--force", "g-1"]);
    assert_eq!(entries(&bulkhead.state().join("runs")), ["vm"]);
    assert_eq!(vm.state(), "running");
}

#[tokio::test(flavor = "multi_thread")]
async fn machines_with_a_network_are_saved_restored_and_forked() {
    let internet = Internet::new();
    let bulkhead = internet.bulkhead();
    let words = [
        "--network",
        "offline",
        "--allow-host",
        "good.org",
        "--start",
    ];
    let vm = bulkhead.create("vm", &[&DISK[..], &words].concat());
    let perl = include_str!("support/try.pl");
    let script = format!(
        "cat > /tmp/try.pl <<'PERL'\n{perl}\nPERL\nperl /tmp/try.pl <<'TRIES'\n\
         web good.org 80 good.org\nname evil.org\ntcp 93.184.215.15 80\nTRIES\n\
         cat /sys/class/net/eth0/address; hostname -I"
    );
    // What it may, what it may not, and where it is.
    let look = |name: &str| {
        let ran = bulkhead.exec(&["-u", "root", name, "sh", "-c", &script]);
        assert_eq!(ran.code, 0, "{name}: {ran:?}");
        let lines: Vec<String> = ran.stdout.lines().map(str::to_owned).collect();
        assert_eq!(lines[..2], ["200 93.184.215.14", "try again"], "{name}");
        assert_eq!(lines[2], "refused", "{name}");
        lines
    };
    let first = look("vm");
    bulkhead.must(&["snapshot", "save", "vm", "s"]);
    assert_eq!(look("vm"), first);
    bulkhead.must(&["snapshot", "restore", "vm", "s"]);
    assert_eq!(look("vm"), first);
    bulkhead.must(&["verify", "vm"]);
    let forks = ["f-1", "f-2"].map(|name| bulkhead.made(name));
    assert_eq!(
        bulkhead.must(&["fork", "vm", "-n", "2", "--name", "f"]),
        "f-1\nf-2\n"
    );
    // Each in a network of its own, which looks the same from inside.
    for name in ["f-1", "f-2", "vm", "f-1"] {
        assert_eq!(look(name), first, "{name}");
    }
    bulkhead.must(&["verify", "f-2"]);
    // What one may from now on is nothing to the others.
    bulkhead.must(&["net", "deny", "f-1", "--host", "good.org"]);
    let denied = bulkhead
        .exec(&["-u", "root", "f-1", "sh", "-c", &script])
        .stdout;
    assert!(!denied.contains("200 "), "{denied}");
    assert_eq!(look("f-2"), first);
    drop(forks);
    drop(vm);
    internet.world.settle();
}

#[test]
fn a_machine_that_shares_a_directory_is_not_forked() {
    let bulkhead = Bulkhead::new().with_own_state();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    let words = ["--workspace", path, "--workspace-mode", "share", "--start"];
    let _vm = bulkhead.create("vm", &[&DISK[..], &words].concat());
    let told = bulkhead.must_fail(&["fork", "vm"], "machine-unsavable");
    let clear = told.contains("shared workspace") && told.contains("--workspace-mode copy");
    assert!(clear, "{told}");
    assert_eq!(bulkhead.exec(&["vm", "echo", "fine"]).stdout, "fine\n");
    assert_eq!(snapshots(&bulkhead, "vm"), [""; 0]);
    assert_eq!(entries(&bulkhead.state().join("runs")), ["vm"]);
}
