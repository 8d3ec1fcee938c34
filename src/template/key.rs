//! What must be the same in a template and in every machine cloned from it.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::digest;
use crate::image::Image;
use crate::plan::jail::{FIRMWARE, LIBRARIES};
use crate::plan::{HostFacts, Plan};
use crate::spec::{Accel, DomainName};

/// Hexadecimal digits of an id.
pub(super) const ID: usize = 32;

/// What must be the same, part by part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(transparent)]
pub struct Key(BTreeMap<String, String>);

/// A part that is not the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// Which.
    pub part: String,
    /// As the machine would have it.
    pub machine: String,
    /// As the template has it.
    pub template: String,
}

impl Difference {
    /// Each in the words for what was saved elsewhere, or earlier.
    pub(crate) fn told(all: &[Self]) -> String {
        // Who made an export may have written books into it.
        let brief = |text: &str| text.chars().take(2000).collect::<String>();
        let one = |one: &Self| {
            let [part, now, then] =
                [&one.part, &one.machine, &one.template].map(|text| brief(text));
            format!("{part} is {now}, and was {then}")
        };
        let all: Vec<String> = all.iter().map(one).collect();
        all.join("; ")
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            part,
            machine,
            template,
        } = self;
        write!(f, "{part} is {machine}, and {template} in the template")
    }
}

impl Key {
    /// That of a planned machine with its memory in a file. Digests of what
    /// seldom changes are kept in `cache`.
    ///
    /// # Errors
    /// A file of it cannot be read.
    pub fn of(
        plan: &Plan,
        image: &Image,
        domain: &DomainName,
        facts: &HostFacts,
        cache: &Path,
    ) -> io::Result<Self> {
        let mut parts = BTreeMap::new();
        let mut part = |name: &str, value: String| drop(parts.insert(name.to_owned(), value));
        part("domain", domain.to_string());
        part("image", image.id.clone());
        part("agent", image.manifest.agent.sha256.clone());
        part(
            "kernel",
            match plan.kernel.path == image.kernel() {
                true => image.manifest.kernel.image.sha256.clone(),
                false => digest::cached(&plan.kernel.path, cache)?,
            },
        );
        part("qemu", qemu(facts, cache)?);
        part("disk", plan.scratch.to_string());
        if plan.accel == Accel::Kvm {
            part("host cpu", host_cpu()?);
        }
        let mut devices = Vec::new();
        for pair in plan.args.windows(2) {
            let value = pair[1].clone();
            match pair[0].as_str() {
                "-machine" => part("machine", value),
                "-accel" => part("accelerator", value),
                "-cpu" => part("cpu", value),
                "-smp" => part("cpus", value),
                "-m" => part("memory", value),
                "-append" => part("command line", without_clock(&value)),
                "-device" => devices.push(without_descriptors(&value)),
                _ => {}
            }
        }
        part("devices", devices.join(" "));
        Ok(Self(parts))
    }

    /// The id of a template with this key.
    pub fn id(&self) -> String {
        // Sorted names and texts: one way to write each key.
        let mut hash = Sha256::new();
        for (name, value) in &self.0 {
            for text in [name, value] {
                hash.update((text.len() as u64).to_le_bytes());
                hash.update(text);
            }
        }
        let mut id = digest::hex(hash.finalize());
        id.truncate(ID);
        id
    }

    /// What a machine with this key would have otherwise than `template`.
    pub fn differences(&self, template: &Self) -> Vec<Difference> {
        let all = self.0.keys().chain(template.0.keys());
        let names: std::collections::BTreeSet<_> = all.collect();
        let of = |key: &Self, name| key.0.get(name).cloned().unwrap_or_else(|| "absent".into());
        names
            .into_iter()
            .map(|name| Difference {
                part: name.clone(),
                machine: of(self, name),
                template: of(template, name),
            })
            .filter(|one| one.machine != one.template)
            .collect()
    }

