//! Builds the tuned guest kernel from Debian's source package and images/kernel.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, bail, ensure};
use bulkhead::image;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::setup;

const SOURCE_PACKAGE: &str = "linux-source-6.12";
const SOURCE_ARCHIVE: &str = "/usr/src/linux-source-6.12.tar.xz";
const PACKAGES: [&str; 9] = [
    SOURCE_PACKAGE,
    "flex",
    "bison",
    "bc",
    "libelf-dev",
    "libssl-dev",
    "gcc",
    "make",
    "xz-utils",
];
/// CPU seconds (user and system) a whole build may take.
const CPU_BUDGET: f64 = 12.0 * 60.0;
/// Part of the digest: raise it when the way of building changes the result.
const RECIPE: &str = "bulkhead kernel recipe 1\n";
/// Big directories of which the build reads only the Kconfig and make files.
const UNREAD: [&str; 7] = [
    "*/drivers/gpu/*.[ch]",
    "*/drivers/media/*.[ch]",
    "*/drivers/net/ethernet/*.[ch]",
    "*/drivers/net/wireless/*.[ch]",
    "*/sound/*.[ch]",
    "*/tools/testing/*",
    "*/Documentation/*.rst",
];

/// Options.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Add what Docker-like tools need inside the guest; the kernel is then named `docker`.
    #[arg(long)]
    docker: bool,
    /// Where Bulkhead keeps its state.
    #[arg(
        long,
        env = "BULKHEAD_STATE_DIR",
        default_value_os_t = setup::usual_state_dir(),
        value_name = "DIR"
    )]
    state_dir: PathBuf,
    /// Compiler processes at once [default: one per processor].
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,
    /// Keep the source tree after the build, and say where it is.
    #[arg(long)]
    keep_build: bool,
    /// Install missing packages with apt-get (as root).
    #[arg(long)]
    yes: bool,
}

/// `manifest.json` beside the kernel.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    /// The kernel as an image's manifest describes it.
    kernel: image::Kernel,
    /// What it was built from.
    #[serde(flatten)]
    inputs: Inputs,
    /// CPU time of the build, user and system, unpacking included.
    cpu_seconds: f64,
}

/// What decides the result; the same inputs are not built twice.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Inputs {
    source_package: String,
    source_version: String,
    fragment_sha256: String,
}

/// Builds the tuned kernel unless it is there and up to date.
pub(crate) fn ensure(state_dir: &Path, yes: bool) -> anyhow::Result<()> {
    run(Args {
        docker: false,
        state_dir: state_dir.to_owned(),
        jobs: None,
        keep_build: false,
        yes,
    })
}

/// Runs the task.
pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    require_packages(args.yes)?;
    let fragment = fragment(args.docker)?;
    let inputs = Inputs {
        source_package: SOURCE_PACKAGE.to_owned(),
        source_version: source_version()?,
        fragment_sha256: hex_digest(&[RECIPE.as_bytes(), fragment.as_bytes()].concat()),
    };
    let kernels = args.state_dir.join("kernels");
    fs::create_dir_all(&kernels)
        .with_context(|| format!("cannot make the directory {}", kernels.display()))?;
    sweep(&kernels)?;
    let tuned = kernels.join(NAMES[usize::from(args.docker)]);
    if is_current(&tuned, &inputs) {
        eprintln!("kernel: {} is up to date", tuned.join("vmlinux").display());
        return Ok(());
    }

    let jobs = match args.jobs {
        Some(jobs) => jobs,
        None => std::thread::available_parallelism()?.get(),
    };
    let mut dir = tempfile::Builder::new()
        .prefix(&format!("{BUILD_PREFIX}{}-", std::process::id()))
        .tempdir_in(&kernels)
        .with_context(|| format!("cannot make a build directory in {}", kernels.display()))?;
    if args.keep_build {
        dir.disable_cleanup(true);
        eprintln!("kernel: building in {}", dir.path().display());
    }
    let staged = build(dir.path(), &fragment, inputs, jobs)?;
    install(&staged, &tuned)?;
    eprintln!("kernel: installed {}", tuned.join("vmlinux").display());
    Ok(())
}

