//! Packing files into an archive that stays valid whatever happens to them.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat, readlinkat};
use nix::libc;
use nix::sys::stat::{FileStat, Mode, fstat};
use nix::unistd::{Whence, lseek};
use tar::{EntryType, GnuExtSparseHeader, Header};

use super::dirs::{self, Met, walk};
use super::track::{Mark, Marks};
use super::transfer::Output;
use crate::failure::{Context, Result, invalid};

/// Size of a block of the archive, in bytes.
const BLOCK: u64 = 512;
/// Files smaller than this are not examined for holes.
const SPARSE_MIN: i64 = 1024 * 1024;
/// Sections kept of a sparse file; what is between later ones is sent as zeroes.
const MAX_SECTIONS: usize = 4096;

/// What to pack.
pub(super) enum Source {
    /// What is in a directory.
    Dir(OwnedFd),
    /// One entry of a directory.
    Entry { parent: OwnedFd, name: Vec<u8> },
}

impl Source {
    /// Opens what the host named. A symbolic link stands for its target if
    /// that is a directory.
    pub(super) fn open(path: &str) -> Result<Self> {
        let meta = std::fs::metadata(path).or_else(|_| std::fs::symlink_metadata(path));
        if meta.context(|| format!("cannot examine {path}"))?.is_dir() {
            return dirs::open(path).map(Self::Dir);
        }
        let cut = path.trim_end_matches('/').rsplit_once('/');
        let (parent, name) = cut.ok_or_else(|| invalid(format!("{path} is not absolute")))?;
        let parent = dirs::open(if parent.is_empty() { "/" } else { parent })?;
        let name = name.as_bytes().to_vec();
        Ok(Self::Entry { parent, name })
    }
}

/// Packs everything.
pub(super) fn all(source: &Source, output: &mut Output) -> Result<()> {
    match source {
        Source::Dir(base) => walk(base, |met| pack(met, output))?,
        Source::Entry { parent, name } => {
            let name = std::ffi::CString::new(&name[..])
                .map_err(|_| invalid("a zero byte in the path"))?;
            let flags = nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW;
            let stat = nix::sys::stat::fstatat(parent, name.as_c_str(), flags)
                .context(|| format!("cannot examine {}", name.to_string_lossy()))?;
            pack(
                &Met {
                    path: name.to_bytes(),
                    dir: parent.as_fd(),
                    name: &name,
                    stat: &stat,
                },
                output,
            )?;
        }
    }
    end(output)
}

/// Packs what is not as `marks` say; returns the names of what is gone, the
/// deepest first.
pub(super) fn changed(base: &OwnedFd, marks: &Marks, output: &mut Output) -> Result<Vec<Vec<u8>>> {
    let mut gone: BTreeSet<&[u8]> = marks.keys().map(|path| &path[..]).collect();
    walk(base, |met| {
        if !packable(met.stat) {
            return Ok(());
        }
        gone.remove(met.path);
        if marks.get(met.path) == Some(&Mark::new(met.stat)) {
            return Ok(());
        }
        pack(met, output)
    })?;
    end(output)?;
    Ok(gone.into_iter().rev().map(<[u8]>::to_vec).collect())
}

fn packable(stat: &FileStat) -> bool {
    matches!(
        dirs::kind(stat),
        libc::S_IFREG | libc::S_IFDIR | libc::S_IFLNK
    )
}

fn end(output: &mut Output) -> Result<()> {
    output.put(&[0; 2 * BLOCK as usize])
}

/// Packs one entry. Sockets, pipes and devices are left out, and so is what
/// vanished.
fn pack(met: &Met<'_>, output: &mut Output) -> Result<()> {
    let shown = || format!("cannot pack {}", String::from_utf8_lossy(met.path));
    match dirs::kind(met.stat) {
        libc::S_IFDIR => {
            let path = [met.path, b"/"].concat();
            head(
                output,
                &mut header(met.stat, EntryType::Directory),
                &path,
                b"",
            )
        }
        libc::S_IFLNK => {
            let target = match readlinkat(met.dir, met.name) {
                Err(Errno::ENOENT | Errno::EINVAL) => return Ok(()),
                target => target.context(shown)?,
            };
            let target = std::os::unix::ffi::OsStringExt::into_vec(target);
            head(
                output,
                &mut header(met.stat, EntryType::Symlink),
                met.path,
                &target,
            )
        }
        libc::S_IFREG => match open(met.dir, met.name).context(shown)? {
            Some((file, stat)) => pack_file(file, &stat, met.path, output),
            None => Ok(()),
        },
        _ => Ok(()),
    }
}

/// Opens a regular file, if it still is one.
fn open(dir: BorrowedFd<'_>, name: &std::ffi::CStr) -> nix::Result<Option<(File, FileStat)>> {
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let file = match openat(dir, name, flags, Mode::empty()) {
        Err(Errno::ENOENT | Errno::ELOOP | Errno::ENXIO) => return Ok(None),
        opened => opened?,
    };
    let stat = fstat(&file)?;
    Ok((dirs::kind(&stat) == libc::S_IFREG).then(|| (File::from(file), stat)))
}

