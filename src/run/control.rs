//! A socket through which other commands reach a running machine.
//!
//! One request a connection: a line of JSON, answered by a line of JSON. After
//! a granted `console` the connection carries the console's bytes.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_agent::{Info, Reply};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Mutex, mpsc};
use tokio::task::AbortHandle;

use super::dirs::Dirs;
use super::machine::Machine;
use super::retune::Retune;
use super::transfer::joined;
use super::verify::{Finding, Subject};
use super::{MachineError, RunError};
use crate::error::{Explain, Report};
use crate::guest::Channel;
use crate::host::fault;
use crate::host::lease::Lease;
use crate::qmp::GuestAgent;
use crate::spec::{NetworkChange, Spec, VmId};

/// Longest request or answer, in bytes.
const MAX_LINE: u64 = 1 << 20;
/// How long a request may take to arrive and qemu-guest-agent to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the owner of a machine may take to answer.
const ANSWER: Duration = Duration::from_secs(20);
/// Pause after a connection that could not be accepted.
const RETRY: Duration = Duration::from_millis(100);

/// What can be asked of a running machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "kebab-case", deny_unknown_fields)]
enum Ask {
    /// What the guest agent says of the guest.
    Guest,
    /// What qemu-guest-agent says of it.
    Qga,
    /// The emergency console.
    Console,
    /// What the kernel and QEMU say of its layers.
    Verify,
    /// Change what it may reach. Of a `bulkhead run` only: what a supervisor is
    /// asked for is changed with everything else of its machine.
    Network {
        /// What is to change.
        change: Box<NetworkChange>,
    },
}

/// The answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Answer {
    Guest(Info),
    Qga(QgaInfo),
    Console,
    Verify(Vec<Finding>),
    Changed,
    Refused(Report),
}

/// What qemu-guest-agent says of its guest, in its own words. Not to be trusted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct QgaInfo {
    /// The answer to `guest-get-osinfo`.
    pub os: serde_json::Value,
    /// The answer to `guest-network-get-interfaces`.
    pub interfaces: serde_json::Value,
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
    /// The machine belongs to a `bulkhead run`, or to another version.
    #[error("this cannot be asked of this machine: it belongs to a `bulkhead run`")]
    Attached,
    /// Whoever asks is neither the machine's owner nor root.
    #[error("this machine belongs to user {owner}, and does not listen to user {uid}")]
    Foreign {
        /// Whose it is.
        owner: u32,
        /// Who asks.
        uid: u32,
    },
}

impl Explain for ControlError {
    fn told(&self) -> Option<&Report> {
        match self {
            Self::Refused(report) => Some(report),
            _ => None,
        }
    }

    fn code(&self) -> &'static str {
        match self {
            Self::Unreachable { .. } => "machine-not-found",
            Self::Refused(_) => "machine-refused",
            Self::Answer { .. } => "machine-answer",
            Self::NoQga => "qga-missing",
            Self::ConsoleTaken => "console-taken",
            Self::Attached => "machine-attached",
            Self::Foreign { .. } => "machine-foreign",
        }
    }

    fn remedy(&self) -> String {
        match self {
            Self::Unreachable { .. } => "See `bulkhead ls` for the machines there are.".into(),
            Self::Refused(report) => report.remedy.clone(),
            Self::Answer { .. } => {
                "Use the bulkhead of the same version as the machine's owner.".into()
            }
            Self::NoQga => {
                "Start qemu-guest-agent in the guest, or ask Bulkhead's own agent (without --qga)."
                    .into()
            }
            Self::ConsoleTaken => "Close it there first.".into(),
            Self::Attached => {
                "Interrupt the `bulkhead run`, or make the machine with `bulkhead create`.".into()
            }
            Self::Foreign { owner, .. } => format!("Ask as user {owner}, or as root."),
        }
    }
}

