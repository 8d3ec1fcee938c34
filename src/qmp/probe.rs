//! Asks a QEMU binary what it offers, without a machine.

use std::{io, os::fd::OwnedFd, path::Path, process::Stdio, time::Duration};

use serde_json::Value;
use tokio::{io::AsyncReadExt, net::UnixStream, process::Command};

use super::{
    error::{QmpError, quote},
    monitor::{Monitor, Version},
};
use crate::error::Explain;

/// Most of QEMU's error output that is kept, in bytes.
const MAX_STDERR: u64 = 8 * 1024;

/// What one QEMU binary is and offers.
#[derive(Debug, Clone)]
pub struct Offer {
    /// Its version, to be shown.
    pub version: Version,
    /// The reply of `query-qmp-schema`; [`super::Schema::from_value`] reads it.
    pub schema: Value,
}

/// A QEMU binary that could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// It could not be started.
    #[error("cannot start {qemu}")]
    Start {
        /// The binary.
        qemu: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It started, but did not answer.
    #[error("{qemu} does not answer on its monitor{}", said(.stderr))]
    Ask {
        /// The binary.
        qemu: String,
        /// What it wrote to its error output.
        stderr: String,
        /// Why.
        #[source]
        source: QmpError,
    },
}

fn said(stderr: &str) -> String {
    match stderr {
        "" => String::new(),
        text => format!("; it said: {text}"),
    }
}

impl Explain for ProbeError {
    fn code(&self) -> &'static str {
        match self {
            Self::Start { .. } => "qemu-not-started",
            Self::Ask { .. } => "qemu-no-answer",
        }
    }

    fn remedy(&self) -> String {
        match self {
            Self::Start { .. } => {
                "install QEMU (Debian: qemu-system-x86), or name another with --qemu".into()
            }
            Self::Ask { .. } => "name a QEMU 7.2 or newer with --qemu".into(),
        }
    }
}

impl Offer {
    /// Starts `qemu` without a machine, asks, and ends it.
    ///
    /// # Errors
    /// It does not start, or does not answer within `deadline`.
    pub async fn of(qemu: &Path, deadline: Duration) -> Result<Self, ProbeError> {
        let name = || qemu.display().to_string();
        let start = |source| ProbeError::Start {
            qemu: name(),
            source,
        };
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(start)?;
        ours.set_nonblocking(true).map_err(start)?;
        let ours = UnixStream::from_std(ours).map_err(start)?;
        // Standard input is the one descriptor that is inherited without ado.
        let mut child = Command::new(qemu)
            .args(["-M", "none", "-S", "-nodefaults", "-no-user-config"])
            .args(["-display", "none", "-chardev", "socket,id=qmp,fd=0"])
            .args(["-mon", "chardev=qmp,mode=control"])
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(start)?;
        let answer = Self::ask(ours, deadline).await;
        // Nothing of it is needed any more, and a kill always ends it.
        child.kill().await.map_err(start)?;
        match answer {
            Ok(offer) => Ok(offer),
            Err(source) => {
                let mut stderr = Vec::new();
                if let Some(pipe) = child.stderr.take() {
                    // What cannot be read cannot be shown; the cause stands.
                    _ = pipe.take(MAX_STDERR).read_to_end(&mut stderr).await;
                }
                Err(ProbeError::Ask {
                    qemu: name(),
                    stderr: quote(String::from_utf8_lossy(&stderr).trim()),
                    source,
                })
            }
        }
    }

    async fn ask(stream: UnixStream, deadline: Duration) -> Result<Self, QmpError> {
        let monitor = Monitor::connect(stream, deadline)
            .await?
            .with_timeout(deadline);
        let schema = monitor.execute_raw("query-qmp-schema", Value::Null).await?;
        let version = monitor.version().clone();
        Ok(Self { version, schema })
    }
}
