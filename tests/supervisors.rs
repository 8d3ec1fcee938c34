//! How machines end, who may end them, and what is true when somebody dies.

mod support;

use std::fs;
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use support::{Bulkhead, entries, machines};

#[test]
fn time_limits_end_a_machine_and_can_be_extended() {
    let bulkhead = Bulkhead::new().with_own_state();
    let short = bulkhead.create("short", &["--ttl", "1s", "--start"]);
    let idle = bulkhead.create("idle", &["--idle-timeout", "2s", "--start"]);
    let busy = bulkhead.create("busy", &["--ttl", "1h", "--start"]);
    // A build in the background is not idle, although no command of ours runs.
    bulkhead.must(&[
        "exec",
        "busy",
        "sh",
        "-c",
        "(while :; do :; done) </dev/null >/dev/null 2>&1 &",
    ]);
    bulkhead.must(&["set", "busy", "--idle-timeout", "2s"]);
    assert_eq!(
        short.becomes("stopped")["reason"],
        "its time to live is over"
    );
    assert_eq!(idle.becomes("stopped")["reason"], "idle for 2s");
    std::thread::sleep(Duration::from_secs(4));
    let view = busy.inspect();
    assert_eq!(view["state"], "running", "{view}");
    let before = view["deadline_ms"].as_u64().unwrap();
    bulkhead.must(&["set", "busy", "--ttl", "2h", "--without", "idle-timeout"]);
    let view = busy.inspect();
    assert!(
        view["deadline_ms"].as_u64().unwrap() > before + 3_000_000,
        "{view}"
    );
    assert!(view["lifetime"]["idle"].is_null(), "{view}");
    bulkhead.must(&["set", "busy", "--ttl", "500ms"]);
    assert_eq!(
        busy.becomes("stopped")["reason"],
        "its time to live is over"
    );
    bulkhead.must_fail(&["set", "busy"], "value-invalid");
    // One that does not run takes it for its next start.
    bulkhead.must(&["set", "busy", "--without", "ttl"]);
    assert!(busy.inspect()["lifetime"]["ttl"].is_null());
}

#[test]
fn a_dead_supervisor_takes_its_machine_along_and_the_state_says_so() {
    let bulkhead = Bulkhead::new().with_own_state();
    let vm = bulkhead.create("lost", &["--start"]);
    bulkhead.must(&[
        "exec",
        "-u",
        "root",
        "lost",
        "sh",
        "-c",
        "echo kept >/root/file; sync",
    ]);
    let supervisor = vm.supervisor();
    kill(supervisor, Signal::SIGKILL).unwrap();
    let view = vm.becomes("lost");
    let reason = view["reason"].as_str().unwrap();
    assert!(reason.contains(&supervisor.to_string()), "{reason}");
    let begin = Instant::now();
    while !machines("lost").is_empty() {
        assert!(begin.elapsed() < Duration::from_secs(60), "QEMU lives on");
        std::thread::sleep(Duration::from_millis(20));
    }
    let dry = bulkhead.must(&["gc", "--dry-run"]);
    assert!(dry.contains("would release lost"), "{dry}");
    assert_eq!(vm.state(), "lost");
    assert!(bulkhead.must(&["gc"]).contains("released lost"));
    assert_eq!(vm.state(), "failed");
    assert_eq!(entries(bulkhead.runtime()), [""; 0]);
    // A start would have cleared it away itself.
    vm.start();
    assert_eq!(
        bulkhead.must(&["exec", "-u", "root", "lost", "cat", "/root/file"]),
        "kept\n"
    );

    // QEMU alone: the supervisor says what happened, and is gone too.
    let supervisor = vm.supervisor();
    kill(vm.vmm(), Signal::SIGKILL).unwrap();
    let view = vm.becomes("failed");
    assert!(
        view["reason"].as_str().unwrap().contains("SIGKILL"),
        "{view}"
    );
    let begin = Instant::now();
    while alive(supervisor) {
        assert!(
            begin.elapsed() < Duration::from_secs(60),
            "its supervisor lives on"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(entries(bulkhead.runtime()), [""; 0]);
    assert_eq!(bulkhead.raw(&["wait", "lost"]).code, 125);
}

fn alive(pid: nix::unistd::Pid) -> bool {
    // Whoever reaps orphans here takes its time: a zombie is dead.
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        !stat
            .rsplit_once(')')
            .unwrap()
            .1
            .trim_start()
            .starts_with('Z')
    })
}

