//! One command in a guest, from its start to its exit code.

use std::time::Duration;

use bulkhead_agent::{Exit, FailureKind};

use super::RunError;
use super::follow::{Ending, Sink, drive, pump};
use super::outcome::{Captured, TIMED_OUT};
use super::runner::{ANSWER, Io};
use crate::error::Report;
use crate::guest::{GuestError, Stream};

/// How a command ended.
#[derive(Debug, Default)]
pub struct Commanded {
    /// In the guest's words.
    pub exit: Exit,
    /// As a shell has it: its own code, 128 + signal, 124 after the time limit,
    /// 126 or 127 when it could not be run.
    pub exit_code: i32,
    /// The time limit ended it.
    pub timed_out: bool,
    /// It did not end when it was killed: nothing more is to be had of the guest.
    pub stuck: bool,
    /// Why it could not be run.
    pub refused: Option<Report>,
    /// Output, where it was collected instead of passed on.
    pub stdout: Option<Captured>,
    /// Error output, likewise.
    pub stderr: Option<Captured>,
}

/// Follows the command that `stream` was opened for to its end. `name` is in
/// the names of files that long output is collected in.
///
/// # Errors
/// The channel breaks, or output cannot be written.
pub async fn command(
    mut stream: Stream,
    what: String,
    io: &mut Io,
    name: &str,
    limit: Option<Duration>,
) -> Result<Commanded, RunError> {
    let mut done = Commanded::default();
    match tokio::time::timeout(ANSWER, stream.started(&what)).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => return refusal(error, done),
        Err(_) => {
            return Err(GuestError::Timeout {
                what,
                after: ANSWER,
            }
            .into());
        }
    }
    let pump = io
        .stdin
        .take()
        .map(|stdin| tokio::spawn(pump(stdin, stream.input())));
    let mut sinks = [
        Sink::new(io.stdout.take(), "stdout", io, name),
        Sink::new(io.stderr.take(), "stderr", io, name),
    ];
    let result = drive(&mut stream, &mut sinks, &mut io.signals, limit).await;
    if let Some(pump) = pump {
        pump.abort();
    }
    let ending = result?;
    done.timed_out = !matches!(ending, Ending::Exit(_));
    done.stuck = matches!(ending, Ending::Stuck);
    done.exit = match ending {
        Ending::Exit(exit) | Ending::TimedOut(exit) => exit,
        Ending::Stuck => Exit::default(),
    };
    done.exit_code = match &done.exit {
        _ if done.timed_out => TIMED_OUT,
        Exit {
            code: Some(code), ..
        } => code & 0xff,
        Exit {
            signal: Some(signal),
            ..
        } => 128 + (signal & 0x7f),
        exit => return Err(no_status(what, exit)),
    };
    let [stdout, stderr] = sinks;
    done.stdout = stdout.finish().await?;
    done.stderr = stderr.finish().await?;
    Ok(done)
}

/// The guest says that the command is over, but not how.
fn no_status(what: String, exit: &Exit) -> RunError {
    match exit.failure.clone() {
        Some(failure) => GuestError::Refused { what, failure }.into(),
        None => GuestError::Protocol("an Exit without code or signal".into()).into(),
    }
}

/// A command that could not be run is an outcome, as in a shell; all else is an error.
fn refusal(error: GuestError, mut done: Commanded) -> Result<Commanded, RunError> {
    let GuestError::Refused { failure, .. } = &error else {
        return Err(error.into());
    };
    done.exit_code = match failure.kind {
        FailureKind::NotFound => 127,
        FailureKind::NotExecutable => 126,
        _ => return Err(error.into()),
    };
    done.refused = Some(Report::of(&error));
    Ok(done)
}
