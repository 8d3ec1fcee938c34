//! Booting a machine once, to be saved as a template.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_agent::{
    Configure, Exec, FailureKind, Life, Reply, Request, UNKNOWN_PART, UNKNOWN_REQUEST,
};
use qapi::qmp::migrate;

use super::clone::{migrated, tell_memory};
use super::command::command;
use super::host::Host;
use super::machine::{Machine, io_error};
use super::options::{Memory, StartOptions};
use super::record::{Record, RecordError};
use super::runner::{ANSWER, Io, fresh, random_hex, unless_interrupted};
use super::transfer::joined;
use super::{MachineError, RunError, now_ms};
use crate::guest::GuestError;
use crate::host::fault;
use crate::host::lease::Lease;
use crate::plan::Ram;
use crate::spec::{Spec, VmId, Workspace, WorkspaceMode};
use crate::template::{DISK, Described, RAM, STATE, Staged, Store, Template};

/// Host name of a machine that is to be saved. No clone keeps it.
const NAME: &str = "template";
/// How long a machine is left alone before it is saved: what its kernel and its
/// agent still do of themselves after a boot, and would do in every clone.
const SETTLE: Duration = Duration::from_secs(3);
/// How long the guest may take to write everything to its disk.
const REST: Duration = Duration::from_secs(60);
/// How long QEMU may take for the state of its devices.
const SAVE: Duration = Duration::from_secs(60);
/// Most bytes of that state: a hundred times what is usual.
const LARGEST: u64 = 32 << 20;
/// How far the guest's clock is behind while it warms up. OpenSSL takes from the
/// kernel's random pool again where an hour has passed since it last did
/// (MASTER_RESEED_TIME_INTERVAL of its prov_drbg), and so does it in a clone.
const BEHIND_NS: u64 = 65 * 60 * 1_000_000_000;

/// What a template is to be like besides the machine in it.
#[derive(Debug, Clone, Default)]
pub struct Build {
    /// Run by a shell before the machine is saved.
    pub warm: Option<String>,
    /// For machines with a shared workspace.
    pub share: bool,
    /// Also where there is one already.
    pub rebuild: bool,
    /// The guest's clock is right while it warms up; otherwise it is 65 minutes
    /// behind, so that OpenSSL takes from the kernel again in every clone.
    pub true_clock: bool,
}

/// What came of it.
#[derive(Debug)]
pub struct Built {
    /// The template.
    pub template: Template,
    /// It was there already.
    pub kept: bool,
}

/// Makes a template for machines of `spec`: boots one, warms it up, brings it
/// to rest and saves it.
///
/// # Errors
/// Everything a start can give, a warm-up that fails, a full disk. An older
/// template with the same key stays as it is then, and nothing else is left.
pub async fn build(host: &Host, spec: &Spec, wish: &Build, mut io: Io) -> Result<Built, RunError> {
    let spec = &machine(host, spec, wish)?;
    let store = host.templates();
    let ram = |file| Ram::Saved { file };
    let (_, _, key) = host.plan_with(spec, ram(RAM.into()))?;
    if !wish.rebuild
        && let Ok(Some(template)) = store.find(&key)
        && template.manifest.warm == wish.warm
        && template.manifest.behind != wish.true_clock
    {
        return Ok(Built {
            template,
            kept: true,
        });
    }
    let staged = store.stage()?;
    let file = staged.path().join(RAM);
    let (image, plan, key) = host.plan_with(spec, ram(file.clone()))?;
    host.prove(spec, &image, &plan).await?;
    let lock = image.lock()?;
    let memory = empty(&file, plan.memory.0).map_err(io_error("make", &file))?;
    let mut record = Record::create(&host.dirs, spec, &plan)?;
    let path = staged.path().to_owned();
    record
        .lease(Lease::Dir { path })
        .map_err(|error| MachineError::from(RecordError::from(error)))?;
    let options = StartOptions {
        disk: Some(staged.path().join(DISK)),
        memory: Memory::Saved(Arc::new(memory)),
        ..host.options(&plan, &record)
    };
    let start = async { Ok(Machine::start(plan, record, &options).await?) };
    let started = unless_interrupted(&mut io.signals, start).await;
    if matches!(started, Err(RunError::Interrupted { .. })) {
        // What it had written down is cleared away like that of any dead run.
        if let Err(error) = super::recover(&host.dirs, false) {
            tracing::warn!("{error}");
        }
    }
    let mut machine = started?;
    machine.hold(lock);
    let work = async {
        warm_up(&machine, spec, wish, &mut io).await?;
        let settle = async {
            tokio::time::sleep(SETTLE).await;
            Ok(())
        };
        unless_interrupted(&mut io.signals, settle).await?;
        let life = rest(&machine).await?;
        save(&machine, staged.path()).await?;
        let of = Described {
            key,
            life,
            created_ms: now_ms(),
            image: spec.image.clone(),
            profile: spec.profile.clone(),
            warm: wish.warm.clone(),
            behind: !wish.true_clock,
            qemu: machine.monitor().version().clone(),
            kernel: kernel_file(spec, &machine.plan().kernel.path),
        };
        keep(&machine, &store, staged, of).await
    };
    let built = work.await;
    if let Err(errors) = machine.kill().await {
        for error in errors {
            tracing::warn!("left behind, `bulkhead gc` will try again: {error}");
        }
    }
    Ok(Built {
        template: built?,
        kept: false,
    })
}

