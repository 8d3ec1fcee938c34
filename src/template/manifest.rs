//! What is in a template, as its manifest says.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;

use bulkhead_agent::Life;
use rustix::fs::{Mode, OFlags, openat};
use serde::{Deserialize, Serialize};

use super::error::TemplateError;
use super::key::Key;
use crate::qmp::Version;
use crate::spec::ProfileName;

/// The guest's memory.
pub(crate) const RAM: &str = "ram";
/// Everything else of the machine's state, as QEMU writes it.
pub(crate) const STATE: &str = "state";
/// The writable disk.
pub(crate) const DISK: &str = "disk";
pub(super) const MANIFEST: &str = "template.json";
/// Format of the manifest.
pub(crate) const SCHEMA: u32 = 1;

/// A file of a template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Piece {
    /// Size in bytes.
    pub size: u64,
    /// Digest of its size and of every 4 KiB that are not zero, with their place.
    pub sha256: String,
}

/// `template.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this format: 1.
    pub schema: u32,
    /// What a machine must have in common with it.
    pub key: Key,
    /// What the guest was when it was saved.
    pub life: Life,
    /// The guest's memory.
    pub ram: Piece,
    /// The state of its devices.
    pub state: Piece,
    /// Its writable disk.
    pub disk: Piece,
    /// When it was made, in milliseconds since 1970.
    pub created_ms: u64,
    /// Name of the image, as it was asked for.
    pub image: String,
    /// Profile it was built with.
    pub profile: ProfileName,
    /// What was run in it before it was saved.
    pub warm: Option<String>,
    /// The guest's clock was behind until then: OpenSSL takes from the kernel
    /// again in each clone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub behind: bool,
    /// Version of its QEMU.
    pub qemu: Version,
    /// File of its kernel, where that was named by path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
}

/// What is known of a template before its files are there.
#[derive(Debug)]
pub(crate) struct Described {
    pub(crate) key: Key,
    pub(crate) life: Life,
    pub(crate) created_ms: u64,
    pub(crate) image: String,
    pub(crate) profile: ProfileName,
    pub(crate) warm: Option<String>,
    pub(crate) behind: bool,
    pub(crate) qemu: Version,
    pub(crate) kernel: Option<String>,
}

/// Opens a file of a template, whatever has become of the directory's name.
pub(super) fn open_in(dir: &File, name: &str) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    Ok(openat(dir.as_fd(), name, flags, Mode::empty())?.into())
}

/// Largest manifest, in bytes.
pub(crate) const LONGEST: u64 = 1 << 20;

/// A short file of a template.
pub(super) fn read(dir: &File, name: &str) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open_in(dir, name)?.take(LONGEST).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The manifest of the template `id` in `dir`.
pub(super) fn manifest(dir: &File, id: &str) -> Result<Manifest, TemplateError> {
    let corrupt = |what: String| TemplateError::Corrupt {
        id: id.to_owned(),
        what: format!("{MANIFEST}: {what}"),
    };
    let bytes = read(dir, MANIFEST).map_err(|error| corrupt(error.to_string()))?;
    let manifest: Manifest =
        serde_json::from_slice(&bytes).map_err(|error| corrupt(error.to_string()))?;
    match manifest.schema {
        SCHEMA => Ok(manifest),
        other => Err(corrupt(format!("format {other}, and {SCHEMA} is known"))),
    }
}
