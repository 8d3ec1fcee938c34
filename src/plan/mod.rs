//! Every choice made, as plain data.
//!
//! A plan is pure: made from a spec, an image and host facts without touching
//! the system, and compared against snapshots in tests.

mod argv;
mod cmdline;
mod facts;
pub mod firewall;
pub mod jail;
pub mod network;
pub mod ram;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::Explain;
use crate::image::{Image, KernelFormat};
use crate::spec::{
    Accel, Bytes, ChannelKind, JailLayer, LsmLabel, MachineType, Spec, Survivors, VmId,
    WorkspaceMode,
};

pub(crate) use argv::{CID, ROOT_ID, SCRATCH_ID, SCRATCH_NODE};
pub use facts::{HostFacts, LsmFacts, LsmKind};
pub use jail::Jail;
pub use network::Network;
pub use ram::Ram;

/// Number of the first descriptor handed to QEMU.
pub const FIRST_FD: i32 = 3;
/// Mount tag of the shared workspace.
pub const SHARE_TAG: &str = "workspace";

/// A wish this host cannot fulfil.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// vsock asked for by name where there is none.
    #[error("the vsock channel cannot be used: /dev/vhost-vsock is missing")]
    NoVsock,
    /// vsock asked for by name in a template or a clone.
    #[error("templates and their clones are not reached over vsock")]
    VsockTemplate,
    /// The files QEMU needs are not known.
    #[error("cannot tell what {qemu} needs to run: {why}")]
    NoClosure {
        /// The binary.
        qemu: PathBuf,
        /// Why not.
        why: String,
    },
    /// A label asked for that no module of this host knows.
    #[error("QEMU cannot be given the label {label}: neither AppArmor nor SELinux is active here")]
    NoLsm {
        /// The label.
        label: LsmLabel,
    },
    /// The machine's own user could not open /dev/kvm.
    #[error(
        "a machine without the layer `files` has the host's /dev/kvm, which its own user may not open"
    )]
    ClosedKvm,
}

impl Explain for PlanError {
    fn code(&self) -> &'static str {
        match self {
            Self::NoVsock => "vsock-missing",
            Self::VsockTemplate => "vsock-template",
            Self::NoClosure { .. } => "jail-files",
            Self::NoLsm { .. } => "lsm-missing",
            Self::ClosedKvm => "kvm-closed",
        }
    }

    fn remedy(&self) -> String {
        match self {
            Self::NoVsock => {
                "Load the vhost_vsock module (modprobe vhost_vsock), or use --channel serial.".into()
            }
            Self::VsockTemplate => "Leave --channel out, or boot with --cold.".into(),
            Self::NoClosure { .. } => {
                "Name QEMU's own binary with --qemu, or do without a root of its own (--waive files)."
                    .into()
            }
            Self::NoLsm { .. } => "Leave --lsm-label out (lsm_label in a file).".into(),
            Self::ClosedKvm => {
                "Keep the layer, or waive the machine's own user as well: --waive files,user.".into()
            }
        }
    }
}

/// The kernel a machine boots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelChoice {
    /// The file.
    pub path: PathBuf,
    /// How it boots.
    pub format: KernelFormat,
}

impl KernelChoice {
    /// The kernel an image brings.
    pub fn own(image: &Image) -> Self {
        Self {
            path: image.kernel(),
            format: image.manifest.kernel.format,
        }
    }
}

/// What QEMU is given as open descriptors, from [`FIRST_FD`] on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Descriptor {
    /// The monitor's socket.
    Qmp,
    /// The serial port: kernel messages.
    Serial,
    /// The virtio console: the emergency way in.
    Console,
    /// The guest agent's virtio-serial port.
    Agent,
    /// The port of qemu-guest-agent.
    Qga,
    /// The read-only root disk.
    Root,
    /// The writable disk.
    Scratch,
    /// The shared workspace.
    Share,
    /// /dev/vhost-vsock, with the machine's CID set.
    Vsock,
    /// The tap in the machine's network namespace.
    Tap,
}

/// How the guest agent is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Channel {
    /// Over the virtio-serial port.
    Serial,
    /// Over vsock; the CID is leased when the machine starts.
    Vsock,
}

/// A host directory the guest sees live.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// The host directory.
    pub dir: PathBuf,
    /// The guest cannot write.
    pub read_only: bool,
}