#[test]
fn a_survivor_is_taken_over_by_a_new_supervisor() {
    let bulkhead = Bulkhead::new().with_own_state();
    let vm = bulkhead.create(
        "adopted",
        &["--survivors", "adopt", "--ttl", "1h", "--start"],
    );
    bulkhead.must(&[
        "exec",
        "-u",
        "root",
        "adopted",
        "sh",
        "-c",
        "echo alive >/dev/shm/mark",
    ]);
    let (vmm, deadline) = (vm.vmm(), vm.inspect()["deadline_ms"].as_u64().unwrap());
    kill(vm.supervisor(), Signal::SIGKILL).unwrap();
    vm.becomes("lost");
    assert!(bulkhead.must(&["gc"]).contains("took over adopted"));
    let view = vm.inspect();
    assert_eq!(
        (&view["state"], view["live"]["vmm_pid"].as_i64()),
        (&"running".into(), Some(vmm.as_raw().into()))
    );
    // The same guest: its memory is as it was, and its time goes on.
    assert_eq!(
        bulkhead.must(&["exec", "adopted", "cat", "/dev/shm/mark"]),
        "alive\n"
    );
    let now = view["deadline_ms"].as_u64().unwrap();
    assert!(now.abs_diff(deadline) < 2000, "{now} and {deadline}");
    // Any start takes over too; and an end of the guest is seen without being its parent.
    kill(vm.supervisor(), Signal::SIGKILL).unwrap();
    vm.becomes("lost");
    bulkhead.must_fail(&["start", "adopted"], "state-conflict");
    assert_eq!(vm.state(), "running");
    bulkhead.must(&["stop", "adopted"]);
    assert_eq!(machines("adopted"), [""; 0]);
    // Who looks for its sockets in another place leaves it alone, and says so.
    vm.start();
    kill(vm.supervisor(), Signal::SIGKILL).unwrap();
    vm.becomes("lost");
    let elsewhere = tempfile::tempdir().unwrap();
    let refused = bulkhead.raw(&["--runtime-dir", elsewhere.path().to_str().unwrap(), "gc"]);
    let place = bulkhead.runtime().to_str().unwrap();
    assert!(
        refused.code != 0 && refused.stderr.contains(place),
        "{refused:?}"
    );
    assert_eq!(vm.state(), "lost");
    assert!(bulkhead.must(&["gc"]).contains("took over adopted"));
    // One whose VMM died with its supervisor is no survivor.
    let (vmm, supervisor) = (vm.vmm(), vm.supervisor());
    kill(supervisor, Signal::SIGKILL).unwrap();
    kill(vmm, Signal::SIGKILL).unwrap();
    let begin = Instant::now();
    while alive(vmm) {
        assert!(begin.elapsed() < Duration::from_secs(60), "it lives on");
        std::thread::sleep(Duration::from_millis(10));
    }
    bulkhead.must(&["gc"]);
    assert_eq!(vm.state(), "failed");
    assert_eq!(entries(bulkhead.runtime()), [""; 0]);
}

#[test]
fn a_reboot_of_the_host_is_recognised() {
    let bulkhead = Bulkhead::new().with_own_state();
    let vm = bulkhead.create("rebooted", &["--start"]);
    let vmm = vm.vmm();
    kill(vm.supervisor(), Signal::SIGKILL).unwrap();
    while alive(vmm) {}
    // As the disk is found after a reboot: everything is of another boot, and
    // the process ids are somebody else's.
    let run = bulkhead.state().join("runs/rebooted");
    let ours = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    for name in ["state.json", "leases.json"] {
        let text = fs::read_to_string(run.join(name)).unwrap();
        let other = text.replace(ours.trim(), "00000000-0000-0000-0000-000000000000");
        assert_ne!(text, other);
        fs::write(run.join(name), other).unwrap();
    }
    let seen = vm.inspect();
    assert_eq!(
        (&seen["state"], &seen["reason"]),
        (&"lost".into(), &"the host was started again".into())
    );
    bulkhead.must(&["gc"]);
    let seen = vm.inspect();
    assert_eq!(
        (&seen["state"], &seen["reason"]),
        (&"stopped".into(), &"the host was started again".into())
    );
    vm.start();
}

