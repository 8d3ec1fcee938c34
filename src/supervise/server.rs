//! The supervisor's end of a connection that carries streams: the same frames
//! as towards the guest, so that the command line uses the same channel for a
//! machine it started and for one that a supervisor watches.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bulkhead_agent::{
    Control, Exit, Failure, FailureKind, Header, Hello, Kind, MAX_PAYLOAD, Reply, VERSION, WINDOW,
};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;
use tokio::sync::{Semaphore, mpsc};

use super::execs::Execs;
use super::wire::Open;
use crate::guest::channel::{frame, read_frame};

/// Frames waiting to be written before streams have to wait.
const WRITE_QUEUE: usize = 32;
/// Streams of one connection.
const MAX_STREAMS: usize = 64;
/// Messages of a client that a stream has not passed on yet. A command line
/// sends a window of input in a few dozen.
const INPUTS: usize = 8192;

/// What a client sends on a stream.
#[derive(Debug)]
pub(super) enum FromClient {
    /// Bytes for the command.
    In(Vec<u8>),
    /// No more bytes.
    End,
    /// A signal, a size, or the order to kill.
    Control(Control),
}

/// Sends to the client of one stream.
#[derive(Debug, Clone)]
pub(super) struct ToClient {
    id: u32,
    frames: mpsc::Sender<Vec<u8>>,
    credit: Arc<Semaphore>,
    pending: Arc<AtomicU32>,
    streams: Streams,
}

/// Receives from the client of one stream; ends when the client is gone.
pub(super) type Inputs = mpsc::Receiver<FromClient>;

#[derive(Debug)]
struct Served {
    inputs: mpsc::Sender<FromClient>,
    credit: Arc<Semaphore>,
    /// Bytes of input that were not passed on yet.
    pending: Arc<AtomicU32>,
}

type Streams = Arc<Mutex<HashMap<u32, Served>>>;

impl ToClient {
    async fn send(&self, kind: Kind, payload: &[u8]) -> Option<()> {
        self.frames.send(frame(self.id, kind, payload)).await.ok()
    }

    /// Answers the request.
    pub(super) async fn reply(&self, reply: &Reply) -> Option<()> {
        self.send(Kind::Reply, &serde_json::to_vec(reply).ok()?)
            .await
    }

    /// Passes output on, at the client's pace; `None` when it is gone.
    pub(super) async fn output(&self, kind: Kind, bytes: &[u8]) -> Option<()> {
        for piece in bytes.chunks(MAX_PAYLOAD) {
            let len = u32::try_from(piece.len()).ok()?;
            self.credit.acquire_many(len).await.ok()?.forget();
            self.send(kind, piece).await?;
        }
        Some(())
    }

    /// So many bytes of input were passed on.
    pub(super) async fn passed(&self, bytes: usize) {
        let bytes = u32::try_from(bytes).unwrap_or(WINDOW);
        self.pending.fetch_sub(bytes, Ordering::Relaxed);
        let _ = self.send(Kind::Credit, &bytes.to_le_bytes()).await;
    }

    /// Ends the stream.
    pub(super) async fn exit(&self, exit: &Exit) {
        // Before the client may use the number again.
        lock(&self.streams).remove(&self.id);
        if let Ok(payload) = serde_json::to_vec(exit) {
            let _ = self.send(Kind::Exit, &payload).await;
        }
    }

    /// Ends the stream before anything happened on it.
    pub(super) async fn refuse(&self, failure: Failure) {
        let _ = self.reply(&Reply::Refused(failure.clone())).await;
        self.exit(&Exit {
            failure: Some(failure),
            ..Exit::default()
        })
        .await;
    }
}

fn lock(streams: &Streams) -> std::sync::MutexGuard<'_, HashMap<u32, Served>> {
    streams.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn failure(kind: FailureKind, message: impl Into<String>) -> Failure {
    Failure {
        kind,
        message: message.into(),
    }
}

