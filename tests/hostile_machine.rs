//! Guests that use up whatever they have: real machines, each of which must
//! come to a clear end and cost the host no more than it was given.

mod support;

use std::io::Read;
use std::process::Stdio;
use std::time::{Duration, Instant};

use support::{Bulkhead, Ran, machines};

/// Most memory that `bulkhead` itself may ever take, in KiB.
const MOST_KIB: u64 = 64 * 1024;

/// `bulkhead run` in a machine of the tuned kernel, its output taken at once,
/// and the most memory the program ever took, in KiB.
fn watched(bulkhead: &Bulkhead, words: &[&str]) -> (Ran, u64) {
    let fixed = [
        "run", "--accel", "tcg", "--image", "base", "--kernel", "tuned",
    ];
    let mut command = bulkhead.command(&[&fixed, words].concat());
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let status = format!("/proc/{}/status", child.id());
    let watching = std::thread::spawn(move || {
        let mut peak = 0;
        // Gone from the file when the program has ended.
        while let Some(now) = peak_kib(&status) {
            peak = now;
            std::thread::sleep(Duration::from_millis(5));
        }
        peak
    });
    let ran = support::ran(child.wait_with_output().unwrap());
    (ran, watching.join().unwrap())
}

fn peak_kib(status: &str) -> Option<u64> {
    let text = std::fs::read_to_string(status).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().trim_end_matches(" kB").parse().ok()
}

fn assert_bounded(peak: u64) {
    assert!((1..MOST_KIB).contains(&peak), "{peak} KiB");
}

#[test]
fn more_output_than_is_collected_ends_the_command() {
    let bulkhead = Bulkhead::new().with_own_state();
    let words = [
        "--json",
        "--name",
        "wordy",
        "--max-output",
        "20M",
        "--",
        "yes",
    ];
    let (run, peak) = watched(&bulkhead, &words);
    assert_eq!((run.code, run.stdout.as_str()), (125, ""), "{run:?}");
    let report: serde_json::Value = serde_json::from_str(&run.stderr).unwrap();
    assert_eq!(report["error"]["code"], "output-too-long", "{report}");
    assert_eq!(report["error"]["cause"], "it is more than 20M", "{report}");
    assert_bounded(peak);
    // What nobody is told of is not left behind.
    assert!(!bulkhead.state().join("output/wordy.stdout").exists());
    assert_eq!(machines("wordy"), [""; 0]);
}

#[test]
fn output_without_end_is_passed_on_in_little_memory() {
    let bulkhead = Bulkhead::new().with_own_state();
    let script = "yes out & yes err >&2 & wait";
    let fixed = [
        "run", "--accel", "tcg", "--image", "base", "--kernel", "tuned",
    ];
    let words = ["--timeout", "8s", "--", "sh", "-c", script];
    let mut child = bulkhead
        .command(&[&fixed[..], &words].concat())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut stderr = child.stderr.take().unwrap();
    let errors = std::thread::spawn(move || {
        let (mut all, mut last) = (0, Vec::new());
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(count @ 1..) = stderr.read(&mut buffer) {
            all += count;
            last.extend_from_slice(&buffer[..count]);
            last.drain(..last.len().saturating_sub(200));
        }
        (all, String::from_utf8(last).unwrap())
    });
    let mut stdout = child.stdout.take().unwrap();
    let (mut all, mut peak) = (0, 0);
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(count @ 1..) = stdout.read(&mut buffer) {
        all += count;
        peak = peak_kib(&status).unwrap_or(peak);
    }
    assert_eq!(child.wait().unwrap().code(), Some(124));
    let (errors, last) = errors.join().unwrap();
    assert!(last.contains("ended by its time limit"), "{last}");
    // Many times what may be kept of it.
    assert!(
        all > 4 << 20 && errors > 4 << 20,
        "{all} and {errors} bytes"
    );
    assert_bounded(peak);
}

#[test]
fn a_fork_bomb_stays_where_it_is() {
    let bulkhead = Bulkhead::new().with_own_state();
    let mut beside = bulkhead.start(
        "beside",
        &[
            "--kernel",
            "tuned",
            "--",
            "sh",
            "-c",
            "echo ready; while read x; do echo $x; done",
        ],
    );
    let (done, bomb) = std::thread::scope(|scope| {
        let bomb = scope.spawn(|| {
            let bomb = "b() { b | b & b; }; b";
            let words = [
                "--name",
                "bomb",
                "--memory",
                "256M",
                "--cpus",
                "1",
                "--timeout",
                "6s",
            ];
            watched(&bulkhead, &[&words[..], &["--", "sh", "-c", bomb]].concat())
        });
        let mut answers = 0;
        while !bomb.is_finished() {
            let begin = Instant::now();
            assert_eq!(beside.ask("hello"), "hello\n");
            assert!(begin.elapsed() < Duration::from_secs(60), "it noticed");
            answers += 1;
            std::thread::sleep(Duration::from_millis(100));
        }
        (answers, bomb.join().unwrap())
    });
    let (run, peak) = bomb;
    assert!(done > 10, "it was asked {done} times");
    // By its time limit, or because the guest kills the shell for its memory.
    let by_time = run.code == 124 && run.stderr.contains("ended by its time limit");
    let by_memory = run.code == 137 && run.stderr.contains("ran out of memory");
    let by_itself = run.code == 2 && run.stderr.contains("Cannot fork");
    assert!(by_time || by_memory || by_itself, "{run:?}");
    assert_bounded(peak);
    assert_eq!(machines("bomb"), [""; 0]);
    assert_eq!(beside.finish().code, 0);
}

