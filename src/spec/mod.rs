//! What is asked for.

mod address;
mod bridge;
mod config;
mod domain;
mod error;
mod host;
mod jail;
mod layer;
mod lifetime;
mod load;
mod lsm;
mod network;
mod network_change;
mod origin;
mod preset;
mod profile;
mod publish;
mod resolvers;
mod script;
mod templates;
mod tuning;
mod units;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use address::{Cidr, Exception, Port, Protocol};
pub use bridge::Bridge;
pub use config::{Config, MACHINE_KEYS, Merged, Setting, merge};
pub use domain::{Domain, NotADomain};
pub use error::SpecError;
pub(crate) use host::Hosts;
pub use host::{BadPattern, HostPattern};
pub use jail::{JailLayer, UidRange, Waived};
pub use layer::Layer;
pub use lifetime::{LabelName, Lifetime, Survivors};
pub use load::Request;
pub use lsm::LsmLabel;
pub use network::{NetworkLimits, NetworkMode, NetworkName, NetworkPolicy};
pub use network_change::NetworkChange;
pub use origin::Origin;
pub use preset::{Preset, PresetData, presets};
pub use profile::{Catalog, CustomProfile, Limits, Profile, ProfileName};
pub use publish::{NotAPublish, Publish};
pub use resolvers::Resolvers;
pub use script::Script;
pub use templates::{DomainName, Templates};
pub use tuning::{IoLimits, Tuning};
pub use units::{Bytes, Malformed, Timeout, VmId};

/// A run as it was asked for, with every default filled in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// Name of the machine.
    pub id: VmId,
    /// Name or id of the image.
    pub image: String,
    /// A kernel other than the image's own: a path, or the name of an installed one.
    pub kernel: Option<String>,
    /// The profile the limits came from.
    pub profile: ProfileName,
    /// What the machine may use.
    pub limits: Limits,
    /// The network it gets.
    pub network: NetworkPolicy,
    /// What executes the guest's instructions.
    pub accel: Accel,
    /// The machine type.
    pub machine: MachineType,
    /// How host and guest agent reach each other.
    pub channel: ChannelKind,
    /// What is exchanged with a host directory.
    pub workspace: Workspace,
    /// Whether the machine outlives the command that makes it.
    #[serde(default)]
    pub detached: bool,
    /// How long a detached machine lives. A run ends with its command.
    #[serde(default)]
    pub lifetime: Lifetime,
    /// Whether its memory can be taken back while it runs.
    #[serde(default)]
    pub balloon: bool,
    /// Whether the guest may run virtual machines of its own.
    #[serde(default)]
    pub nested: bool,
    /// Which template it may be cloned from.
    #[serde(default)]
    pub templates: Templates,
    /// What a detached machine is held to besides its limits.
    #[serde(default)]
    pub tuning: Tuning,
    /// Layers of the jail it does without.
    #[serde(default)]
    pub waive: Waived,
    /// The AppArmor profile or SELinux context of QEMU; absent for the profile
    /// Bulkhead brings, where it is loaded.
    #[serde(default)]
    pub lsm_label: Option<LsmLabel>,
    /// Ports of the host that lead to services in it.
    #[serde(default)]
    pub publish: Vec<Publish>,
    /// Whether a policy is proposed from what it tried.
    #[serde(default)]
    pub learn: bool,
    /// What the user calls it by, besides its name.
    #[serde(default)]
    pub labels: BTreeMap<LabelName, String>,
    /// What to run; without a program only in a detached machine.
    pub command: Command,
}

/// What executes the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// Hardware virtualization; the only one that counts as isolation.
    #[default]
    Kvm,
    /// Software emulation.
    Tcg,
}

impl Accel {
    /// QEMU's name for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// QEMU machine type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum MachineType {
    /// Minimal, virtio-mmio only, no PCI, no ACPI.
    #[default]
    Microvm,
    /// PCI Express and ACPI, for images that need them.
    Q35,
}

/// How host and guest agent reach each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum ChannelKind {
    /// vsock where the host has it, else a virtio-serial port.
    #[default]
    Auto,
    /// vhost-vsock.
    Vsock,
    /// A virtio-serial port.
    Serial,
}

/// What is exchanged with a host directory.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub struct Workspace {
    /// The host directory; absent for none.
    pub dir: Option<PathBuf>,
    /// How it is exchanged.
    pub mode: WorkspaceMode,
    /// With `share`: the guest cannot write.
    pub read_only: bool,
    /// Where what the guest left in `/workspace/output` goes.
    pub artifacts: Option<PathBuf>,
    /// With `copy`: bring changed files back into `dir`.
    pub apply: bool,
    /// With `apply`: overwrite files that changed on the host meanwhile.
    pub force: bool,
    /// With `copy`: show what changed as a diff.
    pub diff: bool,
}

/// How a workspace is exchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum WorkspaceMode {
    /// Packed in; changes come back only on request.
    #[default]
    Copy,
    /// Live, through virtio-9p.
    Share,
    /// Nothing is exchanged.
    None,
}

/// What to run in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Command {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Added environment.
    pub env: Vec<(String, String)>,
    /// Working directory; `/workspace/work` when absent.
    pub workdir: Option<String>,
    /// User; the image's unprivileged user when absent.
    pub user: Option<String>,
    /// On a terminal.
    pub terminal: bool,
    /// A script to put in the guest and run with `argv` as its arguments.
    pub script: Option<Script>,
}

/// Fills `bytes` from the kernel's random pool.
pub(crate) fn fill_random(bytes: &mut [u8]) {
    use std::io::Read;
    // The one way to fail is a host without /dev/urandom, where nothing else works either.
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(bytes))
        .expect("/dev/urandom is readable");
}