/// The machine that is booted: a run's, with a share of nothing where its
/// clones are to have one.
fn machine(host: &Host, spec: &Spec, wish: &Build) -> Result<Spec, RunError> {
    let mut workspace = Workspace {
        mode: WorkspaceMode::None,
        ..Workspace::default()
    };
    if wish.share {
        let dir = host.dirs.cache().join("empty");
        super::dirs::make_private(&dir).map_err(io_error("make", &dir))?;
        workspace = Workspace {
            dir: Some(dir),
            mode: WorkspaceMode::Share,
            read_only: true,
            ..workspace
        };
    }
    Ok(Spec {
        // Its VMM's name, and that of its record; no clone sees it.
        id: format!("{NAME}-{}", VmId::random())
            .parse()
            .unwrap_or_else(|_| VmId::random()),
        workspace,
        detached: false,
        balloon: false,
        ..spec.clone()
    })
}

/// The file of a kernel that is neither an image's nor installed.
fn kernel_file(spec: &Spec, path: &Path) -> Option<String> {
    spec.kernel.as_ref().filter(|asked| asked.contains('/'))?;
    let path = std::path::absolute(path).ok()?;
    path.to_str().map(str::to_owned)
}

/// A file of zeroes for the guest's memory.
fn empty(path: &Path, size: u64) -> io::Result<File> {
    fault::at("make memory")?;
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.set_len(size)?;
    Ok(file)
}

async fn warm_up(
    machine: &Machine,
    spec: &Spec,
    wish: &Build,
    io: &mut Io,
) -> Result<(), RunError> {
    let channel = machine.channel();
    let take = async |room| {
        let mut identity = fresh(&Configure {
            hostname: Some(NAME.into()),
            machine_id: Some(random_hex::<16>()),
            room,
            ..Configure::default()
        });
        if !wish.true_clock {
            identity.unix_ns = identity.unix_ns.map(|ns| ns.saturating_sub(BEHIND_NS));
        }
        let request = Request::Configure(identity);
        channel.ask("take its identity", &request, ANSWER).await
    };
    match take(true).await {
        // An older agent leaves none, and writes a clone's names to its disk.
        Err(error) if knows_no_room(&error) => take(false).await?,
        taken => taken?,
    };
    let Some(warm) = &wish.warm else {
        return Ok(());
    };
    let exec = Exec {
        argv: ["sh", "-c", warm].map(str::to_owned).into(),
        env: spec.command.env.clone(),
        cwd: Some(
            spec.command
                .workdir
                .clone()
                .unwrap_or_else(|| super::exchange::WORK.into()),
        ),
        user: spec.command.user.clone(),
        ..Exec::default()
    };
    let stream = channel.open(&Request::Exec(exec)).await?;
    let what = "run the warm-up".to_owned();
    let done = command(
        stream,
        what,
        io,
        spec.id.as_str(),
        Some(spec.limits.timeout.0),
    )
    .await?;
    match done.exit_code {
        0 => Ok(()),
        code => Err(RunError::WarmUp {
            code,
            timed_out: done.timed_out,
        }),
    }
}

