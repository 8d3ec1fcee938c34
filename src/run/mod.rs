//! From a plan to an outcome.

mod audit;
#[cfg(test)]
pub(crate) mod bare_host;
mod capture;
mod clone;
mod command;
mod connect;
mod console;
mod control;
pub(crate) mod detached;
mod dirs;
mod disk;
pub mod doctor;
mod ends;
mod error;
mod exception;
mod exchange;
mod export;
mod follow;
mod grow;
mod host;
mod jail;
mod machine;
mod network;
mod options;
mod outcome;
pub mod prove;
mod provision;
mod publish;
mod record;
mod recovery;
mod resources;
#[cfg(feature = "service")]
mod rest;
mod retune;
mod runner;
mod share;
mod snapshot;
mod stale;
mod state;
mod stats;
mod template;
mod transfer;
mod verify;
mod violation;
pub mod workspace;

use std::path::PathBuf;

pub use clone::{CloneError, Origin};
pub use command::{Commanded, command};
pub use console::ConsoleLog;
pub(crate) use control::{Asked, Desk, is_served, listen};
pub use control::{ControlError, Controller, QgaInfo};
pub use dirs::Dirs;
pub use disk::{DiskState, DiskWatch};
pub use error::MachineError;
pub use exception::{Excepted, ExceptedEvent, exceptions};
pub use export::import_template;
pub use grow::{Grown, lengthen};
pub use host::Host;
pub use machine::{Machine, Phases};
pub use network::Given;
#[cfg(feature = "cli")]
pub(crate) use network::record_files;
pub use options::{Memory, StartOptions};
pub use outcome::{Captured, Changes, FAILED, Outcome, Resources, TIMED_OUT, Times};
pub use provision::provision;
pub(crate) use record::save_spec;
pub use record::{Record, RecordError};
pub use recovery::{Found, recover};
pub(crate) use recovery::{abandon, look};
#[cfg(feature = "service")]
pub(crate) use rest::rests;
pub use runner::{Io, Progress, Signal, run};
pub(crate) use snapshot::{Saving, check, copy_disk, differences, is_keeping, save, save_disk};
pub use stale::{
    ListedTemplate, PrunedTemplate, inspect_template, list_templates, prune_templates,
};
pub(crate) use state::Beginning;
pub(crate) use state::now_ms;
pub use state::{
    Ended, HISTORY, ImageUse, Owner, State, StateError, StateFile, Status, Transition,
};
pub use stats::Stats;
pub use template::{Build, Built, build};
pub use transfer::{receive, send};
pub use verify::{Finding, Verdict, failures};
pub use violation::{Violation, violations};

use crate::error::Explain;
use crate::export::ExportError;
use crate::host::probe::ProbeError;
use crate::image::Error as ImageError;
use crate::plan::PlanError;
use crate::snapshot::SnapshotError;
use crate::spec::SpecError;
use crate::template::TemplateError;

/// A run that came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Asked for something that cannot be.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The image is missing or damaged.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The template cannot be used.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The snapshot cannot be made or used.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// An export cannot be written or taken in.
    #[error(transparent)]
    Export(#[from] ExportError),
    /// What a template was to be warmed up with failed.
    #[error("the warm-up {}; no template was made", script_end(*.code, *.timed_out))]
    WarmUp {
        /// Its exit code.
        code: i32,
        /// The time limit ended it.
        timed_out: bool,
    },
    /// The kernel asked for cannot be used.
    #[error("cannot use the kernel {name} ({path})")]
    Kernel {
        /// As it was asked for.
        name: String,
        /// Where it should be.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The host lacks something.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// The host cannot do what is asked.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// KVM does not work here.
    #[error("KVM does not work on this host: {reason}")]
    NoKvm {
        /// What was seen.
        reason: String,
    },
    /// The record could not be kept.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The machine did not come up, or did not stay up.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The workspace could not be exchanged.
    #[error(transparent)]
    Workspace(#[from] exchange::ExchangeError),
    /// The output could not be passed on or kept.
    #[error("cannot write the command's output to {place}")]
    Output {
        /// Where to.
        place: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A script that was to make an image failed.
    #[error("the script {}; no image was made", script_end(*.code, *.timed_out))]
    Script {
        /// Its exit code.
        code: i32,
        /// The time limit ended it.
        timed_out: bool,
    },
    /// The user ended it while no command ran.
    #[error("interrupted by signal {signal}")]
    Interrupted {
        /// The signal.
        signal: i32,
    },
}

fn script_end(code: i32, timed_out: bool) -> String {
    match timed_out {
        true => "ran out of time".to_owned(),
        false => format!("ended with exit code {code}"),
    }
}

impl From<crate::guest::GuestError> for RunError {
    fn from(error: crate::guest::GuestError) -> Self {
        Self::Machine(error.into())
    }
}

impl Explain for RunError {
    fn code(&self) -> &'static str {
        match self {
            Self::Spec(error) => error.code(),
            Self::Image(error) => error.code(),
            Self::Template(error) => error.code(),
            Self::Snapshot(error) => error.code(),
            Self::Export(error) => error.code(),
            Self::WarmUp { .. } => "warm-up-failed",
            Self::Kernel { .. } => "kernel-unusable",
            Self::Probe(error) => error.code(),
            Self::Plan(error) => error.code(),
            Self::NoKvm { .. } => "kvm-unusable",
            Self::Record(error) => error.code(),
            Self::Machine(error) => error.code(),
            Self::Workspace(error) => error.code(),
            Self::Output { source, .. } if crate::host::is_full(source) => "no-space",
            Self::Output { source, .. } if source.kind() == std::io::ErrorKind::FileTooLarge => {
                "output-too-long"
            }
            Self::Output { .. } => "output-unwritable",
            Self::Script { .. } => "script-failed",
            Self::Interrupted { .. } => "interrupted",
        }
    }

    fn system_call(&self) -> Option<&str> {
        match self {
            Self::Machine(error) => error.system_call(),
            _ => None,
        }
    }

    fn remedy(&self) -> String {
        match self {
            Self::Spec(error) => error.remedy(),
            Self::Image(error) => error.remedy(),
            Self::Template(error) => error.remedy(),
            Self::Snapshot(error) => error.remedy(),
            Self::Export(error) => error.remedy(),
            Self::WarmUp { .. } => {
                "Look at its output above. --timeout gives it more time; its clock is 65 minutes \
                 behind, and right with --true-clock."
                    .into()
            }
            Self::Kernel { .. } => {
                "Build the tuned kernel with `cargo xtask kernel`, or leave --kernel out.".into()
            }
            Self::Probe(error) => error.remedy(),
            Self::Plan(error) => error.remedy(),
            Self::NoKvm { .. } => {
                "Use a host with KVM, or accept software emulation, slow and no isolation by hardware, with --accel tcg. `bulkhead doctor` proves it again.".into()
            }
            Self::Record(error) => error.remedy(),
            Self::Machine(error) => error.remedy(),
            Self::Workspace(error) => error.remedy(),
            Self::Output { source, .. } if source.kind() == std::io::ErrorKind::FileTooLarge => {
                "Collect more with --max-output, or let the command write to /workspace/output."
                    .into()
            }
            Self::Output { .. } => {
                "Make room, write to /workspace/output, or redirect the output elsewhere.".into()
            }
            Self::Script {
                timed_out: true, ..
            } => "Give it more time with --timeout.".into(),
            Self::Script { .. } => "Correct the script; its output is above.".into(),
            Self::Interrupted { .. } => "Start it again.".into(),
        }
    }
}
