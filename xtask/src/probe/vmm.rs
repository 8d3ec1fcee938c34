//! `cargo xtask probe vmm`: a program in QEMU's place that tries to get out.
//!
//! It is started as QEMU is, by the library, with QEMU's plan; each attempt is
//! a machine of its own. Under KVM it is not proved that a guest boots: none does. What the filter for system calls stops is tried again
//! without that filter where other layers must stop it, too.

use std::fs;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use bulkhead::error::Report;
use bulkhead::run::{
    Dirs, Given, Host, Machine, MachineError, Memory, Record, RunError, StartOptions,
};
use bulkhead::spec::{Accel, Catalog, Request, Spec, Timeout};

use sha2::{Digest as _, Sha256};

use super::{Came, Row, Rows};
use crate::setup;

/// Fewest attempts: fewer would mean that the list got lost.
const LEAST: usize = 80;
/// Exit codes of the hostile program (xtask/src/bin/hostile-vmm).
const REFUSED: i32 = 10;
const OUT: i32 = 11;
const SKIPPED: i32 = 12;

/// Options.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only attempts whose name contains this.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Print the attempts as JSON; the closing line is on stderr then.
    #[arg(long)]
    json: bool,
    /// kvm or tcg: whose jail it is.
    #[arg(long, default_value = "tcg")]
    accel: String,
    /// Take the hostile program as it was built: where nothing can be, as in the lab.
    #[arg(long)]
    built: bool,
    /// Image of the machines.
    #[arg(long, default_value = "base")]
    image: String,
    /// Where images are kept.
    #[arg(long, env = "BULKHEAD_STATE_DIR", default_value_os_t = setup::usual_state_dir())]
    state_dir: PathBuf,
}

/// Runs the task; gives whether no attempt got anywhere.
pub(crate) fn run(args: &Args) -> Result<bool> {
    let program = program(args.built)?;
    let listed = Command::new(&program).output()?;
    let listed = String::from_utf8(listed.stdout)?;
    let attempts: Vec<(bool, &str)> = listed
        .lines()
        .filter_map(|line| line.split_once('\t'))
        .map(|(kind, name)| (kind == "deep", name))
        .collect();
    ensure!(
        attempts.len() >= LEAST,
        "only {} attempts are listed",
        attempts.len()
    );
    let temp = tempfile::Builder::new().prefix("bh-probe-").tempdir()?;
    let host = Host {
        qemu: Some(program),
        ..place(temp.path(), &args.state_dir)?
    };
    let _canaries = Canaries::new()?;
    let before = Seen::now(temp.path())?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let rows = Rows::said();
    for (number, (deep, name)) in attempts.iter().enumerate() {
        if args.only.as_ref().is_some_and(|only| !name.contains(only)) {
            continue;
        }
        for filter in [true, false] {
            if filter || *deep {
                let row = runtime.block_on(attempt(&host, args, number, name, filter))?;
                rows.add(row);
            }
        }
    }
    rows.add(unchanged(&before, &Seen::now(temp.path())?, &host));
    rows.close(args.json)
}

/// A host with directories of its own in `dir`, and the images of `state_dir`.
pub(crate) fn place(dir: &Path, state_dir: &Path) -> Result<Host> {
    let state = dir.join("state");
    fs::create_dir(&state)?;
    for name in ["images", "kernels", "cache"] {
        let from = state_dir.join(name);
        let from = from
            .canonicalize()
            .with_context(|| format!("{} is missing", from.display()))?;
        std::os::unix::fs::symlink(from, state.join(name))?;
    }
    // Short: the path of a socket may have 107 bytes.
    let runtime = dir.join("run");
    let mut host = Host {
        die_with_thread: true,
        ..Host::new(Dirs { state, runtime })
    };
    // As the program reads it: the lab is slow.
    if let Ok(text) = std::env::var("BULKHEAD_BOOT_TIMEOUT") {
        let timeout: Timeout = text.parse()?;
        (host.boot_timeout, host.proof_timeout) = (timeout.0, timeout.0);
    }
    Ok(host)
}

