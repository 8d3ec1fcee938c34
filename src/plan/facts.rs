//! What the host can do, as far as a plan depends on it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::jail::Closure;

/// Host facts a plan is made from. Filled in by [`crate::host::probe`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    /// The QEMU binary.
    pub qemu: PathBuf,
    /// Clock of the host's time stamp counter in kHz; absent when unknown.
    pub tsc_khz: Option<u64>,
    /// Whether /dev/vhost-vsock can be used.
    pub vhost_vsock: bool,
    /// The files QEMU needs, or why they are not known.
    pub closure: Result<Closure, String>,
    /// Not root here.
    pub unprivileged: bool,
}
