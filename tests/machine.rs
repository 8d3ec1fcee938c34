//! One machine through the library, and what others see of it meanwhile.

mod support;

use std::io::{Read, Write};
use std::process::Stdio;
use std::time::{Duration, Instant};

use bulkhead::error::Explain as _;
use bulkhead::guest::Output;
use bulkhead::run::{Dirs, Host};
use bulkhead::spec::{Accel, Catalog, NetworkMode, Request as Wish, Spec};
use bulkhead_agent::{Exec, Request};
use support::Bulkhead;
use support::terminal::Terminal;

/// More than any answer takes.
const PATIENCE: Duration = Duration::from_secs(30);

fn host(runtime: &tempfile::TempDir) -> Host {
    let state = std::env::var_os("BULKHEAD_TEST_STATE").expect("run `cargo xtask test`");
    Host {
        die_with_thread: true,
        ..Host::new(Dirs {
            state: state.into(),
            runtime: runtime.path().to_owned(),
        })
    }
}

fn spec() -> Spec {
    let wish = Wish {
        image: Some("base".into()),
        accel: Some(Accel::Tcg),
        network: Some(NetworkMode::Isolated.into()),
        command: vec!["true".into()],
        ..Wish::default()
    };
    wish.resolve(&Catalog::default()).unwrap()
}

#[tokio::test]
async fn two_hundred_commands_at_once_all_answer() {
    let runtime = tempfile::tempdir().unwrap();
    let (_, machine) = host(&runtime).start(&spec()).await.unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..200 {
        let channel = machine.channel().clone();
        tasks.spawn(async move {
            let exec = Exec {
                argv: ["sh", "-c", &format!("echo {n}; exit {}", n % 100)]
                    .map(str::to_owned)
                    .into(),
                ..Exec::default()
            };
            let mut stream = channel.open(&Request::Exec(exec)).await.unwrap();
            stream.started("run sh").await.unwrap();
            let mut text = Vec::new();
            loop {
                match stream.next().await.unwrap() {
                    Output::Out(bytes) => text.extend(bytes),
                    Output::Err(bytes) => panic!("{}", String::from_utf8_lossy(&bytes)),
                    Output::Exit(exit) => break (n, text, exit.code),
                }
            }
        });
    }
    let mut answers = 0;
    while let Some(answer) = tasks.join_next().await {
        let (n, text, code) = answer.unwrap();
        assert_eq!((text, code), (format!("{n}\n").into_bytes(), Some(n % 100)));
        answers += 1;
    }
    assert_eq!(answers, 200);
    machine.stop(Duration::from_secs(20)).await.unwrap();
}

/// A port polled from two sides once lost one message in a few hundred.
#[tokio::test]
async fn no_message_gets_lost_on_the_way() {
    let runtime = tempfile::tempdir().unwrap();
    let (_, machine) = host(&runtime).start(&spec()).await.unwrap();
    for round in 0..1000 {
        let ask = machine
            .channel()
            .ask("describe itself", &Request::Info, PATIENCE);
        ask.await
            .unwrap_or_else(|error| panic!("round {round}: {error}"));
    }
    machine.stop(Duration::from_secs(20)).await.unwrap();
}

#[tokio::test]
async fn a_silent_guest_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let qemu = dir.path().join("qemu");
    // Started, but its processors never run.
    std::fs::write(&qemu, "#!/bin/sh\nexec qemu-system-x86_64 -S \"$@\"\n").unwrap();
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&qemu, executable).unwrap();
    let host = Host {
        qemu: Some(qemu),
        boot_timeout: Duration::from_secs(10),
        ..host(&dir)
    };
    // A script: a jail would need a shell.
    let waive = "files,seccomp".parse().unwrap();
    let spec = Spec { waive, ..spec() };
    let error = host.start(&spec).await.unwrap_err();
    assert_eq!(error.code(), "agent-silent", "{error}");
    assert_eq!(support::machines(spec.id.as_str()), [""; 0]);
    assert!(!host.dirs.runs().join(spec.id.as_str()).exists());
}

#[test]
fn how_long_a_guest_may_take_is_the_users_to_say() {
    let dir = tempfile::tempdir().unwrap();
    let qemu = dir.path().join("qemu");
    std::fs::write(&qemu, "#!/bin/sh\nexec qemu-system-x86_64 -S \"$@\"\n").unwrap();
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&qemu, executable).unwrap();
    let qemu = qemu.to_str().unwrap();
    let words = ["--boot-timeout", "2s", "--qemu", qemu];
    let waive = ["--waive", "files,seccomp"];
    let run = Bulkhead::new().run(&[&words[..], &waive, &["--", "true"]].concat());
    assert!(
        run.code == 125 && run.stderr.contains("within 2s"),
        "{run:?}"
    );
}

#[tokio::test]
async fn an_image_in_use_cannot_be_removed() {
    let runtime = tempfile::tempdir().unwrap();
    let host = host(&runtime);
    let (image, machine) = host.start(&spec()).await.unwrap();
    let error = host.images().rm(&image.id).unwrap_err();
    assert_eq!(error.code(), "image-in-use", "{error}");
    machine.kill().await.unwrap();
}

