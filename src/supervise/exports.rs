//! Snapshots that leave a host as one file, and machines made of such.

use std::io::{Read, Write};
use std::path::Path;

use super::error::SuperviseError;
use super::machines::{Machines, absolute};
use crate::export::{self, ExportError, Import};
use crate::run::{
    Beginning, Record, RunError, StateFile, copy_disk, detached, differences, now_ms,
};
use crate::snapshot::{Manifest, SnapshotName, Store};
use crate::spec::{Bytes, Spec, VmId};
use crate::template::Difference;

/// What is to be done where an export does not fit.
const CURE: &str = "Give the options that it needs, or take its disk alone: --disk-only.";

impl Machines {
    /// Writes a snapshot, with what its machine is made of; gives how many bytes
    /// that took. `of` names what is written to. Blocks.
    ///
    /// # Errors
    /// There is none of this name, it is damaged, or it cannot be written.
    pub fn export(
        &self,
        id: &VmId,
        name: &SnapshotName,
        to: impl Write,
        of: &Path,
    ) -> Result<u64, SuperviseError> {
        let store = self.snapshots(id)?;
        store.summary(name)?;
        let state = StateFile::open(&self.dirs().run(id), id)?;
        let machine = export::Machine::of(&self.spec(id)?, &state.status().image.name);
        let written = export::snapshot(&store, name, machine, now_ms(), to, of);
        Ok(written.map_err(RunError::from)?)
    }

    /// Makes a machine of an export: `spec`, which holds what the importer says
    /// over [`export::Machine::request`]. Its first start goes on from the
    /// snapshot, which it has as one of its own; with the disk alone it boots.
    /// Blocks.
    ///
    /// # Errors
    /// It does not fit, and what differs is named; the name is taken; the
    /// export is not what was written. Nothing is left then.
    pub fn import<R: Read>(
        &self,
        import: Import<R>,
        spec: Spec,
        disk_only: bool,
    ) -> Result<(), SuperviseError> {
        let (manifest, machine) = import.snapshot().map_err(RunError::from)?;
        let name = machine.image.clone();
        let image = self.host().images().get(&spec.image);
        let image = image.map_err(RunError::from)?;
        let spec = Spec {
            image: image.id.clone(),
            // Its supervisor works elsewhere.
            kernel: spec.kernel.as_ref().map(|kernel| absolute(kernel)),
            workspace: detached::resolve(&spec.workspace)?,
            ..spec
        };
        self.fits(&spec, manifest, import.of(), disk_only)?;
        let _lock = image.lock().map_err(RunError::from)?;
        let name = match crate::image::check_name(&name) {
            Ok(()) => name,
            Err(_) => image.id.clone(),
        };
        Record::keep_with(self.dirs(), &spec, &image, &name, |dir| {
            let store = Store::new(dir, &spec.id);
            let kept = import.keep_snapshot(&store, disk_only);
            let manifest = kept.map_err(RunError::from)?;
            if manifest.saved.is_some() {
                return Ok(Beginning::Memory(manifest.name));
            }
            copy_disk(&store.get(&manifest.name)?, dir)?;
            Ok::<_, SuperviseError>(Beginning::Disk(manifest.name))
        })
    }

    /// Whether a machine can be made of it here.
    fn fits(
        &self,
        spec: &Spec,
        manifest: &Manifest,
        of: &str,
        disk_only: bool,
    ) -> Result<(), SuperviseError> {
        let mut differences = match manifest.saved.as_ref().filter(|_| !disk_only) {
            Some(saved) => differences(self.host(), spec, saved)?,
            // A disk belongs to its image.
            None if spec.image != manifest.image => vec![Difference {
                part: "image".into(),
                machine: spec.image.clone(),
                template: manifest.image.clone(),
            }],
            None => Vec::new(),
        };
        let disk = Bytes(manifest.disk.size);
        if spec.limits.disk != disk && !differences.iter().any(|one| one.part == "disk") {
            differences.push(Difference {
                part: "disk".into(),
                machine: spec.limits.disk.to_string(),
                template: disk.to_string(),
            });
        }
        match differences.is_empty() {
            true => Ok(()),
            false => Err(RunError::from(ExportError::Elsewhere {
                of: of.to_owned(),
                differences,
                cure: CURE,
            })
            .into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Report;
    use crate::run::bare_host::BareHost;
    use crate::snapshot::{DISK, STATE, Saved, Wish};
    use crate::template::Key;

    /// An export of a snapshot with this key.
    fn exported(spec: &Spec, image: &str, key: Key) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path(), &spec.id);
        let staged = store.stage().unwrap();
        for (name, size) in [(STATE, 5), (DISK, spec.limits.disk.0)] {
            let file = std::fs::File::create(staged.path().join(name)).unwrap();
            file.set_len(size).unwrap();
        }
        let piece = |name| Store::piece(staged.path(), name).unwrap();
        let saved = Saved {
            key,
            life: bulkhead_agent::Life::default(),
            backed: false,
            qemu: serde_json::from_str(r#"{"major":7,"minor":2,"micro":0,"package":""}"#).unwrap(),
            paused_ms: 1,
            state: piece(STATE),
        };
        let wish = Wish {
            name: "one".parse().unwrap(),
            description: None,
            tags: [].into(),
            disk_only: false,
            transient: false,
        };
        let disk = piece(DISK);
        let manifest = Manifest::new(&wish, None, image.to_owned(), Some(saved), disk, 1);
        store.commit(staged, &manifest).unwrap();
        let machine = export::Machine::of(spec, "base");
        let mut bytes = Vec::new();
        export::snapshot(&store, &wish.name, machine, 7, &mut bytes, Path::new("x")).unwrap();
        bytes
    }

    #[test]
    fn a_snapshot_of_another_processor_is_refused_and_named() {
        let bare = BareHost::new();
        let spec = bare.spec();
        let key = bare.key(&spec);
        let image = key.part("image").to_owned();
        let machines = Machines::new(bare.host.clone());
        let foreign = BareHost::changed(&key, "host cpu", "Another CPU (0)");
        let bytes = exported(&spec, &image, foreign);
        let import = |bytes, disk_only| {
            let import = Import::open(bytes, "x").unwrap();
            machines.import(import, spec.clone(), disk_only)
        };
        let error = Report::of(&import(&bytes[..], false).unwrap_err());
        let processor = format!("processor is {}, and was Another CPU (0)", bare.processor());
        assert_eq!(error.code, "export-mismatch");
        assert!(error.what.ends_with(&processor), "{error:?}");
        let record = bare.host.dirs.run(&spec.id);
        assert!(!record.exists());
        // Its disk is the same on every processor.
        import(&bytes[..], true).unwrap();
        std::fs::remove_dir_all(&record).unwrap();
        import(&exported(&spec, &image, key)[..], false).unwrap();
        assert!(record.exists());
    }
}
