//! What can go wrong with machines that outlive their command.

use std::io;
use std::path::PathBuf;

use super::log::LogError;
use crate::error::{Explain, Report};
use crate::guest::GuestError;
use crate::run::{ControlError, DiskState, MachineError, RecordError, RunError, State, StateError};
use crate::snapshot::SnapshotError;
use crate::spec::VmId;

/// Something with a detached machine failed.
#[derive(Debug, thiserror::Error)]
pub enum SuperviseError {
    /// It is in a state in which this cannot be done.
    #[error("{id} is {state}{}: it cannot be {what}", because(.reason))]
    WrongState {
        /// The machine.
        id: VmId,
        /// Its state.
        state: State,
        /// Why it is in it.
        reason: String,
        /// What was asked for.
        what: &'static str,
    },
    /// Its supervisor could not be started.
    #[error("cannot start a supervisor for {id}")]
    Launch {
        /// The machine.
        id: VmId,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Its supervisor ended without a word.
    #[error("the supervisor of {id} ended ({how}) before the machine was up{}", said(.words))]
    Silent {
        /// The machine.
        id: VmId,
        /// With which exit status, or by which signal.
        how: String,
        /// What it left in its log.
        words: String,
    },
    /// It was told why not by its supervisor.
    #[error("{}{}{}", .0.what, if .0.cause.is_empty() { "" } else { ": " }, .0.cause)]
    Told(Report),
    /// No command of that number.
    #[error("{id} has no command {exec}")]
    NoExec {
        /// The machine.
        id: VmId,
        /// The command.
        exec: super::ExecId,
    },
    /// The command is over.
    #[error("command {exec} of {id} has ended")]
    ExecEnded {
        /// The machine.
        id: VmId,
        /// The command.
        exec: super::ExecId,
    },
    /// A lease could not be released.
    #[error("{id} left something behind on the host: {why}")]
    Leaked {
        /// The machine.
        id: VmId,
        /// What, and why.
        why: String,
    },
    /// Its control socket could not be opened.
    #[error("cannot open the control socket {path}")]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It runs on without a supervisor, and its sockets are in another place.
    #[error("{id} runs, and its sockets are in {found}, not in {looked}")]
    Elsewhere {
        /// The machine.
        id: VmId,
        /// The directory they are in.
        found: PathBuf,
        /// Where they were looked for.
        looked: PathBuf,
    },
    /// It runs on without a supervisor, and cannot answer a new one.
    #[error("{id} cannot be taken over yet: {disk}")]
    StandsStill {
        /// The machine.
        id: VmId,
        /// What keeps it.
        disk: DiskState,
    },
    /// A file or directory cannot be copied there.
    #[error("cannot copy {from} to {to}: {why}")]
    Copy {
        /// What.
        from: String,
        /// Where to.
        to: String,
        /// Why not.
        why: String,
    },
    /// A part of a change failed, and what was changed before was taken back.
    #[error("cannot change {what} of {id} ({rest})")]
    NotChanged {
        /// The machine.
        id: VmId,
        /// Which part of it.
        what: &'static str,
        /// What became of the rest of the change.
        rest: String,
        /// Whether some of it could not be taken back.
        is_torn: bool,
        /// Why it failed.
        #[source]
        source: Box<SuperviseError>,
    },
    /// The run or its machine failed.
    #[error(transparent)]
    Run(#[from] RunError),
    /// Its state could not be kept.
    #[error(transparent)]
    State(#[from] StateError),
    /// Its supervisor could not be reached.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// A log could not be read.
    #[error(transparent)]
    Log(#[from] LogError),
}

fn because(reason: &str) -> String {
    match reason {
        "" => String::new(),
        reason => format!(" ({reason})"),
    }
}

fn said(words: &str) -> String {
    match words {
        "" => " and said nothing".to_owned(),
        words => format!("; it said:\n{words}"),
    }
}

impl From<RecordError> for SuperviseError {
    fn from(error: RecordError) -> Self {
        Self::Run(error.into())
    }
}

impl From<MachineError> for SuperviseError {
    fn from(error: MachineError) -> Self {
        Self::Run(error.into())
    }
}

impl From<SnapshotError> for SuperviseError {
    fn from(error: SnapshotError) -> Self {
        Self::Run(error.into())
    }
}

impl From<GuestError> for SuperviseError {
    fn from(error: GuestError) -> Self {
        Self::Run(error.into())
    }
}

impl Explain for SuperviseError {
    fn code(&self) -> &'static str {
        match self {
            Self::WrongState { .. } => "state-conflict",
            Self::Launch { .. } | Self::Silent { .. } => "supervisor-failed",
            // The words are another process's; its code is in the report itself.
            Self::Told(_) => "supervisor-refused",
            Self::NoExec { .. } => "exec-not-found",
            Self::ExecEnded { .. } => "exec-ended",
            Self::Leaked { .. } => "lease-not-released",
            Self::Socket { .. } => "runtime-dir-unusable",
            Self::Elsewhere { .. } => "runtime-dir-differs",
            Self::StandsStill { .. } => "machine-stands-still",
            Self::NotChanged { source, .. } => source.code(),
            Self::Run(error) => error.code(),
            Self::State(error) => error.code(),
            Self::Control(error) => error.code(),
            Self::Log(error) => error.code(),
            Self::Copy { .. } => "copy-impossible",
        }
    }

    fn system_call(&self) -> Option<&str> {
        match self {
            Self::NotChanged { source, .. } => source.system_call(),
            Self::Run(error) => error.system_call(),
            _ => None,
        }
    }

    fn remedy(&self) -> String {
        match self {
            Self::WrongState { id, state, .. } => match state {
                State::Lost => format!("Run `bulkhead gc`, then `bulkhead start {id}`."),
                State::Starting | State::Stopping => {
                    format!("Wait a moment: `bulkhead inspect {id}` shows when it is over.")
                }
                state if state.may_start() => format!("Start it: bulkhead start {id}"),
                State::Paused => format!("Resume it first: bulkhead resume {id}"),
                _ => format!("Stop it first: bulkhead stop {id}"),
            },
            Self::Launch { .. } => {
                "Check the limits on processes and open files (ulimit -a).".into()
            }
            Self::Silent { .. } => "Run `bulkhead gc`, then start it again.".into(),
            Self::Told(report) => report.remedy.clone(),
            Self::NoExec { id, .. } => format!("See `bulkhead inspect {id}` for its commands."),
            Self::ExecEnded { id, exec } => {
                format!("See what it wrote with `bulkhead logs {id} {exec}`.")
            }
            Self::Leaked { .. } => "Run `bulkhead gc`.".into(),
            Self::Socket { .. } => "Name another directory with --runtime-dir.".into(),
            Self::StandsStill { id, .. } => {
                format!(
                    "Free space there and run `bulkhead gc`, or give it up: bulkhead rm -f {id}"
                )
            }
            Self::Elsewhere { found, .. } => {
                format!("Say it again with --runtime-dir {}.", found.display())
            }
            Self::NotChanged {
                id, is_torn: true, ..
            } => format!("See what it is held to with `bulkhead inspect {id}`, and set it again."),
            Self::NotChanged { source, .. } => source.remedy(),
            Self::Run(error) => error.remedy(),
            Self::State(error) => error.remedy(),
            Self::Control(error) => error.remedy(),
            Self::Log(error) => error.remedy(),
            Self::Copy { .. } => "Check both paths; a directory ends with `/`.".into(),
        }
    }

    fn told(&self) -> Option<&Report> {
        match self {
            Self::Told(report) => Some(report),
            Self::Control(error) => error.told(),
            _ => None,
        }
    }
}
