//! A socket through which other commands reach a running machine.
//!
//! One request a connection: a line of JSON, answered by a line of JSON. After
//! a granted `console` the connection carries the console's bytes.

mod controller;
mod desk;

use std::io;

use bulkhead_agent::Info;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

pub use controller::Controller;
pub(super) use desk::serve;
pub(crate) use desk::{Asked, Desk, is_served, listen};

use super::verify::Finding;
use crate::error::{Explain, Report};
use crate::spec::{NetworkChange, VmId};

/// Longest request or answer, in bytes.
const MAX_LINE: u64 = 1 << 20;

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
