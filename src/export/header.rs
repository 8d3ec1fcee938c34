//! What stands first in an export: what is in it, and what it needs.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::error::Flaw;
use crate::spec::{
    Bytes, Command, LabelName, Limits, MachineType, NetworkMode, Request, Spec, VmId,
};
use crate::template::Piece;
use crate::{snapshot, template};

/// Format of the header.
pub(super) const SCHEMA: u32 = 1;
/// Longest header, in bytes: a script of the machine's command is in it.
pub(super) const LONGEST: usize = 8 << 20;
/// Most bytes of a memory, and of a disk: what a machine may have (spec).
const MOST_MEMORY: u64 = 1 << 40;
const MOST_DISK: u64 = 16 << 40;
/// Most bytes of the state of devices.
const MOST_DEVICES: u64 = 1 << 30;

/// What stands first in an export.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// Version of this format: 1.
    pub schema: u32,
    /// Version of the Bulkhead that made it.
    pub bulkhead: String,
    /// When it was made, in milliseconds since 1970.
    pub exported_ms: u64,
    /// Most bytes that its files have besides holes.
    pub data: u64,
    /// What is in it.
    pub content: Content,
}

/// What is in an export. Its files follow in the order of `parts`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Content {
    /// A template.
    Template(Box<template::Manifest>),
    /// A snapshot, and what its machine is made of.
    Snapshot {
        /// The snapshot.
        manifest: Box<snapshot::Manifest>,
        /// The machine.
        machine: Box<Machine>,
    },
}

impl Content {
    /// What it is, in one word.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Template(_) => "template",
            Self::Snapshot { .. } => "snapshot",
        }
    }

    /// Names, in the store of either kind, and digests of the files.
    pub(super) fn parts(&self) -> Vec<(&'static str, &Piece)> {
        match self {
            Self::Template(manifest) => vec![
                (template::RAM, &manifest.ram),
                (template::STATE, &manifest.state),
                (template::DISK, &manifest.disk),
            ],
            Self::Snapshot { manifest, .. } => {
                let saved = manifest.saved.iter();
                let state = saved.map(|saved| (snapshot::STATE, &saved.state));
                state.chain([(snapshot::DISK, &manifest.disk)]).collect()
            }
        }
    }

    /// Most bytes of a file of this name.
    fn most(&self, name: &str) -> u64 {
        match (self, name) {
            (_, template::DISK) => MOST_DISK,
            (_, template::RAM) => MOST_MEMORY,
            (Self::Template(_), _) => MOST_DEVICES,
            // With memory, which may be in it twice.
            (Self::Snapshot { .. }, _) => 2 * MOST_MEMORY + MOST_DEVICES,
        }
    }
}

impl Header {
    /// Refuses what cannot be, before anything is made for it.
    pub(super) fn check(&self) -> Result<(), Flaw> {
        let known = |what: &str, found: u32, known: u32| match found == known {
            true => Ok(()),
            false => Err(Flaw::Corrupt(format!(
                "{what} has format {found}, and {known} is known"
            ))),
        };
        known("its header", self.schema, SCHEMA)?;
        let text = match &self.content {
            Content::Template(manifest) => {
                known("its template", manifest.schema, template::SCHEMA)?;
                serde_json::to_vec_pretty(manifest)
            }
            Content::Snapshot { manifest, .. } => {
                known("its snapshot", manifest.schema, snapshot::SCHEMA)?;
                serde_json::to_vec_pretty(manifest)
            }
        };
        let len = text
            .map_err(|error| Flaw::Corrupt(error.to_string()))?
            .len();
        // A parent becomes none: a few bytes more.
        if len as u64 + 4 > template::LONGEST {
            // The store would not read it again.
            let most = template::LONGEST;
            let told = format!("a manifest of {len} bytes, and {most} are the most");
            return Err(Flaw::TooLarge(told));
        }
        let mut sum = 0;
        for (name, piece) in self.content.parts() {
            let most = self.content.most(name);
            if piece.size > most {
                let told = format!("{name} has {} bytes, and {most} are the most", piece.size);
                return Err(Flaw::TooLarge(told));
            }
            // The last block counts as a whole one.
            sum += piece.size;
        }
        if self.data > sum {
            let told = format!("{} bytes of data in files of {sum}", self.data);
            return Err(Flaw::TooLarge(told));
        }
        match &self.content {
            Content::Template(manifest) => fits_its_key(manifest),
            Content::Snapshot { .. } => Ok(()),
        }
    }
}

/// What a machine is made of again. Nothing in it opens anything of the host
/// that it comes to: no paths, no ports, no network, no layer to do without;
/// those are the importer's to say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// Its name.
    pub name: VmId,
    /// Name of its image, as it was asked for.
    pub image: String,
    /// Name of an installed kernel; the image's own when absent.
    pub kernel: Option<String>,
    /// What it may use.
    pub limits: Limits,
    /// Its type.
    pub machine: MachineType,
    /// Whether its memory can be taken back.
    pub balloon: bool,
    /// It has no network device.
    pub isolated: bool,
    /// Its network has IPv6.
    pub ipv6: bool,
    /// What the user called it by.
    pub labels: BTreeMap<LabelName, String>,
    /// What runs in it.
    pub command: Command,
}

