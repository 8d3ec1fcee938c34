//! What an image is made of, and the digests that prove it.

use serde::{Deserialize, Serialize};

/// `manifest.json` of an image. Its own SHA-256 is the image's id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this format: 1.
    pub schema: u32,
    /// Name it was built under.
    pub name: String,
    /// Id of the image it was provisioned from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// The read-only root file system (squashfs).
    pub root: File,
    /// The kernel it boots unless another is asked for.
    pub kernel: Kernel,
    /// The initramfs with the guest agent and the kernel's modules.
    pub initramfs: File,
    /// The guest agent inside the initramfs.
    pub agent: Agent,
    /// Packages of the root file system, sorted by name.
    pub packages: Vec<Package>,
}

impl Manifest {
    /// Every file of the image but the manifest.
    pub fn files(&self) -> impl Iterator<Item = &File> {
        [&self.root, &self.kernel.image, &self.initramfs].into_iter()
    }

    /// Bytes of all its files, as it claims.
    pub(super) fn size(&self) -> u64 {
        self.files()
            .fold(0, |sum, file| sum.saturating_add(file.size))
    }
}

/// Whether a name stays in the directory it is joined to.
pub(super) fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\0'])
}

/// One file of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct File {
    /// Name in the image's directory.
    pub file: String,
    /// Size in bytes.
    pub size: u64,
    /// SHA-256 in lower-case hexadecimal.
    pub sha256: String,
}

/// A kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Kernel {
    /// The kernel image.
    pub image: File,
    /// Release, as `uname -r` prints it.
    pub release: String,
    /// How it boots.
    pub format: KernelFormat,
}

/// How a kernel boots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum KernelFormat {
    /// A compressed image with the Linux boot protocol.
    Bzimage,
    /// An uncompressed ELF with a PVH entry point.
    Vmlinux,
}

/// The guest agent of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Agent {
    /// Its version.
    pub version: String,
    /// Version of the messages it speaks ([`bulkhead_agent::VERSION`]).
    pub protocol: u16,
    /// SHA-256 of its binary.
    pub sha256: String,
}

/// An installed package.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Package {
    /// Name.
    pub name: String,
    /// Version.
    pub version: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_may_claim_any_size() {
        let file = File {
            file: "root.squashfs".into(),
            size: u64::MAX,
            sha256: String::new(),
        };
        let manifest = Manifest {
            schema: 1,
            name: "base".into(),
            from: None,
            root: file.clone(),
            kernel: Kernel {
                image: file.clone(),
                release: "6.12.0".into(),
                format: KernelFormat::Vmlinux,
            },
            initramfs: file,
            agent: Agent {
                version: "0.1.0".into(),
                protocol: 1,
                sha256: String::new(),
            },
            packages: Vec::new(),
        };
        assert_eq!(manifest.size(), u64::MAX);
    }
}
