//! Who asks: another command, that reaches a machine through its owner.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_agent::Info;
use serde::Serialize;
use tokio::net::UnixStream;

use super::{Answer, Ask, ControlError, QgaInfo, read_line, write_line};
use crate::host::fault;
use crate::run::dirs::Dirs;
use crate::run::verify::Finding;
use crate::spec::{NetworkChange, VmId};

/// How long the owner of a machine may take to answer.
const ANSWER: Duration = Duration::from_secs(20);

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
