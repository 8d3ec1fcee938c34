//! What must be the same in a template and in every machine cloned from it.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::digest;
use super::here::{self, Here};
use crate::image::Image;
use crate::plan::{HostFacts, Plan};
use crate::spec::{Accel, DomainName};

/// Hexadecimal digits of an id.
pub(super) const ID: usize = 32;
/// What a part is that is not there.
const ABSENT: &str = "absent";
/// The part with the host's processor, under KVM.
const HOST_CPU: &str = "host cpu";

/// What must be the same, part by part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(transparent)]
pub struct Key(BTreeMap<String, String>);

/// A part that is not the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
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
        part("qemu", here::qemu(facts, cache)?);
        part("disk", plan.scratch.to_string());
        if plan.accel == Accel::Kvm {
            part(HOST_CPU, here::processor()?);
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
        let of = |key: &Self, name| key.0.get(name).cloned().unwrap_or_else(|| ABSENT.into());
        names
            .into_iter()
            .map(|name| Difference {
                part: told(name).to_owned(),
                machine: of(self, name),
                template: of(template, name),
            })
            .filter(|one| one.machine != one.template)
            .collect()
    }

    /// What a host has otherwise of what no machine on it can choose, and
    /// whether `domain` is another trust domain. `image` is the one that its
    /// machines would have, or what has become of it.
    pub(crate) fn elsewhere(
        &self,
        domain: &str,
        image: Result<&Image, &str>,
        host: &Here,
    ) -> Vec<Difference> {
        let mut here = self.clone();
        let mut part = |name: &str, value: &str| drop(here.0.insert(name.into(), value.into()));
        part("domain", domain);
        part("qemu", host.qemu.as_deref().unwrap_or(ABSENT));
        if self.0.contains_key(HOST_CPU) {
            part(HOST_CPU, &host.processor);
        }
        match image {
            Err(why) => part("image", why),
            Ok(image) => {
                part("image", &image.id);
                part("agent", &image.manifest.agent.sha256);
                let own = &image.manifest.kernel.image.sha256;
                let mut known = host.kernels.iter().chain(&host.named).chain([own]);
                if !known.any(|kernel| kernel == self.part("kernel")) {
                    part("kernel", host.named.as_ref().unwrap_or(own));
                }
            }
        }
        here.differences(self)
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

/// What a part is called where it differs.
fn told(part: &str) -> &str {
    match part {
        HOST_CPU => "processor",
        other => other,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Agent, File, Kernel, KernelFormat, Manifest};

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
                "processor is absent, and y in the template",
                "memory is 1024M, and 512M in the template",
            ]
        );
        assert_eq!(machine.differences(&machine), []);
    }

    fn image(id: &str, kernel: &str) -> Image {
        let file = |sha256: &str| File {
            file: "file".into(),
            size: 1,
            sha256: sha256.into(),
        };
        Image {
            id: id.into(),
            dir: "/images".into(),
            manifest: Manifest {
                schema: 1,
                name: "base".into(),
                from: None,
                root: file("r"),
                kernel: Kernel {
                    image: file(kernel),
                    release: "6.12.0".into(),
                    format: KernelFormat::Vmlinux,
                },
                initramfs: file("i"),
                agent: Agent {
                    version: "0.1.0".into(),
                    protocol: 1,
                    sha256: "agent".into(),
                },
                packages: Vec::new(),
            },
        }
    }

    fn here() -> Here {
        Here {
            qemu: Some("q".into()),
            processor: "Xeon (1)".into(),
            kernels: vec!["tuned".into()],
            named: None,
        }
    }

    /// What a template has of its host, besides `kernel` and what is asked for.
    fn template(kernel: &str, more: &[(&str, &str)]) -> Key {
        let host = [("image", "a"), ("agent", "agent"), ("qemu", "q")];
        let asked = [("domain", "ci"), ("memory", "256M"), ("kernel", kernel)];
        key(&[&host[..], &asked, more].concat())
    }

    fn parts(differences: &[Difference]) -> Vec<&str> {
        differences.iter().map(|one| one.part.as_str()).collect()
    }

    #[test]
    fn what_a_host_has_otherwise_is_named_and_what_is_asked_for_is_not() {
        let own = template("own", &[("host cpu", "Xeon (1)")]);
        let differs = |image: Result<&Image, &str>, change: &dyn Fn(&mut Here)| {
            let mut host = here();
            change(&mut host);
            let found = own.elsewhere("ci", image, &host);
            parts(&found).join(" ")
        };
        let same = image("a", "own");
        assert_eq!(differs(Ok(&same), &|_| ()), "");
        assert_eq!(differs(Ok(&image("b", "own")), &|_| ()), "image");
        assert_eq!(differs(Ok(&image("b", "new")), &|_| ()), "image kernel");
        assert_eq!(differs(Err("absent"), &|_| ()), "image");
        let mut other = same.clone();
        other.manifest.agent.sha256 = "later".into();
        assert_eq!(differs(Ok(&other), &|_| ()), "agent");
        let qemu = |value: Option<&str>| {
            let value = value.map(str::to_owned);
            differs(Ok(&same), &move |host| host.qemu.clone_from(&value))
        };
        assert_eq!([qemu(Some("r")), qemu(None)], ["qemu", "qemu"]);
        let found = own.elsewhere("default", Err("absent"), &here());
        assert_eq!(parts(&found), ["domain", "image"]);
    }

    #[test]
    fn another_processor_is_named_where_the_template_has_one() {
        let host = Here {
            processor: "EPYC (2)".into(),
            ..here()
        };
        let image = image("a", "own");
        let kvm = template("own", &[("host cpu", "Xeon (1)")]);
        let found = kvm.elsewhere("ci", Ok(&image), &host);
        assert_eq!(
            Difference::told(&found),
            "processor is EPYC (2), and was Xeon (1)"
        );
        // Emulation is the same on every processor.
        assert_eq!(template("own", &[]).elsewhere("ci", Ok(&image), &host), []);
        // What a machine asks for names it, too.
        let machine = template("own", &[("host cpu", "EPYC (2)")]);
        assert_eq!(machine.differences(&kvm), found);
    }

    #[test]
    fn a_kernel_is_the_images_an_installed_one_or_one_with_a_path() {
        let image = image("a", "own");
        let found = |kernel: &str, named: Option<&str>| {
            let host = Here {
                named: named.map(str::to_owned),
                ..here()
            };
            let found = template(kernel, &[]).elsewhere("ci", Ok(&image), &host);
            Difference::told(&found)
        };
        assert_eq!(found("own", None), "");
        assert_eq!(found("tuned", None), "");
        assert_eq!(found("path", None), "kernel is own, and was path");
        assert_eq!(found("path", Some("path")), "");
        assert_eq!(found("path", Some("new")), "kernel is new, and was path");
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
