//! From one `Hello` of the host to the next: the streams and who works on them.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_agent::{
    Control, Exit, Header, Hello, Kind, Life, MAX_STREAMS, Reply, Request, VERSION,
};

use super::outbox::Outbox;
use super::stream::{Stream, Violation};
use super::wire::Reader;
use super::{Role, Server};
use crate::channel::Channel;
use crate::clone::{Lives, boot_id};
use crate::console::complain;
use crate::exec::{self, Command};
use crate::failure::{Result, invalid};
use crate::{files, forward, identity, info};

/// Why a session is over.
pub(super) enum End {
    /// The host closed its end, or the channel broke.
    Gone,
    /// The host said `Hello` again.
    Again,
    /// The host broke the rules.
    Violation(Violation),
    /// The machine is to power off.
    PowerOff,
}

/// What happens on a stream.
#[derive(Debug)]
struct Entry {
    stream: Arc<Stream>,
    /// The command, unless it is a transfer.
    command: Option<Arc<Command>>,
}

type Streams = Arc<Mutex<HashMap<u32, Entry>>>;

/// One session.
#[derive(Debug)]
pub(super) struct Session {
    server: Arc<Server>,
    outbox: Arc<Outbox>,
    streams: Streams,
    accepted: bool,
}

impl Session {
    pub(super) fn new(server: &Arc<Server>) -> Self {
        Self {
            server: Arc::clone(server),
            outbox: Arc::new(Outbox::new()),
            streams: Streams::default(),
            accepted: false,
        }
    }

    pub(super) fn outbox(&self) -> Arc<Outbox> {
        Arc::clone(&self.outbox)
    }

