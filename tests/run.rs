//! `bulkhead run` against real QEMU, real kernels and the real agent.

mod support;

use std::io::{Read, Write};
use std::process::Stdio;

use nix::sys::signal::Signal;
use support::{Bulkhead, machines};

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
fn a_hundred_megabytes_arrive_whole_in_little_memory() {
    const SIZE: usize = 100_000_000;
    let bulkhead = Bulkhead::new();
    let script = format!("seq 1 20000000 | head -c {SIZE}");
    let words = [
        "run", "--accel", "tcg", "--image", "base", "--", "sh", "-c", &script,
    ];
    let mut child = bulkhead
        .command(&words)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let mut bytes = vec![0; SIZE - 1];
    stdout.read_exact(&mut bytes).unwrap();
    // Before its last byte is read, it is still there to be looked at.
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    stdout.read_to_end(&mut bytes).unwrap();
    assert!(child.wait().unwrap().success());
    let mut expected = Vec::with_capacity(SIZE + 16);
    for number in 1.. {
        writeln!(expected, "{number}").unwrap();
        if expected.len() >= SIZE {
            break;
        }
    }
    expected.truncate(SIZE);
    assert!(
        bytes == expected,
        "the output is not what the command wrote"
    );
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let peak: usize = peak
        .unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap();
    assert!(peak < 64 * 1024, "{peak} KiB");
}

#[test]
fn long_output_for_a_program_goes_to_a_file() {
    let bulkhead = Bulkhead::new().with_own_state();
    let run = bulkhead.run(&["--json", "--", "sh", "-c", "head -c 3000000 /dev/zero"]);
    let outcome: serde_json::Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!(outcome["stdout"]["bytes"], 3_000_000);
    assert_eq!(outcome["stdout"]["complete"], false);
    let file = outcome["stdout"]["file"].as_str().unwrap();
    assert_eq!(std::fs::metadata(file).unwrap().len(), 3_000_000);
}

#[test]
fn a_reader_that_goes_away_ends_the_command() {
    let bulkhead = Bulkhead::new();
    let words = ["run", "--accel", "tcg", "--image", "base", "--", "yes"];
    let mut child = bulkhead
        .command(&words)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut start = [0; 2];
    child.stdout.take().unwrap().read_exact(&mut start).unwrap();
    assert_eq!(
        (&start, child.wait().unwrap().code()),
        (b"y\n", Some(128 + 13))
    );
}

#[test]
fn signals_are_forwarded() {
    let script = "trap 'echo caught; exit 9' TERM; echo ready; while :; do sleep 0.1; done";
    let run = Bulkhead::new().start("signals", &["--", "sh", "-c", script]);
    run.signal(Signal::SIGTERM);
    let ran = run.finish();
    assert_eq!((ran.stdout.as_str(), ran.code), ("caught\n", 9), "{ran:?}");
}

#[test]
fn the_time_limit_ends_the_whole_tree() {
    // Deaf to everything but SIGKILL, in a session of its own.
    let script = "trap '' TERM HUP INT; setsid sh -c 'sleep 600' & echo ready; sleep 600";
    let bulkhead = Bulkhead::new();
    let ran = bulkhead
        .start("limit", &["--timeout", "6s", "--", "sh", "-c", script])
        .finish();
    assert_eq!(ran.code, 124, "{ran:?}");
    assert!(ran.stderr.contains("time limit"), "{ran:?}");
}

#[test]
fn the_time_limit_holds_though_nobody_reads_the_output() {
    let bulkhead = Bulkhead::new();
    let words = [
        "run",
        "--accel",
        "tcg",
        "--image",
        "base",
        "--timeout",
        "3s",
        "--",
        "yes",
    ];
    let mut child = bulkhead
        .command(&words)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // Held, and not read.
    let _stdout = child.stdout.take().unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(124));
}

#[test]
fn two_runs_at_once_do_not_meet() {
    let bulkhead = Bulkhead::new();
    let first = bulkhead.start("twin-a", &["--", "sh", "-c", "echo ready; read x; echo $x"]);
    let second = bulkhead.start("twin-b", &["--", "sh", "-c", "echo ready; read x; echo $x"]);
    let again = bulkhead.run(&["--name", "twin-a", "--", "true"]);
    assert_eq!(again.code, 125, "{again:?}");
    assert!(again.stderr.contains("name-in-use"), "{again:?}");
    for run in [first, second] {
        assert_eq!(run.finish().code, 0);
    }
}

#[test]
fn a_signal_before_the_command_runs_ends_it_all() {
    let bulkhead = Bulkhead::new().with_own_state();
    let words = [
        "run", "--accel", "tcg", "--image", "base", "--name", "early", "--", "true",
    ];
    let child = bulkhead
        .command(&words)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    while machines("early").is_empty() {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    nix::sys::signal::kill(pid, Signal::SIGINT).unwrap();
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(130), "{stderr}");
    assert!(stderr.contains("[interrupted]"), "{stderr}");
    assert_eq!(machines("early"), [""; 0]);
    assert!(!bulkhead.state().join("runs/early").exists());
}

