//! Snapshots and templates as files, against real QEMU and the real agent.

mod support;

use std::path::{Path, PathBuf};

use support::{Bulkhead, Detached, entries};

fn bulkhead() -> Bulkhead {
    Bulkhead::new().with_own_state()
}

/// Options of an import that fit [`Bulkhead::create`].
fn import(file: &Path, words: &[&str]) -> Vec<String> {
    let fixed = ["snapshot", "import", file.to_str().unwrap()];
    let accel = support::accel();
    let all = [&fixed[..], &["--accel", &accel], words].concat();
    all.into_iter().map(str::to_owned).collect()
}

fn words(all: &[String]) -> Vec<&str> {
    all.iter().map(String::as_str).collect()
}

fn started<'a>(bulkhead: &'a Bulkhead, name: &str, words: &[&str]) -> Detached<'a> {
    bulkhead.create(name, &[&["--disk", "64M"], words, &["--start"]].concat())
}

#[track_caller]
fn sh(bulkhead: &Bulkhead, vm: &str, script: &str) -> String {
    bulkhead.must(&["exec", "-u", "root", vm, "sh", "-c", script])
}

/// A shell that lives on and has a secret in its memory only, which it tells,
/// with how often it was asked, when it is asked.
const KEEPER: &str = "cat > /tmp/keep.sh <<'X'\n\
     read -r secret < /proc/sys/kernel/random/uuid; n=0; echo $secret > /tmp/secret; \
     while :; do [ -e /tmp/ask ] && { n=$((n+1)); rm /tmp/ask; \
     echo $secret $n > /tmp/new; mv /tmp/new /tmp/told; }; sleep 0.05; done\nX\n\
     (sh /tmp/keep.sh </dev/null >/dev/null 2>&1 &); \
     while [ ! -s /tmp/secret ]; do sleep 0.02; done; cat /tmp/secret; rm /tmp/secret";
const ASK: &str = "rm -f /tmp/told; touch /tmp/ask; \
     while [ ! -s /tmp/told ]; do sleep 0.02; done; cat /tmp/told";

struct Exported {
    dir: tempfile::TempDir,
    file: PathBuf,
}

/// Exports a snapshot `s` of a machine `vm` that has the keeper, and removes it;
/// gives the keeper's secret, too.
fn exported(bulkhead: &Bulkhead) -> (Exported, String) {
    let vm = started(bulkhead, "vm", &["--label", "team=a"]);
    let secret = sh(bulkhead, "vm", KEEPER).trim().to_owned();
    assert_eq!(sh(bulkhead, "vm", ASK), format!("{secret} 1\n"));
    sh(bulkhead, "vm", "echo kept > /var/mark");
    bulkhead.must(&["snapshot", "save", "vm", "s", "--tag", "k=v"]);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("s.export");
    let path = file.to_str().unwrap();
    let told = bulkhead.json(&["snapshot", "export", "vm", "s", path]);
    let bytes = std::fs::metadata(&file).unwrap().len();
    assert_eq!(told["bytes"], bytes, "{told}");
    println!("an export of 256 MiB has {bytes} bytes");
    assert!(bytes < 64 << 20, "{bytes}");
    let words = ["snapshot", "export", "vm", "s", path];
    bulkhead.must_fail(&words, "export-exists");
    drop(vm);
    assert!(entries(&bulkhead.state().join("runs")).is_empty());
    (Exported { dir, file }, secret)
}

