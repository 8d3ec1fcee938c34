//! What a program expects to find besides its root file system.

use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;

use bulkhead_agent::{DEFAULT_USER, WORKSPACE};
use nix::mount::MsFlags;
use nix::unistd::sethostname;

use super::options::Options;
use super::root::attach;
use super::sys;
use crate::console::complain;
use crate::exec::user::Users;
use crate::failure::{Context, Result};

/// The file systems the kernel itself provides.
pub(super) fn mount_kernel_file_systems() {
    let strict = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    for (dir, kind, flags) in [
        ("/dev", "devtmpfs", MsFlags::MS_NOSUID),
        ("/proc", "proc", strict),
        ("/sys", "sysfs", strict),
    ] {
        let _ = fs::create_dir(dir);
        report(attach(kind, dir, kind, flags, ""));
    }
}

/// Mounts and links below the final root; a failure is reported, not fatal.
pub(super) fn mount_the_rest() {
    let (nosuid, nodev) = (MsFlags::MS_NOSUID, MsFlags::MS_NODEV);
    let noexec = MsFlags::MS_NOEXEC;
    for (dir, kind, flags, options) in [
        (
            "/dev/pts",
            "devpts",
            nosuid | noexec,
            "gid=5,mode=620,ptmxmode=666",
        ),
        ("/dev/shm", "tmpfs", nosuid | nodev, "mode=1777"),
        ("/run", "tmpfs", nosuid | nodev, "mode=755,size=20%"),
        (
            "/sys/fs/cgroup",
            "cgroup2",
            nosuid | nodev | noexec,
            "nsdelegate",
        ),
    ] {
        let _ = fs::create_dir(dir);
        report(attach(kind, dir, kind, flags, options));
    }
    for (target, link) in [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ] {
        let made = symlink(target, link).context(|| format!("cannot link {link}"));
        report(made);
    }
    report(link_ports());
    report(make_dir("/run/lock", 0o1777, None));
    // On disk, not a tmpfs: a big build must not eat the machine's memory.
    report(make_dir("/tmp", 0o1777, None));
}

/// Links in /dev/virtio-ports by name, as udev makes them: programs such as
/// qemu-guest-agent look there.
fn link_ports() -> Result<()> {
    const PORTS: &str = "/dev/virtio-ports";
    let Ok(ports) = fs::read_dir("/sys/class/virtio-ports") else {
        return Ok(());
    };
    make_dir(PORTS, 0o755, None)?;
    for port in ports.flatten() {
        let name = fs::read_to_string(port.path().join("name")).unwrap_or_default();
        let name = name.trim();
        if name.is_empty() || name.contains('/') || name.starts_with('.') {
            continue;
        }
        let link = Path::new(PORTS).join(name);
        let target = Path::new("..").join(port.file_name());
        symlink(target, &link).context(|| format!("cannot link {}", link.display()))?;
    }
    Ok(())
}

/// The workspace directories, for the default user where there is one.
pub(super) fn make_workspace() {
    let owner = Users::read()
        .ok()
        .and_then(|users| users.find(DEFAULT_USER).ok())
        .map(|user| (user.uid, user.gid));
    for dir in ["", "/input", "/output", "/work"] {
        report(make_dir(&format!("{WORKSPACE}{dir}"), 0o755, owner));
    }
}

/// The host name from the command line or the image.
pub(super) fn name_host(options: &Options) {
    let name = match &options.hostname {
        Some(name) => name.clone(),
        None => fs::read_to_string("/etc/hostname").unwrap_or_default(),
    };
    let name = if name.trim().is_empty() {
        "bulkhead"
    } else {
        name.trim()
    };
    report(sethostname(name).context(|| format!("cannot set the host name {name}")));
}

/// Brings the loopback interface up.
pub(super) fn loopback_up() {
    report(sys::loopback_up().context(|| "cannot bring lo up".into()));
}

fn make_dir(path: &str, mode: u32, owner: Option<(u32, u32)>) -> Result<()> {
    let make = || -> io::Result<()> {
        if !Path::new(path).is_dir() {
            fs::create_dir(path)?;
        }
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
        match owner {
            Some((uid, gid)) => chown(path, Some(uid), Some(gid)),
            None => Ok(()),
        }
    };
    make().context(|| format!("cannot make {path}"))
}

fn report(result: Result<()>) {
    if let Err(error) = result {
        complain!("{}", error.message);
    }
}
