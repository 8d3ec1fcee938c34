//! The state of a machine on disk.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{ImageUse, State, StateError, Status, brief};
use crate::host::lease::write_durably;
use crate::snapshot::SnapshotName;
use crate::spec::VmId;

/// What the first start of a machine begins with.
#[derive(Debug)]
pub(crate) enum Beginning {
    /// Nothing.
    Fresh,
    /// The memory and the disk of this snapshot.
    Memory(SnapshotName),
    /// The disk of this snapshot, which it has already.
    Disk(SnapshotName),
}

/// The state of one machine on disk. Whoever holds the machine's lock may
/// change it.
#[derive(Debug)]
pub struct StateFile {
    id: VmId,
    path: PathBuf,
    status: Status,
}

impl StateFile {
    /// Name of the file in the machine's directory.
    pub const NAME: &'static str = "state.json";

    /// Whether the directory of a run is that of a detached machine.
    pub fn is_in(dir: &Path) -> bool {
        dir.join(Self::NAME).exists()
    }

    /// Writes down a machine that was just created.
    pub(in crate::run) fn create(
        dir: &Path,
        id: &VmId,
        image: ImageUse,
        beginning: Beginning,
    ) -> Result<Self, StateError> {
        let status = Status::new(image);
        let status = match beginning {
            Beginning::Fresh => status,
            Beginning::Memory(name) => Status {
                restore: Some(name),
                ..status
            },
            Beginning::Disk(name) => Status {
                snapshot: Some(name),
                provisioned: true,
                ..status
            },
        };
        let file = Self {
            id: id.clone(),
            path: dir.join(Self::NAME),
            status,
        };
        file.write(&file.status)?;
        Ok(file)
    }

    /// Reads the state of the machine in `dir`.
    ///
    /// # Errors
    /// There is none, or it is not one.
    pub fn open(dir: &Path, id: &VmId) -> Result<Self, StateError> {
        let path = dir.join(Self::NAME);
        let read = || {
            let status: Status = serde_json::from_slice(&fs::read(&path)?)?;
            if status.schema != 1 {
                let why = format!("version {} of the file, 1 is known", status.schema);
                return Err(io::Error::new(io::ErrorKind::InvalidData, why));
            }
            Ok(status)
        };
        match read() {
            Ok(status) => Ok(Self {
                id: id.clone(),
                path,
                status,
            }),
            Err(source) => Err(StateError::Read { path, source }),
        }
    }

    /// What is known.
    pub fn status(&self) -> &Status {
        &self.status
    }

    /// Goes on to another state. On an error nothing has changed, neither on
    /// disk nor here.
    ///
    /// # Errors
    /// It may not follow, or the disk refuses.
    pub fn advance(&mut self, to: State, reason: &str) -> Result<(), StateError> {
        let mut next = self.status.clone();
        next.advance(&self.id, to, reason)?;
        self.replace(next)
    }

    /// Says that the supervisor of a live machine is gone. The caller holds the
    /// lock that it would hold.
    ///
    /// # Errors
    /// As [`StateFile::note`].
    pub(crate) fn lose(&mut self) -> Result<(), StateError> {
        if !self.status.state.is_live() {
            return Ok(());
        }
        let reason = match &self.status.supervisor {
            Some(owner) if owner.is_of_earlier_boot() => "the host was started again".to_owned(),
            Some(owner) => format!("its supervisor (process {}) died", owner.pid),
            None => "its supervisor died".to_owned(),
        };
        self.note(State::Lost, &reason)
    }

    /// As [`StateFile::advance`] for what has happened already, whether or not
    /// it can be written down: on a full disk it is known here only, until the
    /// next change is written.
    ///
    /// # Errors
    /// It may not follow, or the disk refuses for another reason.
    pub(crate) fn note(&mut self, to: State, reason: &str) -> Result<(), StateError> {
        let mut next = self.status.clone();
        next.advance(&self.id, to, reason)?;
        self.know(next)
    }

