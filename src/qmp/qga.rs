//! qemu-guest-agent, for images that carry it.
//!
//! Its port keeps whatever an earlier reader left behind, so a connection
//! starts with `guest-sync-delimited`: the reply is marked by a byte that
//! cannot occur in UTF-8 (QEMU: `qga/qapi-schema.json`).

use std::time::Duration;

use qapi::{
    Command,
    qga::{self, QgaCommand},
};
use serde_json::{Value, json};
use tokio::{
    io::AsyncWriteExt,
    net::{UnixStream, unix::OwnedReadHalf},
};

use super::{
    error::{ConnectionEnd, Peer, QmpError},
    message::Lines,
    monitor::call,
    transport::Connection,
};

/// Longest message accepted from the guest, in bytes.
const MAX_LINE: usize = 1024 * 1024;
/// How long a command may take unless [`GuestAgent::with_timeout`] says otherwise.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Starts over the parser of whoever reads it.
const SENTINEL: u8 = 0xff;

/// qemu-guest-agent at the other end of a virtio-serial port. Clones share the
/// connection. What it says is the guest's word, and nothing may rely on it.
#[derive(Debug, Clone)]
pub struct GuestAgent {
    connection: Connection,
    timeout: Duration,
}

impl GuestAgent {
    /// Discards what lies around in the port and finds the agent, within
    /// `deadline`.
    ///
    /// # Errors
    /// No agent in time, or the end of the connection.
    pub async fn connect(stream: UnixStream, deadline: Duration) -> Result<Self, QmpError> {
        let peer = Peer::GuestAgent;
        match tokio::time::timeout(deadline, Self::synchronise(stream)).await {
            Ok(agent) => agent.map_err(|source| QmpError::Closed {
                peer,
                command: qga::guest_sync_delimited::NAME.into(),
                source,
            }),
            Err(_) => Err(QmpError::Greeting {
                peer,
                after: deadline,
            }),
        }
    }

    async fn synchronise(stream: UnixStream) -> Result<Self, ConnectionEnd> {
        let (reader, mut writer) = stream.into_split();
        let mut lines = Lines::new(reader, MAX_LINE);
        // Any number will do that an earlier handshake did not use.
        let token = std::time::UNIX_EPOCH
            .elapsed()
            .map_or(0, |now| now.as_millis() as u64);
        let request = json!({
            "execute": qga::guest_sync_delimited::NAME,
            "arguments": { "id": token },
        });
        let mut line = vec![SENTINEL];
        line.extend(format!("{request}\n").into_bytes());
        writer.write_all(&line).await?;
        while read_token(&mut lines).await? != Some(token) {}
        Ok(Self {
            connection: Connection::start(Peer::GuestAgent, lines, writer),
            timeout: TIMEOUT,
        })
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
    /// # Errors
    /// The agent's refusal, a timeout, the connection's end, or a reply that
    /// does not decode.
    pub async fn execute<C: QgaCommand>(&self, command: C) -> Result<C::Ok, QmpError> {
        let peer = Peer::GuestAgent;
        call(&self.connection, command, None, self.timeout, peer).await
    }

    /// Version of the agent and the commands it offers.
    ///
    /// # Errors
    /// As [`GuestAgent::execute`].
    pub async fn info(&self) -> Result<qga::GuestAgentInfo, QmpError> {
        self.execute(qga::guest_info {}).await
    }

    /// The guest's operating system.
    ///
    /// # Errors
    /// As [`GuestAgent::execute`].
    pub async fn os(&self) -> Result<qga::GuestOSInfo, QmpError> {
        self.execute(qga::guest_get_osinfo {}).await
    }

    /// The guest's network interfaces.
    ///
    /// # Errors
    /// As [`GuestAgent::execute`].
    pub async fn interfaces(&self) -> Result<Vec<qga::GuestNetworkInterface>, QmpError> {
        self.execute(qga::guest_network_get_interfaces {}).await
    }
}

/// The number in the next marked reply, if it is one.
async fn read_token(lines: &mut Lines<OwnedReadHalf>) -> Result<Option<u64>, ConnectionEnd> {
    lines.skip_past(SENTINEL).await?;
    let reply: Option<Value> = serde_json::from_slice(lines.next().await?).ok();
    Ok(reply.and_then(|reply| reply["return"].as_u64()))
}
