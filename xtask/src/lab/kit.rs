//! What the lab needs besides this machine's files: the modules of its kernel,
//! and a busybox to mount and load them with. From Debian's packages, by name.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use crate::setup::{self, call};

/// Directories of the kernel package that are unpacked: no driver of real hardware.
const MODULES: [&str; 16] = [
    "modules.builtin",
    "modules.builtin.modinfo",
    "modules.order",
    "kernel/arch",
    "kernel/block",
    "kernel/crypto",
    "kernel/drivers/block",
    "kernel/drivers/char",
    "kernel/drivers/crypto/ccp",
    "kernel/drivers/net",
    "kernel/drivers/vhost",
    "kernel/drivers/virtio",
    "kernel/fs",
    "kernel/lib",
    "kernel/net",
    "kernel/virt",
];
/// Part of the kit's name: raise it when its contents change.
const FORMAT: u32 = 1;

/// The kit of the kernel of this release: a directory with `busybox` and
/// `lib/modules/<release>`, made the first time.
pub(super) fn ensure(release: &str) -> Result<PathBuf> {
    let parent = setup::target()?.join("lab");
    fs::create_dir_all(&parent).with_context(|| format!("cannot make {}", parent.display()))?;
    let parent = parent.canonicalize()?;
    let done = parent.join(format!("kit-{FORMAT}-{release}"));
    if done.is_dir() {
        return Ok(done);
    }
    eprintln!("lab: fetching the modules of Linux {release} ...");
    let work = tempfile::Builder::new()
        .prefix(".kit-")
        .tempdir_in(&parent)?;
    let fresh = work.path().join("kit");
    fs::create_dir(&fresh)?;
    let kernel = package(&format!("linux-image-{release}"), work.path())?;
    let patterns = MODULES
        .iter()
        .map(|name| format!("./lib/modules/{release}/{name}"));
    unpack(&kernel, &fresh, patterns)?;
    let busybox = package("busybox-static", work.path())?;
    unpack(&busybox, &fresh, ["./bin/busybox".to_owned()].into_iter())?;
    let program = fresh.join("busybox");
    fs::rename(fresh.join("bin/busybox"), &program)?;
    fs::remove_dir(fresh.join("bin"))?;
    let mut depmod = Command::new(&program);
    call(depmod.arg("depmod").arg("-b").arg(&fresh).arg(release))?;
    match fs::rename(&fresh, &done) {
        // Somebody else was faster; theirs is as good.
        Err(_) if done.is_dir() => {}
        result => result.with_context(|| format!("cannot make {}", done.display()))?,
    }
    Ok(done)
}

/// Downloads a package into a directory of its own; apt checks it against its
/// signed indexes.
fn package(name: &str, work: &Path) -> Result<PathBuf> {
    let dir = work.join(name);
    fs::create_dir(&dir)?;
    let mut command = Command::new("apt-get");
    command
        // Its sandbox user cannot enter a private directory.
        .args(["-qq", "-o", "APT::Sandbox::User=root", "download", "--", name])
        .current_dir(&dir);
    call(&mut command).with_context(|| {
        format!(
            "cannot fetch {name}: `cargo xtask setup` brings images up to date with apt's lists"
        )
    })?;
    let first = fs::read_dir(&dir)?.next();
    Ok(first.context("apt-get left no file")??.path())
}

/// Unpacks what matches from a package.
fn unpack(package: &Path, into: &Path, patterns: impl Iterator<Item = String>) -> Result<()> {
    let mut list = Command::new("dpkg-deb");
    let mut list = list
        .arg("--fsys-tarfile")
        .arg(package)
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run dpkg-deb")?;
    let files = list.stdout.take().context("its output was piped")?;
    let mut tar = Command::new("tar");
    tar.args(["-x", "-C"]).arg(into).args(patterns).stdin(files);
    let unpacked = call(&mut tar);
    let status = list.wait()?;
    unpacked?;
    ensure!(
        status.success(),
        "dpkg-deb cannot read {}: {status}",
        package.display()
    );
    Ok(())
}
