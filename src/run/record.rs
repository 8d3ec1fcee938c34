//! A run on disk: what was asked, what was planned, what was leased.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use super::control::is_served;
use super::dirs::{Dirs, make_private};
use super::recovery::{self, Found};
use super::state::{Beginning, ImageUse, StateError, StateFile};
use crate::error::Explain;
use crate::host::lease::{Journal, Lease, LeaseError, write_durably};
use crate::host::{fault, process};
use crate::image::Image;
use crate::plan::Plan;
use crate::spec::{Spec, Survivors, VmId};

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
    /// Somebody else starts it, stops it or clears it away.
    #[error("somebody else is at work on {id}")]
    Busy {
        /// The name.
        id: VmId,
    },
    /// No machine of that name.
    #[error("there is no machine named {id}")]
    NotFound {
        /// The name.
        id: VmId,
    },
    /// A machine of that name exists and can be started.
    #[error("a machine named {id} exists already")]
    Exists {
        /// The name.
        id: VmId,
    },
    /// Its state could not be read or written.
    #[error(transparent)]
    State(#[from] StateError),
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
            Self::Busy { .. } => "machine-busy",
            Self::NotFound { .. } => "machine-not-found",
            Self::Exists { .. } => "name-in-use",
            Self::State(error) => error.code(),
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
            Self::Busy { id } => format!("Wait a moment; `bulkhead inspect {id}` shows its state."),
            Self::NotFound { .. } => "See `bulkhead ls` for the machines there are.".into(),
            Self::Exists { id } => {
                format!("Choose another --name, or remove it with `bulkhead rm {id}`.")
            }
            Self::State(error) => error.remedy(),
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

/// Files of a run's directory.
pub(super) const SPEC: &str = "spec.json";
pub(super) const PLAN: &str = "plan.json";
pub(super) const LEASES: &str = "leases.json";
/// What a detached machine holds also while it does not run.
pub(super) const KEPT: &str = "kept.json";

/// The directory of a run or of a detached machine, locked by its owner for as
/// long as this lives.
#[derive(Debug)]
pub struct Record {
    dir: PathBuf,
    journal: Journal,
    /// The directory outlives this.
    kept: bool,
    /// Not inherited by QEMU: free as soon as the owner is gone.
    _lock: Flock<File>,
}

impl Record {
    /// Makes `runs/<id>/`, after clearing away what a dead owner of that name left.
    ///
    /// # Errors
    /// The name is taken by a live machine, or the disk refuses.
    pub fn create(dirs: &Dirs, spec: &Spec, plan: &Plan) -> Result<Self, RecordError> {
        let (dir, lock) = make_dir(dirs, spec)?;
        let made = || {
            write_json(&dir.join(SPEC), spec)?;
            write_json(&dir.join(PLAN), plan)?;
            Ok(Journal::create(dir.join(LEASES))?)
        };
        match made() {
            Ok(journal) => Ok(Self {
                dir,
                journal,
                kept: false,
                _lock: lock,
            }),
            Err(error) => {
                let _ = fs::remove_dir_all(&dir);
                Err(error)
            }
        }
    }

    /// Makes `runs/<id>/` of a detached machine that is not started yet. The
    /// caller holds the image's lock.
    ///
    /// # Errors
    /// The name is taken, or the disk refuses; nothing is left then.
    pub fn keep(dirs: &Dirs, spec: &Spec, image: &Image, name: &str) -> Result<(), RecordError> {
        Self::keep_with(dirs, spec, image, name, |_| Ok(Beginning::Fresh))
    }

    /// As [`Record::keep`]; `prepare` puts something into the directory, and
    /// says what of it the first start begins with.
    ///
    /// # Errors
    /// As [`Record::keep`], or what `prepare` gives.
    pub(crate) fn keep_with<E: From<RecordError>>(
        dirs: &Dirs,
        spec: &Spec,
        image: &Image,
        name: &str,
        prepare: impl FnOnce(&Path) -> Result<Beginning, E>,
    ) -> Result<(), E> {
        let (dir, _lock) = make_dir(dirs, spec)?;
        let mut kept = None;
        let make = || -> Result<(), E> {
            let path = dir.join(SPEC);
            serde_json::to_vec_pretty(spec)
                .map_err(io::Error::from)
                .and_then(|text| write_durably(&path, &text))
                .map_err(io_error("write", &path))?;
            let journal = Journal::create_lasting(dir.join(KEPT)).map_err(RecordError::from)?;
            let journal = kept.insert(journal);
            // Two state directories may share their images.
            let path = image.use_file(&format!("{}-{}", spec.id, VmId::random()));
            let lease = Lease::File { path: path.clone() };
            journal.add(lease).map_err(RecordError::from)?;
            let make = || {
                fault::at("make used-by")?;
                make_private(path.parent().unwrap_or(&path))?;
                // In place: it is written down, and a half-made one counts as well.
                fs::write(&path, dir.to_string_lossy().as_bytes())?;
                File::open(&path)?.sync_all()
            };
            make().map_err(io_error("make", &path))?;
            // The machine exists with this file, and not before.
            let image = ImageUse {
                name: name.to_owned(),
                id: image.id.clone(),
            };
            let beginning = prepare(&dir)?;
            StateFile::create(&dir, &spec.id, image, beginning).map_err(RecordError::from)?;
            Ok(())
        };
        make().inspect_err(|_| {
            let _ = kept.as_mut().map(Journal::release_all);
            let _ = fs::remove_dir_all(&dir);
        })
    }

    /// Takes a detached machine over, to start it or to clear it away.
    ///
    /// # Errors
    /// No such machine, or somebody else has it.
    pub fn open(dirs: &Dirs, id: &VmId) -> Result<(Self, Spec, StateFile), RecordError> {
        let dir = dirs.run(id);
        if !StateFile::is_in(&dir) {
            return Err(RecordError::NotFound { id: id.clone() });
        }
        let lock = lock_soon(&dir)?.ok_or_else(|| RecordError::Busy { id: id.clone() })?;
        let state = StateFile::open(&dir, id)?;
        let spec = read_json(&dir.join(SPEC))?;
        let journal = Journal::open(dir.join(LEASES))?;
        let record = Self {
            dir,
            journal,
            kept: true,
            _lock: lock,
        };
        Ok((record, spec, state))
    }

    /// The spec of a machine or a run, whoever has it.
    ///
    /// # Errors
    /// There is none, or it cannot be read.
    pub fn spec(dirs: &Dirs, id: &VmId) -> Result<Spec, RecordError> {
        let path = dirs.run(id).join(SPEC);
        if !path.exists() {
            return Err(RecordError::NotFound { id: id.clone() });
        }
        read_json(&path)
    }

    /// What is leased for a machine or a run, whoever has it.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn leased(dirs: &Dirs, id: &VmId) -> Result<Vec<Lease>, RecordError> {
        let journal = Journal::open(dirs.run(id).join(LEASES))?;
        Ok(journal.leases().to_vec())
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

    /// Writes several leases down at once.
    ///
    /// # Errors
    /// The journal cannot be written.
    pub(super) fn lease_all(
        &mut self,
        leases: impl IntoIterator<Item = Lease>,
    ) -> Result<(), LeaseError> {
        self.journal.add_all(leases)
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

    /// What is leased at present.
    pub fn leases(&self) -> &[Lease] {
        self.journal.leases()
    }

    /// The plan of the machine that runs, or ran last.
    ///
    /// # Errors
    /// There is none, or it cannot be read.
    pub fn plan(&self) -> Result<Plan, RecordError> {
        read_json(&self.dir.join(PLAN))
    }

    /// Releases every lease, and removes the directory of a run; that of a
    /// detached machine stays. What could not be released stays written down
    /// for `bulkhead gc`.
    pub fn close(mut self) -> Vec<RecordError> {
        let mut errors = self.release();
        if errors.is_empty()
            && !self.kept
            && let Err(error) = self.remove()
        {
            errors.push(error);
        }
        errors
    }

    /// Releases every lease of the running machine.
    pub(crate) fn release(&mut self) -> Vec<RecordError> {
        let mut errors: Vec<_> = self
            .journal
            .release_all()
            .into_iter()
            .map(Into::into)
            .collect();
        // The directory of a run goes as a whole.
        if self.kept
            && let Err(error) = self.journal.save()
        {
            errors.push(error.into());
        }
        errors
    }

    /// Removes a detached machine for good: its leases, its disk, its record.
    pub fn destroy(mut self) -> Vec<RecordError> {
        let mut errors = self.release();
        if !errors.is_empty() {
            return errors;
        }
        // Without this file it is what a dead owner left: whatever ends us from
        // here on, recovery finishes the work. With it, it is a whole machine,
        // and has all that it keeps.
        if let Err(error) = remove_state(&self.dir) {
            return vec![error];
        }
        match Journal::open_lasting(self.dir.join(KEPT)) {
            Ok(mut kept) => errors.extend(kept.release_all().into_iter().map(Into::into)),
            Err(error) => errors.push(error.into()),
        }
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
        fault::at("remove run").map_err(io_error("remove", &self.dir))?;
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

/// Makes a detached machine what a dead owner left. The caller holds its lock.
pub(super) fn remove_state(dir: &Path) -> Result<(), RecordError> {
    let state = dir.join(StateFile::NAME);
    let removed = fault::at("remove state.json").and_then(|()| fs::remove_file(&state));
    removed.map_err(io_error("remove", &state))
}

/// Makes and locks `runs/<id>/` where the name is free.
fn make_dir(dirs: &Dirs, spec: &Spec) -> Result<(PathBuf, Flock<File>), RecordError> {
    let control = dirs.control_socket(&spec.id);
    // The longest of the sockets that it will need.
    let socket = match spec.detached && spec.lifetime.survivors == Survivors::Adopt {
        true => dirs.machine_sockets(&spec.id).join("console"),
        false => control.clone(),
    };
    // sun_path of sockaddr_un (unix(7)), with its zero byte.
    if socket.as_os_str().len() > 107 {
        return Err(RecordError::SocketPath { path: socket });
    }
    let runs = dirs.runs();
    make_private(&runs).map_err(io_error("make", &runs))?;
    make_private(&dirs.runtime).map_err(io_error("make", &dirs.runtime))?;
    // Nobody recovers while a directory has no lock yet.
    let _runs_lock = lock_runs(&runs)?;
    let dir = dirs.run(&spec.id);
    let id = || spec.id.clone();
    if dir.exists() {
        match recovery::recover_one(&dir) {
            Found::Alive { .. } => return Err(RecordError::InUse { id: id() }),
            Found::Kept { .. } | Found::Survivor { .. } => {
                return Err(RecordError::Exists { id: id() });
            }
            Found::Dead { errors, .. } => {
                if let Some(error) = errors.first() {
                    let why = format!("{}: {}", error.what, error.cause);
                    return Err(RecordError::Stale { id: id(), why });
                }
                // What was lost of a detached machine is cleared away, not the machine.
                if StateFile::is_in(&dir) {
                    return Err(RecordError::Exists { id: id() });
                }
            }
        }
    }
    // Two state directories may share one runtime directory.
    if is_served(&control) {
        return Err(RecordError::InUse { id: id() });
    }
    fault::at("make run").map_err(io_error("make", &dir))?;
    make_private(&dir).map_err(io_error("make", &dir))?;
    match lock_run(&dir) {
        Ok(Some(lock)) => Ok((dir, lock)),
        Ok(None) => Err(RecordError::InUse { id: id() }),
        Err(error) => {
            let _ = fs::remove_dir_all(&dir);
            Err(error)
        }
    }
}

fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<(), RecordError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    serde_json::to_vec_pretty(value)
        .map_err(io::Error::from)
        .and_then(|text| fault::at(&format!("make {name}")).map(|()| text))
        .and_then(|text| fs::write(path, text))
        .map_err(io_error("write", path))
}

/// Replaces what a machine was asked for, in its directory.
pub(crate) fn save_spec(dir: &Path, spec: &Spec) -> Result<(), RecordError> {
    let path = dir.join(SPEC);
    let text = serde_json::to_vec_pretty(spec).map_err(io::Error::from);
    text.and_then(|text| write_durably(&path, &text))
        .map_err(io_error("write", &path))
}

pub(super) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, RecordError> {
    fs::read(path)
        .and_then(|text| Ok(serde_json::from_slice(&text)?))
        .map_err(io_error("read", path))
}

/// Takes a machine's lock, or `None` when somebody keeps it: whoever only looks
/// at a machine has it for a moment.
pub(super) fn lock_soon(dir: &Path) -> Result<Option<Flock<File>>, RecordError> {
    for _ in 0..100 {
        if let Some(lock) = lock_run(dir)? {
            return Ok(Some(lock));
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    Ok(None)
}

/// Keeps others from making or recovering runs for the moment.
pub(super) fn lock_runs(runs: &Path) -> Result<Flock<File>, RecordError> {
    let path = runs.join(".lock");
    let file = fault::at("lock runs")
        .and_then(|()| File::create(&path))
        .map_err(io_error("open", &path))?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, errno)| io_error("lock", &path)(errno.into()))
}

/// Takes a run's lock; `None` when its owner is alive.
pub(super) fn lock_run(dir: &Path) -> Result<Option<Flock<File>>, RecordError> {
    let path = dir.join("lock");
    let file = fault::at("lock run")
        .and_then(|()| File::create(&path))
        .map_err(io_error("open", &path))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        // Removed and made again meanwhile, the name is another file's.
        Ok(lock) if !is_at(&lock, &path) => Ok(None),
        Ok(lock) => Ok(Some(lock)),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => Err(io_error("lock", &path)(errno.into())),
    }
}

/// As [`lock_run`], where an owner who was killed may take a moment to let go.
pub(super) fn lock_of_living(dir: &Path) -> Result<Option<Flock<File>>, RecordError> {
    if let Some(lock) = lock_run(dir)? {
        return Ok(Some(lock));
    }
    match process::is_lock_of_dying(&dir.join("lock")) {
        Ok(true) => lock_soon(dir),
        // It may have let go since.
        _ => lock_run(dir),
    }
}

/// Whether the open file is the one that has this name.
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (file.metadata(), fs::metadata(path)) {
        (Ok(held), Ok(there)) => (held.dev(), held.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}