/// A control socket that is listened to; it ends, and its path with it, when
/// this is dropped.
#[derive(Debug)]
pub(crate) struct Listener {
    path: PathBuf,
    task: AbortHandle,
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A request that arrived, not looked into yet.
#[derive(Debug)]
pub(crate) struct Asked {
    line: Vec<u8>,
    connection: UnixStream,
    /// Who asks.
    pub(crate) uid: u32,
}

impl Asked {
    /// The request, in the asker's words.
    pub(crate) fn decode<T: serde::de::DeserializeOwned>(&self) -> Option<T> {
        serde_json::from_slice(&self.line).ok()
    }

    /// Answers; the asker may be gone.
    pub(crate) async fn answer(self, answer: &impl Serialize) {
        let _ = self.grant(answer).await;
    }

    /// Waits until whoever asked is gone.
    pub(crate) async fn gone(&mut self) {
        while self.connection.read_u8().await.is_ok() {}
    }

    /// Answers, and gives the connection for what follows.
    pub(crate) async fn grant(mut self, answer: &impl Serialize) -> io::Result<UnixStream> {
        let answered = write_line(&mut self.connection, answer);
        match tokio::time::timeout(PATIENCE, answered).await {
            Ok(Ok(())) => Ok(self.connection),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

/// Whether somebody listens there already: two state directories may share one
/// runtime directory, and have machines of one name. To be asked before the
/// path is written down, for what is written down is removed.
pub(crate) fn is_served(path: &Path) -> bool {
    std::os::unix::net::UnixStream::connect(path).is_ok()
}

/// Opens a control socket and gives the requests that arrive on it. The caller
/// has written `path` down.
pub(crate) fn listen(path: PathBuf) -> io::Result<(Listener, mpsc::Receiver<Asked>)> {
    let _ = std::fs::remove_file(&path);
    // The directory keeps others out; the credentials are checked besides.
    fault::at("bind control socket")?;
    let listener = UnixListener::bind(&path)?;
    fault::at("bound control socket")?;
    let (sender, asked) = mpsc::channel(16);
    let task = tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((connection, _)) => match connection.peer_cred().map(|peer| peer.uid()) {
                    Ok(uid) if allowed(uid) => {
                        tokio::spawn(receive(connection, uid, sender.clone()));
                    }
                    Ok(uid) => refuse(connection, uid),
                    Err(_) => {}
                },
                // No descriptor left, perhaps: others may be given back.
                Err(_) => tokio::time::sleep(RETRY).await,
            }
        }
    });
    let task = task.abort_handle();
    Ok((Listener { path, task }, asked))
}

async fn receive(mut connection: UnixStream, uid: u32, sender: mpsc::Sender<Asked>) {
    let line = tokio::time::timeout(PATIENCE, read_bytes(&mut connection)).await;
    if let Ok(Ok(line)) = line {
        let asked = Asked {
            line,
            connection,
            uid,
        };
        // Nobody answers any more: the asker sees the end of the connection.
        let _ = sender.send(asked).await;
    }
}

/// Whether this user is the owner or root.
fn allowed(uid: u32) -> bool {
    uid == owner() || uid == 0
}

fn owner() -> u32 {
    nix::unistd::geteuid().as_raw()
}

/// Says why nobody listens. Nothing of what is asked is read, and nothing is
/// waited for: a socket that is new has space for a line.
fn refuse(connection: UnixStream, uid: u32) {
    let foreign = ControlError::Foreign {
        owner: owner(),
        uid,
    };
    let answer = Answer::Refused(Report::of(&foreign));
    if let (Ok(mut line), Ok(mut connection)) = (serde_json::to_vec(&answer), connection.into_std())
    {
        line.push(b'\n');
        let _ = connection.write_all(&line);
    }
}

/// Answers what can be asked of every machine.
#[derive(Debug)]
pub(crate) struct Desk {
    channel: Channel,
    subject: Subject,
    console: Mutex<Option<UnixStream>>,
    qga: Mutex<Option<Qga>>,
    /// What changes its network, where nobody else does.
    retune: Option<Arc<Retune>>,
}

/// qemu-guest-agent's port, before and after its first use.
#[derive(Debug)]
enum Qga {
    Port(UnixStream),
    Connected(GuestAgent),
}

