//! Kernel, root file system and manifest: building, importing and keeping images.

mod apt;
mod build;
mod cpio;
mod digest;
mod entries;
mod error;
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzz;
mod import;
mod initramfs;
mod kernel;
mod manifest;
mod merge;
mod oci;
mod packages;
mod recipe;
mod rules;
pub mod scratch;
pub(crate) mod staging;
mod store;
mod tarball;
mod tool;
mod users;

use std::path::PathBuf;

pub use build::Builder;
pub use error::{Error, Result};
pub use initramfs::AgentBinary;
pub use kernel::KernelSource;
pub use manifest::{Agent, File, Kernel, KernelFormat, Manifest, Package};
pub use recipe::{Recipe, Variant};
pub(crate) use store::check_name;
pub use store::{Lock, Store, Summary};

/// An image on disk whose files were checked against its manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// `sha256-` and the digest of the manifest.
    pub id: String,
    /// Directory with the files.
    pub dir: PathBuf,
    /// What is in it.
    pub manifest: Manifest,
}

impl Image {
    /// Path of the kernel.
    pub fn kernel(&self) -> PathBuf {
        self.dir.join(&self.manifest.kernel.image.file)
    }

    /// Path of the initramfs.
    pub fn initramfs(&self) -> PathBuf {
        self.dir.join(&self.manifest.initramfs.file)
    }

    /// Path of the root file system.
    pub fn root(&self) -> PathBuf {
        self.dir.join(&self.manifest.root.file)
    }
}
