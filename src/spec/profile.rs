//! Named sets of limits.

use serde::{Deserialize, Serialize};

use super::units::{Bytes, Timeout};

/// A named set of limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// 1 vCPU, 1 GiB, 10 GB of disk, 60 s.
    Light,
    /// 2 vCPUs, 2 GiB, 20 GB of disk, 300 s.
    #[default]
    Standard,
    /// 4 vCPUs, 4 GiB, 40 GB of disk, 600 s.
    Intensive,
    /// As standard, and never a network.
    Isolated,
}

/// What a machine may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Virtual CPUs, 1 to 64.
    pub vcpus: u32,
    /// Guest memory.
    pub memory: Bytes,
    /// Size of the disk that takes what the guest writes.
    pub disk: Bytes,
    /// How long the command may run.
    pub timeout: Timeout,
}

impl Profile {
    /// The limits of this profile.
    pub const fn limits(self) -> Limits {
        let (vcpus, gib, disk, secs) = match self {
            Self::Light => (1, 1, 10, 60),
            Self::Standard | Self::Isolated => (2, 2, 20, 300),
            Self::Intensive => (4, 4, 40, 600),
        };
        Limits {
            vcpus,
            memory: Bytes::gib(gib),
            disk: Bytes::gib(disk),
            timeout: Timeout::secs(secs),
        }
    }
}
