//! Commands and replies as JSON lines over a Unix socket, many at a time.
//!
//! Two tasks own the socket. A command registers a waiter under a fresh id and
//! queues its line; the reader hands each reply to the waiter with that id.
//! Dropping the command's future removes the waiter, and a reply that finds
//! none is discarded: the stream itself is never left half-read.

use std::{
    collections::HashMap,
    io::{self, IoSlice},
    os::fd::{AsRawFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncWriteExt, Interest},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{broadcast, mpsc, oneshot, watch},
    task::AbortHandle,
};

use super::{
    error::{ConnectionEnd, Peer, QmpError},
    event::{Event, Events},
    message::{Lines, Message, Refusal},
};

/// Commands that may wait to be written before callers wait too.
const QUEUE: usize = 128;
/// Events kept for a slow reader before it loses the oldest.
const EVENTS: usize = 256;

type Answer = Result<Value, Refusal>;

/// A shared connection. It ends when the last clone is dropped.
#[derive(Debug, Clone)]
pub(super) struct Connection {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    shared: Arc<Shared>,
    outgoing: mpsc::Sender<Outgoing>,
    tasks: [AbortHandle; 2],
}

impl Drop for Inner {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
        self.shared.close(ConnectionEnd::Dropped);
    }
}

/// One line to write, and the descriptor that goes with its first byte.
#[derive(Debug)]
struct Outgoing {
    line: Vec<u8>,
    fd: Option<OwnedFd>,
}

/// What the tasks and the handles have in common.
#[derive(Debug)]
pub(super) struct Shared {
    peer: Peer,
    state: Mutex<State>,
    end: watch::Sender<Option<ConnectionEnd>>,
}

#[derive(Debug)]
struct State {
    next_id: u64,
    waiters: HashMap<u64, oneshot::Sender<Answer>>,
    /// Gone after the end, so that readers of events see it.
    events: Option<broadcast::Sender<Event>>,
}

impl Shared {
    fn new(peer: Peer) -> Self {
        Self {
            peer,
            state: Mutex::new(State {
                next_id: 0,
                waiters: HashMap::new(),
                events: Some(broadcast::Sender::new(EVENTS)),
            }),
            end: watch::Sender::new(None),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while holding the lock; the state stays whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn peer(&self) -> Peer {
        self.peer
    }

    /// Why the connection is over.
    pub(super) fn end(&self) -> ConnectionEnd {
        self.end.borrow().clone().unwrap_or(ConnectionEnd::Closed)
    }

    /// Marks the connection as over, the first reason wins, and wakes everyone.
    fn close(&self, reason: ConnectionEnd) {
        let mut state = self.state();
        self.end.send_if_modified(|end| match end {
            Some(_) => false,
            None => {
                *end = Some(reason);
                true
            }
        });
        state.events = None;
        state.waiters.clear();
    }

    fn register(self: &Arc<Self>) -> Option<Waiter> {
        let mut state = self.state();
        // Only `close` takes the events, and it wakes the waiters it finds.
        state.events.as_ref()?;
        let id = state.next_id;
        state.next_id += 1;
        let (sender, answer) = oneshot::channel();
        state.waiters.insert(id, sender);
        Some(Waiter {
            id,
            answer,
            shared: Arc::clone(self),
        })
    }

    fn deliver(&self, message: Message) {
        match message {
            Message::Reply { id, result } => {
                let waiter = id.and_then(|id| self.state().waiters.remove(&id));
                // Refused only if the caller has just gone away.
                let Some(waiter) = waiter else {
                    tracing::debug!(peer = %self.peer, ?id, "discarded a reply nobody waits for");
                    return;
                };
                _ = waiter.send(result);
            }
            Message::Event(event) => {
                tracing::debug!(peer = %self.peer, name = event.name, data = %event.data, "event");
                if let Some(events) = &self.state().events {
                    // An error means that nobody listens.
                    _ = events.send(event);
                }
            }
            Message::Other(_) => {
                tracing::warn!(peer = %self.peer, "ignored a message of unknown kind");
            }
        }
    }
}

/// A command that was given an id. Dropping it gives up the reply.
struct Waiter {
    id: u64,
    answer: oneshot::Receiver<Answer>,
    shared: Arc<Shared>,
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.shared.state().waiters.remove(&self.id);
    }
}

impl Connection {
    /// Starts the two tasks on a socket whose greeting was already read.
    pub(super) fn start(peer: Peer, lines: Lines<OwnedReadHalf>, writer: OwnedWriteHalf) -> Self {
        let shared = Arc::new(Shared::new(peer));
        let (outgoing, queue) = mpsc::channel(QUEUE);
        let reader = tokio::spawn(read(Arc::clone(&shared), lines));
        let write = write(Arc::clone(&shared), queue, writer);
        let mut end = shared.end.subscribe();
        // The socket is closed as soon as either direction is over for good.
        let writer = tokio::spawn(async move {
            tokio::select! {
                () = write => {}
                _ = end.wait_for(Option::is_some) => {}
            }
        });
        let tasks = [reader.abort_handle(), writer.abort_handle()];
        Self {
            inner: Arc::new(Inner {
                shared,
                outgoing,
                tasks,
            }),
        }
    }

