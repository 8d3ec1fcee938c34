//! What a detached machine is doing: a state that is only left for one that may
//! follow, each time written down with time and reason.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::error::Explain;
use crate::host::lease::write_durably;
use crate::host::process;
use crate::snapshot::SnapshotName;
use crate::spec::VmId;

/// Transitions kept; older ones are forgotten.
const HISTORY: usize = 100;

/// What a detached machine is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Written down, never started.
    Created,
    /// Its supervisor brings it up.
    Starting,
    /// Its guest agent answers.
    Running,
    /// Its processors stand still: asked for, or for want of disk space.
    Paused,
    /// It is being powered off.
    Stopping,
    /// It ended as it was meant to.
    Stopped,
    /// It ended otherwise; the reason says how.
    Failed,
    /// Its supervisor died, and what it left is not cleared away yet.
    Lost,
}

impl State {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Created,
        Self::Starting,
        Self::Running,
        Self::Paused,
        Self::Stopping,
        Self::Stopped,
        Self::Failed,
        Self::Lost,
    ];

    /// The word for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
            Self::Lost => "lost",
        }
    }

    /// Whether a supervisor must be there.
    pub const fn is_live(self) -> bool {
        matches!(
            self,
            Self::Starting | Self::Running | Self::Paused | Self::Stopping
        )
    }

    /// Whether it can be started.
    pub const fn may_start(self) -> bool {
        matches!(self, Self::Created | Self::Stopped | Self::Failed)
    }

    /// Whether `next` may follow.
    pub const fn may_become(self, next: Self) -> bool {
        use State as S;
        match self {
            S::Created | S::Stopped => matches!(next, S::Starting),
            S::Failed => matches!(next, S::Starting | S::Stopped),
            S::Starting => matches!(
                next,
                S::Running | S::Stopping | S::Stopped | S::Failed | S::Lost
            ),
            S::Running => matches!(
                next,
                S::Paused | S::Stopping | S::Stopped | S::Failed | S::Lost
            ),
            S::Paused => matches!(
                next,
                S::Running | S::Stopping | S::Stopped | S::Failed | S::Lost
            ),
            S::Stopping => matches!(next, S::Stopped | S::Failed | S::Lost),
            // Adopted, cleared away, or gone with the host.
            S::Lost => matches!(next, S::Running | S::Failed | S::Stopped),
        }
    }
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Honours width, for tables.
        f.pad(self.as_str())
    }
}

/// One change of state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Transition {
    /// When, in milliseconds since 1970-01-01 UTC.
    pub at_ms: u64,
    /// What it became.
    pub to: State,
    /// Why.
    pub reason: String,
}

/// A process that is responsible for a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Owner {
    /// Its process id.
    pub pid: i32,
    /// Its start time, in clock ticks since boot.
    pub start_time: u64,
    /// The boot of the host it ran in.
    pub boot_id: String,
}

impl Owner {
    /// This very process.
    pub fn current() -> Self {
        let pid = nix::unistd::getpid().as_raw();
        Self {
            pid,
            start_time: process::start_time(pid).unwrap_or_default(),
            boot_id: process::boot_id(),
        }
    }

    /// Whether the host was started again since.
    pub fn is_of_earlier_boot(&self) -> bool {
        self.boot_id != process::boot_id()
    }
}

/// How the main command of a machine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Ended {
    /// What `bulkhead wait` exits with: the command's code, 128 + signal, 124
    /// after a time limit, 125 when the machine failed.
    pub exit_code: i32,
    /// When, in milliseconds since 1970-01-01 UTC.
    pub at_ms: u64,
    /// What its network came to, such as `12 hosts, 3 refused`; absent without
    /// one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
}

/// The image a machine was made from. Its disk fits no other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct ImageUse {
    /// The name it had.
    pub name: String,
    /// Its id.
    pub id: String,
}

/// What is known of a detached machine, as it is on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Status {
    /// Version of this file.
    pub schema: u32,
    /// Its state.
    pub state: State,
    /// Why it is in that state.
    pub reason: String,
    /// Since when, in milliseconds since 1970-01-01 UTC.
    pub since_ms: u64,
    /// When it was created, likewise.
    pub created_ms: u64,
    /// When it was last started, likewise.
    pub started_ms: Option<u64>,
    /// When its time is up, likewise.
    pub deadline_ms: Option<u64>,
    /// Its image.
    pub image: ImageUse,
    /// Whether it came up with the disk it has: the workspace was sent then.
    pub provisioned: bool,
    /// The snapshot it was saved as, or restored from, last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<SnapshotName>,
    /// The snapshot whose memory its next start goes on from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restore: Option<SnapshotName>,
    /// Who is responsible for it, while it is live.
    pub supervisor: Option<Owner>,
    /// How its main command ended last.
    pub ended: Option<Ended>,
    /// Its states so far, oldest first.
    pub history: Vec<Transition>,
}

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

