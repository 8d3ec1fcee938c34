//! Writes an export.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use zstd::stream::write::Encoder;

use super::error::ExportError;
use super::header::{Content, Header, LONGEST, Machine, SCHEMA};
use super::seal::Sealing;
use crate::host::fault;
use crate::snapshot::{self, SnapshotName};
use crate::template::{self, Piece, SparseHash, Template, each_extent, each_run};

/// zstd's own default: memory halves at the speed of a disk.
const LEVEL: i32 = 3;

/// A file to be exported.
struct Part {
    name: &'static str,
    piece: Piece,
    file: File,
}

/// Writes a template; gives how many bytes that took. `of` names what is
/// written to. Blocks.
///
/// # Errors
/// It is damaged, or cannot be written.
pub fn template(
    template: Template,
    exported_ms: u64,
    to: impl Write,
    of: &Path,
) -> Result<u64, ExportError> {
    let manifest = &template.manifest;
    let part = |name, piece: &Piece, file| Part {
        name,
        piece: piece.clone(),
        file,
    };
    let parts = [
        part(template::RAM, &manifest.ram, template.ram),
        part(template::STATE, &manifest.state, template.state),
        part(template::DISK, &manifest.disk, template.disk),
    ];
    let content = Content::Template(Box::new(template::Manifest {
        // A path is one of the host that it was on.
        kernel: None,
        ..template.manifest.clone()
    }));
    write(content, exported_ms, &parts, to, of)
}

/// Writes a snapshot of `machine`, as [`template()`] does.
///
/// # Errors
/// There is none of this name, it is damaged, or it cannot be written.
pub fn snapshot(
    store: &snapshot::Store,
    name: &SnapshotName,
    machine: Machine,
    exported_ms: u64,
    to: impl Write,
    of: &Path,
) -> Result<u64, ExportError> {
    let snapshot = store.get(name)?;
    let manifest = snapshot.manifest;
    let disk = File::open(&snapshot.disk).map_err(ExportError::io("read", &snapshot.disk))?;
    let state = manifest.saved.iter().zip(snapshot.state);
    let mut parts: Vec<Part> = state
        .map(|(saved, file)| Part {
            name: snapshot::STATE,
            piece: saved.state.clone(),
            file,
        })
        .collect();
    parts.push(Part {
        name: snapshot::DISK,
        piece: manifest.disk.clone(),
        file: disk,
    });
    let content = Content::Snapshot {
        manifest: Box::new(manifest),
        machine: Box::new(machine),
    };
    write(content, exported_ms, &parts, to, of)
}

fn write(
    content: Content,
    exported_ms: u64,
    parts: &[Part],
    to: impl Write,
    of: &Path,
) -> Result<u64, ExportError> {
    let mut data = 0;
    for part in parts {
        let count = |begin, end| {
            data += end - begin;
            Ok(())
        };
        each_extent(&part.file, count).map_err(ExportError::io("read for", of))?;
    }
    let header = Header {
        schema: SCHEMA,
        bulkhead: env!("CARGO_PKG_VERSION").to_owned(),
        exported_ms,
        data,
        content,
    };
    let begin = || {
        fault::at("export header")?;
        let mut zstd = Encoder::new(Sealing::new(to)?, LEVEL)?;
        zstd.write_all(&encoded(&header)?)?;
        Ok(zstd)
    };
    let mut zstd = begin().map_err(ExportError::io("write", of))?;
    for part in parts {
        let sha256 = fault::at(&format!("export {}", part.name))
            .and_then(|()| runs(&part.file, &mut zstd))
            .map_err(ExportError::io("write", of))?;
        // Its end is missing now, and nobody takes it for whole.
        if sha256 != part.piece.sha256 {
            return Err(ExportError::Source { file: part.name });
        }
    }
    let finish = || zstd.finish()?.finish();
    finish().map_err(ExportError::io("write", of))
}

/// The header and its length (32 bits, little endian).
pub(super) fn encoded(header: &Header) -> io::Result<Vec<u8>> {
    let text = serde_json::to_vec(header)?;
    if text.len() > LONGEST {
        let told = format!(
            "its header has {} bytes, {LONGEST} are the most",
            text.len()
        );
        return Err(io::Error::new(io::ErrorKind::InvalidInput, told));
    }
    let len = u32::try_from(text.len()).map_err(io::Error::other)?;
    Ok([&len.to_le_bytes()[..], &text].concat())
}

/// Writes what is not zero: for each run its place (64 bits), its length (32
/// bits), and its bytes; then the file's size and no length. Gives the digest.
fn runs(file: &File, to: &mut impl Write) -> io::Result<String> {
    let size = file.metadata()?.len();
    let mut hash = SparseHash::new(size);
    each_run(file, |at, bytes| {
        hash.add(at, bytes);
        let len = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        to.write_all(&at.to_le_bytes())?;
        to.write_all(&len.to_le_bytes())?;
        to.write_all(bytes)
    })?;
    to.write_all(&size.to_le_bytes())?;
    to.write_all(&0_u32.to_le_bytes())?;
    Ok(hash.finish())
}
