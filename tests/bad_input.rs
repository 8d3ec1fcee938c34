//! What goes wrong is said clearly, with a code and a cure, and nothing stays.

mod support;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use support::{Bulkhead, Ran, machines};

/// Failed as Bulkhead's own failures do.
fn assert_report(run: &Ran, code: &str, words: &[&str]) {
    assert_eq!(run.code, 125, "{run:?}");
    assert!(run.stderr.contains(&format!("[{code}]")), "{run:?}");
    assert!(run.stderr.contains("  help: "), "{run:?}");
    for word in words {
        assert!(run.stderr.contains(word), "{word} is not in {run:?}");
    }
    assert_eq!(run.stdout, "");
}

/// A program that stands for QEMU.
fn program(dir: &Path, text: &str) -> PathBuf {
    let path = dir.join("qemu");
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
    path
}

#[test]
fn without_kvm_it_stops_with_reason_and_cure() {
    let run = Bulkhead::new().raw(&["run", "--image", "base", "--", "true"]);
    if run.code == 0 {
        println!("skipped: without_kvm_it_stops_with_reason_and_cure: KVM works here");
        return;
    }
    assert_report(&run, "kvm-unusable", &["--accel tcg"]);
}

/// A QEMU whose processors never run, whatever KVM does here.
const STILL: &str = r#"#!/bin/sh
for word do
    shift
    case $word in
    kvm) word=tcg ;;
    host | host,*) word=max ;;
    esac
    set -- "$@" "$word"
done
exec qemu-system-x86_64 -S "$@"
"#;

