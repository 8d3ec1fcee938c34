//! Others who start QEMU, doing the same work with the same kernel.

mod libvirt;
pub(super) mod reap;
mod virtme;
mod vmtest;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

pub(super) use libvirt::Libvirt;
use virtme::Virtme;
use vmtest::Vmtest;

use super::config::{Bed, Config};
use super::report::Missing;
use super::rounds::Subject;
use xtask_boot as packages;

use crate::setup;

pub(super) const LIBVIRT: &str = "libvirt";
pub(super) const VMTEST: &str = "vmtest";
pub(super) const VIRTME: &str = "virtme-ng";

/// Debian packages: libvirt, and what its guest is made of. vmtest runs
/// qemu-guest-agent in a guest that has this host's root, and virtme-ng udev.
const PACKAGES: [&str; 6] = [
    "libvirt-daemon",
    "libvirt-daemon-driver-qemu",
    "libvirt-clients",
    "qemu-guest-agent",
    "busybox-static",
    "udev",
];

/// Options.
#[derive(Debug, clap::Args)]
pub(super) struct Install {
    /// Install libvirt (apt), vmtest (cargo) and virtme-ng (pip) first. The
    /// latter two only below target/.
    #[arg(long)]
    install_peers: bool,
}

impl Install {
    pub(super) fn run(&self) -> Result<()> {
        if !self.install_peers {
            return Ok(());
        }
        let place = place()?;
        if !PACKAGES.iter().all(|name| is_installed(name)) {
            if !packages::is_root()? {
                bail!("libvirt is installed with apt-get, which takes root");
            }
            packages::apt_install(&PACKAGES)?;
        }
        if !place.join("bin/vmtest").exists() {
            let mut cargo = setup::cargo(&["install", "vmtest"])?;
            setup::call(cargo.arg("--root").arg(&place))?;
        }
        let venv = place.join("venv");
        if !venv.join("bin/vng").exists() {
            setup::call(Command::new("python3").args(["-m", "venv"]).arg(&venv))?;
            let mut pip = Command::new(venv.join("bin/pip"));
            setup::call(pip.args(["install", "--quiet", "virtme-ng"]))?;
        }
        Ok(())
    }
}

fn is_installed(package: &str) -> bool {
    let query = Command::new("dpkg-query")
        .args(["-W", "-f", "${db:Status-Status}", package])
        .output();
    query.is_ok_and(|output| output.stdout == b"installed")
}

/// Where `--install-peers` puts what no package manager keeps.
fn place() -> Result<PathBuf> {
    Ok(setup::target()?.join("peers"))
}

/// A program of that name: in one of `dirs`, or in `PATH`.
fn program(name: &str, dirs: &[PathBuf]) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let known = ["/usr/sbin".into(), "/sbin".into()];
    dirs.iter()
        .cloned()
        .chain(std::env::split_paths(&path))
        .chain(known)
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
}

/// A shell script in a mount and process namespace of its own. Under emulation
/// the script finds no /dev/kvm: libvirt and vmtest would try it, whatever they
/// are told, and libvirt would ask QEMU anew on every call.
fn alone(config: &Config, dir: &Path, script: &str) -> Result<Command> {
    let dev = dir.join("dev");
    std::fs::create_dir_all(&dev)?;
    let mut command = Command::new("unshare");
    command.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]);
    command.args(["--", "sh", "-e", "-c"]);
    let hide = match config.accel.as_str() {
        "kvm" => "",
        _ => {
            "mount -t tmpfs -o mode=755 none $DEV
             for node in null zero full random urandom tty ptmx; do
                 touch $DEV/$node; mount --bind /dev/$node $DEV/$node
             done
             mkdir $DEV/pts $DEV/shm; mount --bind /dev/pts $DEV/pts; mount -t tmpfs none $DEV/shm
             ln -s /proc/self/fd $DEV/fd
             mount --rbind $DEV /dev\n"
        }
    };
    command.arg(format!("{hide}{script}"));
    command.env("DEV", dev).env("DIR", dir);
    Ok(command)
}

/// Whoever is there.
#[derive(Default)]
pub(super) struct Peers {
    libvirt: Option<Libvirt>,
    vmtest: Option<Vmtest>,
    virtme: Option<Virtme>,
}

impl Peers {
    /// Looks for all of them, and names those that are missing.
    pub(super) async fn find(
        bed: &Bed,
        config: &Config,
        missing: &mut Vec<Missing>,
    ) -> Result<Self> {
        Ok(Self {
            libvirt: Libvirt::find(bed, config, missing).await?,
            vmtest: Vmtest::find(bed, config, missing)?,
            virtme: Virtme::find(bed, config, missing)?,
        })
    }

    pub(super) fn versions(&self) -> BTreeMap<String, String> {
        let all = [
            (LIBVIRT, self.libvirt.as_ref().map(Libvirt::version)),
            (VMTEST, self.vmtest.as_ref().map(Vmtest::version)),
            (VIRTME, self.virtme.as_ref().map(Virtme::version)),
        ];
        all.into_iter()
            .filter_map(|(name, version)| Some((name.to_owned(), version?)))
            .collect()
    }

    /// A boot, a command and an end of each.
    pub(super) fn boots(&self) -> Vec<Subject<'_>> {
        let mut subjects = Vec::new();
        if let Some(libvirt) = &self.libvirt {
            subjects.push(Subject::new(LIBVIRT, || libvirt.life()));
        }
        if let Some(vmtest) = &self.vmtest {
            subjects.push(Subject::new(VMTEST, || vmtest.life()));
        }
        if let Some(virtme) = &self.virtme {
            subjects.push(Subject::new(VIRTME, || virtme.life()));
        }
        subjects
    }
}

/// Names somebody who is not there.
fn lacks(missing: &mut Vec<Missing>, subject: &str, why: &str) {
    missing.push(Missing {
        subject: subject.to_owned(),
        why: format!("{why} (see --install-peers)"),
    });
}

/// Runs a peer's whole life as one command, and gives how long it took.
async fn whole(mut command: Command, name: &str) -> Result<super::rounds::Sample> {
    let begin = std::time::Instant::now();
    let mut child =
        tokio::process::Command::from(std::mem::replace(&mut command, Command::new("")));
    child.stdin(std::process::Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(super::config::PATIENCE, child.output()).await;
    let output = output.with_context(|| format!("{name} does not end"))??;
    if !output.status.success() {
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        let lines: Vec<&str> = said.lines().collect();
        let last = lines[lines.len().saturating_sub(20)..].join("\n");
        bail!("{name} gave {}: {last}", output.status);
    }
    let took = super::config::ms(begin.elapsed());
    Ok(vec![(super::ours::ALL, took)].into())
}