#[test]
fn a_machine_goes_on_from_the_same_memory_after_it_was_removed() {
    let bulkhead = bulkhead();
    let (export, secret) = exported(&bulkhead);
    let all = import(&export.file, &[]);
    assert_eq!(bulkhead.must(&words(&all)), "vm\n");
    let seen = bulkhead.json(&["inspect", "vm"]);
    assert_eq!(
        (&seen["state"], &seen["labels"]["team"]),
        (&"created".into(), &"a".into())
    );
    bulkhead.must_fail(&words(&all), "name-in-use");
    bulkhead.must(&["start", "vm"]);
    let seen = bulkhead.json(&["inspect", "vm"]);
    assert_eq!(seen["reason"], "restored from snapshot s", "{seen}");
    assert_eq!(sh(&bulkhead, "vm", ASK), format!("{secret} 2\n"));
    assert_eq!(sh(&bulkhead, "vm", "cat /var/mark"), "kept\n");
    // Another one beside it, from stdin: unlike it but for its memory.
    let all = import(Path::new("-"), &["--name", "twin", "--start"]);
    let bytes = std::fs::read(&export.file).unwrap();
    let ran = bulkhead.raw_with_input(&words(&all), &bytes);
    assert_eq!((ran.code, ran.stdout.as_str()), (0, "twin\n"), "{ran:?}");
    assert_eq!(sh(&bulkhead, "twin", ASK), format!("{secret} 2\n"));
    assert_eq!(sh(&bulkhead, "twin", "hostname"), "twin\n");
    let id = |vm| sh(&bulkhead, vm, "cat /etc/machine-id");
    assert_ne!(id("vm"), id("twin"));
    // The snapshot is its own: it goes back there, and is saved and forked.
    let told = bulkhead.json(&["snapshot", "inspect", "vm", "s"]);
    assert_eq!(told["manifest"]["tags"]["k"], "v");
    bulkhead.must(&["snapshot", "restore", "vm", "s"]);
    assert_eq!(sh(&bulkhead, "vm", ASK), format!("{secret} 2\n"));
    for vm in ["vm", "twin"] {
        bulkhead.must(&["verify", vm]);
        bulkhead.must(&["rm", "--force", vm]);
    }
    drop(export.dir);
}

#[test]
fn what_is_damaged_leaves_nothing_and_says_what_it_is() {
    let bulkhead = bulkhead();
    let (export, _) = exported(&bulkhead);
    let whole = std::fs::read(&export.file).unwrap();
    let bad = export.dir.path().join("bad.export");
    let refused = |bytes: &[u8], code: &str| {
        std::fs::write(&bad, bytes).unwrap();
        bulkhead.must_fail(&words(&import(&bad, &[])), code);
        assert!(entries(&bulkhead.state().join("runs")).is_empty());
    };
    for at in [100, whole.len() / 2, whole.len() - 1] {
        let mut flipped = whole.clone();
        flipped[at] ^= 1;
        refused(&flipped, "export-corrupt");
    }
    refused(&whole[..whole.len() - 40_000], "export-truncated");
    refused(&[&whole[..], b"\n"].concat(), "export-trailing");
    refused(b"PK\x03\x04 and so on", "export-unknown");
    let file = export.file.to_str().unwrap();
    bulkhead.must_fail(&["template", "import", file], "export-kind");
    // What it would have to fit is named, and the disk alone fits.
    let qemu = std::env::var("BULKHEAD_QEMU10").expect("BULKHEAD_QEMU10 names no QEMU 10");
    for (option, value, part) in [
        ("--qemu", qemu.as_str(), "qemu is"),
        ("--memory", "512M", "memory is 512M, and was 256M"),
        ("--domain", "other", "domain is other, and was default"),
        ("--network", "dev", "devices is"),
        ("--disk", "1G", "disk is 1G"),
    ] {
        let all = import(&export.file, &[option, value]);
        let told = bulkhead.must_fail(&words(&all), "export-mismatch");
        assert!(told.contains(part), "{told}");
    }
    let all = import(&export.file, &["--disk", "1G", "--disk-only"]);
    let told = bulkhead.must_fail(&words(&all), "export-mismatch");
    assert!(told.contains("disk is 1G"), "{told}");
    let all = import(&export.file, &["--qemu", &qemu, "--disk-only", "--start"]);
    bulkhead.must(&words(&all));
    assert_eq!(
        sh(
            &bulkhead,
            "vm",
            "cat /var/mark; rm -f /tmp/ask; touch /tmp/ask; sleep 1; ls /tmp/ask && echo gone"
        ),
        "kept\n/tmp/ask\ngone\n"
    );
    bulkhead.must(&["rm", "--force", "vm"]);
}

