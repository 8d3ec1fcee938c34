//! Back to the beginning: a fresh machine in the old one's place.

use super::error::SuperviseError;
use super::launch::Launcher;
use super::machines::Machines;
use crate::host::fault;
use crate::run::{Record, RecordError};
use crate::spec::VmId;

impl Machines {
    /// Gives a machine the disk of one that was never started. One that runs
    /// is ended at once and started again: as a clone, where a template
    /// matches. It keeps its name, its machine id, its labels and its logs.
    ///
    /// # Errors
    /// There is none, it is coming up or going down, or it does not come up
    /// again.
    pub async fn reset(&self, id: &VmId, launcher: &Launcher) -> Result<(), SuperviseError> {
        let live = self.look(id).await?.state.is_live();
        if live {
            match self.stop(id, None, true).await {
                // It ended by itself meanwhile.
                Err(SuperviseError::WrongState { .. }) => {}
                other => other?,
            }
        }
        let (record, _, mut state) = Record::open(self.dirs(), id)?;
        fault::at("reset machine").map_err(|source| RecordError::Io {
            action: "reset",
            path: record.dir().to_owned(),
            source,
        })?;
        // From here on its next start is its first, and makes it a new disk.
        state.update(|status| {
            status.provisioned = false;
            status.snapshot = None;
            status.restore = None;
        })?;
        drop((record, state));
        match live {
            true => self.start(id, launcher).await,
            false => Ok(()),
        }
    }
}
