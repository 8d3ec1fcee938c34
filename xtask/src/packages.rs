//! Debian packages this project needs on the host, and why.

use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::setup::call;

/// A package.
pub(crate) struct Package {
    /// Its name.
    pub(crate) name: &'static str,
    why: &'static str,
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
    package("pkg-config", "finds libraries at build time"),
    package("libmnl-dev", "talks to the kernel's firewall"),
    package("libnftnl-dev", "talks to the kernel's firewall"),
    package("bind9-dnsutils", "asks the resolver in tests (dig)"),
    package("curl", "a client in tests of the network"),
    package("nftables", "sets the rules of networks in tests (nft)"),
    package("openssl", "a TLS server in tests"),
];

const fn package(name: &'static str, why: &'static str) -> Package {
    Package { name, why }
}

/// The packages that are not installed.
pub(crate) fn missing() -> Result<Vec<&'static Package>> {
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

/// Names each package with the reason for it.
pub(crate) fn print(missing: &[&Package]) {
    for package in missing {
        eprintln!("    missing: {:20} {}", package.name, package.why);
    }
}

/// Whether apt would let us install.
pub(crate) fn is_root() -> Result<bool> {
    let output = Command::new("id")
        .arg("-u")
        .output()
        .context("cannot run id")?;
    Ok(output.stdout == b"0\n")
}

/// Installs packages this project needs.
pub(crate) fn install(names: &[&str]) -> Result<()> {
    apt_install(names)?;
    match missing()?.is_empty() {
        true => Ok(()),
        false => bail!("apt-get ended well, yet packages are missing"),
    }
}

/// Installs packages without what they only recommend.
pub(crate) fn apt_install(names: &[&str]) -> Result<()> {
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
