//! What a detached machine is doing: a state that is only left for one that may
//! follow, each time written down with time and reason.

mod file;

use std::io;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

pub(crate) use self::file::Beginning;
pub use self::file::StateFile;
use crate::error::Explain;
use crate::host::process;
use crate::snapshot::SnapshotName;
use crate::spec::VmId;

/// Changes of state that are kept of a machine; older ones are forgotten.
pub const HISTORY: usize = 100;

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
    /// Its last 100 changes of state, oldest first.
    pub history: Vec<Transition>,
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

    /// Whether it was paused when its supervisor was lost, if that was. While it
    /// is saved it counts as one that runs.
    pub(crate) fn was_paused(&self) -> bool {
        let mut known = self.history.iter().rev().map(|one| one.to);
        known.find(|state| *state != State::Lost) == Some(State::Paused)
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

#[cfg(test)]
mod tests {
    use super::*;

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
    fn whether_a_lost_machine_was_paused_is_known() {
        let id: VmId = "vm1".parse().unwrap();
        let mut status = Status::new(ImageUse {
            name: "base".into(),
            id: "sha256-1".into(),
        });
        for (state, paused) in [
            (State::Starting, false),
            (State::Running, false),
            (State::Lost, false),
            (State::Running, false),
            (State::Paused, true),
            (State::Lost, true),
            (State::Running, false),
        ] {
            status.advance(&id, state, "why").unwrap();
            assert_eq!(status.was_paused(), paused, "{state:?}");
        }
    }

    /// As the reference says.
    #[test]
    fn the_last_hundred_changes_are_kept() {
        let id: VmId = "vm1".parse().unwrap();
        let mut status = Status::new(ImageUse {
            name: "base".into(),
            id: "sha256-1".into(),
        });
        for at in 0..75 {
            let reason = format!("start {at}");
            status.advance(&id, State::Starting, &reason).unwrap();
            status.advance(&id, State::Stopped, "stopped").unwrap();
        }
        assert_eq!(status.history.len(), 100);
        assert_eq!(status.history[0].reason, "start 25");
    }
}
