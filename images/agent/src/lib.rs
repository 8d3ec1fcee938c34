//! The messages between the host and the guest agent, and nothing else.
//!
//! Both ends speak frames over one byte stream (a virtio-serial port or a
//! vsock connection). A frame is a [`Header`] of [`HEADER_LEN`] bytes followed
//! by at most [`MAX_PAYLOAD`] bytes. Frames belong to a stream; the host opens
//! streams with [`Kind::Open`], and the guest ends each with [`Kind::Exit`].
//!
//! ```text
//! host                                   guest
//!  | <------------------ Hello (stream 0) -- |   when the agent is up
//!  | -- Hello (stream 0) -----------------> |   forgets all earlier streams
//!  | -- Open(n): Request -----------------> |
//!  | <-------------------- Reply(n): Reply -- |   started, or refused (an Exit follows)
//!  | -- In(n): bytes / End(n) ------------> |   stdin or an archive
//!  | <-------- Out(n), Err(n): bytes ------- |   stdout and stderr, or an archive
//!  | -- Control(n): Control --------------> |   signal, resize, kill
//!  | <---- Credit(n) in both directions ---> |   bytes consumed by the receiver
//!  | <---------------------- Exit(n): Exit -- |   always the last frame of a stream
//! ```
//!
//! Flow control: each side may have at most [`WINDOW`] unacknowledged payload
//! bytes of `In` (host), or of `Out` and `Err` together (guest), on one stream.
//! The receiver returns them with `Credit` as it consumes them. Everything that
//! comes from the guest is hostile: the host checks sizes, windows, kinds and
//! stream numbers, and ends the connection at the first violation.

mod frame;

use serde::{Deserialize, Serialize};

pub use self::frame::{FrameError, HEADER_LEN, Header, Kind, MAX_PAYLOAD};

/// Version of these messages. Both `Hello`s carry it; a difference is refused.
pub const VERSION: u16 = 1;
/// Unacknowledged payload bytes allowed per stream and direction.
pub const WINDOW: u32 = 512 * 1024;
/// Most streams the agent keeps open at once; one more is refused.
pub const MAX_STREAMS: usize = 1024;
/// The vsock port the agent listens on. Only CID 2 (the host) is served.
pub const VSOCK_PORT: u32 = 1024;

/// Ports of the host the agent takes vsock connections from: those that an
/// ordinary user cannot bind.
pub const VSOCK_HOST_PORTS: std::ops::RangeInclusive<u32> = 512..=1023;
/// Name of the virtio-serial port the agent speaks on.
pub const AGENT_PORT: &str = "bulkhead.agent";
/// Name of the virtio-serial port of qemu-guest-agent, where an image carries it.
pub const QGA_PORT: &str = "org.qemu.guest_agent.0";
/// `serial` of the virtio disk that holds the read-only root file system.
pub const ROOT_SERIAL: &str = "bulkhead-root";
/// `serial` of the virtio disk that takes everything the guest writes.
pub const SCRATCH_SERIAL: &str = "bulkhead-scratch";
/// The unprivileged user commands run as unless root is asked for.
pub const DEFAULT_USER: &str = "agent";
/// Where the workspace is in the guest: `input`, `output` and `work` below it.
pub const WORKSPACE: &str = "/workspace";
/// Directory in the initramfs with kernel modules: `<release>/order` names the
/// files of `<release>/`, one a line, in loading order.
pub const MODULES_DIR: &str = "/bulkhead-modules";

/// First frame in each direction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`VERSION`] of the sender.
    pub version: u16,
    /// Version of the sending program, for messages to people.
    pub program: String,
    /// The guest's boot id (`/proc/sys/kernel/random/boot_id`); empty from the host.
    #[serde(default)]
    pub boot_id: String,
}