#[test]
fn a_bad_verdict_on_kvm_says_nothing_of_a_longer_time() {
    if let Err(error) = std::fs::File::options().write(true).open("/dev/kvm") {
        println!("skipped: a_bad_verdict_on_kvm: /dev/kvm: {error}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let qemu = program(dir.path(), STILL);
    let bulkhead = Bulkhead::new();
    for (given, seen) in [
        ("1s", "within 1s"),
        ("2s", "within 2s"),
        ("1s", "within 2s"),
    ] {
        let words = ["--boot-timeout", given, "--qemu", qemu.to_str().unwrap()];
        // A script in QEMU's place cannot be jailed.
        let run = [
            "run",
            "--image",
            "base",
            "--waive",
            "user,files,seccomp",
            "--",
            "true",
        ];
        let run = bulkhead.raw(&[&words[..], &run[..]].concat());
        assert_report(&run, "kvm-unusable", &[seen]);
    }
}

#[test]
fn a_missing_image_and_a_missing_qemu_are_named() {
    let bulkhead = Bulkhead::new();
    let run = bulkhead.raw(&["run", "--accel", "tcg", "--image", "nowhere", "--", "true"]);
    assert_report(&run, "image-not-found", &["nowhere"]);
    let run = bulkhead.run(&["--qemu", "/nowhere/qemu", "--", "true"]);
    assert_report(&run, "qemu-not-found", &["/nowhere/qemu"]);
}

#[test]
fn a_qemu_that_dies_is_quoted() {
    let dir = tempfile::tempdir().unwrap();
    let qemu = program(
        dir.path(),
        "#!/bin/sh\necho 'no such machine' >&2; exit 1\n",
    );
    let run = Bulkhead::new().run(&[
        "--qemu",
        qemu.to_str().unwrap(),
        "--waive",
        "files,seccomp",
        "--",
        "true",
    ]);
    assert_report(&run, "qemu-died", &["no such machine"]);
}

#[test]
fn a_damaged_image_is_refused() {
    let bulkhead = Bulkhead::new();
    let temp = tempfile::tempdir().unwrap();
    let images = temp.path().join("images");
    let copied = std::process::Command::new("cp")
        .arg("-a")
        .args([bulkhead.state().join("images"), images.clone()])
        .status();
    assert!(copied.unwrap().success());
    let root = images.join("names/base").canonicalize().unwrap();
    let root = root.join("root.squashfs");
    let mut bytes = std::fs::read(&root).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&root, bytes).unwrap();
    let state = temp.path().to_str().unwrap();
    let run = bulkhead.run(&["--state-dir", state, "--", "true"]);
    assert_report(&run, "image-corrupt", &["base", "root.squashfs"]);
}

#[test]
fn a_guest_that_panics_shows_its_console() {
    let script = "echo c > /proc/sysrq-trigger; sleep 60";
    let run = Bulkhead::new().run(&["--user", "root", "--", "sh", "-c", script]);
    assert_report(&run, "guest-panic", &["sysrq triggered crash"]);
}

#[test]
fn a_guest_that_goes_down_by_itself_is_told() {
    let script = "for p in $(pgrep -x init); do [ $p = 1 ] || kill -9 $p; done; sleep 60";
    let run = Bulkhead::new().run(&["--user", "root", "--", "sh", "-c", script]);
    assert_report(&run, "guest-ended", &["agent's server died"]);
}

#[test]
fn a_full_guest_disk_is_the_commands_failure() {
    let script = "head -c 200M /dev/zero > big || echo full; rm big; echo after > small; cat small";
    let run = Bulkhead::new().run(&["--disk", "64M", "--", "sh", "-c", script]);
    assert_eq!(
        (run.stdout.as_str(), run.code),
        ("full\nafter\n", 0),
        "{run:?}"
    );
}

#[test]
fn a_full_host_disk_is_named() {
    let bulkhead = Bulkhead::new();
    let temp = tempfile::tempdir().unwrap();
    // The mount lives and dies with the private namespace.
    let script = format!(
        "mount -t tmpfs -o size=24k none {dir} && ln -s {images} {dir}/images && \
         exec {program} run --state-dir {dir} --accel tcg --image base -- true",
        dir = temp.path().display(),
        images = bulkhead.state().join("images").display(),
        program = env!("CARGO_BIN_EXE_bulkhead"),
    );
    let mut command = std::process::Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", &script]);
    command.env("BULKHEAD_CONFIG", "none");
    command.env("BULKHEAD_NETWORK", "isolated");
    command.env("BULKHEAD_RUNTIME_DIR", temp.path().join("runtime"));
    let output = command.output().unwrap();
    let run = Ran {
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
        code: output.status.code().unwrap(),
    };
    assert_report(&run, "no-space", &[]);
}

#[test]
fn workspaces_that_cannot_be_used_are_named() {
    let bulkhead = Bulkhead::new();
    let file = tempfile::NamedTempFile::new().unwrap();
    for path in ["/nowhere/at-all", file.path().to_str().unwrap()] {
        let run = bulkhead.run(&["--workspace", path, "--", "true"]);
        assert_report(&run, "workspace-unreadable", &[path]);
    }
}

#[test]
fn unknown_keys_and_values_are_named() {
    let bulkhead = Bulkhead::new();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("spec.toml");
    std::fs::write(&path, "image = \"base\"\nmemroy = \"1G\"\n").unwrap();
    let path = path.to_str().unwrap();
    let run = bulkhead.run(&["--spec", path, "--", "true"]);
    assert_report(&run, "config-invalid", &[path, "line 2", "memroy"]);
    let run = bulkhead.run(&["--memory", "1Q", "--", "true"]);
    assert_eq!(run.code, 125, "{run:?}");
    assert!(run.stderr.contains("1Q"), "{run:?}");
    let run = bulkhead.run(&[]);
    assert_report(&run, "no-command", &[]);
}

#[test]
fn errors_are_json_where_asked() {
    let run = Bulkhead::new().run(&["--json", "--qemu", "/nowhere/qemu", "--", "true"]);
    let error: serde_json::Value = serde_json::from_str(&run.stderr).unwrap();
    for key in ["code", "what", "cause", "remedy"] {
        assert!(error["error"][key].is_string(), "{error}");
    }
    assert_eq!(
        (run.code, &error["error"]["code"]),
        (125, &"qemu-not-found".into())
    );
}

#[test]
fn a_user_or_directory_that_is_not_there_is_told() {
    let bulkhead = Bulkhead::new();
    let run = bulkhead.run(&["--user", "nobody-here", "--", "true"]);
    assert!(
        run.code == 125 && run.stderr.contains("nobody-here"),
        "{run:?}"
    );
    let run = bulkhead.run(&["--workdir", "/no/such/dir", "--", "true"]);
    assert!(
        run.code == 125 && run.stderr.contains("/no/such/dir"),
        "{run:?}"
    );
    let run = bulkhead.run(&["--", "/etc/passwd"]);
    assert!(
        run.code == 126 && run.stderr.contains("/etc/passwd"),
        "{run:?}"
    );
    assert_eq!(machines("nobody-here"), [""; 0]);
}
