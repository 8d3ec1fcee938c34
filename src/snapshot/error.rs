//! Why a snapshot cannot be kept or used.

use std::io;
use std::path::PathBuf;

use super::SnapshotName;
use crate::error::Explain;
use crate::spec::VmId;

/// A snapshot cannot be kept or used.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The file system refused.
    #[error("cannot {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It could not be put together beside the others.
    #[error(transparent)]
    Staging(#[from] crate::image::Error),
    /// There is none of this name.
    #[error("{vm} has no snapshot {name}")]
    NotFound {
        /// The machine.
        vm: VmId,
        /// As it was asked for.
        name: SnapshotName,
    },
    /// There is one of this name.
    #[error("{vm} has a snapshot {name} already")]
    Exists {
        /// The machine.
        vm: VmId,
        /// As it was asked for.
        name: SnapshotName,
    },
    /// It is not what was saved.
    #[error("the snapshot {name} of {vm} is damaged: {what}")]
    Corrupt {
        /// The machine.
        vm: VmId,
        /// The snapshot.
        name: SnapshotName,
        /// What is wrong.
        what: String,
    },
    /// The machine would not be the one that was saved.
    #[error("the memory in the snapshot {name} of {vm} does not fit: {differences}")]
    Mismatch {
        /// The machine.
        vm: VmId,
        /// The snapshot.
        name: SnapshotName,
        /// What differs.
        differences: String,
    },
    /// The machine has a part whose state QEMU cannot save.
    #[error("the memory of {vm} cannot be saved: {why}")]
    Unsavable {
        /// The machine.
        vm: VmId,
        /// Which part.
        why: &'static str,
        /// What to do about it.
        cure: &'static str,
    },
    /// It does not run, and only its disk could be saved.
    #[error("{vm} does not run: there is no memory to save")]
    NoMemory {
        /// The machine.
        vm: VmId,
    },
    /// It has no disk yet.
    #[error("{vm} was never started: there is no disk to save")]
    NoDisk {
        /// The machine.
        vm: VmId,
    },
    /// QEMU did not save it.
    #[error("QEMU could not save {vm}: {why}")]
    Failed {
        /// The machine.
        vm: VmId,
        /// What it said.
        why: String,
    },
}

impl SnapshotError {
    pub(crate) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }
}

impl Explain for SnapshotError {
    fn code(&self) -> &'static str {
        match self {
            Self::Io { source, .. } if crate::host::is_full(source) => "no-space",
            Self::Io { .. } => "snapshot-unusable",
            Self::Staging(error) => error.code(),
            Self::NotFound { .. } => "snapshot-not-found",
            Self::Exists { .. } => "snapshot-exists",
            Self::Corrupt { .. } => "snapshot-corrupt",
            Self::Mismatch { .. } => "snapshot-mismatch",
            Self::Unsavable { .. } => "machine-unsavable",
            Self::NoMemory { .. } | Self::NoDisk { .. } => "nothing-to-save",
            Self::Failed { .. } => "save-failed",
        }
    }

    fn remedy(&self) -> String {
        match self {
            Self::Io { path, .. } => format!(
                "Check the permissions of, and the space for, {}.",
                path.display()
            ),
            Self::Staging(error) => error.remedy(),
            Self::NotFound { vm, .. } => format!("See `bulkhead snapshot ls {vm}`."),
            Self::Exists { vm, name } => {
                format!("Take another name, or remove it: bulkhead snapshot rm {vm} {name}")
            }
            Self::Corrupt { vm, name, .. } => {
                format!("Restore another one, and remove it: bulkhead snapshot rm {vm} {name}")
            }
            Self::Mismatch { vm, name, .. } => format!(
                "Its disk fits all the same: bulkhead snapshot restore --disk-only {vm} {name}"
            ),
            Self::Unsavable { cure, .. } => (*cure).to_owned(),
            Self::NoMemory { vm } => {
                format!("Save its disk with --disk-only, or start it: bulkhead start {vm}")
            }
            Self::NoDisk { vm } => format!("Start it: bulkhead start {vm}"),
            Self::Failed { .. } => "The machine runs on. Act on QEMU's message.".into(),
        }
    }
}
