//! Directories that go into the guest and come back.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use support::Bulkhead;

/// Path, mode and content of every file and link below `dir`.
fn files(dir: &Path) -> BTreeMap<PathBuf, (u32, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut pending = vec![dir.to_owned()];
    while let Some(at) = pending.pop() {
        for entry in fs::read_dir(at).unwrap() {
            let path = entry.unwrap().path();
            let meta = fs::symlink_metadata(&path).unwrap();
            if meta.is_dir() {
                pending.push(path);
                continue;
            }
            let content = match meta.is_symlink() {
                true => fs::read_link(&path)
                    .unwrap()
                    .into_os_string()
                    .into_encoded_bytes(),
                false => fs::read(&path).unwrap(),
            };
            let name = path.strip_prefix(dir).unwrap().to_owned();
            found.insert(name, (meta.mode() & 0o7777, content));
        }
    }
    found
}

#[test]
fn changes_come_back_only_on_request() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.txt"), "one\n").unwrap();
    fs::write(dir.path().join("gone.txt"), "x").unwrap();
    let path = dir.path().to_str().unwrap();
    let script = "cat a.txt; echo two > a.txt; echo new > b.txt; rm gone.txt";
    let change = ["--", "sh", "-c", script];
    let bulkhead = Bulkhead::new();
    let before = files(dir.path());

    let run = bulkhead.run(&[&["--workspace", path, "--diff"], &change[..]].concat());
    assert_eq!((run.stdout.as_str(), run.code), ("one\n", 0), "{run:?}");
    assert!(run.stderr.contains("-one\n+two\n"), "{run:?}");
    assert_eq!(files(dir.path()), before);

    let run = bulkhead.run(&[&["--json", "--workspace", path, "--apply"], &change[..]].concat());
    assert_eq!(run.code, 0, "{run:?}");
    let outcome: serde_json::Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!(
        outcome["changes"]["changed"],
        serde_json::json!(["a.txt", "b.txt"])
    );
    assert_eq!(
        outcome["changes"]["removed"],
        serde_json::json!(["gone.txt"])
    );
    let content = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
    assert_eq!(
        (content("a.txt").as_str(), content("b.txt").as_str()),
        ("two\n", "new\n")
    );
    assert!(!dir.path().join("gone.txt").exists());
}

#[test]
fn what_cannot_be_brought_back_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("both");
    fs::write(&file, "before\n").unwrap();
    let path = dir.path().to_str().unwrap();
    let bulkhead = Bulkhead::new().with_own_state();
    let script = "echo ready; read x; echo guest > both; echo artifact > /workspace/output/a";
    let artifacts = dir.path().join("artifacts");
    let words = [
        "--workspace",
        path,
        "--apply",
        "--artifacts",
        artifacts.to_str().unwrap(),
        "--",
        "sh",
        "-c",
        script,
    ];
    let run = bulkhead.start("conflict", &words);
    fs::write(&file, "the host was faster\n").unwrap();
    let ran = run.finish();
    assert_eq!(ran.code, 125, "{ran:?}");
    assert!(ran.stderr.contains("both"), "{ran:?}");
    assert_eq!(fs::read_to_string(&file).unwrap(), "the host was faster\n");
    let kept = bulkhead.state().join("kept/conflict/workspace/both");
    assert_eq!(fs::read_to_string(kept).unwrap(), "guest\n");
    assert!(ran.stderr.contains("kept/conflict/workspace"), "{ran:?}");
    // A second time, under the same name, replaces nothing that was kept.
    let run = bulkhead.start("conflict", &words);
    fs::write(&file, "faster again\n").unwrap();
    let again = run.finish();
    assert!(
        again.stderr.contains("kept/conflict/workspace.2"),
        "{again:?}"
    );
    let kept = bulkhead.state().join("kept/conflict");
    for place in ["workspace/both", "workspace.2/both"] {
        assert_eq!(fs::read_to_string(kept.join(place)).unwrap(), "guest\n");
    }
    // The rest came back all the same.
    assert_eq!(
        fs::read_to_string(artifacts.join("a")).unwrap(),
        "artifact\n"
    );
}

