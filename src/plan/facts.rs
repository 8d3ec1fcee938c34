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
    /// The security module that labels processes; none where none is active.
    pub lsm: Option<LsmFacts>,
    /// Whether any user of this host may open /dev/kvm.
    pub open_kvm: bool,
    /// Whether we can raise a limit again that a process was given
    /// (CAP_SYS_RESOURCE): in containers root often cannot.
    pub raises_limits: bool,
}

/// What is known of a security module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LsmFacts {
    /// Which.
    pub kind: LsmKind,
    /// Whether the profile Bulkhead brings is loaded.
    pub profile: bool,
}

/// A security module that labels processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LsmKind {
    /// AppArmor: labels are names of profiles.
    Apparmor,
    /// SELinux: labels are contexts.
    Selinux,
}
