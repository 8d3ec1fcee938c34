//! Saving a machine that runs, and going on from what was saved.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bulkhead_agent::{Configure, Request};
use qapi::qmp::{cont, migrate, migrate_cancel, stop};
use serde_json::json;

use super::clone::{Origin, migrated, tell_memory, told};
use super::host::Host;
use super::machine::Machine;
use super::runner::fresh;
use super::template::{is_unknown, rest, write_down};
use super::transfer::joined;
use super::{MachineError, RunError, now_ms};
use crate::guest::GuestError;
use crate::host::{fault, lease};
use crate::image::Image;
use crate::plan::{Channel, Plan, Ram};
use crate::qmp::{Monitor, QmpError};
use crate::snapshot::{
    DISK, Manifest, STATE, Saved, Snapshot, SnapshotError, SnapshotName, Store, Wish,
};
use crate::spec::{Accel, Spec, VmId};
use crate::template::{Difference, Key};

/// How long a machine is saved while it runs; then it stands still for the rest.
const LIVE: Duration = Duration::from_secs(5);
/// How long saving may take in all.
const SAVE: Duration = Duration::from_secs(600);
/// Bytes a second that QEMU may write: all it can.
const BANDWIDTH: u64 = 64 << 30;
/// Bytes of the state besides the memory: a hundred times what is usual, and
/// pages that were written to while they were saved.
const BESIDES: u64 = 1 << 30;
/// How long what QEMU has told already may take.
const TOLD: Duration = Duration::from_secs(1);
/// How long QEMU may take to clear up after a save.
const GO_ON: Duration = Duration::from_secs(10);
/// How long the guest may take to go on.
const WAKE: Duration = Duration::from_secs(45);

/// Saves of this process that are in their last part.
static KEEPING: AtomicUsize = AtomicUsize::new(0);

/// One of them, for as long as it lives.
struct Keeping;

impl Keeping {
    fn begin() -> Self {
        KEEPING.fetch_add(1, Ordering::Relaxed);
        Self
    }
}

