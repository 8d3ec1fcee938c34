//! What an export must have in common with the host that takes it in.

use std::io::Read;
use std::path::PathBuf;

use super::RunError;
use super::host::Host;
use crate::export::{ExportError, Import};
use crate::host::probe;
use crate::spec::DomainName;
use crate::template::{Manifest, Template, TemplateError};

/// Takes a template in, where machines here, of the trust domain that the
/// importer names, could be cloned from it. Blocks.
///
/// # Errors
/// Its image is not here; trust domain, kernel, QEMU or processor are others,
/// which are named; or what [`Import::keep_template`] gives. Nothing is left then.
pub fn import_template<R: Read>(
    host: &Host,
    import: Import<R>,
    domain: &DomainName,
) -> Result<Template, RunError> {
    fits(host, import.template()?, import.of(), domain)?;
    Ok(import.keep_template(&host.templates())?)
}

fn fits(host: &Host, manifest: &Manifest, of: &str, domain: &DomainName) -> Result<(), RunError> {
    let key = &manifest.key;
    let image = host.images().inspect(key.part("image"))?;
    let qemu = probe::find_qemu(host.qemu.as_deref())?;
    let facts = probe::facts(qemu, &host.dirs.cache());
    let differences = key.elsewhere(domain, &image, &kernels(host), &facts, &host.dirs.cache());
    let differences = differences.map_err(|source| TemplateError::Io {
        action: "read what the key of a template is made of in",
        path: image.dir.clone(),
        source,
    })?;
    match differences.is_empty() {
        true => Ok(()),
        false => Err(ExportError::Elsewhere {
            of: of.to_owned(),
            differences,
            cure: "Build one here, with `bulkhead template build` and the same options; where \
                 only the trust domain differs, and you trust who made it, name that: --domain.",
        }
        .into()),
    }
}

/// The kernels that are installed besides those of images.
fn kernels(host: &Host) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(host.dirs.kernels());
    let kernels = entries.into_iter().flatten().flatten();
    let kernels = kernels.map(|entry| entry.path().join("vmlinux"));
    kernels.filter(|path| path.is_file()).collect()
}
