//! `qemu10`: QEMU 10.0 beside the host's own, to test with both.
//!
//! It comes from the backports of the running Debian release, unpacked into a
//! directory of its own. apt is given private lists and caches: the host's
//! configuration and package state stay as they are.

use std::{
    ffi::OsString,
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, bail, ensure};

const SUITE: &str = "bookworm-backports";
const NAME: &str = "qemu-10.0";
const BINARY: &str = "usr/bin/qemu-system-x86_64";
const PACKAGES: [&str; 4] = [
    "qemu-system-x86",
    "qemu-system-common",
    "qemu-system-data",
    "seabios",
];

/// Debian builds QEMU 10 not relocatable: it must be told where its files are.
const WRAPPER: &str = r#"#!/bin/sh
here=$(CDPATH= cd -- "${0%/*}" && pwd) || exit 1
export QEMU_MODULE_DIR="$here/usr/lib/x86_64-linux-gnu/qemu"
[ ! -d "$here/lib" ] || export LD_LIBRARY_PATH="$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
exec "$here/usr/bin/qemu-system-x86_64" \
    -L "$here/usr/share/qemu" -L "$here/usr/share/seabios" -L "$here/usr/lib/ipxe/qemu" "$@"
"#;

/// Options.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Where to unpack it.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../target"))]
    dir: PathBuf,
}

/// Runs the task.
pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    match ensure(&args.dir)? {
        Some(path) => println!("{}", path.display()),
        None => bail!("QEMU 10.0 is not to be had here; the reason stands above"),
    }
    Ok(())
}

/// Makes `<dir>/qemu-10.0` unless it is there, and returns the absolute path
/// of its binary; `None`, with the reason on stderr, where the host's
/// package source does not have it.
pub(crate) fn ensure(dir: &Path) -> anyhow::Result<Option<PathBuf>> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let dir = dir.canonicalize()?;
    let done = dir.join(NAME);
    let wrapper = done.join("qemu-system-x86_64");
    let binary = done.join(BINARY);
    if wrapper.exists() {
        return Ok(Some(binary));
    }
    let none = |reason: String| {
        eprintln!("no QEMU 10.0: {reason}");
        Ok(None)
    };
    let source = match source() {
        Ok(source) => source,
        Err(error) => return none(format!("{error:#}")),
    };
    // Beside its destination, so that a rename is all that is left to do.
    let work = tempfile::Builder::new()
        .prefix(".qemu-10.0-")
        .tempdir_in(&dir)?;
    let apt = Apt::new(work.path().join("apt"), &source)?;
    if let Err(error) = apt.get(&["update"], &apt.root) {
        return none(format!(
            "the host's package source has no {SUITE}: {error:#}"
        ));
    }
    let debs = work.path().join("debs");
    fs::create_dir(&debs)?;
    if let Err(error) = apt.get(&[&["download"][..], &PACKAGES].concat(), &debs) {
        return none(format!("{SUITE} does not give its packages: {error:#}"));
    }
    let tree = work.path().join(NAME);
    unpack(&debs, &tree)?;
    // The host's QEMU brings the network boot ROMs; they fit any version.
    if Path::new("/usr/lib/ipxe/qemu").exists() && !tree.join("usr/lib/ipxe").exists() {
        symlink("/usr/lib/ipxe", tree.join("usr/lib/ipxe"))?;
    }
    if let Err(error) = close_over_libraries(&tree, &apt, work.path()) {
        return none(format!("{error:#}"));
    }
    let made = tree.join("qemu-system-x86_64");
    fs::write(&made, WRAPPER)?;
    fs::set_permissions(&made, fs::Permissions::from_mode(0o755))?;
    let version = output(Command::new(&made).arg("--version"))?;
    ensure!(
        version.contains(" version 10."),
        "{SUITE} brought another version: {version}"
    );
    match fs::rename(&tree, &done) {
        // Somebody else was faster; theirs is as good.
        Err(_) if wrapper.exists() => {}
        result => result.with_context(|| format!("cannot make {}", done.display()))?,
    }
    // A jail takes the program itself; the wrapper is for people.
    Ok(Some(binary))
}

/// The host's own source of its release, with the suite replaced.
fn source() -> anyhow::Result<String> {
    let format = "$(SUITE)|$(CODENAME)|$(COMPONENT)|$(REPO_URI)|$(SIGNED_BY)";
    let list = output(Command::new("apt-get").args(["indextargets", "--format", format]))?;
    let release = SUITE.split('-').next().unwrap_or(SUITE);
    for line in list.lines() {
        let [suite, codename, "main", uri, signed_by] = *line.split('|').collect::<Vec<_>>() else {
            continue;
        };
        if suite != release && codename != release {
            continue;
        }
        // apt leaves the words alone where there is no such option.
        let options = match signed_by {
            "" | "$(SIGNED_BY)" => String::new(),
            key => format!("[signed-by={key}] "),
        };
        return Ok(format!("deb {options}{uri} {SUITE} main\n"));
    }
    bail!("apt has no source for Debian {release} on this host (run `apt-get update` first)")
}

