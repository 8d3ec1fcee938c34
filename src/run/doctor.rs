//! What a host can do, each with reason and cure.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use super::host::Host;
use super::{RunError, prove};
use crate::error::Explain;
use crate::host::{lsm, probe};
use crate::plan::jail::PROFILE;
use crate::plan::{KernelChoice, LsmKind};
use crate::qmp::{Needs, Offer, Schema};

/// How well something is provided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Works, with something less.
    Limited,
    /// Machines cannot be run, or not safely.
    Missing,
}

/// One thing a host can or cannot do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Check {
    /// What was looked at.
    pub name: &'static str,
    /// How well it is provided.
    pub status: Status,
    /// What was seen.
    pub seen: String,
    /// What to do about it.
    pub cure: Option<String>,
}

fn check(name: &'static str, status: Status, seen: impl Into<String>, cure: &str) -> Check {
    let cure = (!cure.is_empty()).then(|| cure.to_owned());
    Check {
        name,
        status,
        seen: seen.into(),
        cure,
    }
}

/// Looks at everything.
pub async fn examine(host: &Host) -> Vec<Check> {
    vec![
        qemu(host).await,
        accelerator(host).await,
        image(host),
        vsock(),
        cgroup(Path::new("/proc/self/mountinfo")),
        jail(host),
        landlock(),
        security(),
        violations(&host.dirs.violations()),
        nftables(),
        user(),
        space(host),
    ]
}

async fn qemu(host: &Host) -> Check {
    let path = match probe::find_qemu(host.qemu.as_deref()) {
        Ok(path) => path,
        Err(error) => return check("qemu", Status::Missing, error.to_string(), &error.remedy()),
    };
    match Offer::of(&path, Duration::from_secs(20)).await {
        Ok(offer) => {
            let missing = missing(&offer);
            let seen = format!("{} is version {}", path.display(), offer.version);
            if missing.is_empty() {
                check("qemu", Status::Ok, seen, "")
            } else {
                let names = missing;
                let seen = format!("{seen}, which lacks {}", names.join(", "));
                check("qemu", Status::Missing, seen, "Install QEMU 7.2 or newer.")
            }
        }
        Err(error) => check("qemu", Status::Missing, error.to_string(), &error.remedy()),
    }
}

/// The commands and arguments Bulkhead cannot do without and this QEMU lacks.
fn missing(offer: &Offer) -> Vec<String> {
    match Schema::from_value(offer.schema.clone()) {
        Ok(schema) => Needs::ours()
            .missing(&schema)
            .iter()
            .filter(|one| !one.optional)
            .map(ToString::to_string)
            .collect(),
        Err(error) => vec![error.to_string()],
    }
}

async fn accelerator(host: &Host) -> Check {
    let name = "kvm";
    let proved = async {
        let qemu = probe::find_qemu(host.qemu.as_deref())?;
        let images = host.images();
        let image = images.get("base").or_else(|_| images.get("default"))?;
        let kernel = KernelChoice::own(&image);
        prove::kvm(
            host,
            &qemu,
            &image,
            kernel,
            crate::spec::Waived::default(),
            prove::Earlier::Good,
        )
        .await
    };
    match proved.await {
        Ok(verdict) if verdict.usable => check(name, Status::Ok, verdict.reason, ""),
        Ok(verdict) => {
            let reason = verdict.reason.lines().collect::<Vec<_>>().join("; ");
            let cure = RunError::NoKvm {
                reason: String::new(),
            }
            .remedy();
            check(name, Status::Missing, format!("unusable: {reason}"), &cure)
        }
        Err(error) => {
            let seen = format!("not proved: {error}");
            check(name, Status::Missing, seen, &error.remedy())
        }
    }
}

fn image(host: &Host) -> Check {
    match host.images().get("default") {
        Ok(image) => check("image", Status::Ok, format!("default is {}", image.id), ""),
        Err(error) => check("image", Status::Limited, error.to_string(), &error.remedy()),
    }
}

fn vsock() -> Check {
    match probe::vhost_vsock() {
        Ok(_) => check("vsock", Status::Ok, "/dev/vhost-vsock opens", ""),
        Err(error) => {
            let cure = match error.kind() {
                io::ErrorKind::PermissionDenied => {
                    "Run as root, or join the group of /dev/vhost-vsock."
                }
                _ => {
                    "Load the module: modprobe vhost_vsock. Until then a virtio-serial port serves."
                }
            };
            check(
                "vsock",
                Status::Limited,
                format!("/dev/vhost-vsock: {error}"),
                cure,
            )
        }
    }
}