/// Serves a connection until the client closes it or breaks the rules.
pub(super) async fn serve(connection: UnixStream, execs: Arc<Execs>) {
    let (mut reader, mut writer) = connection.into_split();
    let (frames, mut queue) = mpsc::channel::<Vec<u8>>(WRITE_QUEUE);
    let hello = Hello {
        version: VERSION,
        program: format!("bulkhead {} supervisor", env!("CARGO_PKG_VERSION")),
        boot_id: String::new(),
    };
    let Ok(hello) = serde_json::to_vec(&hello) else {
        return;
    };
    if writer
        .write_all(&frame(0, Kind::Hello, &hello))
        .await
        .is_err()
    {
        return;
    }
    let writing = tokio::spawn(async move {
        while let Some(frame) = queue.recv().await {
            if writer.write_all(&frame).await.is_err() {
                // The reader sees the end too, and ends the streams.
                return;
            }
        }
    });
    let streams = Streams::default();
    let _ = read(&mut reader, &frames, &streams, &execs).await;
    // Their inputs end, and with them the commands that belong to this client.
    for (_, served) in lock(&streams).drain() {
        served.credit.close();
    }
    // A client that reads no more must not keep anything.
    writing.abort();
}

/// Reads frames until the end; `None` is the only way out.
async fn read(
    reader: &mut OwnedReadHalf,
    frames: &mpsc::Sender<Vec<u8>>,
    streams: &Streams,
    execs: &Arc<Execs>,
) -> Option<()> {
    let (hello, payload) = read_frame(reader).await.ok()?;
    let theirs: Hello = serde_json::from_slice(&payload).ok()?;
    if hello.kind != Kind::Hello || theirs.version != VERSION {
        return None;
    }
    loop {
        let (header, payload) = read_frame(reader).await.ok()?;
        take(header, payload, frames, streams, execs).await?;
    }
}

/// Takes in one frame; `None` when it breaks the rules.
async fn take(
    header: Header,
    payload: Vec<u8>,
    frames: &mpsc::Sender<Vec<u8>>,
    streams: &Streams,
    execs: &Arc<Execs>,
) -> Option<()> {
    let id = header.stream;
    if header.kind == Kind::Open {
        return open(id, &payload, frames, streams, execs).await;
    }
    let streams = lock(streams);
    // It may have ended while the frame was on its way.
    let Some(served) = streams.get(&id) else {
        return Some(());
    };
    let message = match header.kind {
        Kind::In => {
            let len = u32::try_from(payload.len()).ok()?;
            let pending = served.pending.fetch_add(len, Ordering::Relaxed);
            if pending.saturating_add(len) > WINDOW {
                return None;
            }
            FromClient::In(payload)
        }
        Kind::End => FromClient::End,
        Kind::Control => FromClient::Control(serde_json::from_slice(&payload).ok()?),
        Kind::Credit => {
            let bytes = u32::from_le_bytes(payload.try_into().ok()?) as usize;
            if served.credit.available_permits() + bytes > WINDOW as usize {
                return None;
            }
            served.credit.add_permits(bytes);
            return Some(());
        }
        _ => return None,
    };
    match served.inputs.try_send(message) {
        Err(mpsc::error::TrySendError::Full(_)) => None,
        // The stream's task may be over already.
        _ => Some(()),
    }
}

async fn open(
    id: u32,
    payload: &[u8],
    frames: &mpsc::Sender<Vec<u8>>,
    streams: &Streams,
    execs: &Arc<Execs>,
) -> Option<()> {
    let (inputs, received) = mpsc::channel(INPUTS);
    let credit = Arc::new(Semaphore::new(WINDOW as usize));
    let pending = Arc::new(AtomicU32::new(0));
    let to = ToClient {
        id,
        frames: frames.clone(),
        credit: Arc::clone(&credit),
        pending: Arc::clone(&pending),
        streams: Arc::clone(streams),
    };
    let full = {
        let mut streams = lock(streams);
        if streams.contains_key(&id) {
            return None;
        }
        let full = streams.len() >= MAX_STREAMS;
        if !full {
            let served = Served {
                inputs,
                credit,
                pending,
            };
            streams.insert(id, served);
        }
        full
    };
    let request = serde_json::from_slice::<Open>(payload);
    match (full, request) {
        (true, _) => {
            let why = format!("{MAX_STREAMS} streams are open on this connection");
            to.refuse(failure(FailureKind::Invalid, why)).await;
        }
        (false, Err(error)) => {
            let why = format!("cannot understand the request: {error}");
            to.refuse(failure(FailureKind::Invalid, why)).await;
        }
        (false, Ok(request)) => {
            let execs = Arc::clone(execs);
            tokio::spawn(async move { execs.open(request, to, received).await });
        }
    }
    Some(())
}