/// Everything needed to start a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Name of the machine.
    pub id: VmId,
    /// The QEMU binary.
    pub qemu: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// What its descriptors are, in order from [`FIRST_FD`].
    pub descriptors: Vec<Descriptor>,
    /// What executes the guest's instructions.
    pub accel: Accel,
    /// The machine type.
    pub machine: MachineType,
    /// The kernel.
    pub kernel: KernelChoice,
    /// The kernel's command line.
    pub cmdline: String,
    /// The guest's memory.
    pub memory: Bytes,
    /// Where that is.
    #[serde(default)]
    pub ram: Ram,
    /// Whether it has a balloon, which takes memory back.
    pub balloon: bool,
    /// The read-only root disk.
    pub root: PathBuf,
    /// Size of the writable disk.
    pub scratch: Bytes,
    /// How the guest agent is reached.
    pub channel: Channel,
    /// The shared workspace.
    pub share: Option<Share>,
    /// The writable disk outlives the VMM: what the guest flushes is flushed.
    #[serde(default)]
    pub keep_disk: bool,
    /// Its sockets listen, so that another process can take it over.
    #[serde(default)]
    pub adoptable: bool,
    /// How the VMM is confined.
    pub jail: Jail,
    /// Its network; none when it is isolated.
    #[serde(default)]
    pub network: Option<Network>,
    /// The vsock address it leased.
    #[serde(default)]
    pub cid: Option<u32>,
}

impl Plan {
    /// Makes every choice for `spec`.
    ///
    /// # Errors
    /// The spec insists on something the host facts deny.
    pub fn new(
        spec: &Spec,
        image: &Image,
        kernel: KernelChoice,
        facts: &HostFacts,
    ) -> Result<Self, PlanError> {
        Self::with_ram(spec, image, kernel, facts, Ram::Own)
    }

    /// As [`Plan::new`], for a machine that is to be a template, or a clone of
    /// one. Neither has a balloon.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn with_ram(
        spec: &Spec,
        image: &Image,
        kernel: KernelChoice,
        facts: &HostFacts,
        ram: Ram,
    ) -> Result<Self, PlanError> {
        let channel = match (spec.channel, facts.vhost_vsock) {
            (ChannelKind::Vsock, false) => return Err(PlanError::NoVsock),
            (ChannelKind::Vsock, true) if ram != Ram::Own => return Err(PlanError::VsockTemplate),
            (ChannelKind::Serial, _) | (ChannelKind::Auto, false) => Channel::Serial,
            // Over vsock no clone's agent was ever reached (decision 0040); a
            // detached machine may be saved at any time (decision 0042).
            (ChannelKind::Auto, true) if ram != Ram::Own || spec.detached => Channel::Serial,
            (ChannelKind::Vsock | ChannelKind::Auto, true) => Channel::Vsock,
        };
        use Descriptor as D;
        let mut descriptors = vec![D::Qmp, D::Serial, D::Console, D::Qga, D::Root, D::Scratch];
        descriptors.push(match channel {
            Channel::Serial => D::Agent,
            Channel::Vsock => D::Vsock,
        });
        let share = match (&spec.workspace.dir, spec.workspace.mode) {
            (Some(dir), WorkspaceMode::Share) => Some(Share {
                dir: dir.clone(),
                read_only: spec.workspace.read_only,
            }),
            _ => None,
        };
        let jail = Jail::new(spec, image, &kernel, share.as_ref(), channel, facts)?;
        if share.is_some() && !jail.has(JailLayer::Files) {
            descriptors.push(D::Share);
        }
        let network = Network::of(&spec.network);
        if network.is_some() {
            descriptors.push(D::Tap);
        }
        let mut plan = Self {
            id: spec.id.clone(),
            qemu: facts.qemu.clone(),
            args: Vec::new(),
            descriptors,
            accel: spec.accel,
            machine: spec.machine,
            cmdline: cmdline::build(spec, channel, facts, kernel.format),
            kernel,
            memory: spec.limits.memory,
            balloon: spec.balloon && !ram.is_backed(),
            ram,
            root: image.root(),
            scratch: spec.limits.disk,
            channel,
            share,
            keep_disk: spec.detached,
            adoptable: spec.detached && spec.lifetime.survivors == Survivors::Adopt,
            jail,
            network,
            cid: None,
        };
        plan.args = argv::build(spec, image, &plan);
        Ok(plan)
    }

    /// The number QEMU sees a descriptor under.
    pub fn fd(&self, descriptor: Descriptor) -> Option<i32> {
        let at = self.descriptors.iter().position(|one| *one == descriptor)?;
        Some(FIRST_FD + i32::try_from(at).ok()?)
    }
}

#[cfg(test)]
mod tests;
