//! Whether a template's files are what was saved.

use std::fs::File;
use std::io;
use std::path::Path;

use super::digest;
use super::error::TemplateError;
use super::manifest::{DISK, Manifest, Piece, RAM, STATE, open_in, read};
use crate::host::lease::write_durably;
use crate::host::stamp::Stamp;

const SEEN: &str = "seen.json";

/// How closely files are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Look {
    /// They are there, and of their size.
    Size,
    /// What was touched since it was last read is read again.
    Content,
}

/// Opens memory, state and disk of the template `id`, which is in `dir`; `place`
/// is the name of that.
pub(super) fn open(
    dir: &File,
    place: &Path,
    id: &str,
    manifest: &Manifest,
    look: Look,
) -> Result<[File; 3], TemplateError> {
    let corrupt = |what: String| TemplateError::Corrupt {
        id: id.to_owned(),
        what,
    };
    if manifest.key.id() != id {
        return Err(corrupt("its manifest is another's".into()));
    }
    let seen = seen(dir);
    let mut changed = false;
    let mut piece = |name: &str, piece: &Piece| {
        let file = open_in(dir, name).map_err(|error| corrupt(format!("{name}: {error}")))?;
        let meta = file.metadata().map_err(TemplateError::io("read", place))?;
        if meta.len() != piece.size {
            let (found, wanted) = (meta.len(), piece.size);
            return Err(corrupt(format!("{name} has {found} bytes, not {wanted}")));
        }
        if look == Look::Content && !seen.contains(&(name.to_owned(), Stamp::from(&meta))) {
            changed = true;
            let found =
                digest::of_sparse(&file).map_err(TemplateError::io("read", place.join(name)))?;
            if found != piece.sha256 {
                return Err(corrupt(format!("{name} is not what was saved")));
            }
        }
        Ok(file)
    };
    let files = [
        piece(RAM, &manifest.ram)?,
        piece(STATE, &manifest.state)?,
        piece(DISK, &manifest.disk)?,
    ];
    if changed {
        remember(place);
    }
    Ok(files)
}

/// What the files were like when they were last what was saved.
type Seen = Vec<(String, Stamp)>;

fn seen(dir: &File) -> Seen {
    let bytes = read(dir, SEEN).ok();
    bytes
        .and_then(|bytes| serde_json::from_slice(&bytes).ok())
        .unwrap_or_default()
}

/// Best effort: without it the files are read again.
pub(super) fn remember(dir: &Path) {
    let stamp = |name: &str| Ok((name.to_owned(), Stamp::of(&dir.join(name))?));
    let seen: io::Result<Seen> = [RAM, STATE, DISK].into_iter().map(stamp).collect();
    let kept = seen.and_then(|seen| write_durably(&dir.join(SEEN), &serde_json::to_vec(&seen)?));
    if let Err(error) = kept {
        tracing::debug!(%error, "what was checked is not remembered");
    }
}
