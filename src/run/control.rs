//! A socket through which other commands reach a running machine.
//!
//! One request a connection: a line of JSON, answered by a line of JSON. After
//! a granted `console` the connection carries the console's bytes.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_agent::{Info, Reply};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Mutex;
use tokio::task::AbortHandle;

use super::dirs::Dirs;
use super::machine::Machine;
use super::{MachineError, RunError};
use crate::error::{Explain, Report};
use crate::guest::Channel;
use crate::host::lease::Lease;
use crate::qmp::GuestAgent;
use crate::spec::{Spec, VmId};

/// Longest request or answer, in bytes.
const MAX_LINE: u64 = 1 << 20;
/// How long a request may take to arrive and qemu-guest-agent to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the owner of a machine may take to answer.
const ANSWER: Duration = Duration::from_secs(20);
/// Pause after a connection that could not be accepted.
const RETRY: Duration = Duration::from_millis(100);

/// What can be asked of a running machine.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "kebab-case", deny_unknown_fields)]
enum Ask {
    /// What the guest agent says of the guest.
    Guest,
    /// What qemu-guest-agent says of it.
    Qga,
    /// The emergency console.
    Console,
}

/// The answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Answer {
    Guest(Info),
    Qga(serde_json::Value),
    Console,
    Refused(Report),
}

/// A machine could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// No such machine, or its owner does not answer.
    #[error("cannot reach a machine named {id}")]
    Unreachable {
        /// The name.
        id: VmId,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The owner refused.
    #[error("{}{}{}", .0.what, if .0.cause.is_empty() { "" } else { ": " }, .0.cause)]
    Refused(Report),
    /// The answer is not the one to the question.
    #[error("the owner of {id} gave no proper answer")]
    Answer {
        /// The name.
        id: VmId,
    },
    /// qemu-guest-agent is not there, or its port is taken.
    #[error("no qemu-guest-agent answers in the guest")]
    NoQga,
    /// The console is open elsewhere.
    #[error("the console of this machine is open elsewhere")]
    ConsoleTaken,
}

impl Explain for ControlError {
    fn code(&self) -> &'static str {
        match self {
            Self::Unreachable { .. } => "machine-not-found",
            Self::Refused(_) => "machine-refused",
            Self::Answer { .. } => "machine-answer",
            Self::NoQga => "qga-missing",
            Self::ConsoleTaken => "console-taken",
        }
    }

    fn remedy(&self) -> String {
        match self {
            Self::Unreachable { .. } => {
                "See `bulkhead gc --dry-run` for the machines there are.".into()
            }
            Self::Refused(report) => report.remedy.clone(),
            Self::Answer { .. } => {
                "Use the bulkhead of the same version as the machine's owner.".into()
            }
            Self::NoQga => {
                "Start qemu-guest-agent in the guest, or ask Bulkhead's own agent (without --qga)."
                    .into()
            }
            Self::ConsoleTaken => "Close it there first.".into(),
        }
    }
}

/// Serves a machine's control socket until it is dropped.
#[derive(Debug)]
pub(super) struct Server {
    path: PathBuf,
    task: AbortHandle,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
        let _ = std::fs::remove_file(&self.path);
    }
}

/// What connections have in common.
struct Serving {
    channel: Channel,
    console: Mutex<Option<UnixStream>>,
    qga: Mutex<Option<Qga>>,
}

/// qemu-guest-agent's port, before and after its first use.
enum Qga {
    Port(UnixStream),
    Connected(GuestAgent),
}

/// Opens the control socket of `machine`.
pub(super) async fn serve(
    dirs: &Dirs,
    spec: &Spec,
    machine: &mut Machine,
) -> Result<Server, RunError> {
    let path = dirs.control_socket(&spec.id);
    machine.lease(Lease::File { path: path.clone() })?;
    let _ = std::fs::remove_file(&path);
    // The directory keeps others out; the credentials are checked besides.
    let listener = UnixListener::bind(&path).map_err(|source| MachineError::Io {
        action: "make the control socket",
        path: path.clone(),
        source,
    })?;
    let serving = Arc::new(Serving {
        channel: machine.channel().clone(),
        console: Mutex::new(machine.take_emergency_console()),
        qga: Mutex::new(machine.take_qga().map(Qga::Port)),
    });
    let task = tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((connection, _)) if allowed(&connection) => {
                    let serving = Arc::clone(&serving);
                    tokio::spawn(async move { serving.answer(connection).await });
                }
                Ok(_) => {}
                // No descriptor left, perhaps: others may be given back.
                Err(_) => tokio::time::sleep(RETRY).await,
            }
        }
    });
    Ok(Server {
        path,
        task: task.abort_handle(),
    })
}

/// Only the owner and root may ask.
fn allowed(connection: &UnixStream) -> bool {
    let ours = nix::unistd::geteuid().as_raw();
    connection
        .peer_cred()
        .is_ok_and(|peer| peer.uid() == ours || peer.uid() == 0)
}

impl Serving {
    async fn answer(&self, mut connection: UnixStream) -> Option<()> {
        let ask: Ask = tokio::time::timeout(PATIENCE, read_line(&mut connection))
            .await
            .ok()?
            .ok()?;
        let answer = match ask {
            Ask::Guest => self.guest().await,
            Ask::Qga => self.qga().await,
            Ask::Console => return self.console(connection).await,
        };
        write_line(&mut connection, &answer).await.ok()
    }

    async fn guest(&self) -> Answer {
        let ask = bulkhead_agent::Request::Info;
        match self.channel.ask("describe itself", &ask, PATIENCE).await {
            Ok(Reply::Info(info)) => Answer::Guest(info),
            Ok(other) => {
                let error = crate::guest::GuestError::Protocol(format!("{other:?} to Info"));
                Answer::Refused(Report::of(&error))
            }
            Err(error) => Answer::Refused(Report::of(&error)),
        }
    }

