//! Whether templates can still be used on this host as it is now, and the end of
//! those that cannot.
//!
//! Nothing is started for it: what only a start can tell (KVM, room) is not
//! looked at.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::RunError;
use super::host::Host;
use crate::host::probe;
use crate::image::{Error as ImageError, Image, Store as Images};
use crate::plan::HostFacts;
use crate::template::{Difference, Here, Manifest, Store, Summary, TemplateError, cached};

/// A template, and whether machines of this host can be cloned from it.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ListedTemplate {
    /// The template.
    #[serde(flatten)]
    pub template: Summary,
    /// The host has all that it was built with.
    pub usable: bool,
    /// What the host has otherwise; empty where it is usable.
    pub differences: Vec<Difference>,
}

/// A template that cannot be used any more.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct PrunedTemplate {
    /// Its id.
    pub id: String,
    /// Bytes that its files took of the disk.
    pub bytes: u64,
    /// What the host has otherwise.
    pub differences: Vec<Difference>,
    /// What is wrong with its files, where they are damaged.
    pub damage: Option<String>,
}

/// All templates, oldest first, and what is wrong with those that cannot be read.
///
/// # Errors
/// The templates, or what the host has, cannot be read.
pub fn list_templates(host: &Host) -> Result<(Vec<ListedTemplate>, Vec<RunError>), RunError> {
    let (all, errors) = host.templates().list()?;
    let mut errors: Vec<RunError> = errors.into_iter().map(Into::into).collect();
    let mut listed = Vec::new();
    if !all.is_empty() {
        let present = Present::of(host, false)?;
        for template in all {
            match present.listed(template) {
                Ok(one) => listed.push(one),
                Err(error) => errors.push(error),
            }
        }
    }
    Ok((listed, errors))
}

/// The template with this id, or whose id begins so; its files are checked.
///
/// # Errors
/// There is none, it is damaged, or what the host has cannot be read.
pub fn inspect_template(host: &Host, id: &str) -> Result<ListedTemplate, RunError> {
    let store = host.templates();
    // Its files are checked by opening it.
    let id = store.get(id)?.id;
    Present::of(host, false)?.listed(store.summary(&id)?)
}

/// Removes the templates that cannot be used any more, or only says which; gives
/// them, and what failed. One that is being built or taken in stays, and so do
/// machines cloned from one.
///
/// # Errors
/// There is no QEMU: none could be used, and all would go; the templates, or
/// what the host has, cannot be read.
pub fn prune_templates(
    host: &Host,
    dry_run: bool,
) -> Result<(Vec<PrunedTemplate>, Vec<RunError>), RunError> {
    let (mut pruned, mut errors) = (Vec::new(), Vec::new());
    let store = host.templates();
    if store.ids()?.is_empty() {
        return Ok((pruned, errors));
    }
    let present = Present::of(host, true)?;
    // Whatever is judged is what is removed.
    let held = store.hold()?;
    for id in store.ids()? {
        let removed = present.stale(&store, &id).and_then(|stale| {
            if stale.is_some() && !dry_run {
                held.remove(&id)?;
            }
            Ok(stale)
        });
        match removed {
            Ok(stale) => pruned.extend(stale),
            Err(error) => errors.push(error),
        }
    }
    Ok((pruned, errors))
}

/// What a host has now.
struct Present<'a> {
    host: &'a Host,
    images: Images,
    here: Here,
}

impl<'a> Present<'a> {
    /// Without QEMU, unless it is `needed`, it has none.
    fn of(host: &'a Host, needed: bool) -> Result<Self, RunError> {
        let qemu = match probe::find_qemu(host.qemu.as_deref()) {
            Err(error) if needed => return Err(error.into()),
            found => found.ok(),
        };
        let facts = qemu.map(|qemu| probe::facts(qemu, &host.dirs.cache()));
        Ok(Self {
            host,
            images: host.images(),
            here: here(host, facts.as_ref())?,
        })
    }

