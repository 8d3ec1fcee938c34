//! What an export must have in common with the host that takes it in.

use std::io::Read;

use super::RunError;
use super::host::Host;
use super::stale::here;
use crate::export::{ExportError, Import};
use crate::host::probe;
use crate::spec::DomainName;
use crate::template::{Manifest, Template};

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
    let here = here(host, Some(&probe::facts(qemu, &host.dirs.cache())))?;
    let differences = key.elsewhere(domain.as_str(), Ok(&image), &here);
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::error::Report;
    use crate::run::bare_host::BareHost;

    #[test]
    fn a_template_of_another_processor_is_refused_and_named() {
        let bare = BareHost::new();
        let (store, key) = (bare.host.templates(), bare.key(&bare.spec()));
        let import = |key| {
            let made = bare.template(key, None);
            let id = made.id.clone();
            let mut bytes = Vec::new();
            crate::export::template(made, 7, &mut bytes, Path::new("x")).unwrap();
            store.rm(&id).unwrap();
            let import = Import::open(&bytes[..], "x").unwrap();
            import_template(&bare.host, import, &DomainName::default())
        };
        let foreign = BareHost::changed(&key, "host cpu", "Another CPU (0)");
        let error = Report::of(&import(foreign).unwrap_err());
        let processor = format!("processor is {}, and was Another CPU (0)", bare.processor());
        assert_eq!(error.code, "export-mismatch");
        assert!(error.what.ends_with(&processor), "{error:?}");
        assert!(store.ids().unwrap().is_empty());
        assert!(import(key).is_ok());
    }
}
