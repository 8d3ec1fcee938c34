//! Writes tar archives byte for byte: names and links are kept as they are.

use std::io::{self, Read, Write};

use tar::{EntryType, Header};

/// Metadata of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Meta {
    pub(super) mode: u32,
    pub(super) uid: u64,
    pub(super) gid: u64,
    pub(super) mtime: u64,
}

impl Meta {
    /// Owned by root, from the beginning of time.
    pub(super) fn root(mode: u32) -> Self {
        Self {
            mode,
            uid: 0,
            gid: 0,
            mtime: 0,
        }
    }
}

/// What an entry is, beside its name.
pub(super) enum Body<'a> {
    Dir,
    Symlink(&'a [u8]),
    Hardlink(&'a [u8]),
    File(u64, &'a mut dyn Read),
}

/// A tar archive being written, in pax format where ustar is too small.
pub(super) struct TarWriter<W: Write> {
    out: W,
}

impl<W: Write> TarWriter<W> {
    pub(super) fn new(out: W) -> Self {
        Self { out }
    }

    /// Appends an entry; `capability` is its security.capability attribute.
    pub(super) fn entry(
        &mut self,
        path: &[u8],
        meta: Meta,
        capability: Option<&[u8]>,
        body: Body<'_>,
    ) -> io::Result<()> {
        let (kind, link, size) = match &body {
            Body::Dir => (EntryType::Directory, &[][..], 0),
            Body::Symlink(target) => (EntryType::Symlink, *target, 0),
            Body::Hardlink(target) => (EntryType::Link, *target, 0),
            Body::File(size, _) => (EntryType::Regular, &[][..], *size),
        };
        let mut pax = Vec::new();
        if path.len() > 100 {
            record(&mut pax, b"path", path);
        }
        if link.len() > 100 {
            record(&mut pax, b"linkpath", link);
        }
        if let Some(value) = capability {
            record(&mut pax, b"SCHILY.xattr.security.capability", value);
        }
        if !pax.is_empty() {
            let size = pax.len() as u64;
            self.raw(EntryType::XHeader, b"pax", b"", Meta::root(0o644), size)?;
            self.data(size, &mut &pax[..])?;
        }
        self.raw(kind, path, link, meta, size)?;
        match body {
            Body::File(size, reader) => self.data(size, reader),
            _ => Ok(()),
        }
    }

    /// Ends the archive.
    pub(super) fn finish(mut self) -> io::Result<W> {
        self.out.write_all(&[0; 1024])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn raw(
        &mut self,
        kind: EntryType,
        path: &[u8],
        link: &[u8],
        meta: Meta,
        size: u64,
    ) -> io::Result<()> {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(meta.mode & 0o7777);
        header.set_uid(meta.uid);
        header.set_gid(meta.gid);
        header.set_mtime(meta.mtime);
        header.set_size(size);
        let old = header.as_old_mut();
        // A longer name stands in the pax record before.
        let (path, link) = (&path[..path.len().min(100)], &link[..link.len().min(100)]);
        old.name[..path.len()].copy_from_slice(path);
        old.linkname[..link.len()].copy_from_slice(link);
        header.set_cksum();
        self.out.write_all(header.as_bytes())
    }

    fn data(&mut self, size: u64, reader: &mut dyn Read) -> io::Result<()> {
        let copied = io::copy(&mut reader.take(size), &mut self.out)?;
        if copied != size {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("an entry ends after {copied} of {size} bytes"),
            ));
        }
        let pad = (512 - size % 512) % 512;
        self.out.write_all(&[0; 512][..pad as usize])
    }
}

/// Appends a pax record, whose length counts its own digits.
fn record(pax: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut len = rest + 1;
    while len != rest + len.to_string().len() {
        len = rest + len.to_string().len();
    }
    pax.extend_from_slice(len.to_string().as_bytes());
    pax.push(b' ');
    pax.extend_from_slice(key);
    pax.push(b'=');
    pax.extend_from_slice(value);
    pax.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_names_and_attributes_are_read_back() {
        let long = "d/".repeat(120) + "f";
        let mut writer = TarWriter::new(Vec::new());
        let body = Body::File(3, &mut &b"abc"[..]);
        writer
            .entry(
                long.as_bytes(),
                Meta::root(0o4755),
                Some(b"\x01\n\x00"),
                body,
            )
            .unwrap();
        let target = "../".repeat(80);
        writer
            .entry(
                b"s",
                Meta::root(0o777),
                None,
                Body::Symlink(target.as_bytes()),
            )
            .unwrap();
        let bytes = writer.finish().unwrap();

        let mut archive = tar::Archive::new(&bytes[..]);
        let mut entries = archive.entries().unwrap();
        let mut first = entries.next().unwrap().unwrap();
        assert_eq!(&*first.path_bytes(), long.as_bytes());
        assert_eq!(first.header().mode().unwrap(), 0o4755);
        // Byte for byte, for the tar crate ends records at the first newline.
        let record = b"SCHILY.xattr.security.capability=\x01\n\x00\n";
        let length = format!("{} ", record.len() + 3);
        let record = [length.as_bytes(), record].concat();
        assert!(bytes.windows(record.len()).any(|part| part == record));
        let mut data = String::new();
        first.read_to_string(&mut data).unwrap();
        assert_eq!(data, "abc");
        let second = entries.next().unwrap().unwrap();
        assert_eq!(&*second.link_name_bytes().unwrap(), target.as_bytes());
        assert!(entries.next().is_none());
    }

    #[test]
    fn a_record_counts_itself() {
        for len in 80..110 {
            let mut pax = Vec::new();
            record(&mut pax, b"k", &vec![b'v'; len]);
            let text = String::from_utf8(pax.clone()).unwrap();
            let stated: usize = text.split(' ').next().unwrap().parse().unwrap();
            assert_eq!(stated, pax.len());
        }
    }
}