#[test]
fn a_command_that_takes_all_memory_is_killed_and_the_outcome_says_why() {
    let bulkhead = Bulkhead::new().with_own_state();
    let dir = tempfile::tempdir().unwrap();
    let artifacts = dir.path().to_str().unwrap();
    let script = "echo kept > /workspace/output/a; exec tail /dev/zero";
    let words = [
        "--memory",
        "256M",
        "--timeout",
        "60s",
        "--artifacts",
        artifacts,
    ];
    let (run, peak) = watched(
        &bulkhead,
        &[&words[..], &["--", "sh", "-c", script]].concat(),
    );
    assert_eq!((run.code, run.stdout.as_str()), (137, ""), "{run:?}");
    assert!(
        run.stderr.contains("the guest ran out of memory (256M)"),
        "{run:?}"
    );
    // The machine lives on: what was there before comes back.
    assert_eq!(
        std::fs::read_to_string(dir.path().join("a")).unwrap(),
        "kept\n"
    );
    assert_bounded(peak);
}

#[test]
fn a_full_disk_is_told_to_the_command_and_stops_no_exchange() {
    let bulkhead = Bulkhead::new().with_own_state();
    let dir = tempfile::tempdir().unwrap();
    let [work, artifacts] = ["work", "artifacts"].map(|name| dir.path().join(name));
    std::fs::create_dir(&work).unwrap();
    std::fs::write(work.join("old"), "old").unwrap();
    let script = "echo kept > /workspace/output/a; echo new > old; mkdir /tmp/x; \
                  head -c 200M /dev/zero > /tmp/x/big; echo $?; rm old; echo no > /tmp/x/more";
    let words = [
        "--disk",
        "64M",
        "--workspace",
        work.to_str().unwrap(),
        "--apply",
        "--artifacts",
        artifacts.to_str().unwrap(),
        "--",
        "sh",
        "-c",
        script,
    ];
    let (run, peak) = watched(&bulkhead, &words);
    let refused = run.stderr.matches("No space left on device").count();
    assert!(refused >= 1 && run.stdout == "1\n", "{run:?}");
    assert!(!work.join("old").exists(), "{run:?}");
    assert_eq!(
        std::fs::read_to_string(artifacts.join("a")).unwrap(),
        "kept\n"
    );
    assert_bounded(peak);
}

#[test]
fn a_guest_that_restarts_has_ended() {
    let bulkhead = Bulkhead::new().with_own_state();
    // LINUX_REBOOT_CMD_RESTART (reboot(2)), over and over, were it to come back.
    let reboot = "$| = 1; print \"going\\n\"; syscall(169, 0xfee1dead, 672274793, 0x1234567)";
    let words = [
        "--name", "again", "--user", "root", "--", "perl", "-e", reboot,
    ];
    let (run, peak) = watched(&bulkhead, &words);
    assert_eq!(run.code, 125, "{run:?}");
    assert!(run.stderr.contains("error [guest-ended]"), "{run:?}");
    assert!(run.stderr.contains("Restarting system"), "{run:?}");
    assert_bounded(peak);
    assert_eq!(machines("again"), [""; 0]);
    assert!(!bulkhead.state().join("runs/again").exists());
}

#[test]
fn the_guests_clock_moves_no_limit_of_the_host() {
    let bulkhead = Bulkhead::new().with_own_state();
    let script = "while :; do date -s 2038-01-19 >/dev/null || exit 9; sleep 0.3; \
                  date -s 1999-01-01 >/dev/null || exit 9; sleep 0.3; done";
    let words = [
        "--json",
        "--user",
        "root",
        "--timeout",
        "4s",
        "--",
        "sh",
        "-c",
        script,
    ];
    let (run, peak) = watched(&bulkhead, &words);
    assert_eq!(run.code, 124, "{run:?}");
    let outcome: serde_json::Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!(outcome["timed_out"], true, "{outcome}");
    let took = outcome["times"]["command_us"].as_u64().unwrap();
    // Not before the limit, and not for as long as the guest would have it.
    assert!((4_000_000..20_000_000).contains(&took), "{took} us");
    assert_bounded(peak);
}
