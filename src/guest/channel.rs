//! Many streams over one connection to the guest agent.
//!
//! Everything that arrives is hostile. What the guest may make the host keep
//! is bounded: one frame, and for each stream one window of output and two
//! short messages.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_agent::{
    HEADER_LEN, Header, Hello, Kind, MAX_PAYLOAD, MAX_STREAMS, Reply, Request, VERSION, WINDOW,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{Notify, mpsc};
use tokio::task::AbortHandle;

use super::error::GuestError;
use super::stream::{State, Stream};
use super::words;

/// Frames waiting to be written before senders have to wait.
const WRITE_QUEUE: usize = 32;
/// How long the guest may leave that queue full.
const STALLED: Duration = Duration::from_secs(60);

/// A connection to a guest agent. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Channel {
    shared: Arc<Shared>,
    /// Ends the two tasks with the last clone.
    _tasks: Arc<Tasks>,
}

#[derive(Debug)]
struct Tasks([AbortHandle; 2]);

impl Drop for Tasks {
    fn drop(&mut self) {
        self.0.iter().for_each(AbortHandle::abort);
    }
}

/// What the channel, its streams and its tasks have in common.
#[derive(Debug)]
pub(super) struct Shared {
    streams: Mutex<Streams>,
    frames: mpsc::Sender<Vec<u8>>,
    /// Told once, when the connection ends.
    over: Notify,
}

#[derive(Debug)]
struct Streams {
    open: HashMap<u32, Arc<State>>,
    next: u32,
    /// Why the connection ended.
    ended: Option<GuestError>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A frame as it goes over the wire.
pub(crate) fn frame(stream: u32, kind: Kind, payload: &[u8]) -> Vec<u8> {
    // Callers keep payloads within MAX_PAYLOAD, which fits.
    let len = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    let mut bytes = Vec::with_capacity(HEADER_LEN + payload.len());
    bytes.extend(Header { len, stream, kind }.encode());
    bytes.extend(payload);
    bytes
}

fn json(what: &'static str, value: &impl serde::Serialize) -> Result<Vec<u8>, GuestError> {
    let bytes = serde_json::to_vec(value)
        .map_err(|error| GuestError::Protocol(format!("{what} cannot be encoded: {error}")))?;
    if bytes.len() > MAX_PAYLOAD {
        return Err(GuestError::TooLarge {
            what,
            size: bytes.len(),
        });
    }
    Ok(bytes)
}

/// Our `Hello` as it goes over the wire.
fn our_hello() -> Result<Vec<u8>, GuestError> {
    let ours = Hello {
        version: VERSION,
        program: format!("bulkhead {}", env!("CARGO_PKG_VERSION")),
        boot_id: String::new(),
    };
    Ok(frame(0, Kind::Hello, &json("Hello", &ours)?))
}

impl Channel {
    /// Waits for the agent's `Hello`, answers it, and starts to serve.
    ///
    /// The caller bounds the time this may take.
    ///
    /// # Errors
    /// The connection breaks, or the agent speaks another version.
    pub async fn connect<IO>(io: IO) -> Result<(Self, Hello), GuestError>
    where
        IO: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (mut reader, writer) = tokio::io::split(io);
        let (header, payload) = read_frame(&mut reader).await?;
        if header.kind != Kind::Hello {
            return Err(GuestError::Protocol(format!(
                "{:?} instead of Hello",
                header.kind
            )));
        }
        Self::serve(reader, writer, &payload, true).await
    }

