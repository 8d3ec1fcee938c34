//! One stream of a channel: a command or a transfer.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_agent::{Control, Exit, Kind, MAX_PAYLOAD, Reply, WINDOW};
use tokio::sync::Notify;

use super::channel::{Shared, frame};
use super::error::GuestError;

/// What a stream gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// From stdout, or the main data of a transfer.
    Out(Vec<u8>),
    /// From stderr, or the side data of a transfer.
    Err(Vec<u8>),
    /// The end.
    Exit(Exit),
}

/// The part of a stream that the reading task fills.
#[derive(Debug, Default)]
pub(super) struct State {
    inner: Mutex<Inner>,
    /// Something arrived for the reader.
    readable: Notify,
    /// Credit arrived for the sender.
    writable: Notify,
}

#[derive(Debug)]
struct Inner {
    out: Vec<u8>,
    err: Vec<u8>,
    /// Bytes the guest may not send yet because they were not consumed.
    unacknowledged: u32,
    reply: Option<Reply>,
    replied: bool,
    exit: Option<Exit>,
    failed: Option<GuestError>,
    /// Bytes we may send.
    credit: u32,
    /// Nobody reads any more.
    abandoned: bool,
    /// A task returns the window of an abandoned stream.
    crediting: bool,
}

impl Default for Inner {
    fn default() -> Self {
        Self {
            out: Vec::new(),
            err: Vec::new(),
            unacknowledged: 0,
            reply: None,
            replied: false,
            exit: None,
            failed: None,
            credit: WINDOW,
            abandoned: false,
            crediting: false,
        }
    }
}

impl State {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in output; `true` when nobody reads this stream any more and
    /// somebody has to return its window ([`State::discarded`]).
    pub(super) fn receive(&self, kind: Kind, bytes: &[u8]) -> Result<bool, GuestError> {
        // An empty frame costs the guest nothing and us a wake-up.
        let Some(len) = u32::try_from(bytes.len()).ok().filter(|len| *len > 0) else {
            return Err(GuestError::Protocol(
                "an output frame without output".into(),
            ));
        };
        let mut inner = self.lock();
        if !inner.replied {
            return Err(GuestError::Protocol("output before the Reply".into()));
        }
        if inner.unacknowledged.saturating_add(len) > WINDOW {
            return Err(GuestError::Protocol(
                "more output than its window allows".into(),
            ));
        }
        inner.unacknowledged += len;
        if inner.abandoned {
            return Ok(!std::mem::replace(&mut inner.crediting, true));
        }
        match kind {
            Kind::Err => inner.err.extend_from_slice(bytes),
            _ => inner.out.extend_from_slice(bytes),
        }
        self.readable.notify_one();
        Ok(false)
    }

    /// Bytes of an abandoned stream to be returned to the guest; `None` when
    /// there are none and nobody returns them any more.
    pub(super) fn discarded(&self) -> Option<u32> {
        let mut inner = self.lock();
        let bytes = std::mem::take(&mut inner.unacknowledged);
        inner.crediting = bytes > 0 && inner.exit.is_none();
        inner.crediting.then_some(bytes)
    }

    pub(super) fn reply(&self, reply: Reply) -> Result<(), GuestError> {
        let mut inner = self.lock();
        if std::mem::replace(&mut inner.replied, true) {
            return Err(GuestError::Protocol("a second Reply on one stream".into()));
        }
        inner.reply = Some(reply);
        self.readable.notify_one();
        Ok(())
    }

    pub(super) fn credit(&self, bytes: u32) -> Result<(), GuestError> {
        let mut inner = self.lock();
        inner.credit = match inner.credit.checked_add(bytes) {
            // As with output, nothing is no message.
            Some(credit) if bytes > 0 && credit <= WINDOW => credit,
            _ => {
                return Err(GuestError::Protocol(
                    "credit for nothing that was sent".into(),
                ));
            }
        };
        self.writable.notify_waiters();
        Ok(())
    }

    pub(super) fn exit(&self, exit: Exit) {
        self.lock().exit = Some(exit);
        self.readable.notify_one();
        self.writable.notify_waiters();
    }

    pub(super) fn fail(&self, error: GuestError) {
        self.lock().failed = Some(error);
        self.readable.notify_one();
        self.writable.notify_waiters();
    }
}

/// A command or transfer in the guest. Dropping it kills the command.
#[derive(Debug)]
pub struct Stream {
    id: u32,
    state: Arc<State>,
    shared: Arc<Shared>,
    finished: bool,
}

impl Stream {
    pub(super) fn new(id: u32, state: Arc<State>, shared: Arc<Shared>) -> Self {
        Self {
            id,
            state,
            shared,
            finished: false,
        }
    }

    /// The sending half, to be used beside the reading one.
    pub fn input(&self) -> Input {
        Input {
            id: self.id,
            state: Arc::clone(&self.state),
            shared: Arc::clone(&self.shared),
        }
    }

    /// Waits for the guest's answer to the request.
    ///
    /// # Errors
    /// The guest refused `what`, or the connection ended.
    pub async fn started(&mut self, what: &str) -> Result<Reply, GuestError> {
        loop {
            let notified = self.state.readable.notified();
            {
                let mut inner = self.state.lock();
                if let Some(reply) = inner.reply.take() {
                    return match reply {
                        Reply::Refused(failure) => Err(GuestError::Refused {
                            what: what.to_owned(),
                            failure,
                        }),
                        reply => Ok(reply),
                    };
                }
                if let Some(error) = &inner.failed {
                    return Err(error.clone());
                }
                if inner.exit.is_some() {
                    return Err(GuestError::Protocol("an Exit without a Reply".into()));
                }
            }
            notified.await;
        }
    }