/// The hostile program, beside this one.
fn program(built: bool) -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let dir = own.parent().context("this program is nowhere")?;
    let program = dir.join("hostile-vmm");
    if built {
        ensure!(program.exists(), "there is no {}", program.display());
        return Ok(program);
    }
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args([
        "build",
        "--quiet",
        "--package",
        "xtask",
        "--bin",
        "hostile-vmm",
    ]);
    ensure!(
        cargo.status()?.success(),
        "the hostile program cannot be built"
    );
    Ok(program)
}

/// What the host has to be reached.
struct Canaries {
    _loopback: std::net::TcpListener,
    _abstract: UnixListener,
    /// A segment of shared memory.
    segment: String,
    /// A key in the session's keyring; none where the kernel has no keys.
    key: Option<i64>,
}

impl Canaries {
    fn new() -> Result<Self> {
        let loopback = std::net::TcpListener::bind("127.0.0.1:45871");
        let address = SocketAddr::from_abstract_name("bulkhead-probe-canary")?;
        let made = Command::new("ipcmk").args(["--shmem", "4096"]).output()?;
        let made = String::from_utf8(made.stdout)?;
        let segment = made
            .split_whitespace()
            .last()
            .context("ipcmk made nothing")?;
        Ok(Self {
            _loopback: loopback.context("another probe runs")?,
            _abstract: UnixListener::bind_addr(&address)?,
            segment: segment.to_owned(),
            key: add_key(),
        })
    }
}

/// Adds a key that no machine may find (add_key(2)), to a session keyring of our
/// own, which what we start would have, too.
#[allow(unsafe_code)] // no crate here offers it
fn add_key() -> Option<i64> {
    let (kind, name, session_keyring) = (c"user", c"bulkhead-probe-canary", -3);
    let join_session_keyring = 1;
    let no_name = std::ptr::null::<nix::libc::c_char>();
    // SAFETY: texts that end in zero or none, a buffer of the length given, integers.
    let key = unsafe {
        nix::libc::syscall(nix::libc::SYS_keyctl, join_session_keyring, no_name);
        nix::libc::syscall(
            nix::libc::SYS_add_key,
            kind.as_ptr(),
            name.as_ptr(),
            c"x".as_ptr(),
            1usize,
            session_keyring,
        )
    };
    (key >= 0).then_some(key)
}

/// Takes a key away again (keyctl(2)).
#[allow(unsafe_code)] // as above
fn revoke_key(key: i64) {
    let revoke = 3;
    // SAFETY: integers.
    unsafe { nix::libc::syscall(nix::libc::SYS_keyctl, revoke, key) };
}

impl Drop for Canaries {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            revoke_key(key);
        }
        let _ = Command::new("ipcrm")
            .args(["--shmem-id", &self.segment])
            .status();
    }
}

async fn attempt(host: &Host, args: &Args, number: usize, name: &str, filter: bool) -> Result<Row> {
    let begin = Instant::now();
    let wish = Request {
        name: Some(format!("probe-{number}-{}", if filter { "all" } else { "deep" }).parse()?),
        image: Some(args.image.clone()),
        accel: Some(match args.accel.as_str() {
            "kvm" => Accel::Kvm,
            "tcg" => Accel::Tcg,
            other => bail!("--accel cannot be {other}"),
        }),
        memory: Some("64M".parse()?),
        cpus: Some(1),
        command: vec!["true".into()],
        waive: if filter {
            None
        } else {
            Some("seccomp".parse()?)
        },
        network: Some(bulkhead::spec::NetworkMode::Isolated.into()),
        ..Request::default()
    };
    let spec: Spec = wish.resolve(&Catalog::default())?;
    let (came, why) = match start(host, &spec).await {
        Ok(()) => bail!("the hostile program behaved like QEMU"),
        Err(RunError::Machine(error)) => judge(&error),
        Err(error) => (Came::Failed, told(&error)),
    };
    let without = if filter {
        ""
    } else {
        " (without the filter for system calls)"
    };
    Ok(Row {
        case: format!("{name}{without}"),
        came,
        why: vec![why],
        again: format!(
            "cargo xtask probe vmm --accel {} --only {name:?}",
            args.accel
        ),
        ms: begin.elapsed().as_millis(),
        tried: None,
    })
}

