//! Configuration: files, environment and flags as the program takes them.

mod support;

use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use support::Bulkhead;

/// The program in an environment of its own.
struct Place {
    home: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        Self { home }
    }

    /// Writes a file below the home directory, for its owner only to change.
    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.home.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap();
        path
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bulkhead"));
        command
            .env_clear()
            .env("HOME", self.home.path())
            .args(words);
        command
    }

    fn call(&self, words: &[&str]) -> (String, String, i32) {
        called(&mut self.command(words))
    }

    /// The lines of `config show`, which must succeed.
    fn show(&self, words: &[&str]) -> Vec<String> {
        let (stdout, stderr, code) = self.call(&[&["config", "show"], words].concat());
        assert_eq!(code, 0, "{stderr}");
        stdout.lines().map(str::to_owned).collect()
    }
}

fn called(command: &mut Command) -> (String, String, i32) {
    let output = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    let code = output.status.code().unwrap();
    (text(output.stdout), text(output.stderr), code)
}

#[track_caller]
fn assert_line(lines: &[String], start: &str, end: &str) {
    let found = lines
        .iter()
        .any(|line| line.starts_with(start) && line.ends_with(end));
    assert!(found, "no line {start} ... {end} in {lines:#?}");
}

#[test]
fn every_layer_is_shown_with_its_origin() {
    let place = Place::new();
    let file = place.file(
        ".config/bulkhead/config.toml",
        "[machine]\nmemory = \"1G\"\ncpus = 3\nenv = { \"A.b\" = \"1\" }\n[profile.big]\nmemory = \"3G\"\n",
    );
    let spec = place.file("spec.toml", "disk = \"5G\"\ncommand = [\"true\"]\n");
    let words = ["config", "show", "--origin", "--ttl", "8h", "--spec"];
    let mut command = place.command(&words);
    command.arg(&spec).args(["--state-dir", "/s"]);
    command.env("BULKHEAD_CPUS", "4");
    let (stdout, stderr, code) = called(&mut command);
    assert_eq!(code, 0, "{stderr}");
    let lines: Vec<String> = stdout.lines().map(str::to_owned).collect();
    let file = file.display();
    assert_line(&lines, "state_dir = \"/s\"", "# --state-dir");
    assert_line(&lines, "image = \"default\"", "# default");
    assert_line(&lines, "memory = \"1G\"", &format!("# {file}:2"));
    assert_line(&lines, "cpus = 4", "# BULKHEAD_CPUS");
    assert_line(&lines, "disk = \"5G\"", &format!("# {}:1", spec.display()));
    assert_line(&lines, "ttl = \"28800s\"", "# --ttl");
    assert_line(&lines, "timeout = \"300s\"", "# profile standard");
    assert_line(&lines, "\"A.b\" = \"1\"", &format!("# {file}:4"));
    assert_line(&lines, "[profile.big]", "");
    assert_line(&lines, "# qemu =", "# default");
}

#[test]
fn what_is_shown_is_a_file_that_says_the_same() {
    let place = Place::new();
    let first = place.show(&[
        "--profile",
        "light",
        "--cpus",
        "3",
        "--env",
        "A=1",
        "--env",
        "B.c= \"x\\\n",
        "--label",
        "a/b=c",
        "--accel",
        "tcg",
        "--idle-timeout",
        "3m",
        "--kernel",
        "tuned",
        "--state-dir",
        "/s",
    ]);
    let file = place.file("copy.toml", &first.join("\n"));
    let second = place.show(&["--config", file.to_str().unwrap()]);
    assert_eq!(first, second);
    // That is no comparison of empty texts.
    assert_line(&second, "cpus = 3", "");
}

#[test]
fn json_tells_values_and_origins() {
    let place = Place::new();
    let (stdout, _, _) = place.call(&["config", "show", "--json", "--memory", "1G"]);
    let settings: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    support::printed::check("config-show", &settings);
    let settings = settings.as_array().unwrap();
    let get = |name: &str| {
        let found = settings
            .iter()
            .find(|setting| setting["key"] == serde_json::json!(["machine", name]));
        found.unwrap().clone()
    };
    assert_eq!(get("memory")["value"], "1G");
    let flag = serde_json::json!({ "from": "flag", "flag": "--memory" });
    assert_eq!(get("memory")["origin"], flag);
    let profile = serde_json::json!({ "from": "profile", "profile": "standard" });
    assert_eq!(
        (&get("cpus")["value"], &get("cpus")["origin"]),
        (&2.into(), &profile)
    );
}

#[test]
fn root_refuses_files_others_can_change() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: root_refuses_files_others_can_change: not root");
        return;
    }
    let place = Place::new();
    let path = place.file("c.toml", "qemu = \"/q\"\n");
    let name = path.to_str().unwrap();
    place.show(&["--config", name]);
    let refused = |owner: u32, mode: u32| {
        chown(&path, Some(owner), None).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
        let (_, stderr, code) = place.call(&["config", "show", "--config", name]);
        assert_eq!(code, 125, "{owner} {mode:o}: {stderr}");
        assert!(
            stderr.contains("[config-untrusted]") && stderr.contains(name),
            "{stderr}"
        );
    };
    refused(0, 0o664);
    refused(0, 0o646);
    refused(1000, 0o644);
}

