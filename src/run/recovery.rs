//! Releases what dead owners left behind.

use std::fs;
use std::path::Path;

use serde::Serialize;

use super::dirs::Dirs;
use super::record::{
    KEPT, LEASES, RecordError, SPEC, io_error, lock_of_living, lock_run, lock_runs, lock_soon,
    read_json, remove_state,
};
use super::share;
use super::state::{Ended, State, StateFile, Status, now_ms};
use crate::error::{Explain, Report};
use crate::guest::archive::HostDir;
use crate::host::fault;
use crate::host::lease::{self, Journal, Lease};
use crate::spec::{Spec, Survivors, VmId, WorkspaceMode};

/// What was found in one run's directory.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Found {
    /// Its owner is alive.
    Alive {
        /// Name of the machine.
        id: String,
    },
    /// Its owner is dead; the leases were released (or would be).
    Dead {
        /// Name of the machine.
        id: String,
        /// What it held.
        leases: Vec<Lease>,
        /// What could not be released.
        errors: Vec<Report>,
    },
    /// A detached machine that does not run, in order.
    Kept {
        /// Name of the machine.
        id: String,
    },
    /// A detached machine that runs on without a supervisor, as it was asked
    /// to: it needs a new one.
    Survivor {
        /// Name of the machine.
        id: String,
    },
}

/// Looks through all runs and releases those whose owner is dead; with
/// `dry_run` it only says what it would do.
///
/// # Errors
/// The directory of runs cannot be read. Failures of single runs are in the list.
pub fn recover(dirs: &Dirs, dry_run: bool) -> Result<Vec<Found>, RecordError> {
    let runs = dirs.runs();
    if !runs.exists() {
        return Ok(Vec::new());
    }
    let _lock = lock_runs(&runs)?;
    let mut found = Vec::new();
    for entry in fs::read_dir(&runs).map_err(io_error("read", &runs))? {
        let entry = entry.map_err(io_error("read", &runs))?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.push(if dry_run {
                look(&entry.path())
            } else {
                recover_one(&entry.path())
            });
        }
    }
    Ok(found)
}

