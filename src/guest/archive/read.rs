//! Tar entries out of a hostile stream: every length is checked before use.

use std::io::{self, Read, Write};

use tar::{EntryType, GnuExtSparseHeader, Header};

use super::beneath::{CopyError, copy_exact};
use super::header::BLOCK;
use super::{Error, Limits};

/// Largest PAX header that is read, in bytes.
const PAX_MAX: u64 = 256 * 1024;
/// Most extents of one sparse file.
const EXTENTS_MAX: usize = 1 << 20;
/// Zeros allowed after the end marker, in bytes (tar pads to its record size).
const TRAILER_MAX: usize = 1 << 20;

/// One entry, as it claims to be.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) kind: EntryType,
    pub(crate) name: Vec<u8>,
    pub(crate) link: Vec<u8>,
    pub(crate) mode: u32,
    pub(crate) mtime: u64,
    /// Apparent size in bytes.
    pub(crate) size: u64,
    /// Where the stored bytes belong; in order, disjoint, within `size`.
    pub(crate) extents: Vec<(u64, u64)>,
}

/// Names and sizes that a preceding entry sets for the next one.
#[derive(Debug, Default)]
struct Extension {
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    mtime: Option<u64>,
}

/// Reads entries in order.
#[derive(Debug)]
pub(crate) struct Reader<'a, R> {
    inner: R,
    limits: &'a Limits,
    /// Stored bytes of the current entry not read yet, and padding after them.
    left: u64,
    padding: u64,
    /// Stored bytes of all entries so far.
    stored: u64,
    /// Headers seen, with those of extensions.
    headers: u64,
    buffer: Vec<u8>,
}

impl<'a, R: Read> Reader<'a, R> {
    pub(crate) fn new(inner: R, limits: &'a Limits) -> Self {
        Self {
            inner,
            limits,
            left: 0,
            padding: 0,
            stored: 0,
            headers: 0,
            buffer: vec![0; 64 * 1024],
        }
    }

    /// The next entry; `None` at the end marker. Unread data is skipped.
    pub(crate) fn next(&mut self) -> Result<Option<Entry>, Error> {
        let mut extension = Extension::default();
        loop {
            self.discard(self.left + self.padding)?;
            (self.left, self.padding) = (0, 0);
            let mut header = Header::new_old();
            self.block(header.as_mut_bytes())?;
            if header.as_bytes().iter().all(|&byte| byte == 0) {
                self.trailer()?;
                return Ok(None);
            }
            self.headers += 1;
            // Three extensions may honestly precede an entry.
            if self.headers > self.limits.entries.saturating_mul(4) {
                let limit = self.limits.entries;
                return Err(Error::too_large(header.path_bytes(), limit, "entries"));
            }
            if checksum(header.as_bytes()) != header.cksum().ok() {
                return Err(Error::hostile(header.path_bytes(), "has a wrong checksum"));
            }
            let kind = header.entry_type();
            if let Some(entry) = match kind {
                EntryType::GNULongName => {
                    extension.name = Some(self.long_name(&header)?);
                    None
                }
                EntryType::GNULongLink => {
                    extension.link = Some(self.long_name(&header)?);
                    None
                }
                EntryType::XHeader => {
                    let records = self.payload(&header, PAX_MAX)?;
                    pax(&records, &mut extension)?;
                    None
                }
                EntryType::XGlobalHeader => {
                    self.payload(&header, PAX_MAX)?;
                    None
                }
                _ => Some(self.entry(&header, std::mem::take(&mut extension))?),
            } {
                return Ok(Some(entry));
            }
        }
    }

    /// Copies the next `len` stored bytes of the current entry to `out`.
    pub(crate) fn copy(&mut self, len: u64, out: &mut impl Write) -> Result<(), CopyError> {
        debug_assert!(len <= self.left);
        copy_exact(&mut self.inner, out, len, &mut self.buffer)?;
        self.left -= len;
        Ok(())
    }