#[test]
fn errors_name_the_file_the_line_and_the_key() {
    let place = Place::new();
    let path = place.file(
        ".config/bulkhead/config.toml",
        "\n[machine]\nmemroy = \"1G\"\n",
    );
    let (_, stderr, code) = place.call(&["config", "show"]);
    assert_eq!(code, 125);
    for word in [
        path.to_str().unwrap(),
        "line 3",
        "memroy",
        "[config-invalid]",
    ] {
        assert!(stderr.contains(word), "{stderr}");
    }
    // No verb goes on without what it was told, and one can do without a file.
    let (_, stderr, code) = place.call(&["gc", "--dry-run"]);
    assert!(code == 125 && stderr.contains("memroy"), "{stderr}");
    place.show(&["--config", "none"]);
    let (_, stderr, code) = place.call(&["config", "show", "--config", "/nowhere.toml"]);
    assert!(code == 125 && stderr.contains("/nowhere.toml"), "{stderr}");
}

#[test]
fn ordinary_users_have_places_of_their_own() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: ordinary_users_have_places_of_their_own: not root");
        return;
    }
    let place = Place::new();
    // Where others may not look, as below a private target directory.
    let program = place.home.path().join("bulkhead");
    std::fs::copy(env!("CARGO_BIN_EXE_bulkhead"), &program).unwrap();
    for path in [place.home.path(), &program] {
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
    }
    let show = |variables: &[(&str, &str)]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]);
        command.arg(&program).args(["config", "show"]);
        command.env_clear().env("PATH", "/usr/bin:/bin");
        command.envs(variables.iter().copied());
        called(&mut command)
    };
    let (stdout, stderr, _) = show(&[("HOME", "/h"), ("XDG_RUNTIME_DIR", "/r")]);
    assert!(
        stdout.starts_with(
            "state_dir = \"/h/.local/state/bulkhead\"\nruntime_dir = \"/r/bulkhead\"\n"
        ),
        "{stdout}{stderr}"
    );
    let (stdout, _, _) = show(&[("XDG_STATE_HOME", "/s")]);
    assert!(
        stdout.starts_with("state_dir = \"/s/bulkhead\"\nruntime_dir = \"/s/bulkhead/run\"\n"),
        "{stdout}"
    );
    let (_, stderr, code) = show(&[]);
    assert!(code == 125 && stderr.contains("--state-dir"), "{stderr}");
}

#[test]
fn shells_and_man_get_what_they_can_read() {
    let place = Place::new();
    for (shell, word) in [
        ("bash", "complete -F _bulkhead"),
        ("zsh", "#compdef bulkhead"),
        ("fish", "complete -c bulkhead"),
    ] {
        let (stdout, stderr, code) = place.call(&["completions", shell]);
        assert!(code == 0 && stdout.contains(word), "{shell}: {stderr}");
    }
    let script = place.file("completions.bash", &place.call(&["completions", "bash"]).0);
    let status = Command::new("bash").arg("-n").arg(script).status().unwrap();
    assert!(status.success());
    let (page, _, code) = place.call(&["man"]);
    assert!(code == 0 && page.contains(".TH bulkhead 1"), "{page}");
    let dir = place.home.path().join("man");
    let (_, stderr, code) = place.call(&["man", "--dir", dir.to_str().unwrap()]);
    assert_eq!(code, 0, "{stderr}");
    let page = std::fs::read_to_string(dir.join("bulkhead-run.1")).unwrap();
    assert!(page.contains("\\-\\-memory"), "{page}");
}

/// Memory of a guest under the tuned kernel, in KiB.
fn guest_memory(bulkhead: &Bulkhead, words: &[&str], config: &Path) -> u64 {
    let mut command = bulkhead.command(&["run", "--config"]);
    command.arg(config).args(words);
    command.args(["--", "sh", "-c", "grep MemTotal /proc/meminfo"]);
    let (stdout, stderr, code) = called(&mut command);
    assert_eq!(code, 0, "{stderr}");
    stdout.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn a_custom_profile_reaches_the_guest() {
    let place = Place::new();
    let config = place.file(
        "c.toml",
        "[machine]\nimage = \"base\"\naccel = \"tcg\"\nkernel = \"tuned\"\nprofile = \"small\"\n\
         network = \"off\"\n\
         [profile.small]\nbase = \"light\"\nmemory = \"192M\"\n\
         [profile.wide]\nbase = \"light\"\nmemory = \"384M\"\n\
         [network.off]\nmode = \"isolated\"\n",
    );
    let bulkhead = Bulkhead::new();
    let small = guest_memory(&bulkhead, &[], &config);
    assert!((100 << 10..192 << 10).contains(&small), "{small} KiB");
    let wide = guest_memory(&bulkhead, &["--profile", "wide"], &config);
    assert!((192 << 10..384 << 10).contains(&wide), "{wide} KiB");
}

#[test]
fn a_machine_on_a_bridge_is_warned_of_when_it_is_made() {
    let bulkhead = Bulkhead::new().with_own_state();
    let bridge = "br-none:192.0.2.50/24@192.0.2.1";
    let words = [
        "create", "--image", "base", "--accel", "tcg", "--bridge", bridge, "--name", "on",
    ];
    let made = bulkhead.raw(&words);
    assert_eq!((made.code, made.stdout.as_str()), (0, "on\n"), "{made:?}");
    let warning = "what this machine reaches on br-none is not filtered";
    assert!(made.stderr.contains(warning), "{made:?}");
    // The bridge is looked for when it is started.
    bulkhead.must_fail(&["start", "on"], "network-no-bridge");
    bulkhead.must(&["rm", "on"]);
}
