//! Consoles of machines: what the kernel says, followed, and the emergency one.

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdout, Stdio};

use support::{Bulkhead, Detached, Ran, ran};

/// `bulkhead logs --console -f`, under way.
struct Follow {
    child: Child,
    stdout: BufReader<ChildStdout>,
    seen: Vec<u8>,
}

impl Follow {
    fn start(bulkhead: &Bulkhead, vm: &str) -> Self {
        let mut command = bulkhead.command(&["logs", "--console", "-f", vm]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Self {
            child,
            stdout,
            seen: Vec::new(),
        }
    }

    /// Waits until a line has these words.
    fn wait_for(&mut self, words: &str) {
        loop {
            let begin = self.seen.len();
            let count = self.stdout.read_until(b'\n', &mut self.seen).unwrap();
            let seen = String::from_utf8_lossy(&self.seen);
            assert!(count > 0, "{words} did not come: {seen}");
            if String::from_utf8_lossy(&self.seen[begin..]).contains(words) {
                return;
            }
        }
    }

    /// Waits for its end; gives all that it printed.
    fn finish(mut self) -> (Vec<u8>, Ran) {
        let mut seen = std::mem::take(&mut self.seen);
        self.stdout.read_to_end(&mut seen).unwrap();
        let status = self.child.wait().unwrap();
        let mut stderr = Vec::new();
        let pipe = self.child.stderr.as_mut().unwrap();
        pipe.read_to_end(&mut stderr).unwrap();
        let ended = ran(std::process::Output {
            status,
            stdout: Vec::new(),
            stderr,
        });
        (seen, ended)
    }
}

impl Drop for Follow {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Has the guest's kernel say this, however quiet its console is.
fn say(words: &str) -> String {
    format!("echo '<1>{words}' > /dev/kmsg")
}

#[test]
fn the_console_is_followed_until_its_machine_ends() {
    let bulkhead = Bulkhead::new().with_own_state();
    let vm = bulkhead.create("said", &["--start"]);
    let tell = |words: &str| {
        bulkhead.must(&["exec", "-u", "root", "said", "sh", "-c", &say(words)]);
    };
    tell("what came before");
    let mut follow = Follow::start(&bulkhead, "said");
    follow.wait_for("what came before");
    for words in ["the first while it is followed", "the second"] {
        tell(words);
        follow.wait_for(words);
    }
    bulkhead.must(&["stop", "said"]);
    let (seen, ended) = follow.finish();
    assert_eq!((ended.code, ended.stderr.as_str()), (0, ""));
    let file = bulkhead.state().join("runs/said/console.log");
    let whole = std::fs::read(&file).unwrap();
    let text = String::from_utf8_lossy;
    assert_eq!(text(&seen), text(&whole));
    // One that has ended already says what it said, and no more.
    let (again, ended) = Follow::start(&bulkhead, "said").finish();
    assert_eq!((text(&again), ended.code), (text(&whole), 0));
    // So does one that is started again: its console begins anew.
    vm.start();
    tell("in its second life");
    let mut follow = Follow::start(&bulkhead, "said");
    follow.wait_for("in its second life");
    bulkhead.must(&["rm", "-f", "said"]);
    let (seen, ended) = follow.finish();
    assert_eq!((ended.code, ended.stderr.as_str()), (0, ""));
    assert!(!text(&seen).contains("what came before"));

    // One that was never started has said nothing.
    let _created = bulkhead.create("silent", &[]);
    let (seen, ended) = Follow::start(&bulkhead, "silent").finish();
    assert_eq!((&*text(&seen), ended.code), ("", 0));
    let missing = Follow::start(&bulkhead, "nobody").finish().1;
    assert!(
        missing.code == 125 && missing.stderr.contains("machine-not-found"),
        "{missing:?}"
    );
}

#[test]
fn the_console_of_a_run_is_followed_until_its_end() {
    let bulkhead = Bulkhead::new();
    let script = format!("echo ready; read x; {}; echo said; read x", say("of a run"));
    let options = ["--kernel", "tuned", "--user", "root", "--"];
    let command = ["sh", "-c", &script];
    let mut run = bulkhead.start("followed", &[&options[..], &command].concat());
    let mut follow = Follow::start(&bulkhead, "followed");
    assert_eq!(run.ask("go on"), "said\n");
    follow.wait_for("of a run");
    let ended = run.finish();
    assert_eq!(ended.code, 1, "{ended:?}");
    let (_, ended) = follow.finish();
    assert_eq!((ended.code, ended.stderr.as_str()), (0, ""));
}

/// Says something in the emergency console and waits for the answer; what is
/// done `meanwhile` is done while it is open.
#[track_caller]
fn talk(bulkhead: &Bulkhead, vm: &Detached, name: &str, meanwhile: impl FnOnce()) {
    let mut console = bulkhead
        .command(&["console", name])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = console.stdin.take().unwrap();
    // What it echoes is not yet the answer.
    let line = b"\necho answer-$((40+2))-$(id -un)-$(hostname)\n";
    stdin.write_all(line).unwrap();
    let expected = format!("answer-42-root-{name}");
    let mut stdout = console.stdout.take().unwrap();
    let (mut seen, mut buffer) = (String::new(), [0; 1000]);
    while !seen.contains(&expected) {
        let count = stdout.read(&mut buffer).unwrap();
        assert!(count > 0, "the console of {name} closed: {seen}");
        seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
    }
    meanwhile();
    // Ctrl-] leaves.
    stdin.write_all(b"\x1d").unwrap();
    assert!(console.wait().unwrap().success());
    // Its supervisor may take a moment to see that.
    let begin = std::time::Instant::now();
    while vm.inspect()["live"]["busy"] != 0 {
        let patience = std::time::Duration::from_secs(60);
        assert!(begin.elapsed() < patience, "the console stays open");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

#[test]
fn the_emergency_console_of_a_detached_machine_answers_whatever_became_of_it() {
    let bulkhead = Bulkhead::new().with_own_state();
    let vm = bulkhead.create("vm", &["--disk", "64M", "--start"]);
    talk(&bulkhead, &vm, "vm", || {
        // An open console is something that happens.
        assert_eq!(vm.inspect()["live"]["busy"], 1);
        bulkhead.must_fail(&["console", "vm"], "console-taken");
    });
    talk(&bulkhead, &vm, "vm", || {});
    // A shell is open in the guest when it is saved.
    bulkhead.must(&["snapshot", "save", "vm", "one"]);
    bulkhead.must(&["snapshot", "restore", "vm", "one"]);
    talk(&bulkhead, &vm, "vm", || {});
    let fork = bulkhead.made("f-1");
    bulkhead.must(&["fork", "vm", "--name", "f"]);
    talk(&bulkhead, &fork, "f-1", || {});
    talk(&bulkhead, &vm, "vm", || {});
    bulkhead.must(&["stop", "vm"]);
    bulkhead.must_fail(&["console", "vm"], "machine-not-found");
}
