//! Releases what dead owners left behind.

use std::fs;
use std::path::Path;

use serde::Serialize;

use super::dirs::Dirs;
use super::record::{RecordError, io_error, lock_run, lock_runs};
use super::share;
use crate::error::{Explain, Report};
use crate::guest::archive::HostDir;
use crate::host::lease::{Journal, Lease};
use crate::spec::{Spec, WorkspaceMode};

/// What was found in one run's directory.
#[derive(Debug, Clone, Serialize)]
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
    match lock_run(dir) {
        Ok(None) => Found::Alive { id },
        Ok(Some(_lock)) => match Journal::open(dir.join("leases.json")) {
            Ok(journal) => Found::Dead {
                id,
                leases: journal.leases().to_vec(),
                errors: Vec::new(),
            },
            Err(error) => dead(id, Vec::new(), &[&error]),
        },
        Err(error) => dead(id, Vec::new(), &[&error]),
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

/// Releases one run if its owner is dead. The caller holds the lock on all runs.
pub(super) fn recover_one(dir: &Path) -> Found {
    let id = name(dir);
    // Held until the directory is gone.
    let _lock = match lock_run(dir) {
        Ok(Some(lock)) => lock,
        Ok(None) => return Found::Alive { id },
        Err(error) => return dead(id, Vec::new(), &[&error]),
    };
    let mut journal = match Journal::open(dir.join("leases.json")) {
        Ok(journal) => journal,
        Err(error) => return dead(id, Vec::new(), &[&error]),
    };
    let leases = journal.leases().to_vec();
    let errors = journal.release_all();
    if !errors.is_empty() {
        let errors: Vec<&dyn Explain> = errors.iter().map(|error| error as &dyn Explain).collect();
        return dead(id, leases, &errors);
    }
    settle_share(dir);
    match fs::remove_dir_all(dir) {
        Ok(()) => dead(id, leases, &[]),
        Err(source) => {
            let error = io_error("remove", dir)(source);
            dead(id, leases, &[&error])
        }
    }
}