    fn entry(&mut self, header: &Header, extension: Extension) -> Result<Entry, Error> {
        let mut name = extension
            .name
            .unwrap_or_else(|| header.path_bytes().into_owned());
        let link = extension
            .link
            .or_else(|| header.link_name_bytes().map(|link| link.into_owned()))
            .unwrap_or_default();
        let bad = |what: &str| {
            let why = format!("has an unreadable {what}");
            move |_: io::Error| Error::hostile(header.path_bytes(), why.clone())
        };
        let mut kind = header.entry_type();
        let mode = header.mode().map_err(bad("mode"))?;
        let mtime = match extension.mtime {
            Some(mtime) => mtime,
            None => header.mtime().map_err(bad("time"))?,
        };
        let stored = match extension.size {
            Some(size) => size,
            None => header.entry_size().map_err(bad("size"))?,
        };
        // tar before POSIX had no type for directories.
        if matches!(kind, EntryType::Regular | EntryType::Continuous) {
            kind = if name.ends_with(b"/") {
                EntryType::Directory
            } else {
                EntryType::Regular
            };
        }
        name.truncate(self.limits.path_len + 1);
        let no_data = matches!(
            kind,
            EntryType::Directory | EntryType::Symlink | EntryType::Link
        );
        if no_data && stored != 0 {
            return Err(Error::hostile(&name, "has data its type cannot have"));
        }
        self.stored = self.stored.saturating_add(stored);
        if self.stored > self.limits.bytes {
            return Err(Error::too_large(&name, self.limits.bytes, "bytes"));
        }
        (self.left, self.padding) = (stored, padding(stored));
        let (size, extents) = if kind.is_gnu_sparse() {
            self.sparse(header, &name, stored)?
        } else {
            (stored, vec![(0, stored)])
        };
        if size > self.limits.file_size {
            return Err(Error::too_large(
                &name,
                self.limits.file_size,
                "bytes in one file",
            ));
        }
        Ok(Entry {
            kind,
            name,
            link,
            mode,
            mtime,
            size,
            extents,
        })
    }

    /// The map of a GNU sparse file, which must account for every byte.
    fn sparse(
        &mut self,
        header: &Header,
        name: &[u8],
        stored: u64,
    ) -> Result<(u64, Vec<(u64, u64)>), Error> {
        let lies = |_| Error::hostile(name, "has an unreadable sparse map");
        let gnu = header
            .as_gnu()
            .ok_or_else(|| Error::hostile(name, "is sparse without a GNU header"))?;
        let size = gnu.real_size().map_err(lies)?;
        let mut extents = Vec::new();
        let mut add = |slot: &tar::GnuSparseHeader| -> Result<(), Error> {
            if slot.is_empty() {
                return Ok(());
            }
            let (offset, len) = (slot.offset().map_err(lies)?, slot.length().map_err(lies)?);
            let from = extents.last().map_or(0, |(offset, len)| offset + len);
            let fits = offset >= from && offset.checked_add(len).is_some_and(|end| end <= size);
            if !fits || extents.len() == EXTENTS_MAX {
                return Err(Error::hostile(
                    name,
                    "has a sparse map that does not add up",
                ));
            }
            extents.push((offset, len));
            Ok(())
        };
        gnu.sparse.iter().try_for_each(&mut add)?;
        let mut more = gnu.is_extended();
        while more {
            let mut block = GnuExtSparseHeader::new();
            read_block(&mut self.inner, block.as_mut_bytes())?;
            // An endless chain of empty blocks must end as well.
            self.stored = self.stored.saturating_add(BLOCK as u64);
            if self.stored > self.limits.bytes {
                return Err(Error::too_large(name, self.limits.bytes, "bytes"));
            }
            block.sparse().iter().try_for_each(&mut add)?;
            more = block.is_extended();
        }
        if extents.iter().map(|(_, len)| len).sum::<u64>() != stored {
            return Err(Error::hostile(
                name,
                "has a sparse map that does not add up",
            ));
        }
        Ok((size, extents))
    }

