//! What came of a run.

use std::path::PathBuf;

use serde::Serialize;

use super::machine::Phases;
use super::verify::Finding;
use crate::error::Report;
use crate::net::Summary;
use crate::spec::{Accel, ChannelKind, MachineType, NetworkMode, ProfileName, VmId};

/// Exit code when the command ran out of time.
pub const TIMED_OUT: i32 = 124;
/// Exit code when Bulkhead itself failed.
pub const FAILED: i32 = 125;

/// What came of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Outcome {
    /// Name of the machine.
    pub id: VmId,
    /// Id of the image.
    pub image: String,
    /// Id of the template it was cloned from; absent when it booted.
    pub template: Option<String>,
    /// The profile.
    pub profile: ProfileName,
    /// What executed the guest's instructions.
    pub accel: Accel,
    /// Whether the guest was isolated by hardware: never under emulation.
    pub hardware_isolation: bool,
    /// The machine type.
    pub machine: MachineType,
    /// How the guest agent was reached.
    pub channel: ChannelKind,
    /// The network it had.
    pub network: NetworkMode,
    /// The exit code of `bulkhead run`: the command's own, 128 + signal, 124
    /// after the time limit, 126 or 127 when the command could not be run.
    pub exit_code: i32,
    /// The signal that ended the command.
    pub signal: Option<i32>,
    /// The time limit ended the command.
    pub timed_out: bool,
    /// Why the command could not be run.
    pub refused: Option<Report>,
    /// What could not be brought back to the host, and why; it is kept where
    /// the remedy says, and the exit code is 125.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failed: Option<Report>,
    /// Output, where it was collected instead of passed on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stdout: Option<Captured>,
    /// Error output, likewise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stderr: Option<Captured>,
    /// What changed in the workspace; absent when it was not asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub changes: Option<Changes>,
    /// Paths of artifacts brought back, relative to the directory given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub artifacts: Option<Vec<String>>,
    /// What the kernel and QEMU said of each layer before the command started.
    pub layers: Vec<Finding>,
    /// What came of its network: the hosts that were reached, and what was
    /// refused; absent without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub traffic: Option<Summary>,
    /// A network that lets through what it tried and no more, as a piece of a
    /// configuration file, where that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub learned: Option<String>,
    /// What was used.
    pub resources: Resources,
    /// How long the phases took.
    pub times: Times,
    /// What the user should know besides.
    pub warnings: Vec<String>,
}

/// Collected output: its beginning here, all of it in a file when it was long.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Captured {
    /// Size in bytes of all of it.
    pub bytes: u64,
    /// Its beginning (at most [`Captured::INLINE`] bytes); what is not UTF-8 is
    /// replaced.
    pub text: String,
    /// Whether `text` is all of it, byte for byte.
    pub complete: bool,
    /// The file with all of it, where `text` is not.
    pub file: Option<PathBuf>,
}

impl Captured {
    /// Bytes kept in memory.
    pub const INLINE: usize = 1 << 20;
}

/// What changed in the workspace.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Changes {
    /// New and changed paths.
    pub changed: Vec<String>,
    /// Removed paths.
    pub removed: Vec<String>,
    /// Whether they were brought back.
    pub applied: bool,
    /// All of it as a diff, where one was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub diff: Option<String>,
}

/// What was used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Resources {
    /// CPU time of the command as the guest tells it, in microseconds.
    pub command_cpu_us: u64,
    /// Peak memory of the command as the guest tells it, in KiB.
    pub command_rss_kib: u64,
    /// CPU time of QEMU, in milliseconds.
    pub vmm_cpu_ms: u64,
    /// Peak memory of QEMU, in KiB.
    pub vmm_rss_kib: u64,
}

/// How long the phases took, in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Times {
    /// Phases of the start.
    #[serde(flatten)]
    pub start: Phases,
    /// The command, from request to end.
    pub command_us: u64,
    /// All of the run.
    pub total_us: u64,
}