fn name(dir: &Path) -> String {
    dir.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

fn look(dir: &Path) -> Found {
    let id = name(dir);
    match lock_of_living(dir) {
        Ok(None) => Found::Alive { id },
        Ok(Some(_lock)) => examine(dir, id).map_or_else(|found| found, |kept| kept.found()),
        Err(error) => dead(id, Vec::new(), &[&error]),
    }
}

/// What stands in the directory of a run that has no owner.
struct Ownerless {
    id: String,
    journal: Journal,
    /// Of a detached machine.
    state: Option<(StateFile, Spec)>,
}

/// Reads the directory of a run whose lock the caller holds.
fn examine(dir: &Path, id: String) -> Result<Ownerless, Found> {
    let bad = |error: &dyn Explain| dead(id.clone(), Vec::new(), &[error]);
    let journal = Journal::open(dir.join(LEASES)).map_err(|error| bad(&error))?;
    let mut state = None;
    if StateFile::is_in(dir) {
        let vm: VmId = id
            .parse()
            .map_err(|error: crate::spec::Malformed| bad(&error))?;
        let file = StateFile::open(dir, &vm).map_err(|error| bad(&error))?;
        let spec = read_json(&dir.join(SPEC)).map_err(|error| bad(&error))?;
        state = Some((file, spec));
    }
    Ok(Ownerless { id, journal, state })
}

impl Ownerless {
    /// What it is, before anything is done about it.
    fn found(&self) -> Found {
        let id = self.id.clone();
        match &self.state {
            Some(_) if self.survives() => Found::Survivor { id },
            Some((file, _)) if !self.is_lost(file) && self.journal.leases().is_empty() => {
                Found::Kept { id }
            }
            _ => dead(id, self.journal.leases().to_vec(), &[]),
        }
    }

    fn is_lost(&self, file: &StateFile) -> bool {
        file.status().state.is_live() || file.status().state == State::Lost
    }

    /// Whether its VMM runs on and may.
    fn survives(&self) -> bool {
        let Some((file, spec)) = &self.state else {
            return false;
        };
        spec.lifetime.survivors == Survivors::Adopt
            && matches!(
                file.status().state,
                State::Running | State::Paused | State::Lost
            )
            // It came up once: what was restored and is not unlike its siblings
            // is nobody's.
            && file.status().came_up()
            && self.journal.leases().iter().any(Lease::is_live_process)
    }

    /// Says on disk that nothing of it is left on the host.
    fn note_cleared(&mut self) -> Result<(), super::StateError> {
        let Some((file, _)) = &mut self.state else {
            return Ok(());
        };
        if file.status().state != State::Lost {
            return Ok(());
        }
        let rebooted = file
            .status()
            .supervisor
            .as_ref()
            .is_some_and(super::state::Owner::is_of_earlier_boot);
        file.update(|status| {
            status.ended = Some(Ended {
                exit_code: super::FAILED,
                at_ms: now_ms(),
                network: None,
            });
        })?;
        let reason = file.status().reason.clone();
        match rebooted {
            true => file.advance(State::Stopped, &reason),
            false => file.advance(State::Failed, &reason),
        }
    }
}

fn dead(id: String, leases: Vec<Lease>, errors: &[&dyn Explain]) -> Found {
    Found::Dead {
        id,
        leases,
        errors: errors.iter().map(|error| Report::of(*error)).collect(),
    }
}

/// Makes the shared workspace of a dead run ordinary. It may be long gone.
fn settle_share(run: &Path) {
    let spec: Option<Spec> = fs::read(run.join("spec.json"))
        .ok()
        .and_then(|text| serde_json::from_slice(&text).ok());
    let Some(workspace) = spec.map(|spec| spec.workspace) else {
        return;
    };
    let (WorkspaceMode::Share, false, Some(dir)) =
        (workspace.mode, workspace.read_only, &workspace.dir)
    else {
        return;
    };
    let settle = || {
        let share = HostDir::open(dir)?;
        // Another directory may have that name by now, even a link to one.
        match share::is_recorded(run, &share) {
            true => share::settle(&share).map(|_| ()),
            false => Ok(()),
        }
    };
    if let Err(error) = settle() {
        tracing::warn!(
            "the shared workspace {} keeps QEMU's owners: {error}",
            dir.display()
        );
    }
}

/// Looking at one machine without changing anything but what it says of itself.
pub(crate) mod look {
    use super::*;

    /// Whether the run in `dir` has an owner.
    pub(crate) fn is_owned(dir: &Path) -> Result<bool, RecordError> {
        Ok(lock_run(dir)?.is_none())
    }

    /// Whether a VMM of the run in `dir` lives, whoever watches it.
    pub(crate) fn has_vmm(dir: &Path) -> bool {
        Journal::open(dir.join(LEASES))
            .is_ok_and(|journal| journal.leases().iter().any(Lease::is_live_process))
    }

    /// What was asked for.
    pub(crate) fn spec(dir: &Path) -> Result<Spec, RecordError> {
        read_json(&dir.join(SPEC))
    }

    /// What is known of a detached machine; that its supervisor is gone is
    /// written down, if it is.
    pub(crate) fn note_loss(dir: &Path, id: &VmId) -> Result<Status, crate::run::StateError> {
        let lock = lock_run(dir);
        let mut file = StateFile::open(dir, id)?;
        if matches!(lock, Ok(Some(_))) {
            file.lose()?;
        }
        Ok(file.status().clone())
    }
}

/// Clears away a detached machine whose record is damaged.
///
/// # Errors
/// Somebody has it, or something of it stays.
pub(crate) fn abandon(dirs: &Dirs, id: &VmId) -> Result<Vec<Report>, RecordError> {
    let dir = dirs.run(id);
    let lock = lock_soon(&dir)?.ok_or_else(|| RecordError::Busy { id: id.clone() })?;
    // Without its state nobody starts it any more.
    if StateFile::is_in(&dir) {
        remove_state(&dir)?;
    }
    drop(lock);
    let _runs = lock_runs(&dirs.runs())?;
    match recover_one(&dir) {
        Found::Dead { errors, .. } => Ok(errors),
        // Somebody else is at it.
        _ => Ok(Vec::new()),
    }
}

/// Releases one run if its owner is dead. The caller holds the lock on all runs.
pub(super) fn recover_one(dir: &Path) -> Found {
    let id = name(dir);
    // Held until the directory is gone.
    let _lock = match lock_of_living(dir) {
        Ok(Some(lock)) => lock,
        Ok(None) => return Found::Alive { id },
        Err(error) => return dead(id, Vec::new(), &[&error]),
    };
    let mut run = match examine(dir, id.clone()) {
        Ok(run) => run,
        Err(found) => return found,
    };
    let found = run.found();
    // Also of one that is in order: its owner may have died before it changed anything.
    if let Err(source) = lease::sweep(dir) {
        let error = io_error("clear", dir)(source);
        return dead(id, run.journal.leases().to_vec(), &[&error]);
    }
    if matches!(found, Found::Kept { .. }) {
        return found;
    }
    let leases = run.journal.leases().to_vec();
    if let Some((file, _)) = &mut run.state
        && let Err(error) = file.lose()
    {
        return dead(id, leases, &[&error]);
    }
    if matches!(found, Found::Survivor { .. }) {
        return found;
    }
    let mut errors = run.journal.release_all();
    if run.state.is_none() {
        // A machine that was not finished, or was being removed.
        match Journal::open_lasting(dir.join(KEPT)) {
            Ok(mut kept) => errors.extend(kept.release_all()),
            Err(error) => errors.push(error),
        }
    } else if let Err(error) = run.journal.save() {
        errors.push(error);
    }
    if !errors.is_empty() {
        let errors: Vec<&dyn Explain> = errors.iter().map(|error| error as &dyn Explain).collect();
        return dead(id, leases, &errors);
    }
    settle_share(dir);
    if run.state.is_some() {
        return match run.note_cleared() {
            Ok(()) => dead(id, leases, &[]),
            Err(error) => dead(id, leases, &[&error]),
        };
    }
    match fault::at("remove run").and_then(|()| fs::remove_dir_all(dir)) {
        Ok(()) => dead(id, leases, &[]),
        Err(source) => {
            let error = io_error("remove", dir)(source);
            dead(id, leases, &[&error])
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;
    use crate::host::process;
    use crate::run::state::{Beginning, ImageUse};
    use crate::spec::{Catalog, Request};

    /// Ends with the test.
    struct Vmm(Child);

    impl Drop for Vmm {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    /// What a machine is whose supervisor is gone and whose VMM lives, and that
    /// may be adopted.
    fn found(beginning: Beginning, came_up: bool) -> Found {
        let vmm = Vmm(Command::new("sleep").arg("60").spawn().unwrap());
        let pid = i32::try_from(vmm.0.id()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let id: VmId = "vm1".parse().unwrap();
        let image = ImageUse {
            name: "base".into(),
            id: "sha256-1".into(),
        };
        let mut file = StateFile::create(dir.path(), &id, image, beginning).unwrap();
        file.advance(State::Starting, "start").unwrap();
        if came_up {
            let up = file.advance_with(State::Running, "up", |status| {
                status.provisioned = true;
                status.restore = None;
            });
            up.unwrap();
        }
        file.lose().unwrap();
        let wish = Request {
            survivors: Some(Survivors::Adopt),
            ..Request::default()
        };
        let spec = wish.resolve_machine(&Catalog::default()).unwrap();
        fs::write(dir.path().join(SPEC), serde_json::to_vec(&spec).unwrap()).unwrap();
        let lease = Lease::Process {
            pid,
            start_time: process::start_time(pid).unwrap(),
            boot_id: process::boot_id(),
        };
        let mut journal = Journal::open(dir.path().join(LEASES)).unwrap();
        journal.add(lease).unwrap();
        examine(dir.path(), id.to_string()).map_or_else(|found| found, |one| one.found())
    }

    #[test]
    fn what_never_came_up_is_nobodys_to_take_over() {
        let memory = || Beginning::Memory("before".parse().unwrap());
        for beginning in [Beginning::Fresh, memory()] {
            let found = found(beginning, false);
            assert!(matches!(found, Found::Dead { .. }), "{found:?}");
        }
        for beginning in [Beginning::Fresh, memory()] {
            let found = found(beginning, true);
            assert!(matches!(found, Found::Survivor { .. }), "{found:?}");
        }
    }
}