fn pack_file(mut file: File, stat: &FileStat, path: &[u8], output: &mut Output) -> Result<()> {
    let shown = || format!("cannot pack {}", String::from_utf8_lossy(path));
    let size = stat.st_size as u64;
    let Some(sections) = sections(&file, stat).context(shown)? else {
        let mut header = header(stat, EntryType::Regular);
        header.set_size(size);
        head(output, &mut header, path, b"")?;
        copy(&mut file, size, output).context(shown)?;
        return pad(size, output);
    };
    let stored = sections.iter().map(|(_, len)| len).sum();
    let mut header = header(stat, EntryType::GNUSparse);
    header.set_size(stored);
    let extensions = describe(&mut header, size, &sections);
    head(output, &mut header, path, b"")?;
    for extension in extensions {
        output.put(extension.as_bytes())?;
    }
    for (start, len) in sections {
        file.seek(SeekFrom::Start(start)).context(shown)?;
        copy(&mut file, len, output).context(shown)?;
    }
    pad(stored, output)
}

/// Where the data of a file with holes is: start and length. The last section
/// ends where the file does.
fn sections(file: &File, stat: &FileStat) -> nix::Result<Option<Vec<(u64, u64)>>> {
    if stat.st_size < SPARSE_MIN || stat.st_blocks * 512 > stat.st_size / 2 {
        return Ok(None);
    }
    let mut sections = Vec::new();
    let mut at = 0;
    while at < stat.st_size && sections.len() < MAX_SECTIONS {
        let start = match lseek(file, at, Whence::SeekData) {
            Err(Errno::ENXIO) => break,
            Err(Errno::EINVAL | Errno::EOPNOTSUPP) => return Ok(None),
            start => start?.min(stat.st_size),
        };
        let end = lseek(file, start, Whence::SeekHole)?.min(stat.st_size);
        if end > start {
            sections.push((start as u64, (end - start) as u64));
        }
        at = end.max(at + 1);
    }
    lseek(file, 0, Whence::SeekSet)?;
    let size = stat.st_size as u64;
    let full = sections.len() == MAX_SECTIONS;
    match sections.last_mut() {
        Some((start, len)) if full => *len = size - *start,
        // The format wants the end of the file to be named.
        _ => sections.push((size, 0)),
    }
    Ok(Some(sections))
}

/// Writes the sections into the header, and into what follows it.
fn describe(header: &mut Header, size: u64, sections: &[(u64, u64)]) -> Vec<GnuExtSparseHeader> {
    // Only GNU headers are made here.
    let Some(gnu) = header.as_gnu_mut() else {
        return Vec::new();
    };
    gnu.set_real_size(size);
    let (first, more) = sections.split_at(sections.len().min(gnu.sparse.len()));
    for (place, (start, len)) in gnu.sparse.iter_mut().zip(first) {
        place.set_offset(*start);
        place.set_length(*len);
    }
    gnu.set_is_extended(!more.is_empty());
    let mut extensions = Vec::new();
    let mut chunks = more.chunks(21).peekable();
    while let Some(chunk) = chunks.next() {
        let mut extension = GnuExtSparseHeader::new();
        for (place, (start, len)) in extension.sparse.iter_mut().zip(chunk) {
            place.set_offset(*start);
            place.set_length(*len);
        }
        extension.set_is_extended(chunks.peek().is_some());
        extensions.push(extension);
    }
    extensions
}

fn header(stat: &FileStat, kind: EntryType) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(stat.st_mode & 0o7777);
    header.set_uid(stat.st_uid.into());
    header.set_gid(stat.st_gid.into());
    header.set_mtime(stat.st_mtime.max(0) as u64);
    header.set_size(0);
    header
}

/// Sends a header, with long names before it as GNU tar has them.
fn head(output: &mut Output, header: &mut Header, path: &[u8], link: &[u8]) -> Result<()> {
    for (kind, name) in [
        (EntryType::GNULongName, path),
        (EntryType::GNULongLink, link),
    ] {
        let Some(gnu) = header.as_gnu_mut() else {
            continue;
        };
        let field = if kind == EntryType::GNULongName {
            &mut gnu.name
        } else {
            &mut gnu.linkname
        };
        let fits = name.len().min(field.len());
        field[..fits].copy_from_slice(&name[..fits]);
        if fits < name.len() {
            long_name(output, kind, name)?;
        }
    }
    header.set_cksum();
    output.put(header.as_bytes())
}

fn long_name(output: &mut Output, kind: EntryType, name: &[u8]) -> Result<()> {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    let size = name.len() as u64 + 1;
    header.set_size(size);
    header.set_mode(0o644);
    if let Some(gnu) = header.as_gnu_mut() {
        gnu.name[..13].copy_from_slice(b"././@LongLink");
    }
    header.set_cksum();
    output.put(header.as_bytes())?;
    output.put(name)?;
    output.put(b"\0")?;
    pad(size, output)
}

/// Sends exactly `size` bytes: the size is announced already, though the file
/// may have another by now.
fn copy(file: &mut File, size: u64, output: &mut Output) -> io::Result<()> {
    let sent = output.take(file, size)?;
    io::copy(&mut io::repeat(0).take(size - sent), output)?;
    Ok(())
}

fn pad(size: u64, output: &mut Output) -> Result<()> {
    let rest = (BLOCK - size % BLOCK) % BLOCK;
    output.put(&[0; BLOCK as usize][..rest as usize])
}
