//! Tar headers as the packer writes them: GNU format, long names, sparse maps.

use std::io::{self, Write};

use tar::{EntryType, GnuExtSparseHeader, Header};

/// Bytes of a tar block.
pub(crate) const BLOCK: usize = 512;

/// Sparse map entries in the header itself and in each block after it.
const MAP_IN_HEADER: usize = 4;
const MAP_IN_BLOCK: usize = 21;

/// One entry's header, before it is written.
#[derive(Debug)]
pub(crate) struct Entry<'a> {
    pub(crate) kind: EntryType,
    pub(crate) name: &'a [u8],
    /// Target of a symlink or hard link.
    pub(crate) link: &'a [u8],
    pub(crate) mode: u32,
    pub(crate) mtime: u64,
    /// Apparent size in bytes.
    pub(crate) size: u64,
    /// Data extents of a sparse file; empty and unused otherwise.
    pub(crate) extents: &'a [(u64, u64)],
}

impl Entry<'_> {
    /// Writes everything that stands before the entry's data.
    pub(crate) fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let mut header = blank(self.kind);
        // Any bytes are allowed in GNU long names, unlike in PAX records.
        if self.link.len() > header.as_old().linkname.len() {
            long(out, EntryType::GNULongLink, self.link)?;
        }
        if self.name.len() > header.as_old().name.len() {
            long(out, EntryType::GNULongName, self.name)?;
        }
        fill(&mut header.as_old_mut().name, self.name);
        fill(&mut header.as_old_mut().linkname, self.link);
        header.set_mode(self.mode);
        header.set_mtime(self.mtime);
        if self.kind.is_gnu_sparse() {
            return self.write_sparse(header, out);
        }
        header.set_size(self.size);
        header.set_cksum();
        out.write_all(header.as_bytes())
    }

    /// GNU's old sparse format: four extents in the header, the others in
    /// blocks after it. A last extent of no bytes marks the file's end.
    fn write_sparse(&self, mut header: Header, out: &mut impl Write) -> io::Result<()> {
        let map: Vec<_> = self
            .extents
            .iter()
            .copied()
            .chain([(self.size, 0)])
            .collect();
        let (first, rest) = map.split_at(map.len().min(MAP_IN_HEADER));
        header.set_size(self.extents.iter().map(|(_, len)| len).sum());
        let gnu = header
            .as_gnu_mut()
            .ok_or_else(|| io::Error::other("sparse entry without a GNU header"))?;
        for (slot, &(offset, len)) in gnu.sparse.iter_mut().zip(first) {
            number(&mut slot.offset, offset);
            number(&mut slot.numbytes, len);
        }
        number(&mut gnu.realsize, self.size);
        gnu.isextended = [u8::from(!rest.is_empty())];
        header.set_cksum();
        out.write_all(header.as_bytes())?;
        let mut blocks = rest.chunks(MAP_IN_BLOCK).peekable();
        while let Some(chunk) = blocks.next() {
            let mut block = GnuExtSparseHeader::new();
            for (slot, &(offset, len)) in block.sparse_mut().iter_mut().zip(chunk) {
                number(&mut slot.offset, offset);
                number(&mut slot.numbytes, len);
            }
            block.isextended = [u8::from(blocks.peek().is_some())];
            out.write_all(block.as_bytes())?;
        }
        Ok(())
    }
}

/// Zeros up to the next block after `len` bytes of data.
pub(crate) fn pad(out: &mut impl Write, len: u64) -> io::Result<()> {
    let over = (len % BLOCK as u64) as usize;
    match over {
        0 => Ok(()),
        _ => out.write_all(&[0; BLOCK][over..]),
    }
}

/// The end of an archive.
pub(crate) fn finish(out: &mut impl Write) -> io::Result<()> {
    out.write_all(&[0; 2 * BLOCK])?;
    out.flush()
}

fn blank(kind: EntryType) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mode(0o644);
    header.set_mtime(0);
    header
}

/// The entry that carries a long name for the entry after it.
fn long(out: &mut impl Write, kind: EntryType, name: &[u8]) -> io::Result<()> {
    let mut header = blank(kind);
    fill(&mut header.as_old_mut().name, b"././@LongLink");
    header.set_size(name.len() as u64 + 1);
    header.set_cksum();
    out.write_all(header.as_bytes())?;
    out.write_all(name)?;
    out.write_all(&[0])?;
    pad(out, name.len() as u64 + 1)
}

fn fill(field: &mut [u8; 100], bytes: &[u8]) {
    let len = bytes.len().min(field.len());
    field[..len].copy_from_slice(&bytes[..len]);
}

/// A number as eleven octal digits, or in base 256 where those do not do.
fn number(field: &mut [u8; 12], value: u64) {
    if value < 1 << 33 {
        field[..11].copy_from_slice(format!("{value:011o}").as_bytes());
        field[11] = 0;
    } else {
        *field = [0; 12];
        field[0] = 0x80;
        field[4..].copy_from_slice(&value.to_be_bytes());
    }
}