    /// What this host has otherwise of what no machine on it can choose, and
    /// whether it is of another trust domain.
    /// `kernels` are those that a machine can have besides the image's own.
    ///
    /// # Errors
    /// A file cannot be read.
    pub(crate) fn elsewhere(
        &self,
        domain: &DomainName,
        image: &Image,
        kernels: &[PathBuf],
        facts: &HostFacts,
        cache: &Path,
    ) -> io::Result<Vec<Difference>> {
        let mut here = self.clone();
        let mut part = |name: &str, value: String| drop(here.0.insert(name.to_owned(), value));
        part("domain", domain.to_string());
        part("image", image.id.clone());
        part("agent", image.manifest.agent.sha256.clone());
        part("qemu", qemu(facts, cache)?);
        if self.0.contains_key("host cpu") {
            part("host cpu", host_cpu()?);
        }
        let own = image.manifest.kernel.image.sha256.clone();
        let mut known = vec![own.clone()];
        for kernel in kernels {
            known.push(digest::cached(kernel, cache)?);
        }
        if !known.iter().any(|kernel| kernel == self.part("kernel")) {
            part("kernel", own);
        }
        Ok(here.differences(self))
    }

    /// All parts: name and value.
    pub fn parts(&self) -> impl Iterator<Item = (&str, &str)> {
        let parts = self.0.iter();
        parts.map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// One part.
    pub fn part(&self, name: &str) -> &str {
        self.0.get(name).map_or("", String::as_str)
    }
}

/// What it measured of the host's clock is of no matter: the guest's goes on.
fn without_clock(line: &str) -> String {
    let words = line
        .split(' ')
        .filter(|word| !word.starts_with("tsc_early_khz="));
    words.collect::<Vec<_>>().join(" ")
}

/// Numbers that are each machine's own.
fn without_descriptors(device: &str) -> String {
    let own = ["vhostfd=", "guest-cid="];
    let options = device
        .split(',')
        .filter(|option| !own.iter().any(|name| option.starts_with(name)));
    options.collect::<Vec<_>>().join(",")
}

/// Digest of QEMU and the firmware and modules it loads. Its libraries change
/// nothing of a machine's state.
fn qemu(facts: &HostFacts, cache: &Path) -> io::Result<String> {
    let Ok(closure) = &facts.closure else {
        return digest::cached(&facts.qemu, cache);
    };
    let mut hash = Sha256::new();
    let is_library = |place: &Path| {
        place.starts_with(LIBRARIES)
            || !place.starts_with(FIRMWARE) && place.to_string_lossy().contains("/ld-linux")
    };
    for (place, file) in &closure.files {
        if !is_library(place) {
            hash.update(place.as_os_str().as_encoded_bytes());
            hash.update(digest::cached(file, cache)?);
        }
    }
    Ok(digest::hex(hash.finalize()))
}

/// Model and features of the first processor.
fn host_cpu() -> io::Result<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo")?;
    let line = |name: &str| {
        let mut lines = text.lines();
        let value = lines.find_map(|line| line.strip_prefix(name)?.split_once(':'));
        value.map_or("", |(_, value)| value.trim())
    };
    let features = Sha256::digest([line("flags"), line("microcode")].join("\n"));
    let features = digest::hex(features);
    Ok(format!("{} ({})", line("model name"), &features[..12]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(parts: &[(&str, &str)]) -> Key {
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        Key(parts.iter().map(owned).collect())
    }

    #[test]
    fn what_differs_is_named() {
        let machine = key(&[("memory", "1024M"), ("image", "a"), ("domain", "x")]);
        let template = key(&[("memory", "512M"), ("image", "a"), ("host cpu", "y")]);
        let differences = machine.differences(&template);
        let shown: Vec<_> = differences.iter().map(ToString::to_string).collect();
        assert_eq!(
            shown,
            [
                "domain is x, and absent in the template",
                "host cpu is absent, and y in the template",
                "memory is 1024M, and 512M in the template",
            ]
        );
        assert_eq!(machine.differences(&machine), []);
    }

    #[test]
    fn an_id_tells_keys_apart() {
        let ids = [
            key(&[("a", "b"), ("c", "d")]),
            key(&[("a", "bcd")]),
            key(&[("ab", "c"), ("d", "")]),
            key(&[("a", "b"), ("c", "e")]),
        ]
        .map(|key| key.id());
        assert!(ids.iter().all(|id| id.len() == ID));
        let distinct: std::collections::BTreeSet<_> = ids.iter().collect();
        assert_eq!(distinct.len(), 4);
    }

    #[test]
    fn what_is_each_machines_own_does_not_count() {
        let device = "vhost-vsock-device,vhostfd=9,guest-cid={cid}";
        assert_eq!(without_descriptors(device), "vhost-vsock-device");
        let line = "quiet tsc_early_khz=2400000 tsc=reliable";
        assert_eq!(without_clock(line), "quiet tsc=reliable");
    }
}
