//! What a machine may use besides its limits: changed while it runs.

use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use super::error::SpecError;
use super::units::Bytes;

/// Limits on the reads and writes of all disks of a machine together; what is
/// absent is not limited.
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct IoLimits {
    /// Bytes read a second.
    pub read_bytes: Option<Bytes>,
    /// Bytes written a second.
    pub write_bytes: Option<Bytes>,
    /// Reads a second.
    pub read_operations: Option<u64>,
    /// Writes a second.
    pub write_operations: Option<u64>,
}

impl IoLimits {
    /// What QEMU takes as a limit; zero stands for none there.
    const POSSIBLE: RangeInclusive<u64> = 1..=1_000_000_000_000_000;

    /// Says whether they can be.
    ///
    /// # Errors
    /// One of them is no limit.
    pub fn check(&self) -> Result<(), SpecError> {
        let bytes = [self.read_bytes, self.write_bytes].map(|limit| limit.map(|bytes| bytes.0));
        let operations = [self.read_operations, self.write_operations];
        let mut all = bytes.into_iter().chain(operations).flatten();
        match all.find(|limit| !Self::POSSIBLE.contains(limit)) {
            None => Ok(()),
            Some(limit) => Err(SpecError::Value {
                what: "a limit of reads or writes",
                value: limit.to_string(),
                why: "1 to 10^15 a second are possible",
            }),
        }
    }
}

/// What a detached machine is held to; what is absent is not limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Tuning {
    /// CPU time of the whole VMM, in percent of one core.
    pub cpu_quota: Option<u32>,
    /// What the guest keeps of its memory: the balloon takes the rest.
    pub memory: Option<Bytes>,
    /// Reads and writes.
    pub io: IoLimits,
}