    fn listed(&self, template: Summary) -> Result<ListedTemplate, RunError> {
        let differences = self.differences(&template.manifest)?;
        Ok(ListedTemplate {
            template,
            usable: differences.is_empty(),
            differences,
        })
    }

    /// The template of this id, where it cannot be used.
    fn stale(&self, store: &Store, id: &str) -> Result<Option<PrunedTemplate>, RunError> {
        let mut stale = PrunedTemplate {
            id: id.to_owned(),
            bytes: store.allocated(id),
            differences: Vec::new(),
            damage: None,
        };
        let checked = store.summary(id).map_err(RunError::from).and_then(|one| {
            stale.differences = self.differences(&one.manifest)?;
            // Nobody has to read all of what goes anyway.
            if stale.differences.is_empty() {
                store.get(id)?;
            }
            Ok(())
        });
        match checked {
            Err(RunError::Template(TemplateError::Corrupt { what, .. })) => {
                stale.damage = Some(what);
            }
            other => other?,
        }
        let usable = stale.differences.is_empty() && stale.damage.is_none();
        Ok((!usable).then_some(stale))
    }

    fn differences(&self, manifest: &Manifest) -> Result<Vec<Difference>, RunError> {
        let key = &manifest.key;
        let image = self.image(manifest)?;
        let image = image.as_ref().map_err(|why| *why);
        let here = Here {
            named: match &manifest.kernel {
                Some(path) => Some(self.kernel(Path::new(path))?),
                None => None,
            },
            ..self.here.clone()
        };
        Ok(key.elsewhere(key.part("domain"), image, &here))
    }

    /// The image that machines like those of a template would have, or what has
    /// become of it. One that lost its last name was built again under that.
    fn image(&self, manifest: &Manifest) -> Result<Result<Image, &'static str>, RunError> {
        let id = manifest.key.part("image");
        let image = match manifest.image == id || self.images.is_named(id)? {
            true => self.images.inspect(id),
            false => self.images.inspect(&manifest.image),
        };
        match image {
            Ok(image) => Ok(Ok(image)),
            Err(ImageError::NotFound { .. }) => Ok(Err("absent")),
            Err(
                ImageError::Corrupt { .. }
                | ImageError::Manifest { .. }
                | ImageError::Unsupported { .. },
            ) => Ok(Err("damaged")),
            Err(error) => Err(error.into()),
        }
    }

    /// Digest of a kernel, or that there is none.
    fn kernel(&self, path: &Path) -> Result<String, RunError> {
        match path.is_file() {
            true => Ok(cached(path, &self.host.dirs.cache()).map_err(unread(path))?),
            false => Ok("absent".into()),
        }
    }
}

/// What this host has; no QEMU without `facts`.
pub(super) fn here(host: &Host, facts: Option<&HostFacts>) -> Result<Here, TemplateError> {
    Here::look(facts, &kernels(host), &host.dirs.cache()).map_err(unread(&host.dirs.state))
}

fn unread(path: &Path) -> impl FnOnce(std::io::Error) -> TemplateError {
    let path = path.to_owned();
    move |source| TemplateError::Io {
        action: "read what the key of a template is made of in",
        path,
        source,
    }
}

