//! Debian packages this project needs on the host, and why.

use std::process::Command;

use anyhow::{Context as _, Result, bail};

/// A package.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Package {
    /// Its name.
    pub name: &'static str,
    why: &'static str,
    /// Whether nothing here can be built without it.
    to_build: bool,
}

const NEEDED: &[Package] = &[
    package("qemu-system-x86", "runs the machines"),
    package("e2fsprogs", "makes the disk a machine writes to"),
    package("mmdebstrap", "makes Debian root file systems"),
    package("squashfs-tools-ng", "packs root file systems (tar2sqfs)"),
    package("iproute2", "makes what tests of networks need"),
    package("util-linux", "ends helpers with their parent (setpriv)"),
    package("xz-utils", "reads compressed images"),
    package("zstd", "reads compressed images"),
    package("gcc", "links the programs"),
    package("g++", "builds libFuzzer"),
    package("libc6-dev", "links the guest agent statically"),
    to_build("pkg-config", "finds libraries at build time"),
    to_build("libmnl-dev", "talks to the kernel's firewall"),
    to_build("libnftnl-dev", "talks to the kernel's firewall"),
    package("bind9-dnsutils", "asks the resolver in tests (dig)"),
    package("curl", "a client in tests of the network"),
    package("nftables", "sets the rules of networks in tests (nft)"),
    package("openssl", "a TLS server in tests"),
    package("python3", "a web server in tests"),
    package("git", "repositories in tests"),
    package("openssh-client", "keys in tests (ssh-keygen)"),
    package("dropbear-bin", "an SSH server in tests"),
    package("apparmor", "compiles the profile for QEMU in tests"),
    package("strace", "traces system calls of QEMU (seccomp trace)"),
];

const fn package(name: &'static str, why: &'static str) -> Package {
    Package {
        name,
        why,
        to_build: false,
    }
}

const fn to_build(name: &'static str, why: &'static str) -> Package {
    Package {
        to_build: true,
        ..package(name, why)
    }
}

/// The packages that are not installed.
///
/// # Errors
/// This is no Debian, or a relative of it.
pub fn missing() -> Result<Vec<&'static Package>> {
    let output = Command::new("dpkg-query")
        .args(["-W", "-f", "${db:Status-Status} ${Package} ${Provides}\n"])
        .output()
        .context("cannot run dpkg-query: setup knows Debian and its relatives only")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let installed: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("installed "))
        // pkgconf provides pkg-config in newer suites.
        .flat_map(|line| line.split([' ', ',']))
        .collect();
    Ok(NEEDED
        .iter()
        .filter(|package| !installed.contains(&package.name))
        .collect())
}

/// Those of them that building needs.
///
/// # Errors
/// As [`missing`].
pub fn missing_to_build() -> Result<Vec<&'static Package>> {
    let mut missing = missing()?;
    missing.retain(|package| package.to_build);
    Ok(missing)
}

/// Names each package with the reason for it.
pub fn print(missing: &[&Package]) {
    for package in missing {
        eprintln!("    missing: {:20} {}", package.name, package.why);
    }
}

/// Whether apt would let us install.
///
/// # Errors
/// `id` does not run.
pub fn is_root() -> Result<bool> {
    let output = Command::new("id")
        .arg("-u")
        .output()
        .context("cannot run id")?;
    Ok(output.stdout == b"0\n")
}

/// Installs packages this project needs.
///
/// # Errors
/// apt's, or one is still missing.
pub fn install(names: &[&str]) -> Result<()> {
    apt_install(names)?;
    match missing()?.is_empty() {
        true => Ok(()),
        false => bail!("apt-get ended well, yet packages are missing"),
    }
}

/// Installs packages without what they only recommend.
///
/// # Errors
/// apt-get fails.
pub fn apt_install(names: &[&str]) -> Result<()> {
    let apt = |args: &[&str]| {
        let mut command = Command::new("apt-get");
        command.args(["-qq", "-o", "Dpkg::Use-Pty=0"]).args(args);
        command.env("DEBIAN_FRONTEND", "noninteractive");
        command
    };
    // Fresh containers have no package lists, others have old ones.
    call(&mut apt(&["update"]))?;
    let mut args = vec!["install", "-y", "--no-install-recommends", "--"];
    args.extend(names);
    call(&mut apt(&args))
}

/// Runs a command to a good end.
///
/// # Errors
/// It cannot be run, or fails.
pub fn call(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("cannot run {command:?}"))?;
    if !status.success() {
        bail!("{command:?} failed with {status}");
    }
    Ok(())
}