    /// Waits for the next output, or the end. Stdout and stderr keep their
    /// order each, but not between each other.
    ///
    /// # Errors
    /// The connection ended before the stream did.
    pub async fn next(&mut self) -> Result<Output, GuestError> {
        loop {
            let notified = self.state.readable.notified();
            let output = {
                let mut inner = self.state.lock();
                if !inner.out.is_empty() {
                    Some(Output::Out(std::mem::take(&mut inner.out)))
                } else if !inner.err.is_empty() {
                    Some(Output::Err(std::mem::take(&mut inner.err)))
                } else if let Some(exit) = inner.exit.clone() {
                    self.finished = true;
                    return Ok(Output::Exit(exit));
                } else if let Some(error) = &inner.failed {
                    return Err(error.clone());
                } else {
                    None
                }
            };
            match output {
                None => notified.await,
                Some(output) => {
                    self.acknowledge(&output).await?;
                    return Ok(output);
                }
            }
        }
    }

    async fn acknowledge(&self, output: &Output) -> Result<(), GuestError> {
        let (Output::Out(bytes) | Output::Err(bytes)) = output else {
            return Ok(());
        };
        let len = u32::try_from(bytes.len()).unwrap_or(WINDOW);
        let ended = {
            let mut inner = self.state.lock();
            inner.unacknowledged = inner.unacknowledged.saturating_sub(len);
            inner.exit.is_some() || inner.failed.is_some()
        };
        // After the end the stream is unknown to the guest.
        if ended {
            Ok(())
        } else {
            self.send(Kind::Credit, &len.to_le_bytes()).await
        }
    }

    /// Reads and drops all output until the end.
    ///
    /// # Errors
    /// `what` failed in the guest, or the connection ended.
    pub async fn finished(&mut self, what: &str) -> Result<Exit, GuestError> {
        loop {
            if let Output::Exit(exit) = self.next().await? {
                return match exit.failure {
                    Some(failure) => Err(GuestError::Refused {
                        what: what.to_owned(),
                        failure,
                    }),
                    None => Ok(exit),
                };
            }
        }
    }

    /// Sends a signal, a new size, or the order to kill.
    ///
    /// # Errors
    /// The connection ended.
    pub async fn control(&self, control: &Control) -> Result<(), GuestError> {
        self.input().control(control).await
    }

    async fn send(&self, kind: Kind, payload: &[u8]) -> Result<(), GuestError> {
        self.shared.send(frame(self.id, kind, payload)).await
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let unread = {
            let mut inner = self.state.lock();
            inner.abandoned = true;
            inner.out = Vec::new();
            inner.err = Vec::new();
            let unread = std::mem::take(&mut inner.unacknowledged);
            (inner.exit.is_none() && inner.failed.is_none()).then_some(unread)
        };
        let Some(unread) = unread.filter(|_| !self.finished) else {
            return;
        };
        if let Ok(kill) = serde_json::to_vec(&Control::Kill) {
            self.shared.send_later(frame(self.id, Kind::Control, &kill));
        }
        if unread > 0 {
            self.shared
                .send_later(frame(self.id, Kind::Credit, &unread.to_le_bytes()));
        }
    }
}

/// The sending half of a stream.
#[derive(Debug, Clone)]
pub struct Input {
    id: u32,
    state: Arc<State>,
    shared: Arc<Shared>,
}

impl Input {
    /// Sends bytes, waiting for the guest to consume what was sent before.
    /// Returns `false` when the stream has ended and nobody wants them.
    ///
    /// # Errors
    /// The connection ended.
    pub async fn send(&self, mut bytes: &[u8]) -> Result<bool, GuestError> {
        while !bytes.is_empty() {
            let notified = self.state.writable.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            let allowed = {
                let mut inner = self.state.lock();
                if let Some(error) = &inner.failed {
                    return Err(error.clone());
                }
                if inner.exit.is_some() {
                    return Ok(false);
                }
                let allowed = bytes.len().min(inner.credit as usize).min(MAX_PAYLOAD);
                inner.credit -= u32::try_from(allowed).unwrap_or(0);
                allowed
            };
            if allowed == 0 {
                notified.await;
                continue;
            }
            let (now, later) = bytes.split_at(allowed);
            self.shared.send(frame(self.id, Kind::In, now)).await?;
            bytes = later;
        }
        Ok(true)
    }

    /// Says that no more bytes will come.
    ///
    /// # Errors
    /// The connection ended.
    pub async fn end(&self) -> Result<(), GuestError> {
        if self.state.lock().exit.is_some() {
            return Ok(());
        }
        self.shared.send(frame(self.id, Kind::End, &[])).await
    }

    /// Sends a signal, a new size, or the order to kill.
    ///
    /// # Errors
    /// The connection ended.
    pub async fn control(&self, control: &Control) -> Result<(), GuestError> {
        if self.state.lock().exit.is_some() {
            return Ok(());
        }
        let payload =
            serde_json::to_vec(control).map_err(|error| GuestError::Protocol(error.to_string()))?;
        self.shared
            .send(frame(self.id, Kind::Control, &payload))
            .await
    }
}
