//! Where a guest's memory is: QEMU's own, or a template's file.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Where QEMU asks for the file. There is nothing of that name: whoever started
/// QEMU answers with a descriptor (`vmm/ram.rs`).
pub const RAM: &str = "/ram";

/// Where a guest's memory is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Ram {
    /// QEMU's own.
    #[default]
    Own,
    /// A file that is to be a template's: QEMU writes to it.
    Saved {
        /// The file.
        file: PathBuf,
    },
    /// Private pages over a template's file, which QEMU can only read.
    Cloned {
        /// Id of the template.
        template: String,
        /// The file.
        file: PathBuf,
        /// Its device and inode: another may have its name later.
        inode: (u64, u64),
    },
    /// QEMU's own, filled from a snapshot.
    Restored {
        /// The machine that was saved came from a template: its memory has
        /// another name in the saved state, and it has no balloon.
        backed: bool,
    },
}

impl Ram {
    /// The file, where there is one.
    pub fn file(&self) -> Option<&Path> {
        match self {
            Self::Own | Self::Restored { .. } => None,
            Self::Saved { file } | Self::Cloned { file, .. } => Some(file),
        }
    }

    /// Id of the template it is cloned from.
    pub fn template(&self) -> Option<&str> {
        match self {
            Self::Cloned { template, .. } => Some(template),
            Self::Own | Self::Saved { .. } | Self::Restored { .. } => None,
        }
    }

    /// Whether QEMU is told of the memory as an object of its own.
    pub fn is_backed(&self) -> bool {
        !matches!(self, Self::Own | Self::Restored { backed: false })
    }
}
