//! `bulkhead run` against real QEMU, real kernels and the real agent.

mod support;

use support::Bulkhead;

#[test]
fn streams_stay_apart_and_the_exit_code_is_the_commands() {
    let run = Bulkhead::new().run(&["--", "sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!((run.stdout.as_str(), run.code), ("out\n", 7), "{run:?}");
    assert!(run.stderr.ends_with("err\n"), "{run:?}");
}

#[test]
fn stdin_reaches_the_command() {
    let run = Bulkhead::new().run_with_input(&["--", "tr", "a-z", "A-Z"], b"hello\n");
    assert_eq!((run.stdout.as_str(), run.code), ("HELLO\n", 0), "{run:?}");
}

#[test]
fn commands_run_unprivileged_unless_root_is_asked_for() {
    let bulkhead = Bulkhead::new();
    assert_eq!(bulkhead.run(&["--", "id", "-un"]).stdout, "agent\n");
    assert_eq!(
        bulkhead.run(&["--user", "root", "--", "id", "-u"]).stdout,
        "0\n"
    );
}

#[test]
fn environment_and_directory_are_as_asked() {
    let words = [
        "--env",
        "A=b c",
        "--workdir",
        "/tmp",
        "--",
        "sh",
        "-c",
        "echo \"$A\"; pwd",
    ];
    assert_eq!(Bulkhead::new().run(&words).stdout, "b c\n/tmp\n");
}

#[test]
fn a_command_that_does_not_exist_gives_127() {
    let run = Bulkhead::new().run(&["--", "no-such-program"]);
    assert_eq!(run.code, 127, "{run:?}");
    assert!(run.stderr.contains("command-not-found") && run.stderr.contains("no-such-program"));
}

#[test]
fn a_command_out_of_time_gives_124() {
    let run = Bulkhead::new().run(&["--timeout", "1s", "--", "sleep", "600"]);
    assert_eq!(run.code, 124, "{run:?}");
}

#[test]
fn a_signal_gives_128_and_its_number() {
    let run = Bulkhead::new().run(&["--", "sh", "-c", "kill -TERM $$"]);
    assert_eq!(run.code, 143, "{run:?}");
}

#[test]
fn the_outcome_says_that_emulation_is_no_isolation() {
    let run = Bulkhead::new().run(&["--json", "--", "echo", "hi"]);
    let outcome: serde_json::Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!(outcome["hardware_isolation"], false);
    assert_eq!(outcome["stdout"]["text"], "hi\n");
    assert_eq!(outcome["exit_code"], 0);
}

#[test]
fn a_hundred_megabytes_arrive_whole() {
    let script = "head -c 100000000 /dev/zero";
    let run = Bulkhead::new().run(&["--", "sh", "-c", script]);
    assert_eq!((run.stdout.len(), run.code), (100_000_000, 0));
}

#[test]
fn q35_boots_too() {
    let run = Bulkhead::new().run(&["--machine", "q35", "--", "echo", "hi"]);
    assert_eq!((run.stdout.as_str(), run.code), ("hi\n", 0), "{run:?}");
}

#[test]
fn changes_come_back_only_on_request() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("a.txt"), "one\n").unwrap();
    let path = dir.path().to_str().unwrap();
    let change = [
        "--",
        "sh",
        "-c",
        "cat a.txt; echo two > a.txt; echo new > b.txt",
    ];
    let bulkhead = Bulkhead::new();

    let run = bulkhead.run(&[&["--workspace", path, "--diff"], &change[..]].concat());
    assert_eq!((run.stdout.as_str(), run.code), ("one\n", 0), "{run:?}");
    assert!(run.stderr.contains("-one\n+two\n"), "{run:?}");
    assert_eq!(
        std::fs::read_to_string(dir.path().join("a.txt")).unwrap(),
        "one\n"
    );

    let run = bulkhead.run(&[&["--workspace", path, "--apply"], &change[..]].concat());
    assert_eq!(run.code, 0, "{run:?}");
    assert_eq!(
        std::fs::read_to_string(dir.path().join("a.txt")).unwrap(),
        "two\n"
    );
    assert_eq!(
        std::fs::read_to_string(dir.path().join("b.txt")).unwrap(),
        "new\n"
    );
}