/// Has the guest write everything down and run nothing any more.
pub(super) async fn rest(machine: &Machine) -> Result<Life, MachineError> {
    let asked = machine
        .channel()
        .ask("come to rest", &Request::Quiesce, REST)
        .await;
    match asked {
        Ok(Reply::Life(life)) => Ok(life),
        Err(error) if is_unknown(&error) => {
            let what = "be cloned";
            Err(MachineError::OldAgent { what })
        }
        Ok(other) => {
            let what = format!("{other:?} instead of its life");
            Err(GuestError::Protocol(what).into())
        }
        Err(error) => Err(error.into()),
    }
}

/// Whether the agent is older than what it was asked for.
pub(super) fn is_unknown(error: &GuestError) -> bool {
    matches!(error, GuestError::Refused { failure, .. }
        if failure.kind == FailureKind::Invalid && failure.message.contains(UNKNOWN_REQUEST))
}

/// Whether the agent is older than room for names.
fn knows_no_room(error: &GuestError) -> bool {
    matches!(error, GuestError::Refused { failure, .. }
        if failure.kind == FailureKind::Invalid && failure.message.contains(UNKNOWN_PART))
}

/// Writes the state of the devices to a file; the machine stands still then,
/// and its memory file and its disk are as that state has them.
async fn save(machine: &Machine, dir: &Path) -> Result<(), MachineError> {
    let path = dir.join(STATE);
    let monitor = machine.monitor();
    let mut events = monitor.events();
    let (ours, theirs) = fault::at("save state")
        .and_then(|()| UnixStream::pair())
        .map_err(io_error("make a socket for", &path))?;
    let write = write_down(ours, path.clone(), LARGEST);
    let name = "state".to_owned();
    tell_memory(monitor, true).await?;
    monitor.send_fd(&name, theirs.into()).await?;
    // The machine runs on until QEMU stops it: so will its clones.
    let go = migrate {
        uri: Some(format!("fd:{name}")),
        channels: None,
        detach: None,
        resume: None,
    };
    monitor.execute(go).await?;
    let status = migrated(&mut events, SAVE).await?;
    let written = tokio::time::timeout(SAVE, write).await;
    let written = joined(written.unwrap_or_else(|_| Ok(Err(io::ErrorKind::TimedOut.into()))));
    written.map_err(io_error("write", &path))?;
    match status.as_str() {
        "completed" => Ok(()),
        other => {
            let told = io::Error::other(format!("QEMU says that it {other}"));
            Err(io_error("save a machine to", &path)(told))
        }
    }
}

/// Writes what QEMU sends to a new file, up to so many bytes.
pub(super) fn write_down(
    from: UnixStream,
    path: PathBuf,
    most: u64,
) -> tokio::task::JoinHandle<io::Result<()>> {
    tokio::task::spawn_blocking(move || {
        let mut file = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)?;
        let count = io::copy(&mut from.take(most), &mut file)?;
        file.flush()?;
        match count == most {
            true => Err(io::ErrorKind::FileTooLarge.into()),
            false => Ok(()),
        }
    })
}

/// Puts the template in its place, once nobody writes to its files any more.
async fn keep(
    machine: &Machine,
    store: &Store,
    staged: Staged,
    of: Described,
) -> Result<Template, RunError> {
    let qemu = &machine.plan().qemu;
    let ended = async {
        fault::at("end saved VMM")?;
        machine.process().kill()?;
        machine.process().wait().await
    };
    ended.await.map_err(io_error("end", qemu))?;
    let store = store.clone();
    let commit = tokio::task::spawn_blocking(move || store.commit(staged, of));
    Ok(joined(commit.await)?)
}