    /// Sends one command and waits for its reply. Safe to cancel: the command
    /// may then still take effect, but its reply is discarded.
    pub(super) async fn call(
        &self,
        command: &str,
        arguments: Value,
        fd: Option<OwnedFd>,
        timeout: Duration,
    ) -> Result<Value, QmpError> {
        let shared = &self.inner.shared;
        let peer = shared.peer;
        let closed = || QmpError::Closed {
            peer,
            command: command.to_owned(),
            source: shared.end(),
        };
        let mut waiter = shared.register().ok_or_else(closed)?;
        let mut request = json!({ "execute": command, "id": waiter.id });
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        let mut line = request.to_string().into_bytes();
        line.push(b'\n');

        let reply = async {
            let sent = self.inner.outgoing.send(Outgoing { line, fd }).await;
            sent.map_err(|_| closed())?;
            (&mut waiter.answer).await.map_err(|_| closed())
        };
        let answer = match tokio::time::timeout(timeout, reply).await {
            Ok(answer) => answer?,
            Err(_) => {
                return Err(QmpError::Timeout {
                    peer,
                    command: command.to_owned(),
                    after: timeout,
                });
            }
        };
        answer.map_err(|refusal| QmpError::Refused {
            peer,
            command: command.to_owned(),
            class: refusal.class,
            description: refusal.description,
        })
    }

    /// Subscribes to events from now on.
    pub(super) fn events(&self) -> Events {
        let shared = &self.inner.shared;
        let receiver = match &shared.state().events {
            Some(events) => events.subscribe(),
            // Already over: a channel without sender says so at once.
            None => broadcast::channel(1).1,
        };
        Events::new(receiver, Arc::clone(shared))
    }

    /// Waits for the end of the connection. Safe to cancel.
    pub(super) async fn closed(&self) -> ConnectionEnd {
        let mut end = self.inner.shared.end.subscribe();
        // The sender lives in what `self` holds; it cannot vanish meanwhile.
        _ = end.wait_for(Option::is_some).await;
        self.inner.shared.end()
    }

    /// How many commands wait for a reply.
    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        self.inner.shared.state().waiters.len()
    }
}

async fn read(shared: Arc<Shared>, mut lines: Lines<OwnedReadHalf>) {
    let reason = loop {
        let message = match lines.next().await {
            Ok(line) => Message::parse(line),
            Err(end) => break end,
        };
        match message {
            Ok(Some(message)) => shared.deliver(message),
            Ok(None) => {}
            Err(end) => break end,
        }
    };
    shared.close(reason);
}

async fn write(
    shared: Arc<Shared>,
    mut queue: mpsc::Receiver<Outgoing>,
    mut writer: OwnedWriteHalf,
) {
    while let Some(Outgoing { line, fd }) = queue.recv().await {
        let written = match fd {
            None => writer.write_all(&line).await,
            Some(fd) => write_with_fd(&mut writer, &line, fd).await,
        };
        match written.map_err(ConnectionEnd::from) {
            Ok(()) => {}
            // Replies may still be on their way in: the reader sees the end.
            Err(ConnectionEnd::Closed) => return,
            Err(end) => return shared.close(end),
        }
    }
}

/// Writes a line whose first byte carries `fd` (unix(7), `SCM_RIGHTS`).
async fn write_with_fd(writer: &mut OwnedWriteHalf, line: &[u8], fd: OwnedFd) -> io::Result<()> {
    let stream: &UnixStream = writer.as_ref();
    let send = || {
        let fds = [fd.as_raw_fd()];
        sendmsg::<()>(
            stream.as_raw_fd(),
            &[IoSlice::new(line)],
            &[ControlMessage::ScmRights(&fds)],
            MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT,
            None,
        )
        .map_err(io::Error::from)
    };
    let sent = stream.async_io(Interest::WRITABLE, send).await?;
    // The descriptor went with the part that was taken.
    writer.write_all(&line[sent..]).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_cancelled_call_leaves_no_waiter() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let (reader, writer) = ours.into_split();
        let connection = Connection::start(Peer::Monitor, Lines::new(reader, 100), writer);
        let an_hour = Duration::from_secs(3600);
        let mut call = Box::pin(connection.call("stop", Value::Null, None, an_hour));
        let polled = tokio::time::timeout(Duration::from_millis(1), &mut call).await;
        assert!(polled.is_err(), "nobody answers");
        assert_eq!(connection.waiting(), 1);
        drop(call);
        assert_eq!(connection.waiting(), 0);
    }
}