#[test]
fn a_running_machine_can_be_inspected() {
    let bulkhead = Bulkhead::with_image("default");
    let script = "qemu-ga -p /dev/virtio-ports/org.qemu.guest_agent.0 & echo ready; sleep 600";
    let words = ["--user", "root", "--", "sh", "-c", script];
    let run = bulkhead.start("inspected", &words);
    let info = bulkhead.raw(&["--json", "inspect", "inspected", "--guest"]);
    let info: serde_json::Value = serde_json::from_str(&info.stdout).unwrap();
    assert!(info["os"].as_str().unwrap().contains("Debian"), "{info}");
    assert_eq!(info["interfaces"][0]["name"], "lo");
    let processes = info["processes"].as_array().unwrap();
    let has = |name: &str| {
        let named =
            |process: &serde_json::Value| process["command"].as_str().unwrap().contains(name);
        processes.iter().any(named)
    };
    assert!(has("sleep 600"), "{info}");
    let text = bulkhead.raw(&["inspect", "inspected", "--guest"]);
    assert!(text.stdout.contains("Debian") && text.code == 0, "{text:?}");
    // qemu-ga needs a moment to open its port.
    let deadline = Instant::now() + Duration::from_secs(30);
    let qga = loop {
        let qga = bulkhead.raw(&["--json", "inspect", "inspected", "--guest", "--qga"]);
        if qga.code == 0 || Instant::now() > deadline {
            break qga;
        }
    };
    let qga: serde_json::Value = serde_json::from_str(&qga.stdout).unwrap();
    assert!(qga["os"].to_string().contains("debian"), "{qga}");
    run.signal(nix::sys::signal::Signal::SIGINT);
    assert_eq!(run.finish().code, 130);
    let gone = bulkhead.raw(&["inspect", "inspected", "--guest"]);
    assert!(
        gone.code == 125 && gone.stderr.contains("machine-not-found"),
        "{gone:?}"
    );
}

#[test]
fn the_emergency_console_is_a_root_shell_again_and_again() {
    let bulkhead = Bulkhead::new();
    let run = bulkhead.start("console", &["--", "sh", "-c", "echo ready; sleep 600"]);
    for round in 1..=2 {
        let mut console = bulkhead
            .command(&["console", "console"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = console.stdin.take().unwrap();
        stdin
            .write_all(b"\necho round-$((40+2))-$(id -un)\n")
            .unwrap();
        let mut stdout = console.stdout.take().unwrap();
        let mut seen = String::new();
        let mut buffer = [0; 1000];
        while !seen.contains("round-42-root") {
            let count = stdout.read(&mut buffer).unwrap();
            assert!(count > 0, "the console closed in round {round}: {seen}");
            seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
        }
        stdin.write_all(b"\x1d").unwrap();
        assert!(console.wait().unwrap().success());
    }
    run.signal(nix::sys::signal::Signal::SIGTERM);
    run.finish();
}

#[test]
fn a_terminal_is_a_real_one() {
    let script = "stty size; while [ \"$(stty size)\" = '40 120' ]; do sleep 0.1; done; \
                  stty size; echo ask; read x; echo \"got-$x\"; exec cat";
    let words = [
        "run",
        "--accel",
        "tcg",
        "--image",
        "base",
        "--timeout",
        "60s",
        "-t",
        "--",
        "sh",
        "-c",
        script,
    ];
    let bulkhead = Bulkhead::new();
    let mut terminal = Terminal::start(bulkhead.command(&words), 40, 120);
    terminal.wait_for("40 120");
    terminal.resize(50, 100);
    terminal.wait_for("50 100");
    terminal.wait_for("ask");
    terminal.send(b"words\r");
    terminal.wait_for("got-words");
    // A shell that is about to fork drops the signal: cat itself has to answer.
    terminal.send(b"again\r");
    terminal.wait_for("again\r\nagain");
    // Ctrl-C is a character, and the guest's terminal makes it a signal.
    terminal.send(b"\x03");
    assert_eq!(terminal.finish().code(), Some(130));
}

#[test]
fn doctor_tells_each_ability_with_reason_and_cure() {
    let bulkhead = Bulkhead::new();
    let doctor = bulkhead.raw(&["--json", "doctor"]);
    let checks: serde_json::Value = serde_json::from_str(&doctor.stdout).unwrap();
    let checks = checks.as_array().unwrap();
    let find = |name: &str| checks.iter().find(|check| check["name"] == name);
    for name in [
        "kvm", "qemu", "image", "vsock", "cgroup", "landlock", "nftables", "user", "space",
    ] {
        let check = find(name).unwrap_or_else(|| panic!("nothing of {name}: {doctor:?}"));
        assert!(!check["seen"].as_str().unwrap().is_empty(), "{check}");
        assert!(
            check["status"] == "ok" || check["cure"].is_string(),
            "{check}"
        );
    }
    assert_eq!(find("qemu").unwrap()["status"], "ok");
    // Asked again, the verdict on KVM is the same: a bad one is proved again.
    let again = bulkhead.raw(&["--json", "doctor"]);
    let again: serde_json::Value = serde_json::from_str(&again.stdout).unwrap();
    let kvm = |checks: &serde_json::Value| {
        let kvm = checks
            .as_array()
            .unwrap()
            .iter()
            .find(|check| check["name"] == "kvm");
        kvm.unwrap()["status"].clone()
    };
    assert_eq!(kvm(&again), find("kvm").unwrap()["status"]);
}
