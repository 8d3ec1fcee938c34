//! How a machine ended, and what its supervisor does about it.

use std::time::Duration;

use super::error::SuperviseError;
use super::supervisor::Up;
use crate::error::{Explain, Report};
use crate::qmp::{Event, Events};
use crate::run::{FAILED, MachineError, RunError, State};

/// How a machine ended.
pub(super) struct End {
    pub(super) to: State,
    pub(super) reason: String,
    pub(super) exit_code: i32,
    /// Why it never came up.
    pub(super) error: Option<SuperviseError>,
    /// What its network came to.
    pub(super) network: Option<String>,
}

impl End {
    pub(super) fn stopped(reason: impl Into<String>) -> Self {
        Self {
            to: State::Stopped,
            reason: reason.into(),
            exit_code: 0,
            error: None,
            network: None,
        }
    }

    pub(super) fn failed(reason: impl Into<String>) -> Self {
        Self {
            to: State::Failed,
            reason: reason.into(),
            exit_code: FAILED,
            error: None,
            network: None,
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
            network: None,
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

/// The VMM has ended.
pub(super) async fn by_itself(up: &Up, known: bool, shutdown: Option<String>) -> End {
    match up.machine().end_reason().await {
        Some(error @ MachineError::GuestPanic { .. }) => End::failed(told(&error)),
        Some(MachineError::GuestEnded { .. }) => End::stopped(match shutdown.as_deref() {
            Some("guest-reset") => "the guest restarted, which ends it",
            _ => "the guest powered off",
        }),
        // A process that was taken over leaves no status, but QEMU said why.
        _ if shutdown.as_deref() == Some("guest-shutdown") => End::stopped("the guest powered off"),
        _ if shutdown.as_deref() == Some("guest-reset") => {
            End::stopped("the guest restarted, which ends it")
        }
        Some(error) => End::failed(told(&error)),
        None if known => End::failed("QEMU ended"),
        None => End::failed("QEMU ended, and nobody knows how"),
    }
}

/// Why QEMU ended: what it said before may be read later than its end is seen.
pub(super) async fn last_words(
    events: &mut Events,
    mut shutdown: Option<String>,
) -> Option<String> {
    let rest = async {
        loop {
            match events.next().await {
                Ok(event) => shutdown = reason(&event).or(shutdown.take()),
                Err(error) if error.is_closed() => break,
                // Some were missed.
                Err(_) => {}
            }
        }
    };
    let _ = tokio::time::timeout(Duration::from_secs(5), rest).await;
    shutdown
}

/// What `SHUTDOWN` says.
pub(super) fn reason(event: &Event) -> Option<String> {
    let reason = (event.name == "SHUTDOWN").then(|| event.data["reason"].as_str())??;
    Some(reason.to_owned())
}

/// The channel to the guest agent is gone, or the monitor, and with it what the
/// machine is for.
pub(super) async fn gone(
    up: &Up,
    error: &dyn Explain,
    what: &str,
    events: &mut Events,
    shutdown: Option<String>,
) -> Next {
    let process = up.machine().process();
    // Mostly the machine is about to be gone as a whole.
    Next::Gone(
        match tokio::time::timeout(Duration::from_secs(5), process.wait()).await {
            Ok(status) => {
                let why = last_words(events, shutdown).await;
                by_itself(up, status.is_ok(), why).await
            }
            Err(_) => End::failed(format!("{what}: {}", told(error))),
        },
    )
}