/// What the host asks for; opens a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Answered with [`Reply::Done`] at once.
    Ping,
    /// Run a command; answered with [`Reply::Started`].
    Exec(Exec),
    /// Unpack the tar archive that comes as `In` below `path` (made if
    /// missing), then `Exit`. Entries are contained below `path`.
    Put {
        /// Absolute directory in the guest.
        path: String,
        /// Owner of everything unpacked; the default user when absent.
        user: Option<String>,
        /// Remember what was unpacked, for a later [`Request::Changes`].
        track: bool,
    },
    /// Send `path` (a file or a directory) as a tar archive on `Out`; names
    /// are relative to `path` (a single file: its base name).
    Get {
        /// Absolute path in the guest.
        path: String,
    },
    /// Send what changed below `path` since the `Put` with `track`: a tar of
    /// new and changed entries on `Out`, NUL-terminated relative names of
    /// removed entries on `Err`.
    Changes {
        /// The same path as in the `Put`.
        path: String,
    },
    /// Connect to a TCP port on the guest's loopback; answered with
    /// [`Reply::Started`]. `In` goes to the service, `Out` comes from it; `End`
    /// tells it that no more comes, and its own end is the stream's.
    Connect {
        /// The port.
        port: u16,
    },
    /// What is at `path`, links followed; answered with [`Reply::Stat`].
    Stat {
        /// Absolute path in the guest.
        path: String,
    },
    /// Make a directory (and its parents) owned by `user`.
    Mkdir {
        /// Absolute path in the guest.
        path: String,
        /// Owner; root when absent.
        user: Option<String>,
    },
    /// Mount a virtio-9p share.
    Mount9p {
        /// The device's mount tag.
        tag: String,
        /// Absolute mount point, made if missing.
        path: String,
        /// Mount read-only.
        read_only: bool,
    },
    /// The host has made the scratch disk larger: let the file system fill it.
    Grow {
        /// Size of the disk in bytes, waited for.
        bytes: u64,
    },
    /// Identity of this machine: applied before any command runs.
    Configure(Configure),
    /// Write everything to disk and run nothing any more until
    /// [`Request::Restored`] or [`Request::Resumed`]: the machine is about to be
    /// saved. Answered with [`Reply::Life`].
    Quiesce,
    /// The machine was saved after [`Request::Quiesce`], and this is a clone of
    /// it: take the identity, run the image's hooks ([`HOOKS`]), and serve
    /// again. Answered with [`Reply::Life`]; after a failure it serves nothing.
    Restored {
        /// One more than the agent told last.
        generation: u64,
        /// All of it is needed.
        identity: Configure,
    },
    /// The machine was saved after [`Request::Quiesce`], and this is itself, not
    /// a clone: serve again, then take the entropy and the clock. No hook runs.
    /// Answered with [`Reply::Life`]; it serves after a failure, too.
    Resumed {
        /// Names are not needed: it has them.
        identity: Configure,
    },
    /// Set the wall clock, in nanoseconds since 1970-01-01 UTC; answered with
    /// [`Reply::Life`], which has the time that it is then.
    Clock {
        /// The time.
        unix_ns: u64,
    },
    /// OS, interfaces and processes; answered with [`Reply::Info`].
    Info,
    /// Kill all processes, flush, unmount, power off. `Exit` comes before the end.
    PowerOff,
}

/// A command to run in the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exec {
    /// Program and arguments; the program is looked up in the command's `PATH`.
    pub argv: Vec<String>,
    /// Added to, and overriding, the user's login environment.
    #[serde(default)]
    pub env: Vec<(String, String)>,
    /// Working directory; the user's home when absent.
    #[serde(default)]
    pub cwd: Option<String>,
    /// User name or numeric id; [`DEFAULT_USER`] when absent.
    #[serde(default)]
    pub user: Option<String>,
    /// Run on a terminal of this size; stderr is then part of stdout.
    #[serde(default)]
    pub terminal: Option<Size>,
    /// Connect `In` to stdin; otherwise stdin is /dev/null.
    #[serde(default)]
    pub stdin: bool,
}

/// Size of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Size {
    /// Rows.
    pub rows: u16,
    /// Columns.
    pub cols: u16,
}

/// Identity of a machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Configure {
    /// Host name.
    #[serde(default)]
    pub hostname: Option<String>,
    /// 32 lower-case hexadecimal digits for /etc/machine-id.
    #[serde(default)]
    pub machine_id: Option<String>,
    /// Wall clock to set, in nanoseconds since 1970-01-01 UTC.
    #[serde(default)]
    pub unix_ns: Option<u64>,
    /// Fresh entropy as hexadecimal digits, credited to the guest's random pool.
    #[serde(default)]
    pub seed: Option<String>,
    /// Leave room for any other names in the files of these: for a machine that
    /// is to be cloned.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub room: bool,
}

/// Programs here are run in a clone before it is handed out, as root, by name.
pub const HOOKS: &str = "/etc/bulkhead/restore.d";