/// The kernels that are installed besides those of images.
fn kernels(host: &Host) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(host.dirs.kernels());
    let kernels = entries.into_iter().flatten().flatten();
    let kernels = kernels.map(|entry| entry.path().join("vmlinux"));
    kernels.filter(|path| path.is_file()).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::error::Explain as _;
    use crate::run::bare_host::BareHost;

    /// What is told of the only template there is: what differs, by name.
    #[track_caller]
    fn told(host: &Host) -> String {
        let (all, errors) = list_templates(host).unwrap();
        assert_eq!((all.len(), errors.len()), (1, 0), "{errors:?}");
        assert_eq!(all[0].usable, all[0].differences.is_empty());
        let parts = all[0].differences.iter().map(|one| one.part.as_str());
        parts.collect::<Vec<_>>().join(" ")
    }

    /// Ids and reasons of what is stale; nothing may fail.
    fn pruned(host: &Host, dry_run: bool) -> Vec<(String, String)> {
        let (pruned, errors) = prune_templates(host, dry_run).unwrap();
        assert_eq!(errors.len(), 0, "{errors:?}");
        let reason = |one: &PrunedTemplate| match &one.damage {
            Some(damage) => damage.clone(),
            None => Difference::told(&one.differences),
        };
        let all = pruned.iter();
        all.map(|one| (one.id.clone(), reason(one))).collect()
    }

    #[test]
    fn a_template_is_stale_with_its_image() {
        let bare = BareHost::new();
        let key = bare.key(&bare.spec());
        let first = key.part("image").to_owned();
        bare.template(key, None);
        assert_eq!(told(&bare.host), "");
        assert!(inspect_template(&bare.host, "").is_err());
        // Built again with another agent, the old one is nobody's.
        let second = bare.image("base", "another agent");
        assert_eq!(told(&bare.host), "agent image");
        let reason = pruned(&bare.host, true).remove(0).1;
        let image = format!("image is {second}, and was {first}");
        assert!(reason.contains(&image), "{reason}");
        // By another name it can still be asked for.
        let images = bare.host.images().dir().to_owned();
        let link = images.join("names/old");
        std::os::unix::fs::symlink(Path::new("..").join(&first), link).unwrap();
        assert_eq!(told(&bare.host), "");
        fs::write(images.join(&first).join("manifest.json"), "{}").unwrap();
        assert_eq!(told(&bare.host), "image");
        fs::remove_dir_all(&images).unwrap();
        assert_eq!(told(&bare.host), "image");
        let reason = pruned(&bare.host, true).remove(0).1;
        assert_eq!(reason, format!("image is absent, and was {first}"));
    }

    #[test]
    fn a_template_is_stale_with_its_qemu_processor_and_kernel() {
        let mut bare = BareHost::new();
        let (spec, own) = (bare.spec(), bare.processor());
        let key = bare.key(&spec);
        assert_eq!(key.part("host cpu"), own);
        bare.template(key.clone(), None);
        assert_eq!(told(&bare.host), "");
        let qemu = bare.host.qemu.clone().unwrap();
        let fresh = bare.dir.path().join("fresh");
        fs::copy(&qemu, &fresh).unwrap();
        let mut bytes = fs::read(&fresh).unwrap();
        bytes.push(0);
        fs::write(&fresh, bytes).unwrap();
        fs::rename(&fresh, &qemu).unwrap();
        assert_eq!(told(&bare.host), "qemu");
        // Without any, none can be used, and none goes.
        bare.host.qemu = Some("/nowhere/qemu".into());
        assert_eq!(told(&bare.host), "qemu");
        let error = prune_templates(&bare.host, false).unwrap_err();
        assert_eq!(error.code(), "qemu-not-found");
        bare.host.qemu = Some(qemu);
        assert_eq!(pruned(&bare.host, false).len(), 1);
        let other = BareHost::changed(&bare.key(&spec), "host cpu", "Another (0)");
        bare.template(other, None);
        let reason = pruned(&bare.host, false).remove(0).1;
        assert_eq!(reason, format!("processor is {own}, and was Another (0)"));
        // A kernel that was named by its path.
        let kernel = bare.dir.path().join("vmlinux");
        fs::write(&kernel, [b"\x7fELF", &[0; 0x300][..]].concat()).unwrap();
        let path = kernel.to_str().unwrap().to_owned();
        let spec = crate::spec::Spec {
            kernel: Some(path.clone()),
            ..spec
        };
        bare.template(bare.key(&spec), Some(path));
        assert_eq!(told(&bare.host), "");
        fs::write(&kernel, b"another").unwrap();
        assert_eq!(told(&bare.host), "kernel");
        fs::remove_file(&kernel).unwrap();
        let reason = pruned(&bare.host, true).remove(0).1;
        assert!(reason.starts_with("kernel is absent"), "{reason}");
    }

    #[test]
    fn what_is_stale_or_damaged_goes_and_nothing_else() {
        let bare = BareHost::new();
        let store = bare.host.templates();
        let templates = bare.host.dirs.state.join("templates");
        assert_eq!(pruned(&bare.host, false), []);
        let key = bare.key(&bare.spec());
        let keep = |part: &str, value: &str| {
            let key = BareHost::changed(&key, part, value);
            bare.template(key, None).id
        };
        // What is asked for makes nothing stale.
        let good = [
            keep("domain", "ci"),
            keep("memory", "512M"),
            keep("cpus", "9"),
        ];
        let stale = keep("qemu", "older");
        let [unread, cut, touched] = ["x", "y", "z"].map(|name| keep("domain", name));
        fs::remove_file(templates.join(&unread).join("template.json")).unwrap();
        fs::remove_file(templates.join(&cut).join("disk")).unwrap();
        fs::remove_file(templates.join(&touched).join("state")).unwrap();
        fs::write(templates.join(&touched).join("state"), "STATE").unwrap();
        let (all, errors) = list_templates(&bare.host).unwrap();
        // Only reading it tells that of the last.
        assert_eq!((all.len(), errors.len()), (5, 2));
        assert!(
            errors
                .iter()
                .all(|error| error.code() == "template-corrupt")
        );
        let staged = store.stage().unwrap();
        let ids = |all: &[(String, String)]| {
            let ids = all.iter().map(|(id, _)| id.clone());
            ids.collect::<std::collections::BTreeSet<_>>()
        };
        let wanted = [&stale, &unread, &cut, &touched].map(Clone::clone).into();
        let would = pruned(&bare.host, true);
        assert_eq!(ids(&would), wanted);
        let reason = |id: &str| &would.iter().find(|one| one.0 == id).unwrap().1;
        assert!(reason(&stale).starts_with("qemu is "), "{would:?}");
        assert!(reason(&unread).starts_with("template.json"), "{would:?}");
        assert!(reason(&cut).starts_with("disk"), "{would:?}");
        assert_eq!(reason(&touched), "state is not what was saved");
        assert_eq!(store.ids().unwrap().len(), 7);
        let (gone, errors) = prune_templates(&bare.host, false).unwrap();
        assert_eq!((gone.len(), errors.len()), (4, 0));
        assert!(gone.iter().all(|one| one.bytes > 0), "{gone:?}");
        let left: std::collections::BTreeSet<_> = store.ids().unwrap().into_iter().collect();
        assert_eq!(left, good.into());
        assert!(staged.path().exists(), "it is being built");
        assert_eq!(pruned(&bare.host, false), []);
    }

    #[test]
    fn what_another_did_meanwhile_counts() {
        let bare = BareHost::new();
        let key = bare.key(&bare.spec());
        let id = bare.template(key.clone(), None).id;
        let state = bare
            .host
            .dirs
            .state
            .join("templates")
            .join(&id)
            .join("state");
        fs::remove_file(state).unwrap();
        std::thread::scope(|scope| {
            let held = bare.host.templates();
            let held = held.hold().unwrap();
            let pruning = scope.spawn(|| prune_templates(&bare.host, false).unwrap());
            // It waits for its turn, and judges then.
            std::thread::sleep(std::time::Duration::from_millis(300));
            assert!(!pruning.is_finished());
            held.remove(&id).unwrap();
            drop(held);
            let (gone, errors) = pruning.join().unwrap();
            assert_eq!((gone.len(), errors.len()), (0, 0));
        });
        bare.template(key, None);
        assert_eq!(pruned(&bare.host, false), []);
    }
}