impl Drop for Keeping {
    fn drop(&mut self) {
        KEEPING.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Whether a save of this process is in its last part, though nobody waits for it.
pub(crate) fn is_keeping() -> bool {
    KEEPING.load(Ordering::Relaxed) > 0
}

/// What is to be saved, and of whom.
#[derive(Debug)]
pub(crate) struct Saving {
    /// Name, description, tags.
    pub(crate) wish: Wish,
    /// The snapshot that the machine is at.
    pub(crate) parent: Option<SnapshotName>,
}

/// Saves a machine, which goes on. Dropped before it is ready, it leaves no snapshot.
///
/// # Errors
/// It cannot be saved; nothing is left of it, and the machine goes on.
pub(crate) async fn save(
    host: &Host,
    spec: &Spec,
    machine: &Machine,
    saving: Saving,
) -> Result<(), RunError> {
    let (wish, plan) = (saving.wish, machine.plan());
    let store = Store::new(machine.dir(), &spec.id);
    store.free(&wish.name)?;
    let image = host.images().inspect(&spec.image)?;
    let key = match wish.disk_only {
        true => None,
        false => Some(savable(plan).and_then(|()| key(host, spec, plan))?),
    };
    let staged = store.stage()?;
    // Whom nobody could wake must not be put to rest.
    wake(machine).await?;
    let begun = async {
        let life = rest(machine).await?;
        // Nobody may take it for want of space that it stands still from here on.
        machine.disk().hold(true);
        let taken = take(machine, staged.path(), key.is_some()).await;
        if taken.is_err() {
            // Nobody reads any more what it still has to say.
            let _ = machine.monitor().execute(migrate_cancel {}).await;
        }
        Ok::<_, MachineError>((life, taken))
    };
    let begun = begun.await;
    // Whatever came of it: the machine goes on.
    machine.disk().hold(false);
    let went_on = go_on(machine.monitor()).await;
    let woken = wake(machine).await;
    let (life, taken) = begun?;
    went_on?;
    woken?;
    let paused_ms = taken?;
    let qemu = machine.monitor().version().clone();
    let backed = plan.ram.is_backed();
    let keeping = Keeping::begin();
    let measure = move || {
        // What is half made goes before the save is over.
        let (keeping, staged) = (keeping, staged);
        let piece = |name| Store::piece(staged.path(), name);
        let disk = piece(DISK)?;
        let saved = match key {
            None => None,
            Some(key) => Some(Saved {
                state: piece(STATE)?,
                key,
                life,
                backed,
                qemu,
                paused_ms,
            }),
        };
        let manifest = Manifest::new(&wish, saving.parent, image.id, saved, disk, now_ms());
        Store::seal(&staged, &manifest)?;
        Ok::<_, SnapshotError>((staged, manifest.name, keeping))
    };
    let measured = tokio::task::spawn_blocking(measure).await;
    let (staged, name, keeping) = joined(measured)?;
    // Whose machine ends before this is told that it was not saved, and it is
    // not. Nothing is waited for from here on.
    store.publish(staged, &name)?;
    let sweep = move || {
        let _keeping = keeping;
        // The fork that wanted it may be dead by now.
        if let Err(error) = store.sweep_forks() {
            tracing::warn!("what a dead fork left stays: {error}");
        }
    };
    drop(tokio::task::spawn_blocking(sweep));
    Ok(())
}

/// Saves the disk of a machine that does not run. The caller holds its record.
pub(crate) fn save_disk(
    record: &Path,
    spec: &Spec,
    wish: &Wish,
    parent: Option<SnapshotName>,
) -> Result<(), RunError> {
    let store = Store::new(record, &spec.id);
    store.free(&wish.name)?;
    let disk = record.join("disk.img");
    if !disk.exists() {
        let vm = spec.id.clone();
        return Err(SnapshotError::NoDisk { vm }.into());
    }
    let staged = store.stage()?;
    crate::image::scratch::copy(&disk, &staged.path().join(DISK))?;
    let piece = Store::piece(staged.path(), DISK)?;
    let manifest = Manifest::new(wish, parent, spec.image.clone(), None, piece, now_ms());
    Ok(store.commit(staged, &manifest)?)
}

/// Gives a machine the disk of a snapshot: the old one is there until the new
/// one is. The caller holds its record.
pub(crate) fn copy_disk(snapshot: &Snapshot, record: &Path) -> Result<(), RunError> {
    // Swept with what else a dead owner left half done.
    let disk = record.join("disk.img");
    let fresh = lease::half_made(&disk);
    let _ = std::fs::remove_file(&fresh);
    crate::image::scratch::copy(&snapshot.disk, &fresh)?;
    let replace = || {
        std::fs::File::open(&fresh)?.sync_all()?;
        fault::at("replace disk.img")?;
        std::fs::rename(&fresh, &disk)
    };
    Ok(replace().map_err(SnapshotError::io("replace", &disk))?)
}

/// Plans the machine of `spec` so that it goes on from a snapshot, and puts the
/// snapshot's disk in place.
pub(super) fn revive(
    host: &Host,
    spec: &Spec,
    record: &Path,
    name: &SnapshotName,
    configure: &Configure,
) -> Result<(Image, Plan, Origin), RunError> {
    let mut snapshot = Store::new(record, &spec.id).get(name)?;
    let vm = spec.id.clone();
    let state = snapshot.state.take();
    let (Some(saved), Some(state)) = (&snapshot.manifest.saved, state) else {
        return Err(SnapshotError::NoMemory { vm }.into());
    };
    let backed = saved.backed;
    let (image, plan, key) = host.plan_with(spec, Ram::Restored { backed })?;
    fits(&vm, name, &key.differences(&saved.key))?;
    copy_disk(&snapshot, record)?;
    let origin = Origin::snapshot(name, saved, state, configure.clone());
    Ok((image, plan, origin))
}

/// Whether the machine of `spec`, as it would be started now, is the one that
/// was saved.
///
/// # Errors
/// It is not.
pub(crate) fn check(host: &Host, spec: &Spec, snapshot: &Snapshot) -> Result<(), RunError> {
    let Some(saved) = &snapshot.manifest.saved else {
        return Ok(());
    };
    let differences = differences(host, spec, saved)?;
    fits(&spec.id, &snapshot.manifest.name, &differences)
}

/// What the machine of `spec`, as it would be started now, has otherwise than
/// the one that was saved.
///
/// # Errors
/// It cannot be planned.
pub(crate) fn differences(
    host: &Host,
    spec: &Spec,
    saved: &Saved,
) -> Result<Vec<Difference>, RunError> {
    let backed = saved.backed;
    let (_, _, key) = host.plan_with(spec, Ram::Restored { backed })?;
    Ok(key.differences(&saved.key))
}

fn fits(vm: &VmId, name: &SnapshotName, differences: &[Difference]) -> Result<(), RunError> {
    if differences.is_empty() {
        return Ok(());
    }
    Err(SnapshotError::Mismatch {
        vm: vm.clone(),
        name: name.clone(),
        differences: Difference::told(differences),
    }
    .into())
}

/// Refuses what QEMU cannot save.
fn savable(plan: &Plan) -> Result<(), RunError> {
    let (why, cure) = match plan {
        Plan { share: Some(_), .. } => (
            "it has a shared workspace, whose state QEMU cannot save",
            "Save its disk with --disk-only, or make it with --workspace-mode copy.",
        ),
        Plan {
            channel: Channel::Vsock,
            ..
        } => (
            "it is reached over vsock, whose state is the host's",
            "Save its disk with --disk-only, or make it without --channel vsock.",
        ),
        _ => return Ok(()),
    };
    let vm = plan.id.clone();
    Err(SnapshotError::Unsavable { vm, why, cure }.into())
}

fn key(host: &Host, spec: &Spec, plan: &Plan) -> Result<Key, RunError> {
    let (image, _, facts) = host.parts(spec)?;
    let domain = &spec.templates.domain;
    let key = Key::of(plan, &image, domain, &facts, &host.dirs.cache());
    Ok(key.map_err(SnapshotError::io("read what belongs to", &plan.qemu))?)
}

/// Writes memory, devices and disk down as they are at one moment. The machine
/// stands still after it. Gives for how long it did until then, in milliseconds.
async fn take(machine: &Machine, dir: &Path, memory: bool) -> Result<u64, RunError> {
    let since = match memory {
        true => migrate_to(machine, dir).await?,
        false => {
            machine.pause().await?;
            now()
        }
    };
    fault::at("save disk").map_err(SnapshotError::io("save", dir))?;
    let (from, to) = (machine.dir().join("disk.img"), dir.join(DISK));
    let copy = tokio::task::spawn_blocking(move || crate::image::scratch::copy(&from, &to));
    joined(copy.await)?;
    let paused = now().saturating_sub(since).as_millis();
    Ok(u64::try_from(paused).unwrap_or(u64::MAX))
}

/// Has QEMU write memory and devices to a file, while the machine runs as far
/// as it can. Gives since when it has stood still.
async fn migrate_to(machine: &Machine, dir: &Path) -> Result<Duration, RunError> {
    let (path, monitor) = (dir.join(STATE), machine.monitor());
    let mut events = monitor.events();
    let mut stops = monitor.events();
    let (ours, theirs) = fault::at("save state")
        .and_then(|()| UnixStream::pair())
        .map_err(SnapshotError::io("make a socket for", &path))?;
    let write = write_down(ours, path.clone(), 2 * machine.plan().memory.0 + BESIDES);
    let begin = async {
        if !runs_while_saved(machine.plan().accel) {
            monitor.execute(stop {}).await?;
        }
        tell_memory(monitor, false).await?;
        let speed = json!({ "max-bandwidth": BANDWIDTH });
        monitor.execute_raw("migrate-set-parameters", speed).await?;
        monitor.send_fd("state", theirs.into()).await?;
        let go = migrate {
            uri: Some("fd:state".into()),
            channels: None,
            detach: None,
            resume: None,
        };
        monitor.execute(go).await?;
        Ok::<_, MachineError>(())
    };
    begin.await?;
    let status = match tokio::time::timeout(LIVE, migrated(&mut events, SAVE)).await {
        Ok(ended) => ended?,
        Err(_) => {
            // It writes faster than it can be saved.
            monitor.execute(stop {}).await.map_err(MachineError::from)?;
            migrated(&mut events, SAVE).await?
        }
    };
    // Events have waited for us: the first that says that it stands still.
    let stopped = stops.wait_for("STOP", TOLD, |_| true).await;
    let written = joined(write.await);
    written.map_err(SnapshotError::io("write", &path))?;
    match status.as_str() {
        "completed" => Ok(stopped
            .ok()
            .and_then(|event| event.timestamp)
            .unwrap_or_else(now)),
        other => {
            let (vm, why) = (machine.plan().id.clone(), format!("it {other}"));
            Err(SnapshotError::Failed { vm, why }.into())
        }
    }
}

/// Has a machine run on. QEMU refuses that for a moment after a save that failed.
async fn go_on(monitor: &Monitor) -> Result<(), MachineError> {
    let deadline = tokio::time::Instant::now() + GO_ON;
    loop {
        match monitor.execute(cont {}).await {
            Err(QmpError::Refused { .. }) if tokio::time::Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            done => return Ok(done.map(drop)?),
        }
    }
}

/// Whether a machine can run while its memory is saved: the emulator misses
/// pages that the guest writes to meanwhile, on a busy host in one of nine saves
/// of a busy guest, and what is restored then is no moment of it (decision 0044).
fn runs_while_saved(accel: Accel) -> bool {
    accel == Accel::Kvm
}

/// Has a machine serve again whose supervisor died, maybe while it saved it.
///
/// # Errors
/// The guest does not answer.
pub(super) async fn wake_after_loss(machine: &Machine) -> Result<(), MachineError> {
    match wake(machine).await {
        // It cannot be saved, so nobody put it to rest.
        Err(MachineError::OldAgent { .. }) => Ok(()),
        woken => woken,
    }
}

/// Time since 1970, as QEMU's events have it.
fn now() -> Duration {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap_or_default()
}

/// Has the guest serve again as what it was, with entropy that is in no
/// snapshot, and the right time. One that serves does not mind.
///
/// # Errors
/// It does not answer, or is too old to be asked.
async fn wake(machine: &Machine) -> Result<(), MachineError> {
    let request = Request::Resumed {
        identity: fresh(&Configure::default()),
    };
    match machine.channel().ask("go on", &request, WAKE).await {
        Ok(reply) => told(reply).map(drop).map_err(Into::into),
        Err(error) if is_unknown(&error) => Err(MachineError::OldAgent { what: "be saved" }),
        // It serves all the same.
        Err(error @ GuestError::Refused { .. }) => {
            tracing::warn!("{} goes on as it was: {error}", machine.plan().id);
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}
