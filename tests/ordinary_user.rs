//! What somebody gets who is not root: a user namespace of their own, and KVM
//! where they are in its group.

mod support;

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use support::{Bulkhead, Ran};

/// Who they are: nobody, who is in no group but those given.
const USER: &str = "65534";
/// A group of this host's that nobody is in.
const GROUP: u32 = 1_900_300_000;

/// A place that an ordinary user can use: the program, one image, one kernel.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let place = tempfile::tempdir().unwrap();
        let bulkhead = Bulkhead::new();
        let sh = |script: &str| {
            let mut shell = Command::new("sh");
            shell.args(["-ec", script, "sh"]);
            shell.arg(place.path()).arg(bulkhead.state());
            let status = shell.arg(env!("CARGO_BIN_EXE_bulkhead")).status();
            assert!(status.unwrap().success(), "{script}");
        };
        sh("cp \"$3\" $1/bulkhead; mkdir -p $1/state/images/names $1/state/kernels $1/run");
        sh(
            "base=$(readlink -f $2/images/names/base); cp -a $base $1/state/images/; \
            ln -s ../${base##*/} $1/state/images/names/base; \
            cp -rL $2/kernels/tuned $1/state/kernels/; chown -R 65534:65534 $1",
        );
        Self(place)
    }

    /// `bulkhead --json run` of a small machine, by a user in these groups.
    fn run(&self, groups: &[&str], accel: &str, command: &[&str]) -> Ran {
        let dir = self.0.path();
        let mut run = Command::new("setpriv");
        run.args(["--reuid", USER, "--regid", USER]).args(groups);
        run.arg(dir.join("bulkhead"));
        run.args(["--json", "run", "--accel", accel, "--image", "base"]);
        run.args(["--kernel", "tuned", "--memory", "256M", "--cpus", "1", "--"]);
        run.args(command).env_clear().env("PATH", "/usr/bin:/bin");
        // How long a guest may take is this host's.
        let patience = std::env::var_os("BULKHEAD_BOOT_TIMEOUT");
        run.envs(patience.map(|patience| ("BULKHEAD_BOOT_TIMEOUT", patience)));
        run.env("BULKHEAD_CONFIG", "none");
        run.env("BULKHEAD_NETWORK", "isolated").env("HOME", dir);
        run.env("BULKHEAD_STATE_DIR", dir.join("state"));
        run.env("BULKHEAD_RUNTIME_DIR", dir.join("run"));
        support::ran(run.output().unwrap())
    }
}

/// The outcome of a run that succeeded, with what a user namespace gives.
fn confined(ran: &Ran) -> Value {
    assert_eq!(ran.code, 0, "{ran:?}");
    let outcome: Value = serde_json::from_str(&ran.stdout).unwrap();
    let layers = outcome["layers"].as_array().unwrap();
    let with = |verdict: &str| -> Vec<String> {
        let all = layers.iter().filter(|one| one["verdict"] == verdict);
        let name = |name: &Value| name.as_str().unwrap().to_owned();
        all.map(|one| format!("{}: {}", name(&one["layer"]), name(&one["what"])))
            .collect()
    };
    assert_eq!(with("fail"), [""; 0], "{outcome}");
    let weaker = ["user: Uid", "user: Gid", "user: Groups", "cgroup: group"];
    assert_eq!(with("weaker"), weaker, "{outcome}");
    let passed = with("pass");
    for one in [
        "user: CapBnd",
        "files: mounts",
        "namespaces: net namespace",
        "seccomp: Seccomp_filters",
        "hardware: accelerator",
    ] {
        let found = passed.iter().any(|have| have == one);
        assert!(found, "no {one} in {outcome}");
    }
    outcome
}

#[test]
fn an_ordinary_user_gets_what_a_user_namespace_gives() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: an_ordinary_user_gets_a_jail: this user cannot become another one");
        return;
    }
    let ran = Place::new().run(&["--clear-groups"], "tcg", &["true"]);
    assert_eq!(confined(&ran)["hardware_isolation"], false);
}

/// /dev/kvm as distributions have it: for a group. As it was when dropped.
struct Grouped(fs::Metadata);

impl Grouped {
    const NODE: &str = "/dev/kvm";

    fn new() -> Self {
        let before = fs::metadata(Self::NODE).unwrap();
        std::os::unix::fs::chown(Self::NODE, None, Some(GROUP)).unwrap();
        fs::set_permissions(Self::NODE, fs::Permissions::from_mode(0o660)).unwrap();
        Self(before)
    }
}

impl Drop for Grouped {
    fn drop(&mut self) {
        let _ = std::os::unix::fs::chown(Self::NODE, None, Some(self.0.gid()));
        let _ = fs::set_permissions(Self::NODE, self.0.permissions());
    }
}

#[test]
#[ignore = "needs a KVM host: cargo xtask lab test"]
fn who_is_in_the_group_of_kvm_gets_isolation_by_hardware() {
    let _grouped = Grouped::new();
    let place = Place::new();
    let refused = place.run(&["--clear-groups"], "kvm", &["true"]);
    assert_eq!(refused.code, 125, "{refused:?}");
    let cure = refused.stderr.contains("kvm-unusable") && refused.stderr.contains("join its group");
    assert!(cure, "{refused:?}");
    let groups = format!("--groups={GROUP}");
    let ran = place.run(&[&groups], "kvm", &["sh", "-c", "echo fine; exit 0"]);
    let outcome = confined(&ran);
    assert_eq!(outcome["stdout"]["text"], "fine\n");
    assert_eq!(outcome["hardware_isolation"], true);
    // The other node is root's.
    assert_eq!(outcome["channel"], "serial");
    assert!(Path::new(Grouped::NODE).exists());
}
