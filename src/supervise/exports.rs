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