    async fn qga(&self) -> Answer {
        match self.ask_qga().await {
            Some(value) => Answer::Qga(value),
            None => Answer::Refused(Report::of(&ControlError::NoQga)),
        }
    }

    async fn ask_qga(&self) -> Option<serde_json::Value> {
        let mut qga = self.qga.lock().await;
        let agent = match qga.take()? {
            Qga::Connected(agent) => agent,
            Qga::Port(port) => {
                // A copy of the descriptor: a failed try can be repeated.
                let std = port.into_std().ok()?;
                let copy = std.try_clone().ok()?;
                *qga = Some(Qga::Port(UnixStream::from_std(std).ok()?));
                GuestAgent::connect(UnixStream::from_std(copy).ok()?, PATIENCE)
                    .await
                    .ok()?
            }
        };
        *qga = Some(Qga::Connected(agent.clone()));
        let (os, interfaces) = (agent.os().await.ok()?, agent.interfaces().await.ok()?);
        serde_json::to_value(serde_json::json!({ "os": os, "interfaces": interfaces })).ok()
    }

    async fn console(&self, mut connection: UnixStream) -> Option<()> {
        let Ok(mut console) = self.console.try_lock() else {
            let taken = Answer::Refused(Report::of(&ControlError::ConsoleTaken));
            return write_line(&mut connection, &taken).await.ok();
        };
        let console = console.as_mut()?;
        write_line(&mut connection, &Answer::Console).await.ok()?;
        // The console outlives the connection: neither side is shut down.
        let (mut from_user, mut to_user) = connection.split();
        let (mut from_guest, mut to_guest) = console.split();
        tokio::select! {
            _ = tokio::io::copy(&mut from_user, &mut to_guest) => {}
            _ = tokio::io::copy(&mut from_guest, &mut to_user) => {}
        }
        Some(())
    }
}

async fn read_line<T: serde::de::DeserializeOwned>(connection: &mut UnixStream) -> io::Result<T> {
    // Byte by byte: what follows the line belongs to the console.
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        if line.len() as u64 > MAX_LINE {
            return Err(io::ErrorKind::InvalidData.into());
        }
        line.push(connection.read_u8().await?);
    }
    Ok(serde_json::from_slice(&line)?)
}

async fn write_line(connection: &mut UnixStream, value: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    connection.write_all(&line).await
}

/// Bounds what the owner may take; it may be stopped.
async fn in_time<T>(answer: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    match tokio::time::timeout(ANSWER, answer).await {
        Ok(answer) => answer,
        Err(_) => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "its owner does not answer",
        )),
    }
}

/// Reaches a running machine through its owner.
#[derive(Debug, Clone)]
pub struct Controller {
    id: VmId,
    path: PathBuf,
}

impl Controller {
    /// The machine named `id` of the host with `dirs`.
    pub fn new(dirs: &Dirs, id: VmId) -> Self {
        Self {
            path: dirs.control_socket(&id),
            id,
        }
    }

    /// What the guest agent says of the guest. Not to be trusted.
    ///
    /// # Errors
    /// No such machine, or the guest does not answer.
    pub async fn guest(&self) -> Result<Info, ControlError> {
        match self.ask(Ask::Guest).await? {
            Answer::Guest(info) => Ok(info),
            _ => Err(self.confused()),
        }
    }

    /// What qemu-guest-agent says of the guest, as `{os, interfaces}` in its
    /// own words. Not to be trusted.
    ///
    /// # Errors
    /// No such machine, or no qemu-guest-agent in it.
    pub async fn qga(&self) -> Result<serde_json::Value, ControlError> {
        match self.ask(Ask::Qga).await? {
            Answer::Qga(value) => Ok(value),
            _ => Err(self.confused()),
        }
    }

    /// The emergency console: bytes to and from a root shell.
    ///
    /// # Errors
    /// No such machine, or the console is open elsewhere.
    pub async fn console(&self) -> Result<UnixStream, ControlError> {
        let mut connection = self.connect().await?;
        let answer = in_time(async {
            write_line(&mut connection, &Ask::Console).await?;
            read_line::<Answer>(&mut connection).await
        });
        match answer.await.map_err(|source| self.unreachable(source))? {
            Answer::Console => Ok(connection),
            Answer::Refused(report) => Err(ControlError::Refused(report)),
            _ => Err(self.confused()),
        }
    }

    async fn ask(&self, ask: Ask) -> Result<Answer, ControlError> {
        let mut connection = self.connect().await?;
        let answer = in_time(async {
            write_line(&mut connection, &ask).await?;
            let mut line = Vec::new();
            BufReader::new(connection)
                .take(MAX_LINE)
                .read_until(b'\n', &mut line)
                .await?;
            Ok(serde_json::from_slice::<Answer>(&line)?)
        });
        match answer.await.map_err(|source| self.unreachable(source))? {
            Answer::Refused(report) => Err(ControlError::Refused(report)),
            answer => Ok(answer),
        }
    }

    async fn connect(&self) -> Result<UnixStream, ControlError> {
        let path: &Path = &self.path;
        UnixStream::connect(path)
            .await
            .map_err(|source| self.unreachable(source))
    }

    fn unreachable(&self, source: io::Error) -> ControlError {
        ControlError::Unreachable {
            id: self.id.clone(),
            source,
        }
    }

    fn confused(&self) -> ControlError {
        ControlError::Answer {
            id: self.id.clone(),
        }
    }
}