#[test]
fn ten_thousand_files_go_in_and_come_back_identical() {
    let dir = tempfile::tempdir().unwrap();
    for n in 0..10_000 {
        let sub = dir.path().join(format!("in/{}", n / 200));
        fs::create_dir_all(&sub).unwrap();
        fs::write(sub.join(format!("file {n}")), format!("content of {n}\n")).unwrap();
    }
    let path = dir.path().to_str().unwrap();
    let words = [
        "--workspace",
        path,
        "--apply",
        "--",
        "cp",
        "-a",
        "in",
        "out",
    ];
    let run = Bulkhead::new().run(&words);
    assert_eq!(run.code, 0, "{run:?}");
    let (went, came) = (
        files(&dir.path().join("in")),
        files(&dir.path().join("out")),
    );
    assert_eq!((went.len(), went == came), (10_000, true));
}

#[test]
fn a_repository_comes_back_without_what_git_would_run() {
    let dir = tempfile::tempdir().unwrap();
    let git = |words: &[&str]| {
        let mut git = std::process::Command::new("git");
        git.current_dir(dir.path())
            .args(["-c", "user.name=a", "-c", "user.email=a@b"]);
        let output = git.args(words).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    git(&["init", "--quiet"]);
    fs::write(dir.path().join("f"), "one\n").unwrap();
    git(&["add", "."]);
    git(&["commit", "--quiet", "-m", "first"]);
    let script = "set -e; echo two > f; git config user.name agent; git config user.email a@b; \
        git commit --quiet -a -m second; git config core.fsmonitor 'touch /tmp/pwned'; \
        git config core.hooksPath /workspace/work; git config filter.x.clean 'touch /tmp/pwned'; \
        printf '#!/bin/sh\\n' > .git/hooks/pre-commit; chmod +x .git/hooks/pre-commit";
    let path = dir.path().to_str().unwrap();
    let words = ["--workspace", path, "--apply", "--", "sh", "-c", script];
    let run = Bulkhead::with_image("default").run(&words);
    assert_eq!(run.code, 0, "{run:?}");
    assert_eq!(git(&["log", "--format=%s"]), "second\nfirst\n");
    assert_eq!(git(&["status", "--porcelain"]), "");
    assert!(!dir.path().join(".git/hooks/pre-commit").exists());
    let config = fs::read_to_string(dir.path().join(".git/config")).unwrap();
    for key in ["fsmonitor", "hooksPath", "clean"] {
        assert!(!config.contains(key), "{config}");
    }
    assert!(run.stderr.contains("fsmonitor"), "{run:?}");
}

#[test]
fn artifacts_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out");
    let script = "cd /workspace/output; mkdir d; echo x > d/r; ln -s /etc/passwd leak; \
                  truncate -s 5G sparse";
    let words = [
        "--artifacts",
        path.to_str().unwrap(),
        "--",
        "sh",
        "-c",
        script,
    ];
    let run = Bulkhead::new().run(&words);
    assert_eq!(run.code, 0, "{run:?}");
    assert_eq!(fs::read_to_string(path.join("d/r")).unwrap(), "x\n");
    assert!(fs::symlink_metadata(path.join("leak")).is_err());
    assert!(run.stderr.contains("leak"), "{run:?}");
    let sparse = fs::metadata(path.join("sparse")).unwrap();
    assert_eq!((sparse.len(), sparse.blocks() < 1000), (5 << 30, true));
}

#[test]
fn the_guests_words_cannot_steer_the_terminal() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    let script = "printf '\\033]52;c;aGk=\\007\\n' > evil.txt";
    let pty = nix::pty::openpty(None, None).unwrap();
    let words = [
        "run",
        "--accel",
        "tcg",
        "--image",
        "base",
        "--workspace",
        path,
        "--diff",
        "--",
        "sh",
        "-c",
        script,
    ];
    let mut child = Bulkhead::new()
        .command(&words)
        .stdin(std::process::Stdio::null())
        .stderr(std::process::Stdio::from(pty.slave))
        .spawn()
        .unwrap();
    let mut seen = Vec::new();
    // The end of a terminal is an error.
    let _ = std::io::Read::read_to_end(&mut fs::File::from(pty.master), &mut seen);
    assert!(child.wait().unwrap().success());
    let seen = String::from_utf8_lossy(&seen);
    assert!(
        seen.contains("evil.txt") && seen.contains("]52;c"),
        "{seen}"
    );
    assert!(!seen.contains("\u{1b}]"), "{seen:?}");
}

