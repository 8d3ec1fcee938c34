//! Starting the process that supervises a machine.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use tokio::io::{AsyncBufReadExt, BufReader};

use super::error::SuperviseError;
use super::supervisor::Start;
use crate::error::Report;
use crate::host::fault;
use crate::run::Dirs;
use crate::spec::VmId;

/// Longest log of a supervisor, in bytes, that is gone on with.
const MOST_LOG: u64 = 1 << 20;
/// Bytes of a dead supervisor's log that are shown.
const WORDS: usize = 4096;

/// How to start a supervisor: a program that calls [`super::supervise`], and
/// writes one line of JSON to stdout when the machine is up (`null`) or cannot
/// be ([`Report`]).
#[derive(Debug, Clone)]
pub struct Launcher {
    /// The program.
    pub program: PathBuf,
    /// Its arguments, before `--take-over` (where it is to) and the machine's name.
    pub args: Vec<OsString>,
}

impl Launcher {
    /// Starts a supervisor and waits until its machine is up. The supervisor
    /// outlives the caller.
    ///
    /// # Errors
    /// What the supervisor said, or that it said nothing.
    pub async fn launch(&self, dirs: &Dirs, id: &VmId, start: Start) -> Result<(), SuperviseError> {
        let failed = |source: io::Error| SuperviseError::Launch {
            id: id.clone(),
            source,
        };
        let log_path = dirs.run(id).join("supervisor.log");
        let spawn = || {
            fault::at("launch supervisor")?;
            // Another's log stays, should there be one already.
            let log = File::options().append(true).create(true).open(&log_path)?;
            if log.metadata()?.len() > MOST_LOG {
                log.set_len(0)?;
            }
            let (ours, theirs) = io::pipe()?;
            Command::new(&self.program)
                .args(&self.args)
                .args((start == Start::TakeOver).then_some("--take-over"))
                .arg(id.as_str())
                .stdin(Stdio::null())
                .stdout(theirs)
                .stderr(log)
                .spawn()
                .map(|child| (child, ours))
        };
        let (mut child, ours) = spawn().map_err(failed)?;
        fault::at("launched supervisor").map_err(failed)?;
        let ours = tokio::net::unix::pipe::Receiver::from_owned_fd(ours.into()).map_err(failed)?;
        let mut line = String::new();
        // It ends with the process at the latest.
        BufReader::new(ours)
            .read_line(&mut line)
            .await
            .map_err(failed)?;
        match serde_json::from_str::<Option<Report>>(&line) {
            Ok(None) => Ok(()),
            Ok(Some(report)) => {
                // It is about to end: its machine is not up.
                let _ = child.wait();
                Err(SuperviseError::Told(report))
            }
            Err(_) => {
                let ended = child.wait();
                let how = ended.map_or_else(|error| error.to_string(), |how| how.to_string());
                let words = std::fs::read(&log_path).unwrap_or_default();
                let tail = &words[words.len().saturating_sub(WORDS)..];
                Err(SuperviseError::Silent {
                    id: id.clone(),
                    how,
                    words: crate::guest::archive::printable(tail),
                })
            }
        }
    }
}