/// Starts the machine, whatever is known of the accelerator.
async fn start(host: &Host, spec: &Spec) -> Result<(), RunError> {
    let (_, plan) = host.plan(spec)?;
    let record = Record::create(&host.dirs, spec, &plan)?;
    let options = StartOptions {
        cache: host.dirs.cache(),
        boot_timeout: host.boot_timeout,
        die_with_thread: host.die_with_thread,
        share: None,
        uid_dir: host.dirs.uids(),
        uids: host.uids,
        disk: None,
        sockets: None,
        netns: host.dirs.netns(&plan.id),
        site: host.site.clone(),
        given: Given::default(),
        violations: host.dirs.violations(),
        exceptions: host.dirs.exceptions(),
        memory: Memory::Empty,
        paused: false,
    };
    Machine::start(plan, record, &options).await?;
    Ok(())
}

/// What the end of the hostile program means.
fn judge(error: &MachineError) -> (Came, String) {
    match error {
        MachineError::SystemCall { call, .. } => {
            (Came::Passed, format!("ended for calling {call}"))
        }
        MachineError::VmmOutOfMemory { limit, .. } => (Came::Passed, format!("ended at {limit}")),
        MachineError::VmmEnded { status, words, .. } => {
            let words = words.lines().last().unwrap_or_default().to_owned();
            match status.code {
                Some(REFUSED) => (Came::Passed, words),
                Some(SKIPPED) => (Came::Skipped, words),
                Some(OUT) => (Came::Failed, words),
                _ => (Came::Failed, told(error)),
            }
        }
        other => (Came::Failed, told(other)),
    }
}

fn told(error: &dyn bulkhead::error::Explain) -> String {
    let report = Report::of(error);
    format!("{}: {} {}", report.code, report.what, report.cause)
}

/// What of the host must be the same afterwards.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    /// Mounts of jails: none is seen from outside.
    mounts: Vec<String>,
    hostname: String,
    passwd: [u8; 32],
    core_pattern: String,
}

impl Seen {
    fn now(place: &Path) -> Result<Self> {
        let place = place.to_string_lossy().into_owned();
        let mounts = fs::read_to_string("/proc/self/mounts")?;
        let ours = |line: &&str| line.starts_with("jail ") || line.contains(&place);
        Ok(Self {
            mounts: mounts.lines().filter(ours).map(str::to_owned).collect(),
            hostname: fs::read_to_string("/proc/sys/kernel/hostname")?,
            passwd: Sha256::digest(fs::read("/etc/passwd")?).into(),
            core_pattern: fs::read_to_string("/proc/sys/kernel/core_pattern")?,
        })
    }
}

/// The host is as before, and nothing of the machines is left.
fn unchanged(before: &Seen, after: &Seen, host: &Host) -> Row {
    let mut why = Vec::new();
    if before != after {
        why.push(format!("the host changed: {before:?} to {after:?}"));
    }
    let left = |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten().count();
    for dir in [host.dirs.uids(), host.dirs.runs()] {
        let locks = usize::from(dir.join(".lock").exists());
        if left(&dir) > locks {
            why.push(format!("something is left in {}", dir.display()));
        }
    }
    Row {
        case: "the host is unchanged".into(),
        came: if why.is_empty() {
            Came::Passed
        } else {
            Came::Failed
        },
        why,
        again: "cargo xtask probe vmm".into(),
        ms: 0,
        tried: None,
    }
}
