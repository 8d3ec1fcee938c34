//! A run on disk: what was asked, what was planned, what was leased.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use super::dirs::{Dirs, make_private};
use super::recovery::{self, Found};
use crate::error::Explain;
use crate::host::lease::{Journal, Lease, LeaseError, write_durably};
use crate::plan::Plan;
use crate::spec::{Spec, VmId};

/// The record of a run could not be kept.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// A machine of that name is alive.
    #[error("a machine named {id} is running already")]
    InUse {
        /// The name.
        id: VmId,
    },
    /// A dead machine of that name holds something that cannot be released.
    #[error("a dead machine named {id} cannot be cleared away: {why}")]
    Stale {
        /// The name.
        id: VmId,
        /// What stays, and why.
        why: String,
    },
    /// The path of the control socket is longer than a socket's may be.
    #[error("{path} is too long for a socket: {} bytes, 107 are possible", path.as_os_str().len())]
    SocketPath {
        /// The path.
        path: PathBuf,
    },
    /// The file system refused.
    #[error("cannot {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A lease could not be journalled.
    #[error(transparent)]
    Lease(#[from] LeaseError),
}

impl Explain for RecordError {
    fn code(&self) -> &'static str {
        match self {
            Self::InUse { .. } => "name-in-use",
            Self::Stale { .. } => "lease-not-released",
            Self::SocketPath { .. } => "runtime-dir-unusable",
            Self::Io { source, .. } if crate::host::is_full(source) => "no-space",
            Self::Io { .. } => "state-dir-unusable",
            Self::Lease(error) => error.code(),
        }
    }

    fn remedy(&self) -> String {
        match self {
            Self::InUse { .. } => "Choose another --name, or leave it out.".into(),
            Self::Stale { .. } => {
                "See `bulkhead gc`; until then choose another --name, or leave it out.".into()
            }
            Self::SocketPath { .. } => "Name a shorter --runtime-dir or --name.".into(),
            Self::Io { source, path, .. } if crate::host::is_full(source) => {
                format!(
                    "Free space on the file system of {}, or name another with --state-dir.",
                    path.display()
                )
            }
            Self::Io { .. } => {
                "Run as root, or name directories of your own with --state-dir and --runtime-dir."
                    .into()
            }
            Self::Lease(error) => error.remedy(),
        }
    }
}

pub(super) fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RecordError {
    let path = path.to_owned();
    move |source| RecordError::Io {
        action,
        path,
        source,
    }
}

/// The directory of a run, locked by its owner for as long as this lives.
#[derive(Debug)]
pub struct Record {
    dir: PathBuf,
    journal: Journal,
    /// Not inherited by QEMU: free as soon as the owner is gone.
    _lock: Flock<File>,
}

impl Record {
    /// Makes `runs/<id>/`, after clearing away what a dead owner of that name left.
    ///
    /// # Errors
    /// The name is taken by a live machine, or the disk refuses.
    pub fn create(dirs: &Dirs, spec: &Spec, plan: &Plan) -> Result<Self, RecordError> {
        let socket = dirs.control_socket(&spec.id);
        // sun_path of sockaddr_un (unix(7)), with its zero byte.
        if socket.as_os_str().len() > 107 {
            return Err(RecordError::SocketPath { path: socket });
        }
        let runs = dirs.runs();
        make_private(&runs).map_err(io_error("make", &runs))?;
        make_private(&dirs.runtime).map_err(io_error("make", &dirs.runtime))?;
        // Nobody recovers while a directory has no lock yet.
        let _runs_lock = lock_runs(&runs)?;
        let dir = runs.join(spec.id.as_str());
        if dir.exists() {
            let id = spec.id.clone();
            match recovery::recover_one(&dir) {
                Found::Alive { .. } => return Err(RecordError::InUse { id }),
                Found::Dead { errors, .. } => {
                    if let Some(error) = errors.first() {
                        let why = format!("{}: {}", error.what, error.cause);
                        return Err(RecordError::Stale { id, why });
                    }
                }
            }
        }
        // Two state directories may share one runtime directory.
        if std::os::unix::net::UnixStream::connect(&socket).is_ok() {
            return Err(RecordError::InUse {
                id: spec.id.clone(),
            });
        }
        make_private(&dir).map_err(io_error("make", &dir))?;
        let lock = lock_run(&dir)?.ok_or_else(|| RecordError::InUse {
            id: spec.id.clone(),
        })?;
        let made = || {
            for (name, text) in [
                ("spec.json", serde_json::to_vec_pretty(spec)),
                ("plan.json", serde_json::to_vec_pretty(plan)),
            ] {
                let path = dir.join(name);
                text.map_err(io::Error::from)
                    .and_then(|text| fs::write(&path, text))
                    .map_err(io_error("write", &path))?;
            }
            Ok(Journal::create(dir.join("leases.json"))?)
        };
        match made() {
            Ok(journal) => Ok(Self {
                dir,
                journal,
                _lock: lock,
            }),
            Err(error) => {
                let _ = fs::remove_dir_all(&dir);
                Err(error)
            }
        }
    }

    /// The run's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes a lease down before the resource is made.
    ///
    /// # Errors
    /// The journal cannot be written.
    pub fn lease(&mut self, lease: Lease) -> Result<(), LeaseError> {
        self.journal.add(lease)
    }

    /// Replaces the plan on disk by the one with its leases filled in.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn update_plan(&self, plan: &Plan) -> Result<(), RecordError> {
        let path = self.dir.join("plan.json");
        let text = serde_json::to_vec_pretty(plan).map_err(io::Error::from);
        text.and_then(|text| write_durably(&path, &text))
            .map_err(io_error("write", &path))
    }

    /// Releases every lease and removes the directory. What could not be
    /// released stays written down for `bulkhead gc`.
    pub fn close(mut self) -> Vec<RecordError> {
        let mut errors: Vec<_> = self
            .journal
            .release_all()
            .into_iter()
            .map(Into::into)
            .collect();
        if errors.is_empty()
            && let Err(error) = self.remove()
        {
            errors.push(error);
        }
        errors
    }
}

/// How often a directory is tried that a thread of ours may still write to.
const TRIES: u32 = 25;

impl Record {
    fn remove(&self) -> Result<(), RecordError> {
        // Without it somebody else would see a directory whose lock is gone
        // already, and take it for a dead run's.
        let _runs = self.dir.parent().map(lock_runs).transpose()?;
        let mut tries = 0;
        loop {
            match fs::remove_dir_all(&self.dir) {
                Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty && tries < TRIES => {
                    tries += 1;
                    std::thread::sleep(std::time::Duration::from_millis(20));
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                done => return done.map_err(io_error("remove", &self.dir)),
            }
        }
    }
}

/// Keeps others from making or recovering runs for the moment.
pub(super) fn lock_runs(runs: &Path) -> Result<Flock<File>, RecordError> {
    let path = runs.join(".lock");
    let file = File::create(&path).map_err(io_error("open", &path))?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, errno)| io_error("lock", &path)(errno.into()))
}

/// Takes a run's lock; `None` when its owner is alive.
pub(super) fn lock_run(dir: &Path) -> Result<Option<Flock<File>>, RecordError> {
    let path = dir.join("lock");
    let file = File::create(&path).map_err(io_error("open", &path))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => Err(io_error("lock", &path)(errno.into())),
    }
}