/// Which life of which boot this is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Life {
    /// The kernel's boot id: the same in a machine and all its clones.
    pub boot_id: String,
    /// How often it was restored since it booted.
    pub generation: u64,
    /// Milliseconds since it booted; what lay between save and restore does
    /// not count.
    pub uptime_ms: u64,
    /// Drawn anew in every life: 32 hexadecimal digits.
    pub session: String,
    /// Wall clock, in nanoseconds since 1970-01-01 UTC.
    pub unix_ns: u64,
}

/// The guest's answer to a [`Request`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// Done, nothing to tell; an `Exit` with code 0 follows.
    Done,
    /// The command or transfer runs.
    Started {
        /// Process id in the guest; 0 for transfers.
        pid: u32,
    },
    /// Answer to [`Request::Stat`].
    Stat {
        /// What is there.
        kind: FileKind,
    },
    /// Answer to [`Request::Info`].
    Info(Info),
    /// Answer to [`Request::Quiesce`], [`Request::Restored`] and
    /// [`Request::Clock`].
    Life(Life),
    /// Refused or failed before anything ran; an `Exit` follows.
    Refused(Failure),
}

/// What is at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileKind {
    /// Nothing.
    Absent,
    /// A directory.
    Directory,
    /// Anything else.
    File,
}

/// Why the guest could not do something.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What kind of failure.
    pub kind: FailureKind,
    /// What failed, on which object, and why.
    pub message: String,
}

/// In the message of an [`FailureKind::Invalid`] failure: the agent is older
/// than the request.
pub const UNKNOWN_REQUEST: &str = "unknown variant";

/// The same: the agent is older than a part of the request.
pub const UNKNOWN_PART: &str = "unknown field";

/// Kinds of [`Failure`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// The program does not exist (exit code 127).
    NotFound,
    /// The program cannot be executed (exit code 126).
    NotExecutable,
    /// No such user in the guest.
    NoUser,
    /// The request is not understood or not acceptable.
    Invalid,
    /// The guest's disk is full.
    NoSpace,
    /// Anything else the system refused.
    System,
}

/// Messages for a running stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "control", rename_all = "snake_case", deny_unknown_fields)]
pub enum Control {
    /// Send a signal to the command's process group.
    Signal {
        /// Signal number.
        signal: i32,
    },
    /// The terminal has a new size.
    Resize(Size),
    /// Kill the command and every process it started; or give up a transfer.
    Kill,
}

/// How a stream ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Exit code of the command; 0 for a transfer that succeeded.
    #[serde(default)]
    pub code: Option<i32>,
    /// The signal that ended the command.
    #[serde(default)]
    pub signal: Option<i32>,
    /// Why a transfer or request failed.
    #[serde(default)]
    pub failure: Option<Failure>,
    /// CPU time of the command and its waited-for children, in microseconds.
    #[serde(default)]
    pub cpu_us: u64,
    /// Peak resident memory of the largest of its processes, in KiB.
    #[serde(default)]
    pub max_rss_kib: u64,
}

/// What the guest says about itself. Nothing in it is to be trusted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Info {
    /// `PRETTY_NAME` of /etc/os-release.
    pub os: String,
    /// Kernel release.
    pub kernel: String,
    /// Host name.
    pub hostname: String,
    /// Milliseconds since boot.
    pub uptime_ms: u64,
    /// Total memory in KiB.
    pub memory_kib: u64,
    /// Free and reclaimable memory in KiB.
    pub available_kib: u64,
    /// Network interfaces.
    pub interfaces: Vec<Interface>,
    /// Processes, at most 256 of them.
    pub processes: Vec<Process>,
}

/// A network interface of the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Interface {
    /// Name.
    pub name: String,
    /// Hardware address.
    pub mac: String,
    /// Addresses with prefix length.
    pub addresses: Vec<String>,
}

/// A process of the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Process {
    /// Process id.
    pub pid: u32,
    /// Parent's process id.
    pub ppid: u32,
    /// Numeric user id.
    pub uid: u32,
    /// Resident memory in KiB.
    pub rss_kib: u64,
    /// Command line, at most 128 bytes of it.
    pub command: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_request_fields_are_refused() {
        let text = r#"{"request":"exec","argv":["true"],"shell":true}"#;
        assert!(serde_json::from_str::<Request>(text).is_err());
    }
}
