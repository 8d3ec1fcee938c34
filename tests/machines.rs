//! Machines that outlive the command that made them, as a user has them.

mod support;

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::json;
use support::terminal::Terminal;
use support::{Bulkhead, entries, machines};

fn states(view: &serde_json::Value) -> Vec<&str> {
    let history = view["history"].as_array().unwrap();
    history
        .iter()
        .map(|change| change["to"].as_str().unwrap())
        .collect()
}

#[test]
fn a_machine_outlives_its_creator_and_keeps_its_disk_until_it_is_removed() {
    let bulkhead = Bulkhead::new().with_own_state();
    let vm = bulkhead.create("life", &["--label", "team=a"]);
    assert_eq!(vm.state(), "created");
    bulkhead.must_fail(&["exec", "life", "true"], "state-conflict");
    vm.start();
    let begin = Instant::now();
    // The agent is asked with a short limit.
    let running = loop {
        let seen = vm.inspect();
        if seen["live"]["agent"] == true || begin.elapsed() > Duration::from_secs(30) {
            break seen;
        }
    };
    assert_eq!(running["state"], "running");
    assert_eq!(
        (&running["live"]["vmm"], &running["live"]["agent"]),
        (&"running".into(), &true.into())
    );
    assert_eq!(machines("life").len(), 1);

    // Streams apart, and the command's own exit code.
    let ran = bulkhead.exec(&["life", "sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!(
        (ran.stdout.as_str(), ran.stderr.as_str(), ran.code),
        ("out\n", "err\n", 7)
    );
    assert_eq!(bulkhead.exec(&["life", "nosuch"]).code, 127);
    assert_eq!(bulkhead.exec(&["life", "sh", "-c", "kill -9 $$"]).code, 137);
    assert_eq!(
        bulkhead
            .exec(&["--timeout", "300ms", "life", "sleep", "60"])
            .code,
        124
    );
    let json = bulkhead.json(&["exec", "life", "echo", "json"]);
    assert_eq!(
        (&json["exit_code"], &json["stdout"]["text"]),
        (&0.into(), &"json\n".into())
    );
    let who = bulkhead.must(&[
        "exec",
        "-e",
        "A=b",
        "--workdir",
        "/tmp",
        "life",
        "sh",
        "-c",
        "echo $(id -un) $A $PWD",
    ]);
    assert_eq!(who, "agent b /tmp\n");

    bulkhead.must(&[
        "exec",
        "-u",
        "root",
        "life",
        "sh",
        "-c",
        "echo kept >/root/file",
    ]);
    let id = bulkhead.must(&["exec", "life", "cat", "/etc/machine-id"]);
    bulkhead.must_fail(&["start", "life"], "state-conflict");
    bulkhead.must_fail(&["rm", "life"], "state-conflict");
    assert_eq!(bulkhead.json(&["stop", "life"]), json!(["life"]));
    assert_eq!(machines("life"), [""; 0]);
    assert_eq!(entries(bulkhead.runtime()), [""; 0]);
    bulkhead.must_fail(&["exec", "life", "true"], "state-conflict");
    bulkhead.must_fail(&["stop", "life"], "state-conflict");

    bulkhead.must(&["restart", "life"]);
    assert_eq!(
        bulkhead.must(&["exec", "-u", "root", "life", "cat", "/root/file"]),
        "kept\n"
    );
    assert_eq!(
        bulkhead.must(&["exec", "life", "cat", "/etc/machine-id"]),
        id
    );
    bulkhead.must(&["restart", "life"]);
    assert_eq!(
        states(&vm.inspect()),
        [
            "created", "starting", "running", "stopping", "stopped", "starting", "running",
            "stopping", "stopped", "starting", "running"
        ]
    );
    bulkhead.must(&["rm", "-f", "life"]);
    assert_eq!(machines("life"), [""; 0]);
    assert_eq!(entries(&bulkhead.state().join("runs")), [""; 0]);
    assert_eq!(entries(bulkhead.runtime()), [""; 0]);
    bulkhead.must_fail(&["inspect", "life"], "machine-not-found");
    bulkhead.must_fail(&["rm", "life"], "machine-not-found");
}

#[test]
fn a_name_is_taken_once_and_an_image_in_use_stays() {
    let bulkhead = Bulkhead::new().with_own_state();
    let vm = bulkhead.create("taken", &[]);
    let again = [
        "create", "--accel", "tcg", "--image", "base", "--name", "taken",
    ];
    let said = bulkhead.must_fail(&again, "name-in-use");
    assert!(said.contains("bulkhead rm taken"), "{said}");
    bulkhead.must_fail(
        &[
            "run", "--accel", "tcg", "--image", "base", "--name", "taken", "--", "true",
        ],
        "name-in-use",
    );
    bulkhead.must_fail(&["image", "rm", "base"], "image-in-use");
    // What does not run needs nobody, and gc leaves it alone.
    bulkhead.must(&["gc"]);
    assert_eq!(vm.state(), "created");
    bulkhead.must_fail(
        &[
            "create", "--accel", "tcg", "--image", "nosuch", "--name", "other",
        ],
        "image-not-found",
    );
    bulkhead.must_fail(
        &[
            "create",
            "--accel",
            "tcg",
            "--image",
            "base",
            "--workspace",
            "/nowhere/at/all",
        ],
        "workspace-unreadable",
    );
    assert_eq!(entries(&bulkhead.state().join("runs")), ["taken"]);
    let users = bulkhead.state().join("images");
    drop(vm);
    let used: Vec<_> = entries(&users)
        .iter()
        .flat_map(|image| entries(&users.join(image).join("used-by")))
        .filter(|user| user.starts_with("taken-"))
        .collect();
    assert_eq!(used, [""; 0]);
}

#[test]
fn a_machine_with_a_command_ends_with_it() {
    let bulkhead = Bulkhead::new().with_own_state();
    let script =
        "echo first; echo other >&2; while [ ! -e /tmp/go ]; do sleep 0.1; done; echo last; exit 5";
    let vm = bulkhead.create("main", &["--start", "--", "sh", "-c", script]);
    // Somebody follows, somebody waits.
    let follow = bulkhead
        .command(&["logs", "-f", "main"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let attach = bulkhead
        .command(&["attach", "main"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let wait = bulkhead
        .command(&["wait", "main"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // They are there before the command goes on.
    let busy = |vm: &support::Detached| vm.inspect()["live"]["busy"].as_u64().unwrap();
    while busy(&vm) < 2 {
        std::thread::sleep(Duration::from_millis(50));
    }
    bulkhead.must(&["exec", "-u", "root", "main", "touch", "/tmp/go"]);
    let wait = wait.wait_with_output().unwrap();
    assert_eq!(
        (wait.status.code(), wait.stdout.as_slice()),
        (Some(5), &b"5\n"[..])
    );
    let attach = attach.wait_with_output().unwrap();
    assert_eq!(attach.status.code(), Some(5));
    assert!(attach.stdout.ends_with(b"last\n"), "{attach:?}");
    let follow = follow.wait_with_output().unwrap();
    assert_eq!(follow.stdout, b"first\nlast\n");
    let ended = vm.inspect();
    assert_eq!(
        (&ended["state"], &ended["ended"]["exit_code"]),
        (&"stopped".into(), &5.into())
    );
    assert_eq!(ended["reason"], "its command ended");
    let logs = bulkhead.raw(&["logs", "main"]);
    assert_eq!(
        (logs.stdout.as_str(), logs.stderr.as_str()),
        ("first\nlast\n", "other\n")
    );
    bulkhead.must_fail(&["logs", "main", "e99"], "exec-not-found");
    // It can be waited for afterwards too, and started again.
    assert_eq!(bulkhead.raw(&["wait", "main"]).code, 5);

    let missing = bulkhead.create("none", &["--start", "--", "nosuch"]);
    assert_eq!(bulkhead.raw(&["wait", "none"]).code, 127);
    let seen = missing.inspect();
    assert!(
        seen["reason"].as_str().unwrap().contains("nosuch"),
        "{seen}"
    );
}

#[test]
fn many_commands_at_once_and_some_that_outlive_their_client() {
    let bulkhead = Bulkhead::new().with_own_state();
    let vm = bulkhead.create("many", &["--start"]);
    let children: Vec<_> = (0..30)
        .map(|n| {
            let script = format!("echo {n}; head -c 200000 /dev/zero | wc -c; exit {n}");
            let child = bulkhead
                .command(&["exec", "many", "sh", "-c", &script])
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .spawn();
            (n, child.unwrap())
        })
        .collect();
    for (n, child) in children {
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(n));
        assert_eq!(output.stdout, format!("{n}\n200000\n").as_bytes());
    }
    // Input goes in as it comes.
    let input = vec![b'x'; 3_000_000];
    let counted = {
        use std::io::Write;
        let mut child = bulkhead
            .command(&["exec", "many", "wc", "-c"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(&input).unwrap();
        child.wait_with_output().unwrap()
    };
    assert_eq!(counted.stdout, b"3000000\n");

    let sleeper = ["many", "sh", "-c", "echo on; exec sleep 600"];
    let detached = bulkhead.json(&[&["exec", "--detach"], &sleeper[..]].concat());
    let detached = detached["exec"].as_str().unwrap();
    // A foreground command ends with the command line that started it.
    let mut child = bulkhead
        .command(&["exec", "many", "sh", "-c", "echo ready; exec sleep 601"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = [0; 6];
    child
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut line)
        .unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    let sleepers = || {
        bulkhead.must(&[
            "exec",
            "-u",
            "root",
            "many",
            "sh",
            "-c",
            "cat /proc/[0-9]*/cmdline | tr '\\0' ' '",
        ])
    };
    let begin = Instant::now();
    while sleepers().contains("sleep 601") {
        assert!(begin.elapsed() < Duration::from_secs(20), "it lives on");
    }
    assert!(sleepers().contains("sleep 600"));
    bulkhead.must(&["kill", "many", detached, "--signal", "INT"]);
    let list = loop {
        let list = bulkhead.json(&["logs", "many", "--list"]);
        let found = list
            .as_array()
            .unwrap()
            .iter()
            .find(|exec| exec["id"] == *detached);
        let found = found.unwrap().clone();
        if !found["ended"].is_null() {
            break found;
        }
    };
    assert_eq!(list["ended"]["exit_code"], 130);
    assert_eq!(bulkhead.must(&["logs", "many", detached]), "on\n");
    bulkhead.must_fail(&["attach", "many", detached], "exec-ended");
    drop(vm);
}

#[test]
fn a_terminal_can_be_left_and_come_back_to() {
    let bulkhead = Bulkhead::new().with_own_state();
    let _vm = bulkhead.create(
        "tty",
        &[
            "--start",
            "-t",
            "--",
            "sh",
            "-c",
            "stty -echo; while read x; do echo \"got-$x\"; done",
        ],
    );
    for round in ["one", "two"] {
        let mut terminal = Terminal::start(bulkhead.command(&["attach", "tty"]), 30, 90);
        terminal.wait_for("Ctrl-]");
        terminal.send(format!("{round}\r").as_bytes());
        terminal.wait_for(&format!("got-{round}"));
        terminal.send(b"\x1d");
        assert_eq!(terminal.finish().code(), Some(0));
    }
    let script = "stty size; while [ \"$(stty size)\" = '40 120' ]; do sleep 0.1; done; stty size; \
         exec cat";
    let mut terminal = Terminal::start(
        bulkhead.command(&["exec", "--timeout", "60s", "-t", "tty", "sh", "-c", script]),
        40,
        120,
    );
    terminal.wait_for("40 120");
    terminal.resize(50, 100);
    terminal.wait_for("50 100");
    // A shell that is about to fork drops a signal: cat itself has to answer.
    terminal.send(b"again\r");
    terminal.wait_for("again\r\nagain");
    terminal.send(b"\x03");
    assert_eq!(terminal.finish().code(), Some(130));
    // The live view, and its end.
    let mut top = Terminal::start(bulkhead.command(&["top", "--interval", "200ms"]), 20, 80);
    top.wait_for("1 machines, 1 running");
    top.wait_for("tty");
    top.send(b"q");
    assert_eq!(top.finish().code(), Some(0));
}

#[test]
fn files_go_in_and_out_as_with_cp() {
    let bulkhead = Bulkhead::new().with_own_state();
    let _vm = bulkhead.create("cp", &["--start"]);
    let top = tempfile::tempdir().unwrap();
    let at = |name: &str| top.path().join(name).to_str().unwrap().to_owned();
    fs::create_dir_all(at("tree/sub")).unwrap();
    fs::write(at("tree/sub/file"), "content").unwrap();
    fs::write(at("one"), vec![7; 1 << 20]).unwrap();
    let guest = |script: &str| bulkhead.must(&["exec", "cp", "sh", "-c", script]);

    // A directory that is there gets it; a name that is not becomes it.
    bulkhead.must(&["cp", &at("tree"), "cp:/workspace/work"]);
    bulkhead.must(&["cp", &at("tree"), "cp:/workspace/work/fresh"]);
    bulkhead.must(&["cp", &at("tree/."), "cp:/workspace/work/fresh/sub"]);
    assert_eq!(
        guest("cd /workspace/work; find . -type f | sort"),
        "./fresh/sub/file\n./fresh/sub/sub/file\n./tree/sub/file\n"
    );
    bulkhead.must(&["cp", &at("one"), "cp:/tmp"]);
    bulkhead.must(&["cp", "-u", "root", &at("one"), "cp:/tmp/other"]);
    assert_eq!(
        guest("stat -c '%U %s %n' /tmp/one /tmp/other"),
        "agent 1048576 /tmp/one\nroot 1048576 /tmp/other\n"
    );

    bulkhead.must(&["cp", "cp:/workspace/work/tree", &at("back")]);
    assert_eq!(fs::read(at("back/sub/file")).unwrap(), b"content");
    fs::create_dir(at("into")).unwrap();
    bulkhead.must(&["cp", "cp:/workspace/work/tree", &at("into")]);
    assert_eq!(fs::read(at("into/tree/sub/file")).unwrap(), b"content");
    bulkhead.must(&["cp", "cp:/tmp/one", &at("into")]);
    let told = bulkhead.json(&["cp", "cp:/tmp/one", &at("renamed")]);
    assert_eq!(told, json!({ "warnings": [] }));
    assert_eq!(
        fs::read(at("into/one")).unwrap(),
        fs::read(at("one")).unwrap()
    );
    assert_eq!(
        fs::read(at("renamed")).unwrap(),
        fs::read(at("one")).unwrap()
    );

    bulkhead.must_fail(&["cp", "cp:/nosuch", &at("x")], "copy-impossible");
    bulkhead.must_fail(&["cp", &at("nosuch"), "cp:/tmp"], "copy-impossible");
    bulkhead.must_fail(&["cp", &at("tree"), "cp:/tmp/one"], "copy-impossible");
    bulkhead.must_fail(&["cp", &at("a"), &at("b")], "flags-clash");
    // What leads out of the copy stays out of the host, with a word about it.
    guest("mkdir /tmp/evil; ln -s /etc/passwd /tmp/evil/link; echo x >/tmp/evil/x");
    let copied = bulkhead.raw(&["cp", "cp:/tmp/evil", &at("evil")]);
    assert_eq!(copied.code, 0, "{copied:?}");
    assert!(copied.stderr.contains("link"), "{copied:?}");
    assert_eq!(entries(Path::new(&at("evil"))), ["x"]);
    let told = bulkhead.json(&["cp", "cp:/tmp/evil", &at("again")]);
    assert!(
        told["warnings"][0].as_str().unwrap().contains("link"),
        "{told}"
    );
    // Nothing half done is left beside it.
    assert!(
        entries(top.path())
            .iter()
            .all(|name| !name.starts_with('.'))
    );
}

#[test]
fn a_paused_machine_stands_still_and_says_so() {
    let bulkhead = Bulkhead::new().with_own_state();
    let vm = bulkhead.create("paused", &["--start"]);
    bulkhead.must(&["pause", "paused"]);
    let view = vm.inspect();
    assert_eq!(
        (&view["state"], &view["live"]["vmm"]),
        (&"paused".into(), &"paused".into())
    );
    let begin = Instant::now();
    let said = bulkhead.must_fail(&["exec", "paused", "true"], "state-conflict");
    assert!(said.contains("bulkhead resume paused"), "{said}");
    assert!(
        begin.elapsed() < Duration::from_secs(15),
        "nobody waits for it"
    );
    bulkhead.must_fail(&["pause", "paused"], "state-conflict");
    bulkhead.must(&["resume", "paused"]);
    assert_eq!(bulkhead.must(&["exec", "paused", "echo", "on"]), "on\n");
    bulkhead.must_fail(&["resume", "paused"], "state-conflict");
    // It can be stopped as it stands.
    bulkhead.must(&["pause", "paused"]);
    bulkhead.must(&["stop", "paused"]);
    assert_eq!(vm.inspect()["reason"], "stopped by root");
}

#[test]
fn a_workspace_is_copied_once_and_a_share_is_settled() {
    let bulkhead = Bulkhead::new().with_own_state();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    fs::write(dir.path().join("file"), "host\n").unwrap();
    let vm = bulkhead.create("copy", &["--workspace", path, "--start"]);
    assert_eq!(
        bulkhead.must(&["exec", "copy", "sh", "-c", "cat file; echo guest >file"]),
        "host\n"
    );
    bulkhead.must(&["restart", "copy"]);
    assert_eq!(bulkhead.must(&["exec", "copy", "cat", "file"]), "guest\n");
    assert_eq!(fs::read(dir.path().join("file")).unwrap(), b"host\n");
    drop(vm);
    let share = [
        "--workspace",
        path,
        "--workspace-mode",
        "share",
        "--user",
        "root",
    ];
    let _vm = bulkhead.create("share", &[&share[..], &["--start"]].concat());
    bulkhead.must(&[
        "exec",
        "-u",
        "root",
        "share",
        "sh",
        "-c",
        "cd /workspace/work; echo new >made; chmod 755 made",
    ]);
    bulkhead.must(&["stop", "share"]);
    use std::os::unix::fs::PermissionsExt;
    let made = fs::metadata(dir.path().join("made")).unwrap();
    assert_eq!(made.permissions().mode() & 0o777, 0o755);
}

#[test]
fn lists_are_filtered_and_figures_add_up() {
    let bulkhead = Bulkhead::new().with_own_state();
    let one = bulkhead.create("one", &["--label", "team=a", "--start"]);
    let _two = bulkhead.create("two", &["--label", "team=b"]);
    let names = |filters: &[&str]| {
        let filters: Vec<&str> = filters
            .iter()
            .flat_map(|filter| ["--filter", filter])
            .collect();
        bulkhead.must(&[&["ls", "-q"], &filters[..]].concat())
    };
    assert_eq!(names(&[]), "one\ntwo\n");
    assert_eq!(names(&["label=team"]), "one\ntwo\n");
    assert_eq!(names(&["label=team=b"]), "two\n");
    assert_eq!(names(&["state=running"]), "one\n");
    assert_eq!(names(&["state=running", "label=team=b"]), "");
    assert_eq!(names(&["image=base", "name=tw"]), "two\n");
    assert_eq!(names(&["kind=run"]), "");
    let list = bulkhead.json(&["ls"]);
    let labels = list.as_array().unwrap().iter().map(|one| &one["labels"]);
    assert!(
        labels.eq([&json!({ "team": "a" }), &json!({ "team": "b" })]),
        "{list}"
    );
    let table = bulkhead.must(&["ls"]);
    assert!(table.lines().next().unwrap().starts_with("NAME"), "{table}");
    let run = bulkhead.start("beside", &["--", "sh", "-c", "echo ready; sleep 600"]);
    assert_eq!(names(&["kind=run"]), "beside\n");
    bulkhead.must_fail(&["exec", "beside", "true"], "machine-attached");
    bulkhead.must_fail(&["rm", "-f", "beside"], "state-conflict");
    drop(run);
    bulkhead.must(&["gc"]);

    bulkhead.must(&[
        "exec",
        "one",
        "sh",
        "-c",
        "(while :; do :; done) </dev/null >/dev/null 2>&1 &",
    ]);
    let stats = bulkhead.json(&["stats"]);
    let stats = stats.as_array().unwrap();
    assert_eq!((stats.len(), &stats[0]["id"]), (1, &"one".into()));
    assert!(stats[0]["cpu_percent"].as_f64().unwrap() > 5.0, "{stats:?}");
    assert!(
        stats[0]["memory_bytes"].as_u64().unwrap() > 50 << 20,
        "{stats:?}"
    );
    bulkhead.must_fail(&["stats", "two"], "state-conflict");
    // A damaged record is said, and does not hide the others.
    fs::write(bulkhead.state().join("runs/two/state.json"), "{").unwrap();
    let list = bulkhead.raw(&["ls", "-q"]);
    assert_eq!(
        (list.stdout.as_str(), list.code),
        ("one\n", 125),
        "{list:?}"
    );
    assert!(list.stderr.contains("state-unreadable"), "{list:?}");
    bulkhead.must(&["rm", "-f", "two"]);
    assert_eq!(entries(&bulkhead.state().join("runs")), ["one"]);
    drop(one);
}