    fn streams(&self) -> MutexGuard<'_, HashMap<u32, Entry>> {
        lock(&self.streams)
    }

    /// Sends our `Hello`.
    pub(super) fn greet(&self) {
        let hello = Hello {
            version: VERSION,
            program: env!("CARGO_PKG_VERSION").into(),
            boot_id: boot_id(),
        };
        self.outbox.send_urgent(0, Kind::Hello, &hello);
    }

    /// The host's `Hello` was read already.
    pub(super) fn accept(&mut self) {
        self.accepted = true;
    }

    /// Serves the host's next frame; gives the end when that is what it was. The
    /// host's first `Hello` answers ours when it is `expected`, and is answered
    /// with ours otherwise. Cancel-safe.
    pub(super) async fn step(
        &mut self,
        reader: &mut Reader,
        channel: &Channel,
        expected: bool,
    ) -> Option<End> {
        if !self.accepted {
            return self.accept_hello(reader, channel, expected).await;
        }
        self.outbox.calm().await;
        let (header, payload) = match reader.frame(channel).await {
            Ok(Ok(Some(frame))) => frame,
            Ok(Ok(None)) => return Some(End::Gone),
            Ok(Err(violation)) => return Some(End::Violation(violation)),
            Err(error) => return Some(gone(&error)),
        };
        self.handle(header, payload)
            .unwrap_or_else(|violation| Some(End::Violation(violation)))
    }

    async fn accept_hello(
        &mut self,
        reader: &mut Reader,
        channel: &Channel,
        expected: bool,
    ) -> Option<End> {
        // What comes before is the rest of something older.
        match reader.hello(channel).await {
            Ok(Some(hello)) if hello.version == VERSION => self.accepted = true,
            Ok(Some(hello)) => return Some(End::Violation(version_message(&hello))),
            Ok(None) => return Some(End::Gone),
            Err(error) => return Some(gone(&error)),
        }
        if !expected {
            self.greet();
        }
        None
    }

    fn handle(&mut self, header: Header, payload: Vec<u8>) -> Result<Option<End>, Violation> {
        let id = header.stream;
        match header.kind {
            Kind::Hello => {
                let hello: Hello = parse(&payload)?;
                if hello.version != VERSION {
                    return Err(version_message(&hello));
                }
                return Ok(Some(End::Again));
            }
            Kind::Open => return self.open(id, &payload),
            Kind::Reply | Kind::Out | Kind::Err | Kind::Exit => {
                return Err(format!("{:?} frame from the host", header.kind));
            }
            Kind::In | Kind::End | Kind::Credit | Kind::Control => {}
        }
        let streams = self.streams();
        // The stream may have ended while the frame was on its way.
        let Some(entry) = streams.get(&id) else {
            return Ok(None);
        };
        match header.kind {
            Kind::In => entry.stream.receive(payload)?,
            Kind::End => entry.stream.end_input()?,
            Kind::Credit => {
                let count: [u8; 4] = payload[..]
                    .try_into()
                    .map_err(|_| format!("credit of {} bytes", payload.len()))?;
                entry.stream.credit(u32::from_le_bytes(count))?;
            }
            _ => match (parse(&payload)?, &entry.command) {
                (Control::Signal { signal }, Some(command)) => command.signal(signal),
                (Control::Resize(size), Some(command)) => command.resize(size),
                (Control::Kill, Some(command)) => command.kill(),
                (Control::Kill, None) => entry.stream.cancel(),
                (_, None) => {}
            },
        }
        Ok(None)
    }

    fn open(&mut self, id: u32, payload: &[u8]) -> Result<Option<End>, Violation> {
        let stream = Arc::new(Stream::new(id, Arc::clone(&self.outbox)));
        {
            let streams = self.streams();
            if streams.contains_key(&id) {
                return Err(format!("stream {id} opened twice"));
            }
            if streams.len() >= MAX_STREAMS {
                let failure = invalid(format!("{MAX_STREAMS} streams are open, no more allowed"));
                stream.exit(&stream.refuse(failure));
                return Ok(None);
            }
        }
        let request = match serde_json::from_slice(payload) {
            Ok(request) => request,
            Err(error) => {
                let failure = invalid(format!("cannot understand the request: {error}"));
                stream.exit(&stream.refuse(failure));
                return Ok(None);
            }
        };
        match self.dispatch(&stream, request) {
            Ok(end) => Ok(end),
            Err(failure) => {
                stream.exit(&stream.refuse(failure));
                Ok(None)
            }
        }
    }

    /// Starts the work; a failure here refuses the request.
    fn dispatch(&mut self, stream: &Arc<Stream>, request: Request) -> Result<Option<End>> {
        let at_rest = matches!(
            request,
            Request::Ping
                | Request::Quiesce
                | Request::Restored { .. }
                | Request::Resumed { .. }
                | Request::Clock { .. }
                | Request::Info
                | Request::PowerOff
        );
        if !at_rest {
            self.server.lives.awake()?;
        }
        match request {
            Request::Ping => answer(stream, &Reply::Done),
            Request::Exec(request) => {
                let (command, work) = exec::start(&self.server, Arc::clone(stream), request)?;
                self.follow(stream, Some(command), work);
            }
            Request::PowerOff if self.server.role == Role::Service => {
                return Err(invalid(
                    "this agent is a service of a system it does not power off",
                ));
            }
            Request::PowerOff => {
                answer(stream, &Reply::Done);
                return Ok(Some(End::PowerOff));
            }
            Request::Put { path, user, track } => {
                let (server, own) = (Arc::clone(&self.server), Arc::clone(stream));
                self.follow(stream, None, files::put(server, own, path, user, track));
            }
            Request::Get { path } => {
                self.follow(stream, None, files::get(Arc::clone(stream), path));
            }
            Request::Changes { path } => {
                let (server, own) = (Arc::clone(&self.server), Arc::clone(stream));
                self.follow(stream, None, files::changes(server, own, path));
            }
            Request::Connect { port } => {
                self.follow(stream, None, forward::connect(Arc::clone(stream), port));
            }
            Request::Stat { path } => answer(stream, &files::stat(&path)?),
            Request::Mkdir { path, user } => {
                files::mkdir(&path, user.as_deref())?;
                answer(stream, &Reply::Done);
            }
            Request::Mount9p {
                tag,
                path,
                read_only,
            } => {
                files::mount_9p(&tag, &path, read_only)?;
                answer(stream, &Reply::Done);
            }
            Request::Grow { bytes } => {
                let scratch = self.server.scratch.clone().ok_or_else(|| {
                    invalid("what this machine writes is not kept on a disk that could grow")
                })?;
                let own = Arc::clone(stream);
                let work = files::work(Arc::clone(stream), move || {
                    scratch.grow(bytes)?;
                    own.reply(&Reply::Done);
                    Ok(())
                });
                self.follow(stream, None, work);
            }
            Request::Quiesce => {
                let (server, own) = (Arc::clone(&self.server), Arc::clone(stream));
                let work = files::alone(move || server.lives.quiesce(server.scratch.as_deref()));
                self.follow(stream, None, async move {
                    match work.await {
                        Ok(life) => {
                            own.reply(&Reply::Life(life));
                            done()
                        }
                        Err(failure) => own.refuse(failure),
                    }
                });
            }
            Request::Restored {
                generation,
                identity,
            } => {
                let step = move |lives: &Lives| lives.restored(generation, &identity);
                // A thread is for what takes its time: under emulation the way there
                // and back is a tenth of what a clone does.
                match self.server.lives.is_quick() {
                    true => answer(stream, &Reply::Life(step(&self.server.lives)?)),
                    false => self.live(stream, step),
                }
            }
            Request::Resumed { identity } => {
                self.live(stream, move |lives| lives.resumed(&identity));
            }
            Request::Clock { unix_ns } => {
                let life = self.server.lives.set_clock(unix_ns)?;
                answer(stream, &Reply::Life(life));
            }
            Request::Configure(configure) => {
                identity::apply(&configure, None)?;
                answer(stream, &Reply::Done);
            }
            Request::Info => answer(stream, &Reply::Info(info::collect())),
        }
        Ok(None)
    }

    /// A step from one life to the next; it may wait for disks and programs.
    fn live(
        &self,
        stream: &Arc<Stream>,
        step: impl FnOnce(&Lives) -> Result<Life> + Send + 'static,
    ) {
        let (server, own) = (Arc::clone(&self.server), Arc::clone(stream));
        let work = files::work(Arc::clone(stream), move || {
            own.reply(&Reply::Life(step(&server.lives)?));
            Ok(())
        });
        self.follow(stream, None, work);
    }

    /// Runs `work` to its end, which is the end of the stream.
    fn follow(
        &self,
        stream: &Arc<Stream>,
        command: Option<Arc<Command>>,
        work: impl Future<Output = Exit> + Send + 'static,
    ) {
        let stream = Arc::clone(stream);
        let entry = Entry {
            stream: Arc::clone(&stream),
            command,
        };
        self.streams().insert(stream.id(), entry);
        let streams = Arc::clone(&self.streams);
        tokio::spawn(async move {
            let exit = work.await;
            // Before the host may use the number again.
            lock(&streams).remove(&stream.id());
            stream.exit(&exit);
        });
    }

    /// Ends all streams and what runs behind them.
    pub(super) fn reset(&mut self) {
        self.outbox.close();
        for (_, entry) in self.streams().drain() {
            entry.stream.cancel();
            if let Some(command) = entry.command {
                command.kill();
            }
        }
    }
}

fn lock(streams: &Streams) -> MutexGuard<'_, HashMap<u32, Entry>> {
    streams.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A request that is done with its answer.
fn answer(stream: &Stream, reply: &Reply) {
    stream.reply(reply);
    stream.exit(&done());
}

fn done() -> Exit {
    Exit {
        code: Some(0),
        ..Exit::default()
    }
}

fn parse<T: serde::de::DeserializeOwned>(payload: &[u8]) -> Result<T, Violation> {
    serde_json::from_slice(payload).map_err(|error| format!("cannot understand a message: {error}"))
}

fn version_message(hello: &Hello) -> Violation {
    format!(
        "version {} of the messages, {VERSION} expected",
        hello.version
    )
}

fn gone(error: &std::io::Error) -> End {
    complain!("cannot read from the host: {error}");
    End::Gone
}