#[test]
fn artifacts_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out");
    let words = [
        "--artifacts",
        path.to_str().unwrap(),
        "--",
        "sh",
        "-c",
        "echo x > /workspace/output/r",
    ];
    let run = Bulkhead::new().run(&words);
    assert_eq!(run.code, 0, "{run:?}");
    assert_eq!(std::fs::read_to_string(path.join("r")).unwrap(), "x\n");
}

#[test]
fn scripts_pick_their_interpreter() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("job.sh");
    std::fs::write(&path, "echo script $1\n").unwrap();
    let run = Bulkhead::new().run(&["--script", path.to_str().unwrap(), "--", "arg"]);
    assert_eq!(
        (run.stdout.as_str(), run.code),
        ("script arg\n", 0),
        "{run:?}"
    );
}

#[test]
fn real_programs_work_in_the_default_image() {
    let script = "set -e; python3 -c 'print(6*7)'; printf 'int main(){return 0;}' > m.c; \
                  gcc m.c -o m && ./m; git init -q . && git -c user.name=a -c user.email=a@b \
                  commit -q --allow-empty -m x; node -e 'console.log(1+1)'";
    let run = Bulkhead::with_image("default").run(&["--", "sh", "-c", script]);
    assert_eq!((run.stdout.as_str(), run.code), ("42\n2\n", 0), "{run:?}");
}

#[test]
fn without_kvm_it_stops_with_reason_and_cure() {
    let run = Bulkhead::new().raw(&["run", "--image", "base", "--", "true"]);
    if run.code == 0 {
        println!("skipped: without_kvm_it_stops_with_reason_and_cure: KVM works here");
        return;
    }
    assert_eq!(run.code, 125, "{run:?}");
    assert!(
        run.stderr.contains("kvm-unusable") && run.stderr.contains("--accel tcg"),
        "{run:?}"
    );
}

#[test]
fn a_missing_image_and_a_missing_qemu_are_named() {
    let bulkhead = Bulkhead::new();
    let run = bulkhead.raw(&["run", "--accel", "tcg", "--image", "nowhere", "--", "true"]);
    assert!(run.code == 125 && run.stderr.contains("nowhere"), "{run:?}");
    let run = bulkhead.run(&["--qemu", "/nowhere/qemu", "--", "true"]);
    assert!(
        run.code == 125 && run.stderr.contains("qemu-not-found"),
        "{run:?}"
    );
}

#[test]
fn a_qemu_that_dies_is_quoted() {
    let dir = tempfile::tempdir().unwrap();
    let qemu = dir.path().join("qemu");
    std::fs::write(&qemu, "#!/bin/sh\necho 'no such machine' >&2; exit 1\n").unwrap();
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&qemu, executable).unwrap();
    let run = Bulkhead::new().run(&["--qemu", qemu.to_str().unwrap(), "--", "true"]);
    assert_eq!(run.code, 125, "{run:?}");
    assert!(
        run.stderr.contains("qemu-died") && run.stderr.contains("no such machine"),
        "{run:?}"
    );
}

#[test]
fn core_runs_work_on_qemu_10() {
    let Ok(qemu) = std::env::var("BULKHEAD_QEMU10") else {
        println!("skipped: core_runs_work_on_qemu_10: BULKHEAD_QEMU10 names no QEMU");
        return;
    };
    for machine in ["microvm", "q35"] {
        let words = [
            "--qemu",
            &qemu,
            "--machine",
            machine,
            "--",
            "sh",
            "-c",
            "echo hi; exit 3",
        ];
        let run = Bulkhead::new().run(&words);
        assert_eq!(
            (run.stdout.as_str(), run.code),
            ("hi\n", 3),
            "{machine}: {run:?}"
        );
    }
}
