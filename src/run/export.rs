//! What an export must have in common with the host that takes it in.

use std::io::Read;
use std::path::PathBuf;

use super::RunError;
use super::host::Host;
use crate::export::{ExportError, Import};
use crate::host::probe;
use crate::template::{Manifest, Template, TemplateError};

/// Takes a template in, where machines here could be cloned from it. Blocks.
///
/// # Errors
/// Its image is not here; kernel, QEMU or processor are others, which are
/// named; or what [`Import::keep_template`] gives. Nothing is left then.
pub fn import_template<R: Read>(host: &Host, import: Import<R>) -> Result<Template, RunError> {
    fits(host, import.template()?, import.of())?;
    Ok(import.keep_template(&host.templates())?)
}

fn fits(host: &Host, manifest: &Manifest, of: &str) -> Result<(), RunError> {
    let key = &manifest.key;
    let image = host.images().inspect(key.part("image"))?;
    let qemu = probe::find_qemu(host.qemu.as_deref())?;
    let facts = probe::facts(qemu, &host.dirs.cache());
    let differences = key.elsewhere(&image, &kernels(host), &facts, &host.dirs.cache());
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
            cure: "Build one here, with `bulkhead template build` and the same options.",
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
