//! The QMP monitor of one QEMU process.

use std::{os::fd::OwnedFd, time::Duration};

use qapi::qmp::{self, QmpCommand};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;
use tokio::net::UnixStream;

use super::{
    error::{ConnectionEnd, Peer, QmpError, quote},
    event::Events,
    message::Lines,
    schema::{Schema, SchemaError},
    transport::Connection,
};

/// Longest message accepted from QEMU, in bytes. The largest known reply,
/// `query-qmp-schema`, has 236 kB in QEMU 10.0.
const MAX_LINE: usize = 4 * 1024 * 1024;
/// How long a command may take unless [`Monitor::with_timeout`] says otherwise.
const TIMEOUT: Duration = Duration::from_secs(30);

/// The monitor of a QEMU process. Clones share the connection.
///
/// Any number of commands can be under way at once; QEMU runs them in the
/// order in which they were first polled. Dropping the future of a command
/// gives up its reply and leaves the connection in order.
#[derive(Debug, Clone)]
pub struct Monitor {
    connection: Connection,
    timeout: Duration,
    version: Version,
}

/// A QEMU version, for people to read: what to do is decided by [`Schema`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Version {
    /// Major, as in 7.2.22.
    pub major: u32,
    /// Minor.
    pub minor: u32,
    /// Micro.
    pub micro: u32,
    /// What the distribution calls it; may be empty.
    pub package: String,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

impl Monitor {
    /// Waits for QEMU's greeting on its socket and enters command mode, both
    /// within `deadline`.
    ///
    /// # Errors
    /// No greeting in time, something else than QEMU at the other end, or the
    /// end of the connection.
    pub async fn connect(stream: UnixStream, deadline: Duration) -> Result<Self, QmpError> {
        let ready = tokio::time::timeout(deadline, Self::negotiate(stream, deadline));
        ready.await.unwrap_or(Err(QmpError::Greeting {
            peer: Peer::Monitor,
            after: deadline,
        }))
    }

    async fn negotiate(stream: UnixStream, deadline: Duration) -> Result<Self, QmpError> {
        let peer = Peer::Monitor;
        let (reader, writer) = stream.into_split();
        let mut lines = Lines::new(reader, MAX_LINE);
        let greeting = lines.next().await.map_err(|source| QmpError::Closed {
            peer,
            command: "qmp_capabilities".into(),
            source,
        })?;
        let version = Version::greeted(greeting).ok_or_else(|| {
            let start = &greeting[..greeting.len().min(64)];
            let said = quote(&String::from_utf8_lossy(start));
            QmpError::Stranger { peer, said }
        })?;
        let monitor = Self {
            connection: Connection::start(peer, lines, writer),
            // QEMU greets early, and answers once its machine is made.
            timeout: deadline,
            version,
        };
        monitor
            .execute(qmp::qmp_capabilities { enable: None })
            .await?;
        Ok(monitor.with_timeout(TIMEOUT))
    }

    /// The version QEMU gave in its greeting.
    pub fn version(&self) -> &Version {
        &self.version
    }

    /// The same connection with another time limit for each command.
    #[must_use]
    pub fn with_timeout(&self, timeout: Duration) -> Self {
        Self {
            timeout,
            ..self.clone()
        }
    }

    /// Runs a command.
    ///
    /// qapi's reply enums are closed: where a reply lists values that differ
    /// between versions, use [`Monitor::execute_into`] with a type of your own.
    ///
    /// # Errors
    /// QEMU's refusal, a timeout, the connection's end, or a reply that does
    /// not decode.
    pub async fn execute<C: QmpCommand>(&self, command: C) -> Result<C::Ok, QmpError> {
        self.execute_into(command).await
    }

    /// Runs a command and decodes its reply as a type of the caller's.
    ///
    /// # Errors
    /// As [`Monitor::execute`].
    pub async fn execute_into<T: DeserializeOwned>(
        &self,
        command: impl QmpCommand,
    ) -> Result<T, QmpError> {
        self.run(command, None).await
    }

    /// Runs a command that qapi has no type for. `arguments` is an object, or
    /// null for none.
    ///
    /// # Errors
    /// As [`Monitor::execute`], but for decoding.
    pub async fn execute_raw(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let call = self.connection.call(command, arguments, None, self.timeout);
        call.await
    }

