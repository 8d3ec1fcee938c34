//! One command while it runs: its input, its output, its signals, its clock.

use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::time::Duration;

use bulkhead_agent::{Control, Exit};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

use super::RunError;
use super::capture::Capture;
use super::outcome::Captured;
use super::runner::{Io, Signal};
use crate::guest::{Input, Output, Stream};

/// How long a killed command may take to end before the machine is killed.
pub(super) const KILL_GRACE: Duration = Duration::from_secs(2);

/// Carries the user's input to the command until either ends.
pub(super) async fn pump(mut stdin: Box<dyn AsyncRead + Send + Unpin>, input: Input) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(count @ 1..) = stdin.read(&mut buffer).await {
        if !matches!(input.send(&buffer[..count]).await, Ok(true)) {
            return;
        }
    }
    let _ = input.end().await;
}

/// How a command ended.
pub(super) enum Ending {
    /// By itself, or by a signal.
    Exit(Exit),
    /// The time limit ended it.
    TimedOut(Exit),
    /// The time limit was over, and it did not even end when killed.
    Stuck,
}

/// Follows a command to its end.
pub(super) async fn drive(
    stream: &mut Stream,
    sinks: &mut [Sink; 2],
    signals: &mut mpsc::Receiver<Signal>,
    limit: Option<Duration>,
) -> Result<Ending, RunError> {
    let control = stream.input();
    // Apart from each other: a reader of the output that is slow, or a guest
    // that does not read, stops neither the clock nor the signals.
    let mut follow = pin!(follow(stream, sinks));
    let over = async {
        match limit {
            Some(limit) => tokio::time::sleep(limit).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        exit = &mut follow => return Ok(Ending::Exit(exit?)),
        never = forward(signals, &control) => match never {},
        () = over => {}
    }
    let end = async {
        let _ = control.control(&Control::Kill).await;
        follow.await
    };
    match tokio::time::timeout(KILL_GRACE, end).await {
        Ok(exit) => Ok(Ending::TimedOut(exit?)),
        Err(_) => Ok(Ending::Stuck),
    }
}

/// Passes output on until the command's end.
async fn follow(stream: &mut Stream, sinks: &mut [Sink; 2]) -> Result<Exit, RunError> {
    let control = stream.input();
    loop {
        match stream.next().await? {
            Output::Exit(exit) => return Ok(exit),
            Output::Out(bytes) => sinks[0].write(&bytes, &control).await?,
            Output::Err(bytes) => sinks[1].write(&bytes, &control).await?,
        }
    }
}

/// Passes signals on. What goes wrong shows where output is read.
async fn forward(signals: &mut mpsc::Receiver<Signal>, control: &Input) -> Infallible {
    while let Some(signal) = signals.recv().await {
        let message = match signal {
            Signal::Send(signal) => Control::Signal { signal },
            Signal::Resize(size) => Control::Resize(size),
        };
        let _ = control.control(&message).await;
    }
    std::future::pending().await
}

/// Where one kind of output goes.
pub(super) enum Sink {
    Pass {
        to: Box<dyn AsyncWrite + Send + Unpin>,
        name: &'static str,
    },
    Collect(Capture),
    /// Nobody reads it any more.
    Closed,
}

impl Sink {
    pub(super) fn new(
        to: Option<Box<dyn AsyncWrite + Send + Unpin>>,
        name: &'static str,
        io: &Io,
        owner: &str,
    ) -> Self {
        match to {
            Some(to) => Self::Pass { to, name },
            None => {
                let path = io.spill.join(format!("{owner}.{name}"));
                Self::Collect(Capture::new(path, io.most))
            }
        }
    }

    async fn write(&mut self, bytes: &[u8], control: &Input) -> Result<(), RunError> {
        match self {
            Self::Pass { to, name } => {
                let written = async {
                    to.write_all(bytes).await?;
                    to.flush().await
                };
                match written.await {
                    // As with any program in a pipe whose reader went away.
                    Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                        *self = Self::Closed;
                        let signal = nix::libc::SIGPIPE;
                        Ok(control.control(&Control::Signal { signal }).await?)
                    }
                    other => {
                        let place = (*name).to_owned();
                        other.map_err(|source| RunError::Output { place, source })
                    }
                }
            }
            Self::Collect(capture) => capture.push(bytes).map_err(|source| {
                let place = capture.path().display().to_string();
                RunError::Output { place, source }
            }),
            Self::Closed => Ok(()),
        }
    }

    pub(super) async fn finish(self) -> Result<Option<Captured>, RunError> {
        Ok(match self {
            Self::Collect(capture) => Some(capture.finish()),
            Self::Pass { .. } | Self::Closed => None,
        })
    }
}