#[test]
fn a_share_is_live_and_leaves_ordinary_files() {
    // On a file system with extended attributes.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    chown(dir.path(), Some(12345), Some(12346)).unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::write(path("in"), "from the host\n").unwrap();
    chown(path("in"), Some(12345), Some(12346)).unwrap();
    let script = "cat in; echo more >> in; mkdir d; printf '#!/bin/sh\\n' > d/tool; \
                  chmod 755 d/tool; ln -s tool d/link; id -u; : > setuid; chmod 6755 setuid; \
                  mkdir -m 2755 setgid; test -u setuid -a -g setgid || exit 9; \
                  umask 077; echo x > private";
    let shared = dir.path().to_str().unwrap();
    let words = [
        "--workspace",
        shared,
        "--workspace-mode",
        "share",
        "--",
        "sh",
        "-c",
        script,
    ];
    let run = Bulkhead::new().run(&words);
    assert_eq!(
        (run.stdout.as_str(), run.code),
        ("from the host\n12345\n", 0),
        "{run:?}"
    );
    assert_eq!(
        fs::read_to_string(path("in")).unwrap(),
        "from the host\nmore\n"
    );
    for (name, mode) in [
        ("d", 0o755),
        ("d/tool", 0o755),
        ("private", 0o600),
        ("in", 0o644),
        // The guest's own belief: on the host nobody becomes another by it.
        ("setuid", 0o755),
        ("setgid", 0o755),
    ] {
        let meta = fs::metadata(path(name)).unwrap();
        let seen = (meta.uid(), meta.gid(), meta.mode() & 0o7777);
        assert_eq!(seen, (12345, 12346, mode), "{name}");
    }
    assert_eq!(fs::read_link(path("d/link")).unwrap(), Path::new("tool"));
    let meta = fs::symlink_metadata(path("d/link")).unwrap();
    assert_eq!(meta.uid(), 12345);
}

#[test]
fn a_share_is_made_ordinary_after_a_crash_too() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    chown(dir.path(), Some(12345), Some(12346)).unwrap();
    let bulkhead = Bulkhead::new().with_own_state();
    let path = dir.path().to_str().unwrap();
    let script = "echo x > f; sync; echo ready; sleep 600";
    let words = [
        "--workspace",
        path,
        "--workspace-mode",
        "share",
        "--",
        "sh",
        "-c",
        script,
    ];
    let run = bulkhead.start("crashed-share", &words);
    run.signal(nix::sys::signal::Signal::SIGKILL);
    run.finish();
    let seen = || {
        let meta = fs::metadata(dir.path().join("f")).unwrap();
        (meta.uid(), meta.mode() & 0o777)
    };
    // The owner's at once; its mode is QEMU's until it is settled.
    assert_eq!(seen(), (12345, 0o600));
    assert_eq!(bulkhead.raw(&["gc"]).code, 0);
    assert_eq!(seen(), (12345, 0o644));
}

#[test]
fn a_read_only_share_cannot_be_written() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o777)).unwrap();
    fs::write(dir.path().join("in"), "x\n").unwrap();
    std::os::unix::fs::symlink("in", dir.path().join("link")).unwrap();
    let before = files(dir.path());
    // Root in the guest may remount as it likes: the host says no.
    let script = "cat link; mount -o remount,rw /workspace/work; echo y > in; touch new; rm in";
    let path = dir.path().to_str().unwrap();
    let words = [
        "--workspace",
        path,
        "--workspace-mode",
        "share:ro",
        "--user",
        "root",
        "--",
        "sh",
        "-c",
        script,
    ];
    let run = Bulkhead::new().run(&words);
    assert_eq!(run.stdout, "x\n", "{run:?}");
    assert_ne!(run.code, 0);
    assert_eq!(files(dir.path()), before);
}