/// The state of a machine could not be kept.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The one state does not follow the other.
    #[error("{id} is {from}, it cannot be {to} next")]
    Transition {
        /// The machine.
        id: VmId,
        /// Its state.
        from: State,
        /// What was asked for.
        to: State,
    },
    /// The file could not be read.
    #[error("cannot read the state of a machine from {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The file could not be written.
    #[error("cannot write the state of a machine to {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl Explain for StateError {
    fn code(&self) -> &'static str {
        match self {
            Self::Transition { .. } => "state-conflict",
            Self::Read { .. } => "state-unreadable",
            Self::Write { source, .. } if crate::host::is_full(source) => "no-space",
            Self::Write { .. } => "state-unwritable",
        }
    }

    fn remedy(&self) -> String {
        match self {
            Self::Transition { id, .. } => format!("See `bulkhead inspect {id}`."),
            Self::Read { path, .. } => format!(
                "Look at {}; `bulkhead rm --force` removes the machine.",
                path.display()
            ),
            Self::Write { path, .. } => format!(
                "Free space on, or get write access to, the file system of {}.",
                path.display()
            ),
        }
    }
}

/// One line of bounded length: a guest may have chosen the words.
fn brief(reason: &str) -> String {
    const LONGEST: usize = 300;
    let line = reason.lines().collect::<Vec<_>>().join(" / ");
    match line.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

/// Milliseconds since 1970-01-01 UTC.
pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since
        .ok()
        .and_then(|since| u64::try_from(since.as_millis()).ok())
        .unwrap_or_default()
}

impl Status {
    /// Whether it came up with what it has: nothing of it is still as it was
    /// saved, and like its siblings.
    pub(crate) fn came_up(&self) -> bool {
        self.provisioned && self.restore.is_none()
    }

    /// A machine that was just created.
    pub(super) fn new(image: ImageUse) -> Self {
        let mut status = Self {
            schema: 1,
            state: State::Created,
            reason: String::new(),
            since_ms: 0,
            created_ms: now_ms(),
            started_ms: None,
            deadline_ms: None,
            image,
            provisioned: false,
            snapshot: None,
            restore: None,
            supervisor: None,
            ended: None,
            history: Vec::new(),
        };
        status.note(State::Created, "created");
        status
    }

    fn note(&mut self, to: State, reason: &str) {
        let at_ms = now_ms();
        let reason = brief(reason);
        self.state = to;
        self.reason = reason.clone();
        self.since_ms = at_ms;
        self.history.push(Transition { at_ms, to, reason });
        let old = self.history.len().saturating_sub(HISTORY);
        self.history.drain(..old);
        if !to.is_live() && to != State::Lost {
            self.supervisor = None;
            self.deadline_ms = None;
        }
    }

    /// Goes on to another state.
    ///
    /// # Errors
    /// It may not follow.
    fn advance(&mut self, id: &VmId, to: State, reason: &str) -> Result<(), StateError> {
        if !self.state.may_become(to) {
            return Err(StateError::Transition {
                id: id.clone(),
                from: self.state,
                to,
            });
        }
        self.note(to, reason);
        Ok(())
    }
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
    pub(super) fn create(
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
        match self.write(&next) {
            Err(StateError::Write { source, path }) if crate::host::is_full(&source) => {
                tracing::warn!("cannot write {}: {source}", path.display());
            }
            written => written?,
        }
        self.status = next;
        Ok(())
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
    fn every_state_can_be_left_and_every_end_can_be_started_again() {
        for state in State::ALL {
            assert!(
                State::ALL.iter().any(|next| state.may_become(*next)),
                "{state}"
            );
            assert_eq!(
                state.may_start(),
                state.may_become(State::Starting),
                "{state}"
            );
            // A dead supervisor can be said of every state that needs one.
            assert_eq!(state.is_live(), state.may_become(State::Lost), "{state}");
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