/// apt-get with lists and caches of its own.
struct Apt {
    root: PathBuf,
    options: Vec<OsString>,
}

impl Apt {
    fn new(root: PathBuf, source: &str) -> anyhow::Result<Self> {
        for dir in ["state/lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(root.join(dir))?;
        }
        let list = root.join("sources.list");
        fs::write(&list, source)?;
        let mut options = Vec::new();
        for (key, value) in [
            ("Dir::Etc::sourcelist", list),
            ("Dir::Etc::sourceparts", PathBuf::from("/dev/null")),
            ("Dir::Etc::preferences", PathBuf::from("/dev/null")),
            ("Dir::Etc::preferencesparts", PathBuf::from("/dev/null")),
            ("Dir::State", root.join("state")),
            ("Dir::State::status", PathBuf::from("/var/lib/dpkg/status")),
            ("Dir::Cache", root.join("cache")),
        ] {
            options.push("-o".into());
            let mut option = OsString::from(format!("{key}="));
            option.push(value);
            options.push(option);
        }
        // The private directories are not readable for apt's sandbox user.
        options.extend(["-o".into(), "APT::Sandbox::User=".into(), "-q".into()]);
        // A list that cannot be had is an error here, not a warning.
        options.extend(["-o".into(), "APT::Update::Error-Mode=any".into()]);
        Ok(Self { root, options })
    }

    fn get(&self, arguments: &[&str], cwd: &Path) -> anyhow::Result<String> {
        let mut command = Command::new("apt-get");
        output(command.args(&self.options).args(arguments).current_dir(cwd))
    }
}

/// Unpacks every package in `debs` into `tree`.
fn unpack(debs: &Path, tree: &Path) -> anyhow::Result<()> {
    for deb in fs::read_dir(debs)? {
        output(
            Command::new("dpkg-deb")
                .arg("-x")
                .arg(deb?.path())
                .arg(tree),
        )?;
    }
    Ok(())
}

/// Brings the libraries the host does not have into `<tree>/lib`.
fn close_over_libraries(tree: &Path, apt: &Apt, work: &Path) -> anyhow::Result<()> {
    let missing = missing_libraries(tree)?;
    if missing.is_empty() {
        return Ok(());
    }
    let extra = work.join("extra");
    fs::create_dir(&extra)?;
    // Libraries are older than the backport: the host's own source has them.
    // A package that is not to be had shows up below as a library still missing.
    let depends = dependencies(work)?;
    for package in depends.iter().filter(|name| !installed(name)) {
        let mut host = Command::new("apt-get");
        let from_host = output(host.args(["download", package]).current_dir(&extra));
        if from_host.is_err() {
            _ = apt.get(&["download", package], &extra);
        }
    }
    let unpacked = work.join("libraries");
    unpack(&extra, &unpacked)?;
    fs::create_dir(tree.join("lib"))?;
    for dir in ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"] {
        let Ok(entries) = fs::read_dir(unpacked.join(dir)) else {
            continue;
        };
        for entry in entries {
            let path = entry?.path();
            if let (true, Some(name)) = (path.is_file(), path.file_name()) {
                fs::copy(&path, tree.join("lib").join(name))?;
            }
        }
    }
    let missing = missing_libraries(tree)?;
    ensure!(
        missing.is_empty(),
        "libraries are missing: {}",
        missing.join(", ")
    );
    Ok(())
}

/// Names of libraries that the loader does not find.
fn missing_libraries(tree: &Path) -> anyhow::Result<Vec<String>> {
    let mut ldd = Command::new("ldd");
    ldd.env("LD_LIBRARY_PATH", tree.join("lib"));
    let list = output(ldd.arg(tree.join(BINARY)))?;
    let missing = list.lines().filter(|line| line.contains("not found"));
    let names = missing.filter_map(|line| line.split_whitespace().next());
    Ok(names.map(str::to_owned).collect())
}

/// Packages that qemu-system-x86 depends on.
fn dependencies(work: &Path) -> anyhow::Result<Vec<String>> {
    for deb in fs::read_dir(work.join("debs"))? {
        let path = deb?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("qemu-system-x86_") {
            let field = output(Command::new("dpkg-deb").arg("-f").arg(&path).arg("Depends"))?;
            let names = field
                .split(',')
                .filter_map(|item| item.split_whitespace().next());
            return Ok(names.map(str::to_owned).collect());
        }
    }
    bail!("the download of qemu-system-x86 is gone")
}

fn installed(package: &str) -> bool {
    let mut query = Command::new("dpkg-query");
    let status = output(query.args(["-W", "-f", "${db:Status-Status}", package]));
    status.is_ok_and(|status| status == "installed")
}

/// Runs a program to its end and returns what it wrote to standard output.
fn output(command: &mut Command) -> anyhow::Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .env("LC_ALL", "C.UTF-8")
        .output()
        .with_context(|| format!("cannot run {program}"))?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{program} failed ({}): {}",
        output.status,
        stderr.trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
