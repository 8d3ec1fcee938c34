//! How the VMM is confined, as plain data.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Channel, HostFacts, KernelChoice, LsmKind, PlanError, Share};
use crate::image::Image;
use crate::spec::{Accel, Bytes, JailLayer, Spec, Waived};

/// The program, in the jail.
pub const PROGRAM: &str = "/qemu";
/// Its libraries, in the jail.
pub const LIBRARIES: &str = "/lib";
/// Its modules, in the jail.
pub const MODULES: &str = "/modules";
/// Its firmware, in the jail.
pub const FIRMWARE: &str = "/firmware";
/// The guest's kernel, in the jail.
pub const KERNEL: &str = "/kernel";
/// The guest's initramfs, in the jail.
pub const INITRAMFS: &str = "/initramfs";
/// The shared workspace, in the jail.
pub const SHARE: &str = "/share";

/// Name of the AppArmor profile we bring (src/vmm/apparmor.profile).
pub const PROFILE: &str = "bulkhead-qemu";

/// Threads of QEMU besides those of the virtual CPUs: main, RCU, timers,
/// vhost, and its pool for disks, which has at most 64.
const THREADS: u32 = 96;

/// The files of one QEMU, each with its place in a jail.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Closure {
    /// Place in the jail to path on the host.
    pub files: BTreeMap<PathBuf, PathBuf>,
}

/// What a security module of the host is to know a VMM by.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Label {
    /// The module.
    pub kind: LsmKind,
    /// The profile or context.
    pub name: String,
}

/// How one VMM is confined.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Jail {
    /// Layers it does without because the user said so.
    pub waived: Waived,
    /// Made without root: a user namespace gives what it can.
    pub unprivileged: bool,
    /// What it sees of the host's files: place in the jail to path on the host.
    pub files: BTreeMap<PathBuf, PathBuf>,
    /// It gets /dev/kvm.
    pub kvm: bool,
    /// It gets the shared workspace, and may write to it.
    pub share: Option<bool>,
    /// Most memory of its control group: the guest's, and what QEMU needs.
    pub memory: Bytes,
    /// Most threads of it.
    pub threads: u32,
    /// Most open files of it.
    pub open_files: u32,
    /// Longest file it can write, where that is limited.
    #[serde(default)]
    pub file_size: Option<Bytes>,
    /// Its label; none where no module is active, or none has one for it.
    #[serde(default)]
    pub label: Option<Label>,
}

impl Jail {
    pub(super) fn new(
        spec: &Spec,
        image: &Image,
        kernel: &KernelChoice,
        share: Option<&Share>,
        channel: Channel,
        facts: &HostFacts,
    ) -> Result<Self, PlanError> {
        let waived = spec.waive.clone();
        let own_user = !facts.unprivileged && !waived.has(JailLayer::User);
        if waived.has(JailLayer::Files) && own_user && spec.accel == Accel::Kvm && !facts.open_kvm {
            return Err(PlanError::ClosedKvm);
        }
        let mut files = BTreeMap::new();
        if !waived.has(JailLayer::Files) {
            let closure = facts.closure.as_ref();
            let closure = closure.map_err(|why| PlanError::NoClosure {
                qemu: facts.qemu.clone(),
                why: why.clone(),
            })?;
            files.clone_from(&closure.files);
            files.insert(KERNEL.into(), kernel.path.clone());
            files.insert(INITRAMFS.into(), image.initramfs());
        }
        Ok(Self {
            waived,
            unprivileged: facts.unprivileged,
            files,
            kvm: spec.accel == Accel::Kvm,
            share: share.map(|share| !share.read_only),
            memory: Bytes(spec.limits.memory.0 + headroom(spec, channel).0),
            threads: THREADS + spec.limits.vcpus,
            open_files: 256 + spec.limits.vcpus,
            label: label(spec, facts)?,
            file_size: file_size(spec, share, facts.raises_limits),
        })
    }

    /// Whether `layer` is to hold.
    pub fn has(&self, layer: JailLayer) -> bool {
        !self.waived.has(layer)
    }

    /// Whether it is a user whose id nobody else has.
    pub fn own_user(&self) -> bool {
        !self.unprivileged && self.has(JailLayer::User)
    }

    /// Where QEMU finds `place`, whose path on the host is `host`.
    pub fn path(&self, place: &str, host: PathBuf) -> PathBuf {
        match self.has(JailLayer::Files) {
            true => place.into(),
            false => host,
        }
    }
}

/// The label asked for, else our profile where it is loaded. It knows the jail's
/// paths only.
fn label(spec: &Spec, facts: &HostFacts) -> Result<Option<Label>, PlanError> {
    if spec.waive.has(JailLayer::Lsm) {
        return Ok(None);
    }
    let name = match (&spec.lsm_label, &facts.lsm) {
        (Some(label), None) => {
            return Err(PlanError::NoLsm {
                label: label.clone(),
            });
        }
        (Some(label), Some(_)) => label.as_str(),
        (None, Some(lsm)) if lsm.profile && !spec.waive.has(JailLayer::Files) => PROFILE,
        (None, _) => return Ok(None),
    };
    Ok(facts.lsm.map(|lsm| Label {
        kind: lsm.kind,
        name: name.to_owned(),
    }))
}

/// None for a share that is written to, nor for a machine whose disk may grow
/// where we could not raise the limit then.
fn file_size(spec: &Spec, share: Option<&Share>, raises_limits: bool) -> Option<Bytes> {
    let bounded = share.is_none_or(|share| share.read_only) && (raises_limits || !spec.detached);
    bounded.then(|| longest(spec.limits.disk.max(spec.limits.memory)))
}

/// Longest file of a VMM whose disk or memory has that size: a 16th and 64 MiB
/// are for what formats of disks and of saved machines add.
pub(crate) fn longest(size: Bytes) -> Bytes {
    Bytes(size.0 + size.0 / 16 + Bytes::mib(64).0)
}

/// Memory of QEMU beside the guest's: reckoned in decision 0017. 128 MiB cover
/// its code, heap and stacks, disk buffers among them; page tables and dirty
/// bitmaps grow with the guest; a translator keeps what it translated.
fn headroom(spec: &Spec, channel: Channel) -> Bytes {
    let base = Bytes::mib(128).0 + u64::from(spec.limits.vcpus) * Bytes::mib(2).0;
    let tables = spec.limits.memory.0 / 128;
    let vhost = match channel {
        Channel::Vsock => Bytes::mib(8).0,
        Channel::Serial => 0,
    };
    let translated = match spec.accel {
        Accel::Kvm => 0,
        Accel::Tcg => Bytes::gib(1).0 + Bytes::mib(128).0,
    };
    Bytes(base + tables + vhost + translated)
}