    fn long_name(&mut self, header: &Header) -> Result<Vec<u8>, Error> {
        let mut name = self.payload(header, self.limits.path_len as u64 + 1)?;
        if name.last() == Some(&0) {
            name.pop();
        }
        Ok(name)
    }

    /// The whole content of an extension entry.
    fn payload(&mut self, header: &Header, limit: u64) -> Result<Vec<u8>, Error> {
        let size = header
            .entry_size()
            .map_err(|_| Error::hostile(header.path_bytes(), "has an unreadable size"))?;
        if size > limit {
            return Err(Error::too_large(
                header.path_bytes(),
                limit,
                "bytes in an extended header",
            ));
        }
        let mut bytes = Vec::new();
        (self.left, self.padding) = (size, padding(size));
        self.copy(size, &mut bytes).map_err(receive)?;
        Ok(bytes)
    }

    fn block(&mut self, block: &mut [u8; BLOCK]) -> Result<(), Error> {
        read_block(&mut self.inner, block)
    }

    fn discard(&mut self, len: u64) -> Result<(), Error> {
        copy_exact(&mut self.inner, &mut io::sink(), len, &mut self.buffer).map_err(receive)
    }

    /// After the end marker only zeros may follow, up to the end of the stream.
    fn trailer(&mut self) -> Result<(), Error> {
        let mut seen = 0;
        loop {
            match self.inner.read(&mut self.buffer) {
                Ok(0) => return Ok(()),
                Ok(got) => {
                    seen += got;
                    if seen > TRAILER_MAX || self.buffer[..got].iter().any(|&byte| byte != 0) {
                        return Err(Error::hostile(b"(end)", "is followed by more data"));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::Receive(error)),
            }
        }
    }
}

fn read_block(reader: &mut impl Read, block: &mut [u8; BLOCK]) -> Result<(), Error> {
    reader
        .read_exact(block)
        .map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => Error::Truncated,
            _ => Error::Receive(error),
        })
}

fn receive(error: CopyError) -> Error {
    match error {
        CopyError::Ended => Error::Truncated,
        CopyError::Read(error) | CopyError::Write(error) => Error::Receive(error),
    }
}

fn padding(size: u64) -> u64 {
    size.wrapping_neg() % BLOCK as u64
}

fn checksum(block: &[u8; BLOCK]) -> Option<u32> {
    let sum = |bytes: &[u8]| bytes.iter().map(|&byte| u32::from(byte)).sum::<u32>();
    Some(sum(&block[..148]) + 8 * u32::from(b' ') + sum(&block[156..]))
}

/// Reads PAX records, `<length> <key>=<value>\n` each (pax(1), extended header).
fn pax(mut records: &[u8], extension: &mut Extension) -> Result<(), Error> {
    let broken = || Error::hostile(b"(pax header)", "does not add up");
    while !records.is_empty() {
        let space = records
            .iter()
            .take(12)
            .position(|&byte| byte == b' ')
            .ok_or_else(broken)?;
        let len = decimal(&records[..space]).and_then(|len| usize::try_from(len).ok());
        let len = len
            .filter(|&len| len > space + 1 && len <= records.len())
            .ok_or_else(broken)?;
        let (record, rest) = records.split_at(len);
        records = rest;
        let record = record[space + 1..].strip_suffix(b"\n").ok_or_else(broken)?;
        let equals = record
            .iter()
            .position(|&byte| byte == b'=')
            .ok_or_else(broken)?;
        let (key, value) = (&record[..equals], &record[equals + 1..]);
        match key {
            b"path" => extension.name = Some(value.to_vec()),
            b"linkpath" => extension.link = Some(value.to_vec()),
            b"size" => extension.size = Some(decimal(value).ok_or_else(broken)?),
            b"mtime" => {
                let whole = value.split(|&byte| byte == b'.').next().unwrap_or_default();
                extension.mtime = decimal(whole);
            }
            _ if key.starts_with(b"GNU.sparse.") => {
                return Err(Error::hostile(
                    b"(pax header)",
                    "asks for the PAX sparse format, which is not supported",
                ));
            }
            _ => {}
        }
    }
    Ok(())
}

fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}
