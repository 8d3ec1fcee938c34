//! What changes the whole host to be tried, and so is tried in the lab only:
//! profiles of AppArmor, and the handler of core dumps.

mod support;

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bulkhead::error::Report;
use bulkhead::plan::jail::PROFILE;
use bulkhead::spec::Request as Wish;
use bulkhead::vmm::APPARMOR;
use serde_json::{Value, json};
use support::live::Live;
use support::{Bulkhead, Ran};

/// Runs `apparmor_parser` on our profile; none where there is no such program.
fn parser(options: &[&str]) -> Option<Ran> {
    let mut command = Command::new("apparmor_parser");
    command.args(options).stdin(Stdio::piped());
    let mut child = match command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
    {
        Ok(child) => child,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
        Err(error) => panic!("{error}"),
    };
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(APPARMOR.as_bytes()).unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    Some(Ran {
        // What it compiles is no text.
        stdout: output.stdout.len().to_string(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        code: output.status.code().unwrap_or(-1),
    })
}

#[test]
fn the_profile_compiles_and_bears_its_name() {
    assert!(APPARMOR.contains(&format!("profile {PROFILE} ")));
    let words = ["--skip-kernel-load", "--skip-cache", "--stdout"];
    // Without AppArmor in the kernel it has to be told what kernels know.
    let features = ["--features-file", "/etc/apparmor.d/abi/3.0"];
    let Some(ran) = parser(&[&words[..], &features].concat()) else {
        println!("skipped: apparmor_parser: it is not installed");
        return;
    };
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(ran.stdout.parse::<usize>().unwrap() > 1000, "{ran:?}");
}

/// The finding about the label in an outcome.
fn label(ran: &Ran) -> Value {
    let outcome: Value = serde_json::from_str(&ran.stdout).unwrap_or_else(|_| panic!("{ran:?}"));
    let layers = outcome["layers"].as_array().unwrap();
    layers
        .iter()
        .find(|one| one["layer"] == "lsm")
        .unwrap()
        .clone()
}

#[test]
#[ignore = "loads a profile into the kernel: cargo xtask lab test"]
fn machines_are_in_the_profile_where_it_is_loaded() {
    if !Path::new("/sys/kernel/security/apparmor").exists() {
        let mount = ["-t", "securityfs", "securityfs", "/sys/kernel/security"];
        Command::new("mount").args(mount).status().unwrap();
    }
    let bulkhead = Bulkhead::new();
    let run = |options: &[&str]| {
        let fixed = [
            "--json", "run", "--image", "base", "--memory", "256M", "--cpus", "1",
        ];
        bulkhead.raw(&[&fixed[..], options, &["--", "true"]].concat())
    };
    // Not loaded yet: nothing is planned, and that is said.
    let found = label(&run(&[]));
    assert_eq!(found["verdict"], "unseen", "{found}");
    // Asked for by name it must be there.
    let refused = run(&["--lsm-label", "bulkhead-nowhere"]);
    assert_eq!(
        (refused.code, refused.stdout.as_str()),
        (125, ""),
        "{refused:?}"
    );
    assert!(refused.stderr.contains("step Label"), "{refused:?}");
    let loaded = parser(&["--replace"]).expect("apparmor_parser is installed");
    assert_eq!(loaded.code, 0, "{loaded:?}");
    for options in [&[][..], &["--machine", "q35"], &["--channel", "serial"]] {
        let found = label(&run(options));
        assert_eq!(found["verdict"], "pass", "{found}");
        assert_eq!(found["measured"], format!("{PROFILE} (enforce)"), "{found}");
    }
    let found = label(&run(&["--waive", "lsm"]));
    assert_eq!(found["verdict"], "waived", "{found}");
    let doctor: Value = serde_json::from_str(&bulkhead.raw(&["--json", "doctor"]).stdout).unwrap();
    let all = doctor.as_array().unwrap();
    let check = all
        .iter()
        .find(|one| one["name"] == "security module")
        .unwrap();
    assert_eq!(check["status"], "ok", "{check}");
    assert_eq!(parser(&["--remove"]).unwrap().code, 0);
}

/// Whether a file appears soon.
fn appears(file: &Path, patience: Duration) -> bool {
    let begin = Instant::now();
    while !file.exists() && begin.elapsed() < patience {
        std::thread::sleep(Duration::from_millis(50));
    }
    file.exists()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "sets the host's handler of core dumps: cargo xtask lab test"]
async fn no_handler_of_core_dumps_reads_a_vmm() {
    let pattern = "/proc/sys/kernel/core_pattern";
    let before = fs::read_to_string(pattern).unwrap();
    let seen = Path::new("/run/lab/core-handler-was-run");
    fs::write(
        pattern,
        format!("|/run/lab/busybox touch {}", seen.display()),
    )
    .unwrap();
    // What it is about: a limit of zero does not stop it.
    let mut shell = Command::new("sh");
    shell
        .args(["-c", "ulimit -c 0; kill -SEGV $$"])
        .status()
        .unwrap();
    assert!(
        appears(seen, Duration::from_secs(30)),
        "the handler is not run at all"
    );
    fs::remove_file(seen).unwrap();
    let live = Live::new();
    let machine = live.start(Wish::default()).await;
    let socket = json!({ "id": "out", "backend": { "type": "socket", "data": {
        "addr": { "type": "unix", "data": { "path": "/x" } }, "server": false
    } } });
    assert!(
        machine
            .monitor()
            .execute_raw("chardev-add", socket)
            .await
            .is_err()
    );
    machine.process().wait().await.unwrap();
    let reason = Report::of(&machine.end_reason().await.unwrap());
    assert_eq!(reason.code, "system-call-violation", "{reason:?}");
    let was_run = appears(seen, Duration::from_secs(5));
    machine.kill().await.unwrap();
    fs::write(pattern, before).unwrap();
    assert!(!was_run, "a handler of the host was given QEMU's memory");
}
