//! What the command line and a supervisor say to each other, besides the
//! frames of the guest protocol.

use std::fmt;
use std::str::FromStr;

use bulkhead_agent::{Exec, Request};
use serde::{Deserialize, Serialize};

use super::view::Live;
use crate::error::Report;
use crate::snapshot::Wish;
use crate::spec::{Bytes, IoLimits, Malformed, NetworkChange, Timeout};

/// Number of a command in a machine; 0 is its main command, written `main`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(try_from = "String", into = "String")]
pub struct ExecId(pub u32);

impl ExecId {
    /// The command a machine was made for.
    pub const MAIN: Self = Self(0);
}

impl fmt::Display for ExecId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => f.pad("main"),
            number => f.pad(&format!("e{number}")),
        }
    }
}

impl FromStr for ExecId {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<Self, Malformed> {
        let number = match text {
            "main" => Some(0),
            _ => text
                .strip_prefix('e')
                .and_then(|digits| digits.parse().ok())
                .filter(|number| *number > 0),
        };
        number.map(Self).ok_or_else(|| Malformed {
            value: text.to_owned(),
            expected: "a command of a machine (`main`, or `e1`, `e2` and so on)",
        })
    }
}

impl TryFrom<String> for ExecId {
    type Error = Malformed;
    fn try_from(text: String) -> Result<Self, Malformed> {
        text.parse()
    }
}

impl From<ExecId> for String {
    fn from(id: ExecId) -> Self {
        id.to_string()
    }
}

/// A command to run in a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecRequest {
    /// The command, as the guest agent takes it.
    pub exec: Exec,
    /// How long it may run; without end when absent.
    pub timeout: Option<Timeout>,
}

/// A command in a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct ExecInfo {
    /// Its number.
    pub id: ExecId,
    /// Program and arguments.
    pub argv: Vec<String>,
    /// The user in the guest; absent for the image's own.
    pub user: Option<String>,
    /// Whether it is on a terminal.
    pub terminal: bool,
    /// When it was started, in milliseconds since 1970-01-01 UTC.
    pub started_ms: u64,
    /// How it ended, if it has.
    pub ended: Option<ExecEnd>,
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct ExecEnd {
    /// When, in milliseconds since 1970-01-01 UTC.
    pub at_ms: u64,
    /// Its exit code as a shell has it: 128 + signal, 124 after a time limit,
    /// 126 or 127 when it could not be run, 125 when the machine failed.
    pub exit_code: i32,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// Why it did not end by itself.
    pub failure: Option<String>,
}

/// Changes to a machine; what is absent stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Stop it so long from now.
    pub ttl: Option<Timeout>,
    /// Stop it when nothing happened for so long.
    pub idle_timeout: Option<Timeout>,
    /// CPU time of the whole VMM, in percent of one core.
    pub cpu_quota: Option<u32>,
    /// What the guest keeps of its memory.
    pub memory: Option<Bytes>,
    /// Size of its disk, never smaller than before.
    pub disk: Option<Bytes>,
    /// Reads and writes.
    pub io: IoLimits,
    /// Its network.
    pub network: NetworkChange,
    /// What is not limited any more.
    pub without: Vec<Limit>,
}

/// A limit that can be taken away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Limit {
    /// The time to live.
    Ttl,
    /// The idle timeout.
    IdleTimeout,
    /// The CPU quota.
    CpuQuota,
    /// The memory target.
    Memory,
    /// All limits on reads and writes.
    Io,
    /// The limit on bytes a second from the guest.
    Upload,
    /// The limit on bytes a second to the guest.
    Download,
    /// The limit on bytes in all.
    Total,
}

/// What can be asked of a supervisor, besides what can be asked of every
/// machine's owner.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "kebab-case", deny_unknown_fields)]
pub(super) enum Ask {
    /// How the machine is.
    Status,
    /// Answered when the machine has ended.
    Wait,
    /// Power off; kill when that takes longer than `grace`, or at once.
    Stop {
        /// The machine's own when absent.
        grace: Option<Timeout>,
        /// Do not ask the guest.
        force: bool,
    },
    /// Stand still.
    Pause,
    /// Go on.
    Resume,
    /// Save it.
    Save { wish: Box<Wish> },
    /// Change limits.
    Set { settings: Box<Settings> },
    /// Start a command that runs on when the asker is gone.
    Detach { request: Box<ExecRequest> },
    /// Commands that run or ran lately.
    Execs,
    /// Send a signal to a command.
    Signal { exec: ExecId, signal: i32 },
    /// Frames of the guest protocol follow, opened with [`Open`].
    Streams,
}

/// The answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Answer {
    /// Done.
    Done,
    /// How the machine is.
    Status(Box<Live>),
    /// A command was started.
    Exec(ExecId),
    /// Commands.
    Execs(Vec<ExecInfo>),
    /// Frames follow.
    Streams,
    /// It cannot be.
    Refused(Report),
}

/// What opens a stream at a supervisor.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "open", rename_all = "kebab-case", deny_unknown_fields)]
pub(super) enum Open {
    /// Run a command that ends with the stream.
    Exec { request: Box<ExecRequest> },
    /// Follow a running command.
    Attach { exec: ExecId },
    /// A request to the guest agent itself: a transfer.
    Guest { request: Request },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_have_short_names() {
        for (text, id) in [("main", ExecId(0)), ("e1", ExecId(1)), ("e70", ExecId(70))] {
            assert_eq!(text.parse(), Ok(id));
            assert_eq!(id.to_string(), text);
        }
        for bad in ["", "e", "e0", "1", "e-1", "E1"] {
            assert!(bad.parse::<ExecId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn an_unknown_setting_is_refused() {
        assert!(serde_json::from_str::<Settings>(r#"{"tll": "5m"}"#).is_err());
    }
}
