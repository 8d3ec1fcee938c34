//! Who answers: the owner of a machine, at its control socket.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_agent::Reply;
use serde::Serialize;
use tokio::io::AsyncReadExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Mutex, mpsc};
use tokio::task::AbortHandle;

use super::{Answer, Ask, ControlError, QgaInfo, read_bytes, write_line};
use crate::error::Report;
use crate::guest::Channel;
use crate::host::fault;
use crate::host::lease::Lease;
use crate::qmp::GuestAgent;
use crate::run::dirs::Dirs;
use crate::run::machine::Machine;
use crate::run::retune::Retune;
use crate::run::transfer::joined;
use crate::run::verify::Subject;
use crate::run::{MachineError, RunError};
use crate::spec::{NetworkChange, Spec};

/// How long a request may take to arrive and qemu-guest-agent to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Pause after a connection that could not be accepted.
const RETRY: Duration = Duration::from_millis(100);

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
pub(in crate::run) async fn serve(
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

#[cfg(test)]
mod tests {
    use super::super::Controller;
    use super::*;
    use crate::spec::VmId;

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