#[test]
fn nothing_is_left_when_the_owner_is_killed() {
    let bulkhead = Bulkhead::new().with_own_state();
    let run = bulkhead.start("orphan", &["--", "sh", "-c", "echo ready; sleep 600"]);
    assert_eq!(machines("orphan").len(), 1);
    run.signal(Signal::SIGKILL);
    run.finish();
    let shown = bulkhead.raw(&["gc", "--dry-run"]);
    assert!(shown.stdout.contains("would release orphan"), "{shown:?}");
    let found = bulkhead.json(&["gc", "--dry-run"]);
    assert_eq!(
        (&found[0]["state"], &found[0]["id"]),
        (&"dead".into(), &"orphan".into())
    );
    assert!(
        !found[0]["leases"].as_array().unwrap().is_empty(),
        "{found}"
    );
    let gc = bulkhead.raw(&["gc"]);
    assert_eq!(gc.code, 0, "{gc:?}");
    assert_eq!(machines("orphan"), [""; 0]);
    assert!(!bulkhead.state().join("runs/orphan").exists());
    assert_eq!(bulkhead.raw(&["gc"]).stdout, "");
}

#[test]
fn q35_boots_too() {
    let run = Bulkhead::new().run(&["--machine", "q35", "--", "echo", "hi"]);
    assert_eq!((run.stdout.as_str(), run.code), ("hi\n", 0), "{run:?}");
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
fn scripts_come_from_stdin_too() {
    let script = b"#!/bin/sh\necho \"$0\" \"$1\"\n";
    let run = Bulkhead::new().run_with_input(&["--script", "-", "--", "arg"], script);
    assert!(run.stdout.ends_with(" arg\n") && run.code == 0, "{run:?}");
    let run = Bulkhead::new().run_with_input(&["--script", "-"], b"no interpreter\n");
    assert!(
        run.code == 125 && run.stderr.contains("script-invalid"),
        "{run:?}"
    );
}

#[test]
fn real_programs_work_in_the_default_image() {
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("programs.sh");
    std::fs::write(&script, REAL_PROGRAMS).unwrap();
    let words = ["--timeout", "5m", "--script", script.to_str().unwrap()];
    let run = Bulkhead::with_image("default").run(&words);
    let lines: Vec<&str> = run.stdout.lines().collect();
    assert_eq!(
        (lines.as_slice(), run.code),
        (&REAL_OUTPUT[..], 0),
        "{run:?}"
    );
}

/// What an agent does all day.
const REAL_PROGRAMS: &str = r#"#!/bin/bash
set -eu
python3 -c 'print(6*7)'
mkdir -p project/tests && cd project
echo 'def add(a, b): return a + b' > sums.py
touch tests/__init__.py
cat > tests/test_sums.py <<'END'
import unittest, sums
class Sums(unittest.TestCase):
    def test_add(self): self.assertEqual(sums.add(2, 3), 5)
END
python3 -m unittest 2>&1 | tail -1
git init --quiet .
git config user.name agent && git config user.email agent@example.com
printf '__pycache__
' > .gitignore
git add . && git commit --quiet -m first
git log --format=%s
git status --porcelain
cat > hello.c <<'END'
#include <stdio.h>
int main(void) { puts("compiled"); return 0; }
END
printf 'hello: hello.c
	gcc -O1 -Wall -o hello hello.c
' > Makefile
make --silent && ./hello
node -e 'console.log([1, 2, 3].map(n => n * n).join(" "))'
rg --no-filename --count add sums.py
readlink /proc/self/exe
"#;
const REAL_OUTPUT: [&str; 7] = [
    "42",
    "OK",
    "first",
    "compiled",
    "1 4 9",
    "1",
    "/usr/bin/readlink",
];

#[test]
fn the_tuned_kernel_runs_the_default_image() {
    let script = "uname -r; readlink /proc/self/exe; python3 -c 'print(6*7)'; git init -q x && \
                  ls -d x/.git; mount -t tmpfs none /mnt && echo root; ls /sys/fs/cgroup/cgroup.procs";
    let words = [
        "--kernel", "tuned", "--user", "root", "--", "sh", "-c", script,
    ];
    for machine in ["microvm", "q35"] {
        let words = [&["--machine", machine], &words[..]].concat();
        let run = Bulkhead::with_image("default").run(&words);
        let (release, rest) = run.stdout.split_once('\n').unwrap();
        assert!(
            release.starts_with("6.12.") && release.ends_with("-bulkhead"),
            "{run:?}"
        );
        let expected = "/usr/bin/readlink\n42\nx/.git\nroot\n/sys/fs/cgroup/cgroup.procs\n";
        assert_eq!((rest, run.code), (expected, 0), "{machine}: {run:?}");
    }
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