/// Unpacks, configures, checks and builds in `dir`; gives a directory with
/// exactly the files to install.
fn build(dir: &Path, fragment: &str, inputs: Inputs, jobs: usize) -> anyhow::Result<PathBuf> {
    let cpu_before = children_cpu_seconds()?;
    let source = dir.join("source");
    let out = dir.join("out");
    fs::create_dir(&source)?;
    fs::create_dir(&out)?;

    step("unpack the source", || {
        let mut tar = Command::new("tar");
        tar.args(["-x", "--strip-components=1", "-f", SOURCE_ARCHIVE, "-C"])
            .arg(&source)
            .args(UNREAD.iter().map(|p| format!("--exclude={p}")));
        checked(&mut tar)
    })?;
    step("configure", || {
        let all = dir.join("fragment.config");
        fs::write(&all, fragment)?;
        let mut setting = std::ffi::OsString::from("KCONFIG_ALLCONFIG=");
        setting.push(&all);
        checked(make(&source).arg(setting).arg("allnoconfig"))?;
        fs::copy(source.join(".config"), out.join("config"))?;
        let lost = lost_lines(fragment, &fs::read_to_string(out.join("config"))?);
        ensure!(
            lost.is_empty(),
            "images/kernel asks for options that {SOURCE_PACKAGE} {} does not give:\n  {}\n\
             correct the lines, or add what they depend on",
            inputs.source_version,
            lost.join("\n  ")
        );
        Ok(())
    })?;
    step("compile", || {
        checked(make(&source).arg(format!("-j{jobs}")).arg("vmlinux"))
    })?;
    let vmlinux = out.join("vmlinux");
    let mut strip = Command::new("strip");
    checked(strip.arg("-o").arg(&vmlinux).arg(source.join("vmlinux")))?;
    let release = output(make(&source).arg("kernelrelease"))?;

    let cpu_seconds = children_cpu_seconds()? - cpu_before;
    eprintln!("kernel: {cpu_seconds:.0} CPU seconds in all ({CPU_BUDGET:.0} allowed)");
    if cpu_seconds > CPU_BUDGET {
        eprintln!("kernel: warning: over the budget: trim images/kernel, or this host is busy");
    }
    let bytes = fs::read(&vmlinux)?;
    let manifest = Manifest {
        kernel: image::Kernel {
            image: image::File {
                file: "vmlinux".to_owned(),
                size: bytes.len() as u64,
                sha256: hex_digest(&bytes),
            },
            release: release.trim().to_owned(),
            format: image::KernelFormat::Vmlinux,
        },
        inputs,
        cpu_seconds,
    };
    let mut text = serde_json::to_vec_pretty(&manifest)?;
    text.push(b'\n');
    File::create(out.join("manifest.json"))?.write_all(&text)?;
    Ok(out)
}

/// `make` in the source tree, with everything fixed that would end up in the
/// kernel. Not tracking macro expansions changes only the wording of compiler
/// warnings, and saves a tenth of the build's CPU time.
fn make(source: &Path) -> Command {
    let mut make = Command::new("make");
    make.arg("-s")
        .arg("-C")
        .arg(source)
        .arg("KCFLAGS=-ftrack-macro-expansion=0")
        .env_remove("MAKEFLAGS")
        .env("LC_ALL", "C")
        .env("KBUILD_BUILD_TIMESTAMP", "1970-01-01 00:00:00 UTC")
        .env("KBUILD_BUILD_VERSION", "1")
        .env("KBUILD_BUILD_USER", "bulkhead")
        .env("KBUILD_BUILD_HOST", "bulkhead");
    make
}

/// Puts the staged files in place: readers see the old kernel or the new one.
///
/// `tuned` is a symbolic link, because a directory cannot be replaced by rename.
fn install(staged: &Path, tuned: &Path) -> anyhow::Result<()> {
    let kernels = tuned.parent().context("the kernel's place has no parent")?;
    for entry in fs::read_dir(staged)? {
        File::open(entry?.path())?.sync_all()?;
    }
    let manifest = fs::read(staged.join("manifest.json"))?;
    let name = format!("{INSTALLED_PREFIX}{}", &hex_digest(&manifest)[..16]);
    let place = kernels.join(&name);
    fs::rename(staged, &place)
        .with_context(|| format!("cannot move the new kernel to {}", place.display()))?;
    let link = kernels.join(format!("{name}.link"));
    std::os::unix::fs::symlink(&name, &link)?;
    let old = fs::read_link(tuned).ok();
    fs::rename(&link, tuned)
        .with_context(|| format!("cannot put the new kernel at {}", tuned.display()))?;
    File::open(kernels)?.sync_all()?;
    if let Some(old) = old.filter(|old| *old != Path::new(&name)) {
        fs::remove_dir_all(kernels.join(old)).context("cannot remove the previous kernel")?;
    }
    Ok(())
}

/// Names of the kernels, without and with the Docker fragment.
const NAMES: [&str; 2] = ["tuned", "docker"];
const BUILD_PREFIX: &str = ".build-";
const INSTALLED_PREFIX: &str = ".tuned-";