    /// Gives QEMU a descriptor under a name (`getfd`), for arguments such as
    /// `fd:NAME`. An earlier one of that name is closed.
    ///
    /// # Errors
    /// As [`Monitor::execute`].
    pub async fn send_fd(&self, name: &str, fd: OwnedFd) -> Result<(), QmpError> {
        let fdname = name.to_owned();
        self.run::<_, qapi::Empty>(qmp::getfd { fdname }, Some(fd))
            .await?;
        Ok(())
    }

    /// Adds a descriptor to the set `set`, for `/dev/fdset/SET` in place of a
    /// path (`add-fd`), and returns its number inside QEMU.
    ///
    /// # Errors
    /// As [`Monitor::execute`].
    pub async fn add_fd(&self, set: u32, fd: OwnedFd) -> Result<i64, QmpError> {
        let command = qmp::add_fd {
            fdset_id: Some(set.into()),
            opaque: None,
        };
        let added: qmp::AddfdInfo = self.run(command, Some(fd)).await?;
        Ok(added.fd)
    }

    /// Everything this QEMU offers.
    ///
    /// # Errors
    /// As [`Monitor::execute`].
    pub async fn schema(&self) -> Result<Schema, QmpError> {
        let command = "query-qmp-schema";
        let reply = self.execute_raw(command, Value::Null).await?;
        Schema::from_value(reply).map_err(|SchemaError::Decode(source)| QmpError::Decode {
            peer: Peer::Monitor,
            command: command.to_owned(),
            source,
        })
    }

    /// Asks QEMU to exit and waits for the end of the connection.
    ///
    /// # Errors
    /// QEMU refused, or is still there after the time limit.
    pub async fn quit(&self) -> Result<(), QmpError> {
        match self.execute(qmp::quit {}).await {
            Ok(_) => {}
            // It may be gone before its reply is out.
            Err(error) if error.is_closed() => return Ok(()),
            Err(error) => return Err(error),
        }
        match tokio::time::timeout(self.timeout, self.closed()).await {
            Ok(_) => Ok(()),
            Err(_) => Err(QmpError::Timeout {
                peer: Peer::Monitor,
                command: "quit".into(),
                after: self.timeout,
            }),
        }
    }

    /// Events from now on: subscribe before the command that causes them.
    pub fn events(&self) -> Events {
        self.connection.events()
    }

    /// Waits for the end of the connection and says why it came.
    pub async fn closed(&self) -> ConnectionEnd {
        self.connection.closed().await
    }

    async fn run<C: QmpCommand, T: DeserializeOwned>(
        &self,
        command: C,
        fd: Option<OwnedFd>,
    ) -> Result<T, QmpError> {
        call(&self.connection, command, fd, self.timeout, Peer::Monitor).await
    }
}

/// Runs a typed command over `connection`.
pub(super) async fn call<C: qapi::Command, T: DeserializeOwned>(
    connection: &Connection,
    command: C,
    fd: Option<OwnedFd>,
    timeout: Duration,
    peer: Peer,
) -> Result<T, QmpError> {
    let arguments = serde_json::to_value(&command).map_err(|source| QmpError::Encode {
        peer,
        command: C::NAME.to_owned(),
        source,
    })?;
    let reply = connection.call(C::NAME, arguments, fd, timeout).await?;
    serde_json::from_value(reply).map_err(|source| QmpError::Decode {
        peer,
        command: C::NAME.to_owned(),
        source,
    })
}

impl Version {
    /// Out of `{"QMP": {"version": {"qemu": {...}, "package": ...}, ...}}`.
    fn greeted(line: &[u8]) -> Option<Self> {
        let greeting: Value = serde_json::from_slice(line).ok()?;
        let version = greeting.get("QMP")?.get("version")?;
        let number = |name| u32::try_from(version["qemu"][name].as_u64()?).ok();
        Some(Self {
            major: number("major")?,
            minor: number("minor")?,
            micro: number("micro")?,
            package: quote(version["package"].as_str().unwrap_or_default()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_version_out_of_a_greeting() {
        let greeting = br#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7},
            "package": "Debian"}, "capabilities": ["oob", "never-seen"]}}"#;
        let version = Version::greeted(greeting).unwrap();
        assert_eq!(version.to_string(), "7.2.22");
        assert_eq!(version.package, "Debian");
        for other in [
            &b"SSH-2.0"[..],
            b"{\"QMP\": 1}",
            b"{\"QMP\": {\"version\": {\"qemu\": []}}}",
        ] {
            assert_eq!(Version::greeted(other), None);
        }
    }
}