/// Opens the control socket of `machine`.
pub(super) async fn serve(
    dirs: &Dirs,
    spec: &Spec,
    machine: &mut Machine,
) -> Result<Listener, RunError> {
    let path = dirs.control_socket(&spec.id);
    machine.lease(Lease::File { path: path.clone() })?;
    let (listener, mut asked) = listen(path.clone()).map_err(|source| MachineError::Io {
        action: "make the control socket",
        path,
        source,
    })?;
    let mut desk = Desk::new(machine);
    desk.retune = Some(Arc::new(Retune::new(machine, spec)));
    let desk = Arc::new(desk);
    tokio::spawn(async move {
        while let Some(asked) = asked.recv().await {
            let desk = Arc::clone(&desk);
            tokio::spawn(async move { desk.answer(asked).await });
        }
    });
    Ok(listener)
}

impl Desk {
    /// For this machine, whose consoles it takes.
    pub(crate) fn new(machine: &mut Machine) -> Self {
        Self {
            channel: machine.channel().clone(),
            subject: machine.subject(),
            console: Mutex::new(machine.take_emergency_console()),
            qga: Mutex::new(machine.take_qga().map(Qga::Port)),
            retune: None,
        }
    }

    /// Answers one request.
    pub(crate) async fn answer(&self, asked: Asked) -> Option<()> {
        let answer = match asked.decode() {
            Some(Ask::Guest) => self.guest().await,
            Some(Ask::Qga) => self.qga().await,
            Some(Ask::Verify) => match self.subject.verify().await {
                Ok(findings) => Answer::Verify(findings),
                Err(error) => Answer::Refused(Report::of(&error)),
            },
            Some(Ask::Console) => return self.console(asked).await,
            Some(Ask::Network { change }) => self.change(change).await,
            None => Answer::Refused(Report::of(&ControlError::Attached)),
        };
        asked.answer(&answer).await;
        Some(())
    }

    async fn change(&self, change: Box<NetworkChange>) -> Answer {
        let Some(retune) = self.retune.clone() else {
            return Answer::Refused(Report::of(&ControlError::Answer {
                id: self.subject.plan.id.clone(),
            }));
        };
        let work = tokio::task::spawn_blocking(move || retune.change(&change));
        match joined(work.await) {
            Ok(()) => Answer::Changed,
            Err(error) => Answer::Refused(Report::of(&error)),
        }
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
            Some(info) => Answer::Qga(info),
            None => Answer::Refused(Report::of(&ControlError::NoQga)),
        }
    }

    async fn ask_qga(&self) -> Option<QgaInfo> {
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
        Some(QgaInfo {
            os: serde_json::to_value(os).ok()?,
            interfaces: serde_json::to_value(interfaces).ok()?,
        })
    }

    async fn console(&self, asked: Asked) -> Option<()> {
        let Ok(mut console) = self.console.try_lock() else {
            let taken = Answer::Refused(Report::of(&ControlError::ConsoleTaken));
            asked.answer(&taken).await;
            return Some(());
        };
        let console = console.as_mut()?;
        let mut connection = asked.grant(&Answer::Console).await.ok()?;
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
    Ok(serde_json::from_slice(&read_bytes(connection).await?)?)
}

async fn read_bytes(connection: &mut UnixStream) -> io::Result<Vec<u8>> {
    // Byte by byte: what follows the line belongs to the console.
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        if line.len() as u64 > MAX_LINE {
            return Err(io::ErrorKind::InvalidData.into());
        }
        line.push(connection.read_u8().await?);
    }
    Ok(line)
}