#[test]
fn an_image_that_is_not_here_is_named() {
    let bulkhead = bulkhead();
    let (export, _) = exported(&bulkhead);
    let bare = tempfile::tempdir().unwrap();
    let other = Bulkhead::new().with_state(bare.path());
    let told = other.must_fail(&words(&import(&export.file, &[])), "image-not-found");
    assert!(told.contains("sha256-"), "{told}");
}

#[test]
fn a_template_is_taken_in_and_cloned() {
    let bulkhead = bulkhead();
    let accel = support::accel();
    let fixed = ["--accel", &accel, "--image", "base", "--kernel", "tuned"];
    let sizes = ["--memory", "256M", "--cpus", "1", "--disk", "64M"];
    let build = [&["template", "build"], &fixed[..], &sizes].concat();
    let build = [&build[..], &["--warm", "echo warm > /tmp/warm"]].concat();
    let id = bulkhead.must(&build);
    let id = id.trim();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.export");
    let file = path.to_str().unwrap();
    assert_eq!(
        bulkhead.must(&["template", "export", &id[..8], file]),
        format!("{file}\n")
    );
    // stdout has the same but for the time.
    let output = bulkhead
        .command(&["template", "export", id, "-"])
        .output()
        .unwrap();
    assert!(output.status.success());
    let sizes_of = (output.stdout.len(), std::fs::metadata(&path).unwrap().len());
    println!(
        "an export of a template of 256 MiB has {} bytes",
        sizes_of.1
    );
    bulkhead.must_fail(&["template", "import", file], "template-exists");
    bulkhead.must_fail(&["snapshot", "import", file], "export-kind");
    bulkhead.must(&["template", "rm", "--all"]);
    let qemu = std::env::var("BULKHEAD_QEMU10").expect("BULKHEAD_QEMU10 names no QEMU 10");
    let told = bulkhead.must_fail(
        &["--qemu", &qemu, "template", "import", file],
        "export-mismatch",
    );
    assert!(told.contains("qemu is"), "{told}");
    // Whoever made the file does not say whose machines are cloned from it.
    let told = bulkhead.must_fail(
        &["template", "import", "--domain", "ci", file],
        "export-mismatch",
    );
    assert!(told.contains("domain is ci, and was default"), "{told}");
    let mut bad = output.stdout.clone();
    let middle = bad.len() / 2;
    bad[middle] ^= 4;
    let ran = bulkhead.raw_with_input(&["template", "import", "-"], &bad);
    assert!(ran.stderr.contains("error [export-corrupt]"), "{ran:?}");
    assert!(bulkhead.must(&["template", "ls"]).lines().count() == 1);
    let ran = bulkhead.raw_with_input(&["template", "import", "-"], &output.stdout);
    assert_eq!((ran.code, ran.stdout.trim()), (0, id), "{ran:?}");
    bulkhead.must(&["template", "rm", id]);
    assert_eq!(bulkhead.json(&["template", "import", file])["id"], id);
    let run = [
        &["run"],
        &fixed[..],
        &sizes,
        &["--template", id, "--", "cat", "/tmp/warm"],
    ]
    .concat();
    assert_eq!(bulkhead.must(&run), "warm\n");
}

#[test]
fn an_import_that_dies_leaves_no_machine() {
    let bulkhead = bulkhead();
    let (export, _) = exported(&bulkhead);
    let bytes = std::fs::read(&export.file).unwrap();
    let all = import(Path::new("-"), &[]);
    let mut child = bulkhead.command(&words(&all));
    child.stdin(std::process::Stdio::piped());
    child.stderr(std::process::Stdio::null());
    let mut child = child.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    // It has taken in nearly all of it, and waits for the rest.
    std::io::Write::write_all(&mut stdin, &bytes[..bytes.len() - 50_000]).unwrap();
    let made = bulkhead.state().join("runs/vm/snapshots");
    for _ in 0..600 {
        if made.exists() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    assert!(made.exists());
    child.kill().unwrap();
    child.wait().unwrap();
    bulkhead.must(&["gc"]);
    assert!(entries(&bulkhead.state().join("runs")).is_empty());
    let whole = bulkhead.raw_with_input(&words(&all), &bytes);
    assert_eq!(whole.code, 0, "{whole:?}");
    bulkhead.must(&["rm", "vm"]);
}