/// Which cgroup version has the controllers that limit machines.
fn cgroup(mountinfo: &Path) -> Check {
    const NEEDED: [&str; 4] = ["cpu", "memory", "pids", "io"];
    let mounts = fs::read_to_string(mountinfo).unwrap_or_default();
    // proc(5): the file system's type follows the first " - ".
    let mounted = |kind: &'static str| {
        mounts.lines().filter_map(move |line| {
            let (before, after) = line.split_once(" - ")?;
            let point = before.split(' ').nth(4)?;
            after
                .starts_with(kind)
                .then(|| (point.to_owned(), after.to_owned()))
        })
    };
    let v2 = mounted("cgroup2 ").find_map(|(point, _)| {
        let text = fs::read_to_string(Path::new(&point).join("cgroup.controllers")).ok()?;
        let all = NEEDED
            .iter()
            .all(|one| text.split_whitespace().any(|have| have == *one));
        all.then(|| format!("version 2 at {point}: {}", text.trim()))
    });
    if let Some(seen) = v2 {
        return check("cgroup", Status::Ok, seen, "");
    }
    let v1: Vec<_> = ["cpu", "memory", "pids", "blkio"]
        .into_iter()
        .filter(|one| {
            mounted("cgroup ").any(|(_, after)| {
                let options = after.rsplit(' ').next().unwrap_or_default();
                options.split(',').any(|option| option == *one)
            })
        })
        .collect();
    let cure = "Boot with systemd.unified_cgroup_hierarchy=1 for version 2.";
    if v1.is_empty() {
        check("cgroup", Status::Missing, "no controller is mounted", cure)
    } else {
        check(
            "cgroup",
            Status::Limited,
            format!("version 1: {}", v1.join(", ")),
            cure,
        )
    }
}

/// Whether a VMM can be confined with every layer.
fn jail(host: &Host) -> Check {
    let name = "jail";
    let qemu = probe::find_qemu(host.qemu.as_deref());
    let files = qemu.map_err(|error| error.to_string()).and_then(|qemu| {
        let found = crate::host::closure::of(&qemu, &host.dirs.cache());
        found.map_err(|error| format!("{}: {error}", qemu.display()))
    });
    let files = match files {
        Ok(closure) => format!("{} files of QEMU", closure.files.len()),
        Err(why) => {
            let cure =
                "Name QEMU's own binary with --qemu, or leave the layer out with --waive files.";
            return check(
                name,
                Status::Missing,
                format!("QEMU's files are not known: {why}"),
                cure,
            );
        }
    };
    if !crate::host::sys::has_mount_setattr() {
        let cure = "Use Linux 5.12 or newer, or leave the layer out with --waive files.";
        return check(
            name,
            Status::Missing,
            "the kernel cannot make a tree of mounts read-only",
            cure,
        );
    }
    if nix::unistd::geteuid().is_root() {
        let seen = format!("{files}; user ids {}", host.uids);
        return check(name, Status::Ok, seen, "");
    }
    let sysctl = |path: &str| fs::read_to_string(path).unwrap_or_default();
    if sysctl("/proc/sys/kernel/apparmor_restrict_unprivileged_userns").trim() == "1" {
        let cure =
            "Allow them (sysctl kernel.apparmor_restrict_unprivileged_userns=0), or run as root.";
        let seen = "AppArmor gives user namespaces of ordinary users no privileges";
        return check(name, Status::Missing, seen, cure);
    }
    let limit = sysctl("/proc/sys/user/max_user_namespaces");
    match limit.trim() {
        "" | "0" => {
            let cure = "Allow user namespaces (sysctl user.max_user_namespaces), or run as root.";
            check(
                name,
                Status::Missing,
                "no user namespaces for ordinary users",
                cure,
            )
        }
        _ => {
            let cure = "Run as root for a user of its own and a control group for each machine.";
            let seen =
                format!("{files}; in a user namespace, as this user, without a control group");
            check(name, Status::Limited, seen, cure)
        }
    }
}