    /// As [`Channel::connect`], where the agent has not noticed that the
    /// connection is another: it is told, and what it said before is dropped.
    ///
    /// # Errors
    /// As [`Channel::connect`].
    pub async fn connect_again<IO>(io: IO) -> Result<(Self, Hello), GuestError>
    where
        IO: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (mut reader, mut writer) = tokio::io::split(io);
        write_all(&mut writer, &our_hello()?).await?;
        // The windows of all streams bound what can be on its way.
        for _ in 0..MAX_STREAMS * (WINDOW as usize / MAX_PAYLOAD + 4) {
            let (header, payload) = read_frame(&mut reader).await?;
            if header.kind == Kind::Hello {
                return Self::serve(reader, writer, &payload, false).await;
            }
        }
        Err(GuestError::Protocol("no Hello among its frames".into()))
    }

    /// Takes in the agent's `Hello`, answers it where it `expects` that, and
    /// starts to serve.
    async fn serve<IO>(
        mut reader: ReadHalf<IO>,
        mut writer: WriteHalf<IO>,
        payload: &[u8],
        expects: bool,
    ) -> Result<(Self, Hello), GuestError>
    where
        IO: AsyncRead + AsyncWrite + Send + 'static,
    {
        let hello = words::hello(decode(payload)?);
        if hello.version != VERSION {
            return Err(GuestError::Version {
                ours: VERSION,
                theirs: hello.version,
            });
        }
        if expects {
            write_all(&mut writer, &our_hello()?).await?;
        }

        let (frames, queue) = mpsc::channel(WRITE_QUEUE);
        let streams = Streams {
            open: HashMap::new(),
            next: 1,
            ended: None,
        };
        let shared = Arc::new(Shared {
            streams: Mutex::new(streams),
            frames,
            over: Notify::new(),
        });
        let writing = tokio::spawn({
            let shared = Arc::downgrade(&shared);
            async move {
                if let Err(error) = write_frames(&mut writer, queue).await
                    && let Some(shared) = shared.upgrade()
                {
                    shared.end(error);
                }
            }
        });
        let reading = tokio::spawn({
            let (shared, writing) = (Arc::clone(&shared), writing.abort_handle());
            async move {
                let error = read_frames(&mut reader, &shared).await;
                shared.end(error);
                // It may wait for a guest that reads no more; with it goes the
                // queue, and so do those who wait for room in it.
                writing.abort();
            }
        });
        let tasks = Arc::new(Tasks([reading.abort_handle(), writing.abort_handle()]));
        Ok((
            Self {
                shared,
                _tasks: tasks,
            },
            hello,
        ))
    }

    /// Opens a stream with a request.
    ///
    /// # Errors
    /// The connection has ended, too many streams are open, or the request is too large.
    pub async fn open(&self, request: &Request) -> Result<Stream, GuestError> {
        self.open_with(request).await
    }

    /// Opens a stream with a request in the words of whoever is at the other
    /// end: a supervisor understands more than a guest agent.
    pub(crate) async fn open_with(
        &self,
        request: &impl serde::Serialize,
    ) -> Result<Stream, GuestError> {
        let payload = json("the request", request)?;
        let (id, state) = self.shared.register()?;
        let stream = Stream::new(id, state, Arc::clone(&self.shared));
        self.shared.send(frame(id, Kind::Open, &payload)).await?;
        Ok(stream)
    }

    /// Asks for something that is answered at once, and waits until it is done.
    ///
    /// # Errors
    /// As [`Channel::open`], a refusal, a failure, or no answer within `within`.
    pub async fn ask(
        &self,
        what: &str,
        request: &Request,
        within: Duration,
    ) -> Result<Reply, GuestError> {
        let work = async {
            let mut stream = self.open(request).await?;
            let reply = stream.started(what).await?;
            stream.finished(what).await?;
            Ok(reply)
        };
        match tokio::time::timeout(within, work).await {
            Ok(result) => result,
            Err(_) => Err(GuestError::Timeout {
                what: what.to_owned(),
                after: within,
            }),
        }
    }

    /// Waits for the end of the connection, and says why it came.
    pub async fn closed(&self) -> GuestError {
        loop {
            let mut over = std::pin::pin!(self.shared.over.notified());
            over.as_mut().enable();
            if let Some(error) = self.ended() {
                return error;
            }
            over.await;
        }
    }

    /// Why the connection ended, if it has.
    pub fn ended(&self) -> Option<GuestError> {
        lock(&self.shared.streams).ended.clone()
    }
}

impl Shared {
    fn register(&self) -> Result<(u32, Arc<State>), GuestError> {
        let mut streams = lock(&self.streams);
        if let Some(error) = &streams.ended {
            return Err(error.clone());
        }
        if streams.open.len() >= MAX_STREAMS {
            let failure = bulkhead_agent::Failure {
                kind: bulkhead_agent::FailureKind::Invalid,
                message: format!("{MAX_STREAMS} commands and transfers are under way already"),
            };
            return Err(GuestError::Refused {
                what: "start another command".into(),
                failure,
            });
        }
        while streams.next == 0 || streams.open.contains_key(&streams.next) {
            streams.next = streams.next.wrapping_add(1);
        }
        let id = streams.next;
        streams.next = streams.next.wrapping_add(1);
        let state = Arc::new(State::default());
        streams.open.insert(id, Arc::clone(&state));
        Ok((id, state))
    }

    pub(super) async fn send(&self, frame: Vec<u8>) -> Result<(), GuestError> {
        match tokio::time::timeout(STALLED, self.frames.send(frame)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(lock(&self.streams)
                .ended
                .clone()
                .unwrap_or(GuestError::Closed)),
            Err(_) => Err(GuestError::Timeout {
                what: "take what was sent to it".into(),
                after: STALLED,
            }),
        }
    }