async fn write_line(connection: &mut UnixStream, value: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    connection.write_all(&line).await
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

    /// What qemu-guest-agent says of the guest.
    ///
    /// # Errors
    /// No such machine, or no qemu-guest-agent in it.
    pub async fn qga(&self) -> Result<QgaInfo, ControlError> {
        match self.ask(Ask::Qga).await? {
            Answer::Qga(info) => Ok(info),
            _ => Err(self.confused()),
        }
    }

    /// What the kernel and QEMU say of its layers.
    ///
    /// # Errors
    /// No such machine, or its VMM is gone.
    pub async fn verify(&self) -> Result<Vec<Finding>, ControlError> {
        match self.ask(Ask::Verify).await? {
            Answer::Verify(findings) => Ok(findings),
            _ => Err(self.confused()),
        }
    }

    /// Changes what the machine of a `bulkhead run` may reach, at once.
    ///
    /// # Errors
    /// No such machine, it has a supervisor, or it cannot be so.
    pub async fn set_network(&self, change: &NetworkChange) -> Result<(), ControlError> {
        let change = Box::new(change.clone());
        match self.ask(Ask::Network { change }).await? {
            Answer::Changed => Ok(()),
            _ => Err(self.confused()),
        }
    }

    /// The emergency console: bytes to and from a root shell.
    ///
    /// # Errors
    /// No such machine, or the console is open elsewhere.
    pub async fn console(&self) -> Result<UnixStream, ControlError> {
        match self.open(&Ask::Console, ANSWER).await? {
            (Answer::Console, connection) => Ok(connection),
            (Answer::Refused(report), _) => Err(ControlError::Refused(report)),
            _ => Err(self.confused()),
        }
    }

    async fn ask(&self, ask: Ask) -> Result<Answer, ControlError> {
        match self.call(&ask, ANSWER).await? {
            Answer::Refused(report) => Err(ControlError::Refused(report)),
            answer => Ok(answer),
        }
    }

    /// Asks one thing, and waits for the answer up to `within`.
    pub(crate) async fn call<T: serde::de::DeserializeOwned>(
        &self,
        ask: &impl Serialize,
        within: Duration,
    ) -> Result<T, ControlError> {
        Ok(self.open(ask, within).await?.0)
    }

    /// Asks one thing, and gives the connection besides the answer.
    pub(crate) async fn open<T: serde::de::DeserializeOwned>(
        &self,
        ask: &impl Serialize,
        within: Duration,
    ) -> Result<(T, UnixStream), ControlError> {
        let mut connection = self.connect().await?;
        let answer = async {
            fault::at("ask owner")?;
            let asked = write_line(&mut connection, ask).await;
            fault::at("asked owner")?;
            let answer = read_line::<T>(&mut connection).await;
            // Whoever is refused at once may find nobody there to ask, but an answer.
            answer.map_err(|error| asked.err().unwrap_or(error))
        };
        let answer = match tokio::time::timeout(within, answer).await {
            Ok(answer) => answer,
            Err(_) => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "its owner does not answer",
            )),
        };
        let answer = answer.map_err(|source| self.unreachable(source))?;
        Ok((answer, connection))
    }

    async fn connect(&self) -> Result<UnixStream, ControlError> {
        let path: &Path = &self.path;
        let connect = async {
            fault::at("connect to owner")?;
            UnixStream::connect(path).await
        };
        connect.await.map_err(|source| self.unreachable(source))
    }

    fn unreachable(&self, source: io::Error) -> ControlError {
        ControlError::Unreachable {
            id: self.id.clone(),
            source,
        }
    }

    pub(crate) fn confused(&self) -> ControlError {
        ControlError::Answer {
            id: self.id.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_is_refused_at_once_hears_why() {
        let dir = tempfile::tempdir().unwrap();
        let dirs = Dirs {
            state: dir.path().join("state"),
            runtime: dir.path().to_owned(),
        };
        let id: VmId = "vm1".parse().unwrap();
        let listener = UnixListener::bind(dirs.control_socket(&id)).unwrap();
        // It is gone before anything can be asked, or while it is.
        tokio::spawn(async move {
            while let Ok((connection, _)) = listener.accept().await {
                refuse(connection, 12_346);
            }
        });
        let controller = Controller::new(&dirs, id);
        for _ in 0..50 {
            let error = controller.verify().await.unwrap_err();
            let report = Report::of(&error);
            assert_eq!(report.code, "machine-foreign", "{report:?}");
            assert!(report.what.ends_with("does not listen to user 12346"));
        }
        assert!(allowed(0) && allowed(owner()) && !allowed(owner() + 1));
    }
}
