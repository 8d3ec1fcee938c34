//! How a machine ended, and what its supervisor does about it.

use std::time::Duration;

use super::error::SuperviseError;
use crate::error::{Explain, Report};
use crate::run::{FAILED, MachineError, RunError, State};

/// How a machine ended.
pub(super) struct End {
    pub(super) to: State,
    pub(super) reason: String,
    pub(super) exit_code: i32,
    /// Why it never came up.
    pub(super) error: Option<SuperviseError>,
}

impl End {
    pub(super) fn stopped(reason: impl Into<String>) -> Self {
        Self {
            to: State::Stopped,
            reason: reason.into(),
            exit_code: 0,
            error: None,
        }
    }

    pub(super) fn failed(reason: impl Into<String>) -> Self {
        Self {
            to: State::Failed,
            reason: reason.into(),
            exit_code: FAILED,
            error: None,
        }
    }

    /// It did not come up.
    pub(super) fn never(error: SuperviseError) -> Self {
        let reason = told(&error);
        // Stopped by the user meanwhile is not a failure.
        let cancelled = matches!(
            &error,
            SuperviseError::Run(RunError::Machine(MachineError::Cancelled))
        );
        Self {
            to: match cancelled {
                true => State::Stopped,
                false => State::Failed,
            },
            reason,
            exit_code: FAILED,
            error: Some(error),
        }
    }
}

/// What the loop does next.
pub(super) enum Next {
    /// Goes on.
    Stay,
    /// Powers the machine off.
    Stop { grace: Option<Duration>, end: End },
    /// The machine is gone already.
    Gone(End),
}

/// With what was left behind on the host.
pub(super) fn with_leaks(end: End, left: Vec<String>) -> End {
    match left[..] {
        [] => end,
        _ => End {
            reason: format!(
                "{}; left behind, `bulkhead gc` will try again: {}",
                end.reason,
                left.join("; ")
            ),
            ..end
        },
    }
}

/// An error and its causes in one line.
pub(super) fn told(error: &dyn Explain) -> String {
    let report = Report::of(error);
    match report.cause.as_str() {
        "" => report.what,
        cause => format!("{}: {cause}", report.what),
    }
}