    /// Sends from where nobody can wait (a drop): in the background when there
    /// is no room at once.
    pub(super) fn send_later(self: &Arc<Self>, frame: Vec<u8>) {
        let Err(mpsc::error::TrySendError::Full(frame)) = self.frames.try_send(frame) else {
            return;
        };
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let shared = Arc::clone(self);
            runtime.spawn(async move { shared.send(frame).await });
        }
    }

    fn end(&self, error: GuestError) {
        let mut streams = lock(&self.streams);
        let error = streams.ended.get_or_insert(error).clone();
        for state in streams.open.drain().map(|(_, state)| state) {
            state.fail(error.clone());
        }
        drop(streams);
        self.over.notify_waiters();
    }
}

async fn write_frames(
    writer: &mut (impl AsyncWrite + Unpin),
    mut queue: mpsc::Receiver<Vec<u8>>,
) -> Result<(), GuestError> {
    while let Some(mut frames) = queue.recv().await {
        // What waits goes along: each write wakes QEMU, and QEMU the guest.
        while frames.len() < MAX_PAYLOAD
            && let Ok(frame) = queue.try_recv()
        {
            frames.extend(frame);
        }
        write_all(writer, &frames).await?;
    }
    Ok(())
}

async fn write_all(writer: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> Result<(), GuestError> {
    writer
        .write_all(bytes)
        .await
        .map_err(|source| GuestError::Io {
            action: "writing",
            source: Arc::new(source),
        })
}

pub(crate) async fn read_frame(
    reader: &mut (impl AsyncRead + Unpin),
) -> Result<(Header, Vec<u8>), GuestError> {
    let broken = |source: std::io::Error| match source.kind() {
        std::io::ErrorKind::UnexpectedEof => GuestError::Closed,
        _ => GuestError::Io {
            action: "reading",
            source: Arc::new(source),
        },
    };
    let mut header = [0; HEADER_LEN];
    reader.read_exact(&mut header).await.map_err(broken)?;
    let header = Header::decode(header)?;
    let mut payload = vec![0; header.len as usize];
    reader.read_exact(&mut payload).await.map_err(broken)?;
    Ok((header, payload))
}

fn decode<'a, T: serde::Deserialize<'a>>(payload: &'a [u8]) -> Result<T, GuestError> {
    // The error quotes what was not expected.
    serde_json::from_slice(payload)
        .map_err(|error| GuestError::Protocol(words::text(&error.to_string())))
}

/// Serves until the connection ends; the reason is returned.
async fn read_frames(reader: &mut (impl AsyncRead + Unpin), shared: &Arc<Shared>) -> GuestError {
    // The frames come through a buffer: small ones cost no system call each.
    let mut reader = tokio::io::BufReader::with_capacity(2 * MAX_PAYLOAD, reader);
    loop {
        let (header, payload) = match read_frame(&mut reader).await {
            Ok(frame) => frame,
            Err(error) => return error,
        };
        if let Err(error) = dispatch(header, payload, shared) {
            return error;
        }
    }
}

fn dispatch(header: Header, payload: Vec<u8>, shared: &Arc<Shared>) -> Result<(), GuestError> {
    let Header { stream, kind, .. } = header;
    let state = lock(&shared.streams).open.get(&stream).cloned();
    let Some(state) = state else {
        return Err(GuestError::Protocol(format!(
            "{kind:?} on stream {stream}, which is not open"
        )));
    };
    match kind {
        Kind::Out | Kind::Err => {
            if state.receive(kind, &payload)? {
                // Nobody reads this stream any more: the window goes straight
                // back, by one task for all that comes.
                let shared = Arc::clone(shared);
                tokio::spawn(async move {
                    while let Some(discarded) = state.discarded() {
                        let credit = frame(stream, Kind::Credit, &discarded.to_le_bytes());
                        if shared.send(credit).await.is_err() {
                            return;
                        }
                    }
                });
            }
        }
        Kind::Reply => state.reply(words::reply(decode(&payload)?))?,
        Kind::Credit => {
            let bytes = payload
                .try_into()
                .map_err(|_| GuestError::Protocol("a Credit that is not four bytes".into()))?;
            state.credit(u32::from_le_bytes(bytes))?;
        }
        Kind::Exit => {
            let exit = words::exit(decode(&payload)?);
            lock(&shared.streams).open.remove(&stream);
            state.exit(exit);
        }
        Kind::Hello | Kind::Open | Kind::In | Kind::End | Kind::Control => {
            return Err(GuestError::Protocol(format!("{kind:?} from the guest")));
        }
    }
    Ok(())
}