#[test]
fn what_a_power_cut_left_is_in_nobodys_way() {
    let bulkhead = Bulkhead::new().with_own_state();
    let adopt = ["--survivors", "adopt", "--network", "offline"];
    let vm = bulkhead.create("vm", &adopt);
    // Its leases are lost, and files outlive the host in a runtime directory that
    // is on a disk.
    let runtime = bulkhead.runtime();
    let sockets = runtime.join("vm.vmm");
    fs::create_dir_all(&sockets).unwrap();
    for name in ["qmp", "console"] {
        drop(std::os::unix::net::UnixListener::bind(sockets.join(name)).unwrap());
    }
    fs::write(runtime.join("vm.netns"), "").unwrap();
    fs::write(bulkhead.state().join("runs/vm/leases.json"), [0; 512]).unwrap();
    bulkhead.must(&["start", "vm"]);
    assert_eq!(bulkhead.must(&["exec", "vm", "echo", "up"]), "up\n");
    bulkhead.must(&["stop", "vm"]);
    assert_eq!(vm.inspect()["state"], "stopped");
    assert!(!runtime.join("vm.netns").exists() && !sockets.exists());
}

#[test]
fn the_guests_own_end_is_told_apart() {
    let bulkhead = Bulkhead::new().with_own_state();
    let vm = bulkhead.create("guest", &[]);
    // reboot(2): LINUX_REBOOT_CMD_POWER_OFF and LINUX_REBOOT_CMD_RESTART.
    for (command, reason) in [
        // Without ACPI it cannot: it stands still, which takes a while to see.
        ("0x4321fedc", "the guest halted"),
        ("0x1234567", "the guest restarted, which ends it"),
    ] {
        vm.start();
        let call = format!("syscall(169, 0xfee1dead, 672274793, {command}, 0)");
        let ran = bulkhead.exec(&["-u", "root", "guest", "perl", "-e", &call]);
        // Its command ended with it, and hears why.
        assert_eq!(ran.code, 125, "{ran:?}");
        assert!(
            ran.stderr.contains("the machine ended meanwhile"),
            "{ran:?}"
        );
        let view = vm.becomes("stopped");
        assert_eq!(view["reason"], reason, "{view}");
        assert_eq!(entries(bulkhead.runtime()), [""; 0]);
    }
}

#[test]
fn users_cannot_see_or_touch_each_others_machines_and_root_can() {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: users: only root can be several users");
        return;
    }
    // Somewhere both users get to.
    let top = tempfile::tempdir().unwrap();
    fs::set_permissions(top.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let program = top.path().join("bulkhead");
    fs::copy(env!("CARGO_BIN_EXE_bulkhead"), &program).unwrap();
    let shared = Bulkhead::new();
    let (alice, mallory) = (12_345, 12_346);
    let state = top.path().join("alice");
    fs::create_dir_all(&state).unwrap();
    for dir in ["images", "kernels"] {
        let copied = std::process::Command::new("cp")
            .args(["-a", "--reflink=auto"])
            .arg(shared.state().join(dir))
            .arg(&state)
            .status();
        assert!(copied.unwrap().success());
    }
    // Only the one image: the others are large.
    let chowned = std::process::Command::new("chown")
        .args(["-R", &alice.to_string()])
        .arg(&state)
        .status();
    assert!(chowned.unwrap().success());
    let runtime = top.path().join("run");
    fs::create_dir(&runtime).unwrap();
    fs::set_permissions(&runtime, fs::Permissions::from_mode(0o1777)).unwrap();
    let call = |uid: u32, words: &[&str]| {
        let mut command = std::process::Command::new(&program);
        command
            .args(words)
            .env_clear()
            .env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin")
            .env("BULKHEAD_CONFIG", "none")
            .env("BULKHEAD_NETWORK", "isolated")
            .env("BULKHEAD_STATE_DIR", &state)
            .env("BULKHEAD_RUNTIME_DIR", runtime.join("alice"))
            .current_dir("/");
        if uid != 0 {
            command.uid(uid).gid(uid);
        }
        let output = command.stdin(Stdio::null()).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (
            output.status.code(),
            text(output.stdout),
            text(output.stderr),
        )
    };
    let create = [
        "create", "--accel", "tcg", "--kernel", "tuned", "--image", "base", "--memory", "256M",
        "--cpus", "1", "--name", "hers", "--start",
    ];
    let made = call(alice, &create);
    assert_eq!(made.0, Some(0), "{made:?}");
    let ran = call(alice, &["exec", "hers", "id", "-un"]);
    assert_eq!((ran.0, ran.1.as_str()), (Some(0), "agent\n"), "{ran:?}");
    for words in [
        &["ls", "-q"][..],
        &["exec", "hers", "true"],
        &["rm", "-f", "hers"],
        &["inspect", "hers"],
        &["gc"],
    ] {
        let tried = call(mallory, words);
        assert!(
            tried.0 != Some(0) && !tried.1.contains("hers"),
            "{words:?}: {tried:?}"
        );
    }
    // The socket itself, had he the path.
    let socket = runtime.join("alice/hers.sock");
    let direct = std::process::Command::new("python3")
        .args([
            "-c",
            "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])",
        ])
        .arg(&socket)
        .uid(mallory)
        .gid(mallory)
        .output()
        .unwrap();
    assert!(
        String::from_utf8_lossy(&direct.stderr).contains("PermissionError"),
        "{direct:?}"
    );
    let root = call(0, &["exec", "hers", "echo", "root"]);
    assert_eq!((root.0, root.1.as_str()), (Some(0), "root\n"), "{root:?}");
    let removed = call(0, &["rm", "-f", "hers"]);
    assert_eq!(removed.0, Some(0), "{removed:?}");
    assert_eq!(machines("hers"), [""; 0]);
}

