//! The entries of a tar archive from anywhere, with bounds on their headers.

use std::cell::Cell;
use std::io::Read;
use std::rc::Rc;

use tar::Archive;

use super::error::{Error, Result};

/// Bytes of all headers of one entry: long names, pax records, sparse maps.
const MAX_HEADERS: u64 = 1 << 20;

/// Goes through an archive whose files have at most `bytes` together; gives
/// what is left of them.
///
/// The tar crate takes headers into memory whole. So whatever it reads to get
/// to the next entry is counted: the data of this one is behind it by then.
pub(super) fn each_entry<R: Read>(
    archive: &str,
    tar: R,
    mut bytes: u64,
    mut each: impl FnMut(&mut tar::Entry<'_, Headers<R>>) -> Result<()>,
) -> Result<u64> {
    let bad = |reason: &str| Error::Archive {
        archive: archive.to_owned(),
        reason: reason.to_owned(),
    };
    let failed = |source| stream(archive, source);
    let left = Rc::new(Cell::new(MAX_HEADERS));
    let mut tar = Archive::new(Headers {
        inner: tar,
        left: Rc::clone(&left),
    });
    let mut entries = tar.entries().map_err(failed)?;
    loop {
        left.set(MAX_HEADERS);
        let entry = entries.next();
        if left.get() == 0 {
            return Err(bad("the headers of an entry are larger than 1 MiB"));
        }
        let Some(entry) = entry else { break };
        let mut entry = entry.map_err(failed)?;
        left.set(u64::MAX);
        // Not taken into memory, but nobody needs one that large.
        if entry.header().entry_type().is_pax_global_extensions() && entry.size() > MAX_HEADERS {
            return Err(bad("it has a global header larger than 1 MiB"));
        }
        // A sparse file can be large without data, and is read to its end.
        bytes = (bytes.checked_sub(entry.size())).ok_or_else(|| bad("its files are too large"))?;
        each(&mut entry)?;
        std::io::copy(&mut entry, &mut std::io::sink()).map_err(failed)?;
    }
    Ok(bytes)
}

/// A reader that ends early when it has given what is left.
pub(super) struct Headers<R> {
    inner: R,
    left: Rc<Cell<u64>>,
}

impl<R: Read> Read for Headers<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let most = usize::try_from(self.left.get()).unwrap_or(usize::MAX);
        let want = buffer.len().min(most);
        let got = self.inner.read(&mut buffer[..want])?;
        self.left.set(self.left.get() - got as u64);
        Ok(got)
    }
}

/// A failure to read `archive`.
pub(super) fn stream(archive: &str, source: std::io::Error) -> Error {
    Error::Archive {
        archive: archive.to_owned(),
        reason: source.to_string(),
    }
}