/// Removes what interrupted builds left: build directories whose process is
/// gone, and installed files nothing points to.
fn sweep(kernels: &Path) -> anyhow::Result<()> {
    let current = NAMES.map(|name| fs::read_link(kernels.join(name)).ok());
    for entry in fs::read_dir(kernels)? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(text) = name.to_str() else { continue };
        let stale = if let Some(rest) = text.strip_prefix(BUILD_PREFIX) {
            let pid = rest.split('-').next().unwrap_or_default();
            pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists()
        } else {
            let used = |link: &Option<PathBuf>| link.as_deref() == Some(Path::new(&name));
            text.starts_with(INSTALLED_PREFIX) && !current.iter().any(used)
        };
        if stale {
            let path = entry.path();
            let removed = if entry.file_type()?.is_dir() {
                fs::remove_dir_all(&path)
            } else {
                fs::remove_file(&path)
            };
            removed.with_context(|| format!("cannot remove the stale {}", path.display()))?;
        }
    }
    Ok(())
}

/// Whether `tuned` holds the kernel of these inputs, unharmed.
fn is_current(tuned: &Path, inputs: &Inputs) -> bool {
    let Ok(text) = fs::read(tuned.join("manifest.json")) else {
        return false;
    };
    let Ok(manifest) = serde_json::from_slice::<Manifest>(&text) else {
        return false;
    };
    manifest.inputs == *inputs
        && fs::read(tuned.join(&manifest.kernel.image.file))
            .is_ok_and(|bytes| hex_digest(&bytes) == manifest.kernel.image.sha256)
}

/// The lines of `fragment` that did not survive into `config`.
fn lost_lines<'a>(fragment: &'a str, config: &str) -> Vec<&'a str> {
    let set: std::collections::HashSet<&str> = config.lines().collect();
    let is_lost = |line: &&str| {
        if line.starts_with("CONFIG_") {
            return !set.contains(line);
        }
        // An option that is off may also be absent: its menu is off.
        let Some(name) = unset_option(line) else {
            return false;
        };
        let on = format!("{name}=");
        set.iter().any(|line| line.starts_with(&on))
    };
    fragment.lines().filter(is_lost).collect()
}

/// The option named in `# CONFIG_X is not set`.
fn unset_option(line: &str) -> Option<&str> {
    line.strip_prefix("# ")?
        .strip_suffix(" is not set")
        .filter(|name| name.starts_with("CONFIG_"))
}

fn fragment(docker: bool) -> anyhow::Result<String> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../images/kernel");
    let read = |name: &str| {
        let path = dir.join(name);
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    let mut text = read("base.config")?;
    if docker {
        text.push_str(&read("docker.config")?);
    }
    Ok(text)
}