#[test]
fn a_stop_that_comes_during_the_start_is_a_stop() {
    let bulkhead = Bulkhead::new().with_own_state();
    let vm = bulkhead.create("early", &[]);
    let start = bulkhead
        .command(&["start", "early"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    vm.becomes("starting");
    bulkhead.must(&["stop", "early"]);
    assert_ne!(start.wait_with_output().unwrap().status.code(), Some(0));
    let view = vm.inspect();
    assert_eq!(view["state"], "stopped", "{view}");
    assert_eq!(machines("early"), [""; 0]);
    vm.start();
}

#[test]
fn whoever_leaves_is_not_waited_for_and_force_needs_no_answer() {
    let bulkhead = Bulkhead::new().with_own_state();
    let vm = bulkhead.create("waits", &["--start"]);
    let supervisor = vm.supervisor();
    let open = || {
        fs::read_dir(format!("/proc/{supervisor}/fd"))
            .unwrap()
            .count()
    };
    let before = open();
    for _ in 0..30 {
        let mut wait = bulkhead.command(&["wait", "waits"]).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(50));
        wait.kill().unwrap();
        wait.wait().unwrap();
    }
    let begin = Instant::now();
    while open() > before + 3 {
        assert!(
            begin.elapsed() < Duration::from_secs(60),
            "{} of {before}",
            open()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    // QEMU does not answer, and then not even the supervisor.
    kill(vm.vmm(), Signal::SIGSTOP).unwrap();
    bulkhead.must(&["stop", "--force", "waits"]);
    assert_eq!(machines("waits"), [""; 0]);
    vm.start();
    let (supervisor, vmm) = (vm.supervisor(), vm.vmm());
    kill(supervisor, Signal::SIGSTOP).unwrap();
    bulkhead.must(&["stop", "--force", "waits"]);
    assert!(!alive(supervisor) && !alive(vmm));
    assert_eq!(vm.state(), "failed");
    assert_eq!(entries(bulkhead.runtime()), [""; 0]);

    // Neither does one live on that may outlive its supervisor.
    let vm = bulkhead.create("adoptable", &["--survivors", "adopt", "--start"]);
    let (supervisor, vmm) = (vm.supervisor(), vm.vmm());
    kill(supervisor, Signal::SIGSTOP).unwrap();
    bulkhead.must(&["stop", "--force", "adoptable"]);
    assert!(!alive(supervisor) && !alive(vmm));
    assert_eq!(vm.state(), "failed");
    assert_eq!(entries(bulkhead.runtime()), [""; 0]);
}

#[test]
fn two_state_directories_do_not_take_each_others_sockets() {
    let one = Bulkhead::new().with_own_state();
    let vm = one.create("same", &[]);
    let other = tempfile::tempdir().unwrap();
    for name in ["images", "kernels"] {
        let prepared = Bulkhead::new().state().join(name);
        std::os::unix::fs::symlink(prepared, other.path().join(name)).unwrap();
    }
    let in_other = |words: &[&str]| {
        let dir = other.path().to_str().unwrap();
        one.raw(&[&["--state-dir", dir], words].concat())
    };
    let words = [
        "create", "--accel", "tcg", "--kernel", "tuned", "--image", "base", "--memory", "256M",
        "--name", "same",
    ];
    assert_eq!(in_other(&words).code, 0);
    vm.start();
    let refused = in_other(&["start", "same"]);
    assert!(
        refused.code == 125 && refused.stderr.contains("same.sock"),
        "{refused:?}"
    );
    // The first is as it was, and can be reached.
    assert_eq!(one.must(&["exec", "same", "echo", "on"]), "on\n");
    assert_eq!(in_other(&["rm", "-f", "same"]).code, 0);
    assert_eq!(one.must(&["exec", "same", "echo", "on"]), "on\n");
}

#[test]
fn a_paused_survivor_is_taken_over_as_it_stands_and_is_not_removed_by_mistake() {
    let bulkhead = Bulkhead::new().with_own_state();
    let vm = bulkhead.create("still", &["--survivors", "adopt", "--start"]);
    bulkhead.must(&["exec", "-d", "still", "sleep", "1000"]);
    bulkhead.must(&["pause", "still"]);
    let vmm = vm.vmm();
    kill(vm.supervisor(), Signal::SIGKILL).unwrap();
    vm.becomes("lost");
    bulkhead.must_fail(&["rm", "still"], "state-conflict");
    assert!(alive(vmm));
    bulkhead.must(&["gc"]);
    let view = vm.becomes("paused");
    assert_eq!(view["live"]["vmm_pid"], vmm.as_raw(), "{view}");
    bulkhead.must(&["resume", "still"]);
    assert_eq!(bulkhead.must(&["exec", "still", "echo", "on"]), "on\n");
    // What was lost with the supervisor is said to have ended, and so is what
    // ends with the machine.
    bulkhead.must(&["exec", "-d", "still", "sleep", "1001"]);
    bulkhead.must(&["stop", "--force", "still"]);
    let list = bulkhead.json(&["logs", "still", "--list"]);
    for exec in list.as_array().unwrap() {
        assert!(!exec["ended"].is_null(), "{list}");
    }
}

#[test]
fn limits_change_on_a_live_machine_and_hold_at_its_next_start() {
    let bulkhead = Bulkhead::new().with_own_state();
    let vm = bulkhead.create("tuned", &["--disk", "128M", "--start"]);
    let size = || -> u64 {
        let kib = bulkhead.must(&[
            "exec",
            "tuned",
            "sh",
            "-c",
            "df -k / | awk 'NR==2 {print $2}'",
        ]);
        kib.trim().parse().unwrap()
    };
    let before = size();
    bulkhead.must(&[
        "set",
        "tuned",
        "--disk",
        "512M",
        "--write-rate",
        "1M",
        "--memory",
        "128M",
    ]);
    assert!(size() > 3 * before, "{} of {before}", size());
    let view = vm.inspect();
    assert_eq!(view["tuning"]["io"]["write_bytes"], "1M", "{view}");
    assert_eq!(
        (&view["disk"], &view["tuning"]["memory"]),
        (&"512M".into(), &"128M".into())
    );
    let available = || -> u64 {
        let kib = bulkhead.must(&[
            "exec",
            "tuned",
            "awk",
            "/MemAvailable/ {print $2}",
            "/proc/meminfo",
        ]);
        kib.trim().parse().unwrap()
    };
    let begin = Instant::now();
    while available() > 120 << 10 {
        assert!(
            begin.elapsed() < Duration::from_secs(30),
            "{} KiB",
            available()
        );
    }
    bulkhead.must_fail(&["set", "tuned", "--disk", "64M"], "value-invalid");
    bulkhead.must(&["restart", "tuned"]);
    assert!(size() > 3 * before);
    // A start waits a moment only for the balloon.
    let begin = Instant::now();
    while available() >= 128 << 10 {
        assert!(
            begin.elapsed() < Duration::from_secs(60),
            "{} KiB",
            available()
        );
    }
    bulkhead.must(&["stop", "tuned"]);
    bulkhead.must(&[
        "set",
        "tuned",
        "--disk",
        "1G",
        "--without",
        "memory",
        "--without",
        "io",
    ]);
    vm.start();
    assert!(size() > 6 * before && available() > 128 << 10);
}