/// Which security module is active besides.
fn security() -> Check {
    let name = "security module";
    let Some(active) = lsm::active() else {
        let cure = "Nothing is needed: the jail does not depend on one.";
        let seen = "none: neither AppArmor nor SELinux is active";
        return check(name, Status::Limited, seen, cure);
    };
    match (active.kind, active.profile) {
        (LsmKind::Apparmor, true) => {
            let seen = format!("AppArmor is active; machines are in its profile {PROFILE}");
            check(name, Status::Ok, seen, "")
        }
        (LsmKind::Apparmor, false) => {
            let cure = "Load it: bulkhead doctor --apparmor-profile | apparmor_parser --replace";
            let seen = format!("AppArmor is active; its profile {PROFILE} is not loaded");
            check(name, Status::Limited, seen, cure)
        }
        (LsmKind::Selinux, _) => {
            let word = if lsm::is_permissive() {
                "is permissive"
            } else {
                "enforces"
            };
            let cure =
                "Name a context for QEMU with --lsm-label, such as one your policy has for it.";
            let seen = format!("SELinux {word}; QEMU has the context of its caller");
            check(name, Status::Limited, seen, cure)
        }
    }
}

/// Whether QEMU was ever stopped for a system call.
fn violations(file: &Path) -> Check {
    let name = "violations";
    let found = super::violations(file);
    let Some(last) = found.last() else {
        return check(name, Status::Ok, "no VMM was stopped for a system call", "");
    };
    let seen = format!(
        "VMMs were stopped for a system call {} times; last {}, for calling {}",
        found.len(),
        last.machine,
        last.call
    );
    let cure = format!(
        "Look at {}: take those guests for hostile; then move it away.",
        file.display()
    );
    check(name, Status::Limited, seen, &cure)
}

fn landlock() -> Check {
    match crate::host::sys::landlock_abi() {
        Ok(abi) => check("landlock", Status::Ok, format!("ABI {abi}"), ""),
        Err(error) => {
            let cure = "Boot a kernel 5.13 or newer with lsm=landlock,...";
            check(
                "landlock",
                Status::Limited,
                format!("not available: {error}"),
                cure,
            )
        }
    }
}

/// Whether the kernel answers on the nftables netlink family.
fn nftables() -> Check {
    match crate::host::sys::nftables_generation() {
        Ok(()) => check("nftables", Status::Ok, "the kernel answers", ""),
        Err(error) => {
            let cure = "Run as root with the nf_tables module loaded.";
            check(
                "nftables",
                Status::Limited,
                format!("no answer: {error}"),
                cure,
            )
        }
    }
}

fn user() -> Check {
    let uid = nix::unistd::geteuid();
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let capabilities = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .unwrap_or("unknown")
        .trim();
    let seen = format!("uid {uid}, effective capabilities {capabilities}");
    if uid.is_root() {
        check("user", Status::Ok, seen, "")
    } else {
        let cure = "Run as root for networks and full confinement; name directories of your own with --state-dir and --runtime-dir.";
        check("user", Status::Limited, seen, cure)
    }
}

fn space(host: &Host) -> Check {
    // The directory may not exist yet; its nearest ancestor tells as much.
    let dir = host
        .dirs
        .state
        .ancestors()
        .find(|dir| dir.exists())
        .unwrap_or(Path::new("/"));
    match nix::sys::statvfs::statvfs(dir) {
        Ok(stat) => {
            let free = (stat.blocks_available() * stat.fragment_size()) >> 20;
            let seen = format!("{free} MiB free for {}", host.dirs.state.display());
            if free < 4096 {
                let cure = "Free at least 4 GiB, or name another place with --state-dir.";
                check("space", Status::Limited, seen, cure)
            } else {
                check("space", Status::Ok, seen, "")
            }
        }
        Err(error) => check(
            "space",
            Status::Limited,
            format!("{}: {error}", dir.display()),
            "Name another place with --state-dir.",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_1_controllers_are_seen_as_such() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let line = "30 24 0:26 / /cg/cpu rw - cgroup cgroup rw,cpu,cpuacct\n\
                    31 24 0:27 / /cg/pids rw - cgroup cgroup rw,pids\n";
        fs::write(file.path(), line).unwrap();
        let check = cgroup(file.path());
        assert_eq!(
            (check.status, check.seen.as_str()),
            (Status::Limited, "version 1: cpu, pids")
        );
        fs::write(file.path(), "").unwrap();
        assert_eq!(cgroup(file.path()).status, Status::Missing);
    }

    #[test]
    fn this_host_answers_on_nftables_as_its_kernel_says() {
        // Whatever the answer, it is one of the two, with a cure for the bad one.
        let check = nftables();
        assert_eq!(check.status == Status::Ok, check.cure.is_none());
    }
}