fn require_packages(install: bool) -> anyhow::Result<()> {
    let missing: Vec<&str> = PACKAGES.into_iter().filter(|p| !is_installed(p)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing.join(" ");
    if !install {
        bail!(
            "packages needed to build the kernel are missing: {names}\n\
             install them with `apt-get install --no-install-recommends {names}`, \
             or run this task as root with --yes"
        );
    }
    step(&format!("install {names}"), || {
        // Fresh machines have no package lists, others have old ones.
        checked(Command::new("apt-get").args(["update", "--quiet"]))?;
        checked(
            Command::new("apt-get")
                .args(["install", "--yes", "--quiet", "--no-install-recommends"])
                .args(&missing)
                .env("DEBIAN_FRONTEND", "noninteractive"),
        )
    })
}

fn is_installed(package: &str) -> bool {
    dpkg_query("${db:Status-Status}", package).is_ok_and(|status| status == "installed")
}

fn source_version() -> anyhow::Result<String> {
    dpkg_query("${Version}", SOURCE_PACKAGE)
}

fn dpkg_query(format: &str, package: &str) -> anyhow::Result<String> {
    output(Command::new("dpkg-query").args(["--show", "--showformat", format, package]))
}

/// CPU time of all finished children of this process, in seconds (proc_pid_stat(5)).
fn children_cpu_seconds() -> anyhow::Result<f64> {
    /// USER_HZ, the same on every x86 Linux.
    const TICKS_PER_SECOND: f64 = 100.0;
    let stat = fs::read_to_string("/proc/self/stat")?;
    let (_, after_name) = stat
        .rsplit_once(')')
        .context("/proc/self/stat has no name")?;
    // cutime and cstime are fields 16 and 17; the state after the name is field 3.
    let ticks: Result<Vec<u64>, _> = after_name
        .split_whitespace()
        .skip(13)
        .take(2)
        .map(str::parse)
        .collect();
    let ticks = ticks.context("cannot read the CPU time in /proc/self/stat")?;
    Ok(ticks.iter().sum::<u64>() as f64 / TICKS_PER_SECOND)
}

fn step<T>(what: &str, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    eprintln!("kernel: {what} ...");
    let (start, cpu) = (Instant::now(), children_cpu_seconds()?);
    let done = work().with_context(|| format!("could not {what}"))?;
    eprintln!(
        "kernel: {what}: {:.0} s ({:.0} CPU seconds)",
        start.elapsed().as_secs_f64(),
        children_cpu_seconds()? - cpu
    );
    Ok(done)
}

fn checked(command: &mut Command) -> anyhow::Result<()> {
    let name = command.get_program().to_owned();
    let name = Path::new(&name).display();
    // stdout stays free for what a task is asked to print.
    let status = command
        .stdin(std::process::Stdio::null())
        .stdout(std::io::stderr())
        .status()
        .with_context(|| format!("cannot run {name}"))?;
    ensure!(status.success(), "{name} failed: {status}");
    Ok(())
}

fn output(command: &mut Command) -> anyhow::Result<String> {
    let name: &OsStr = command.get_program();
    let name = Path::new(name).display().to_string();
    let output = command
        .output()
        .with_context(|| format!("cannot run {name}"))?;
    ensure!(
        output.status.success(),
        "{name} failed: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8(output.stdout)?)
}

fn hex_digest(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    Sha256::digest(bytes)
        .iter()
        .fold(String::new(), |mut s, b| {
            let _ = write!(s, "{b:02x}");
            s
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_did_not_take_effect_are_named() {
        let fragment = "# words\nCONFIG_A=y\nCONFIG_N=64\nCONFIG_LOST=y\n\
                        # CONFIG_OFF is not set\n# CONFIG_GONE is not set\n# CONFIG_ON is not set\n";
        let config = "CONFIG_A=y\nCONFIG_N=64\n# CONFIG_OFF is not set\nCONFIG_ON=y\n\
                      CONFIG_OFFSET=y\n# CONFIG_LOST is not set\n";
        assert_eq!(
            lost_lines(fragment, config),
            ["CONFIG_LOST=y", "# CONFIG_ON is not set"]
        );
    }

    #[test]
    fn a_new_kernel_replaces_the_old_one_and_stale_builds_go() {
        let root = tempfile::tempdir().unwrap();
        let kernels = root.path();
        let tuned = kernels.join("tuned");
        for version in ["one", "two"] {
            let staged = kernels.join("staged");
            fs::create_dir(&staged).unwrap();
            fs::write(staged.join("manifest.json"), version).unwrap();
            install(&staged, &tuned).unwrap();
            assert_eq!(
                fs::read(tuned.join("manifest.json")).unwrap(),
                version.as_bytes()
            );
        }
        // Above the largest pid Linux gives out (2^22).
        fs::create_dir(kernels.join(".build-4194305-x")).unwrap();
        let own = kernels.join(format!(".build-{}-x", std::process::id()));
        fs::create_dir(&own).unwrap();
        fs::create_dir(kernels.join(".tuned-half")).unwrap();
        sweep(kernels).unwrap();
        assert!(own.exists() && tuned.join("manifest.json").exists());
        assert_eq!(fs::read_dir(kernels).unwrap().count(), 3);
    }

    #[test]
    fn a_damaged_kernel_is_built_again() {
        let dir = tempfile::tempdir().unwrap();
        let inputs = Inputs {
            source_package: SOURCE_PACKAGE.to_owned(),
            source_version: "1".to_owned(),
            fragment_sha256: "f".to_owned(),
        };
        let manifest = Manifest {
            kernel: image::Kernel {
                image: image::File {
                    file: "vmlinux".to_owned(),
                    size: 2,
                    sha256: hex_digest(b"ok"),
                },
                release: "6".to_owned(),
                format: image::KernelFormat::Vmlinux,
            },
            inputs: inputs.clone(),
            cpu_seconds: 1.5,
        };
        let text = serde_json::to_vec(&manifest).unwrap();
        fs::write(dir.path().join("manifest.json"), text).unwrap();
        fs::write(dir.path().join("vmlinux"), "ok").unwrap();
        assert!(is_current(dir.path(), &inputs));
        let other = Inputs {
            source_version: "2".to_owned(),
            ..inputs.clone()
        };
        assert!(!is_current(dir.path(), &other));
        fs::write(dir.path().join("vmlinux"), "no").unwrap();
        assert!(!is_current(dir.path(), &inputs));
    }
}