    /// Says better why it is in its state.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn explain(&mut self, reason: &str) -> Result<(), StateError> {
        self.update(|status| {
            status.reason = brief(reason);
            if let Some(last) = status.history.last_mut() {
                last.reason = brief(reason);
            }
        })
    }

    /// Goes on to another state, and changes what is known besides with it.
    ///
    /// # Errors
    /// As [`StateFile::advance`].
    pub fn advance_with(
        &mut self,
        to: State,
        reason: &str,
        change: impl FnOnce(&mut Status),
    ) -> Result<(), StateError> {
        let mut next = self.status.clone();
        next.advance(&self.id, to, reason)?;
        change(&mut next);
        self.replace(next)
    }

    /// Changes what is known besides the state.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn update(&mut self, change: impl FnOnce(&mut Status)) -> Result<(), StateError> {
        let mut next = self.status.clone();
        change(&mut next);
        next.state = self.status.state;
        self.replace(next)
    }

    /// As [`StateFile::update`] for what holds already, as [`StateFile::note`]
    /// does it.
    ///
    /// # Errors
    /// The disk refuses, and not because it is full.
    pub(crate) fn keep(&mut self, change: impl FnOnce(&mut Status)) -> Result<(), StateError> {
        let mut next = self.status.clone();
        change(&mut next);
        next.state = self.status.state;
        self.know(next)
    }

    fn know(&mut self, next: Status) -> Result<(), StateError> {
        match self.write(&next) {
            Err(StateError::Write { source, path }) if crate::host::is_full(&source) => {
                tracing::warn!("cannot write {}: {source}", path.display());
            }
            written => written?,
        }
        self.status = next;
        Ok(())
    }

    fn replace(&mut self, next: Status) -> Result<(), StateError> {
        self.write(&next)?;
        self.status = next;
        Ok(())
    }

    fn write(&self, status: &Status) -> Result<(), StateError> {
        serde_json::to_vec_pretty(status)
            .map_err(io::Error::from)
            .and_then(|text| write_durably(&self.path, &text))
            .map_err(|source| StateError::Write {
                path: self.path.clone(),
                source,
            })
    }
}

#[cfg(test)]
mod tests {
    use super::super::{HISTORY, Owner};
    use super::*;
    use proptest::prelude::*;

    fn image() -> ImageUse {
        ImageUse {
            name: "base".into(),
            id: "sha256-1".into(),
        }
    }

    fn any_state() -> impl Strategy<Value = State> {
        (0..State::ALL.len()).prop_map(|at| State::ALL[at])
    }

    proptest! {
        /// Whatever is asked for in whatever order: only what may follow does,
        /// what is refused changes nothing, and the file says what memory says.
        #[test]
        fn the_file_tells_the_truth(asked in proptest::collection::vec(any_state(), 0..40)) {
            let dir = tempfile::tempdir().unwrap();
            let id: VmId = "vm1".parse().unwrap();
            let mut file = StateFile::create(dir.path(), &id, image(), Beginning::Fresh).unwrap();
            for (at, to) in asked.into_iter().enumerate() {
                let before = file.status().clone();
                let reason = format!("step {at}");
                match file.advance(to, &reason) {
                    Ok(()) => {
                        prop_assert!(before.state.may_become(to));
                        prop_assert_eq!(file.status().state, to);
                        prop_assert_eq!(&file.status().reason, &reason);
                    }
                    Err(_) => {
                        prop_assert!(!before.state.may_become(to));
                        prop_assert_eq!(file.status(), &before);
                    }
                }
                let read = StateFile::open(dir.path(), &id).unwrap();
                prop_assert_eq!(read.status(), file.status());
                let last = file.status().history.last().unwrap();
                prop_assert_eq!(last.to, file.status().state);
                prop_assert!(file.status().history.len() <= HISTORY);
            }
        }
    }

    #[test]
    fn an_end_forgets_the_supervisor_and_a_refused_write_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let id: VmId = "vm1".parse().unwrap();
        let mut file = StateFile::create(dir.path(), &id, image(), Beginning::Fresh).unwrap();
        file.advance(State::Starting, "asked to").unwrap();
        file.update(|status| status.supervisor = Some(Owner::current()))
            .unwrap();
        let gone = dir.path().join("gone");
        fs::rename(dir.path().join(StateFile::NAME), &gone).unwrap();
        let path = std::mem::replace(&mut file.path, dir.path().join("no/such/dir"));
        assert!(file.advance(State::Failed, "no disk").is_err());
        assert_eq!(file.status().state, State::Starting);
        file.path = path;
        file.advance(State::Failed, "QEMU ended").unwrap();
        assert_eq!(file.status().supervisor, None);
    }
}