impl Machine {
    /// That of `spec`; `image` is the name of its image.
    pub fn of(spec: &Spec, image: &str) -> Self {
        Self {
            name: spec.id.clone(),
            image: image.to_owned(),
            // A path is one of the host that it was on.
            kernel: spec.kernel.clone().filter(|name| is_name(name)),
            limits: spec.limits,
            machine: spec.machine,
            balloon: spec.balloon,
            isolated: spec.network.mode == NetworkMode::Isolated,
            ipv6: spec.network.ipv6,
            labels: spec.labels.clone(),
            command: spec.command.clone(),
        }
    }

    /// A request for it, to go below what the importer says. The disk has
    /// `disk` bytes.
    pub fn request(&self, image: &str, disk: u64) -> Request {
        let command = self.command.clone();
        Request {
            name: Some(self.name.clone()),
            image: Some(image.to_owned()),
            kernel: self.kernel.clone().filter(|name| is_name(name)),
            cpus: Some(self.limits.vcpus),
            memory: Some(self.limits.memory),
            disk: Some(Bytes(disk)),
            timeout: Some(self.limits.timeout),
            network: self.isolated.then(|| NetworkMode::Isolated.into()),
            machine: Some(self.machine),
            // Who asks for one asks not to be cloned either.
            balloon: (!self.balloon).then_some(false),
            labels: self.labels.clone(),
            env: command.env.into_iter().collect(),
            workdir: command.workdir,
            user: command.user,
            terminal: Some(command.terminal),
            command: command.argv,
            script: command.script,
            ..Request::default()
        }
    }
}

/// Refuses a template whose files are not as large as its key says: each clone
/// maps the one and copies the other.
fn fits_its_key(manifest: &template::Manifest) -> Result<(), Flaw> {
    let says = |part: &str| manifest.key.part(part).parse::<Bytes>().ok();
    // The key has memory as QEMU does: in whole MiB.
    let ram = Some(Bytes(manifest.ram.size).as_mib());
    let fit = [
        ("memory", says("memory").map(Bytes::as_mib) == ram),
        ("disk", says("disk") == Some(Bytes(manifest.disk.size))),
    ];
    match fit.into_iter().find(|(_, fits)| !fits) {
        Some((part, _)) => Err(Flaw::Corrupt(format!(
            "its {part} is not of the size that its key says"
        ))),
        None => Ok(()),
    }
}

/// Whether it is the name of an installed kernel and no path.
fn is_name(kernel: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    kernel.len() <= 64
        && kernel.chars().all(plain)
        && kernel.starts_with(|c: char| c.is_ascii_alphanumeric())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Catalog;

    fn spec(text: &str) -> Spec {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let request = Request::load(file.path()).unwrap();
        request.resolve_machine(&Catalog::default()).unwrap()
    }

    #[test]
    fn what_opens_the_host_stays_behind() {
        let spec = spec(
            "name = \"vm\"\nmemory = \"256M\"\nkernel = \"/boot/vmlinux\"\nnetwork = \"open\"\n\
             publish = [\"8080:80\"]\nwaive = \"seccomp\"\nnested = true\naccel = \"tcg\"\nipv6 = true\n\
             workspace = \"/srv/secret\"\nallow_cidrs = [\"10.0.0.1/32\"]\ndomain = \"ci\"\n\
             command = [\"sleep\", \"9\"]\nenv = { A = \"b\" }\nlabels = { team = \"a\" }\n",
        );
        let machine = Machine::of(&spec, "base");
        let text = serde_json::to_string(&machine).unwrap();
        assert!(!text.contains('/'), "{text}");
        let made = machine.request("sha256-0", 64 << 20);
        let made = made.resolve_machine(&Catalog::default()).unwrap();
        let plain = Spec {
            id: spec.id.clone(),
            image: "sha256-0".into(),
            limits: Limits {
                disk: Bytes(64 << 20),
                ..spec.limits
            },
            labels: spec.labels.clone(),
            command: spec.command.clone(),
            ..Request::default()
                .resolve_machine(&Catalog::default())
                .unwrap()
        };
        assert_eq!(made, plain);
    }

    #[test]
    fn an_isolated_machine_stays_so_and_a_kernel_is_a_name() {
        let spec = spec("network = \"isolated\"\nkernel = \"tuned\"\nmachine = \"q35\"\n");
        let made = Machine::of(&spec, "base").request("base", 64 << 20);
        let made = made.resolve_machine(&Catalog::default()).unwrap();
        assert_eq!(made.network, spec.network);
        assert_eq!((made.kernel, made.machine), (spec.kernel, spec.machine));
        for bad in ["../tuned", "/boot/x", ".hidden", "", "a/b"] {
            let machine = Machine {
                kernel: Some(bad.into()),
                ..Machine::of(
                    &Request::default()
                        .resolve_machine(&Catalog::default())
                        .unwrap(),
                    "b",
                )
            };
            assert_eq!(machine.request("b", 0).kernel, None, "{bad}");
        }
    }
}
