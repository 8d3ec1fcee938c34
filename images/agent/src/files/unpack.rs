//! Unpacking an archive below a directory, and nowhere else.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use bulkhead_agent::Failure;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, ResolveFlag, openat};
use nix::sys::stat::{Mode, UtimensatFlags, fchmod, futimens, mkdirat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchownat, linkat, symlinkat, unlinkat};
use tar::{Archive, Entry, EntryType};

use super::dirs::{below, give, join};
use super::{Owner, transfer::Input};
use crate::failure::{Context, Result, invalid};

/// Bytes written at once; a block of zeroes of this size becomes a hole.
const BLOCK: usize = 64 * 1024;

/// Unpacks everything from `input`, to its end.
pub(super) fn unpack(base: &OwnedFd, mut input: Input, owner: Owner) -> Result<()> {
    let mut unpacker = Unpacker {
        base,
        owner,
        parent: None,
        dirs: Vec::new(),
        buffer: vec![0; BLOCK],
    };
    let mut archive = Archive::new(&mut input);
    for entry in archive.entries().map_err(bad_archive)? {
        unpacker.entry(&mut entry.map_err(bad_archive)?)?;
    }
    unpacker.finish()?;
    // Padding after the end of the archive.
    io::copy(&mut input, &mut io::sink()).map_err(bad_archive)?;
    Ok(())
}

fn bad_archive(error: io::Error) -> Failure {
    invalid(format!("cannot read the archive: {error}"))
}

/// What is set on a directory once nothing more is put into it.
struct Later {
    path: Vec<u8>,
    mode: Mode,
    modified: TimeSpec,
}

struct Unpacker<'a> {
    base: &'a OwnedFd,
    owner: Owner,
    /// The directory of the last entry: the next is often in it, too.
    parent: Option<(Vec<u8>, OwnedFd)>,
    dirs: Vec<Later>,
    buffer: Vec<u8>,
}

impl Unpacker<'_> {
    fn entry(&mut self, entry: &mut Entry<'_, impl Read>) -> Result<()> {
        let path = clean(&entry.path_bytes())?;
        let Some((dir, name)) = split(&path) else {
            // The directory itself was made by the request.
            return Ok(());
        };
        let mode = entry.header().mode().map_err(bad_archive)? & 0o7777;
        let mode = Mode::from_bits_truncate(mode);
        let modified = i64::try_from(entry.header().mtime().map_err(bad_archive)?);
        let modified = TimeSpec::new(modified.unwrap_or(0), 0);
        let kind = entry.header().entry_type();
        let result = match kind {
            EntryType::Directory => self.dir(dir, name, mode, modified),
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                self.file(entry, dir, name, mode, modified)
            }
            EntryType::Symlink => self.symlink(&link_name(entry)?, dir, name, modified),
            EntryType::Link => {
                let target = clean(&link_name(entry)?)?;
                self.hard_link(&target, dir, name)
            }
            // Devices and the like have no place in a workspace.
            _ => Ok(()),
        };
        let shown = || format!("cannot unpack {}", String::from_utf8_lossy(&path));
        result.context(shown)
    }

    /// Has the directory `path` open as `self.parent`, making it where missing.
    fn enter(&mut self, path: &[u8]) -> nix::Result<BorrowedFd<'_>> {
        if self.parent.as_ref().is_none_or(|(open, _)| open != path) {
            let fd = self.open_or_make(path)?;
            self.parent = Some((path.to_vec(), fd));
        }
        // Just set where it was not.
        self.parent
            .as_ref()
            .map(|(_, fd)| fd.as_fd())
            .ok_or(Errno::ENOENT)
    }

    fn open_or_make(&self, path: &[u8]) -> nix::Result<OwnedFd> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY;
        let open = |path: &[u8]| below(self.base, path, flags, ResolveFlag::empty());
        match (open(path), split(path)) {
            (Err(Errno::ENOENT), Some((dir, name))) => {
                let parent = self.open_or_make(dir)?;
                mkdirat(&parent, name, Mode::from_bits_truncate(0o755))?;
                self.give_entry(parent.as_fd(), name)?;
                open(path)
            }
            (result, _) => result,
        }
    }

    fn dir(&mut self, dir: &[u8], name: &[u8], mode: Mode, modified: TimeSpec) -> io::Result<()> {
        let path = join(dir, name);
        let parent = self.enter(dir)?;
        if let Err(Errno::EEXIST) = mkdirat(parent, name, Mode::S_IRWXU) {
            let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW;
            if below(parent, name, flags, ResolveFlag::empty()).is_err() {
                unlinkat(parent, name, UnlinkatFlags::NoRemoveDir)?;
                mkdirat(parent, name, Mode::S_IRWXU)?;
            }
        }
        self.dirs.push(Later {
            path,
            mode,
            modified,
        });
        Ok(())
    }

    fn file(
        &mut self,
        entry: &mut Entry<'_, impl Read>,
        dir: &[u8],
        name: &[u8],
        mode: Mode,
        modified: TimeSpec,
    ) -> io::Result<()> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let owner = self.owner;
        let parent = self.enter(dir)?;
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
        let made = replace(parent, name, || openat(parent, name, flags, mode))?;
        let mut file = File::from(made);
        copy_sparsely(entry, &mut file, &mut buffer)?;
        give(&file, owner)?;
        // The umask took some of these, a change of owner others.
        if mode.bits() & 0o7022 != 0 {
            fchmod(&file, mode)?;
        }
        futimens(&file, &modified, &modified)?;
        self.buffer = buffer;
        Ok(())
    }

    fn symlink(
        &mut self,
        target: &[u8],
        dir: &[u8],
        name: &[u8],
        modified: TimeSpec,
    ) -> io::Result<()> {
        self.enter(dir)?;
        let parent = self.enter(dir)?;
        replace(parent, name, || symlinkat(target, parent, name))?;
        utimensat(
            parent,
            name,
            &modified,
            &modified,
            UtimensatFlags::NoFollowSymlink,
        )?;
        let parent = self.enter(dir)?.try_clone_to_owned()?;
        Ok(self.give_entry(parent.as_fd(), name)?)
    }

    fn hard_link(&mut self, target: &[u8], dir: &[u8], name: &[u8]) -> io::Result<()> {
        let (from, old) = split(target).ok_or(Errno::EISDIR)?;
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY;
        let from = below(self.base, from, flags, ResolveFlag::empty())?;
        let parent = self.enter(dir)?;
        Ok(replace(parent, name, || {
            linkat(&from, old, parent, name, AtFlags::empty())
        })?)
    }

    fn give_entry(&self, parent: BorrowedFd<'_>, name: &[u8]) -> nix::Result<()> {
        let (uid, gid) = (Uid::from_raw(self.owner.uid), Gid::from_raw(self.owner.gid));
        fchownat(
            parent,
            name,
            Some(uid),
            Some(gid),
            AtFlags::AT_SYMLINK_NOFOLLOW,
        )
    }

    /// Owners, modes and times of the directories, the deepest first.
    fn finish(&mut self) -> Result<()> {
        for later in std::mem::take(&mut self.dirs).into_iter().rev() {
            let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
            let set = || -> nix::Result<()> {
                let no_links = ResolveFlag::RESOLVE_NO_SYMLINKS;
                // A later entry of the archive may have taken its place.
                let dir = match below(self.base, &later.path, flags, no_links) {
                    Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => return Ok(()),
                    opened => opened?,
                };
                give(&dir, self.owner)?;
                fchmod(&dir, later.mode)?;
                futimens(&dir, &later.modified, &later.modified)
            };
            set().context(|| {
                format!(
                    "cannot finish directory {}",
                    String::from_utf8_lossy(&later.path)
                )
            })?;
        }
        Ok(())
    }
}

/// Makes an entry; what is there under its name has to go.
fn replace<T>(
    parent: BorrowedFd<'_>,
    name: &[u8],
    make: impl Fn() -> nix::Result<T>,
) -> nix::Result<T> {
    match make() {
        Err(Errno::EEXIST) => {
            match unlinkat(parent, name, UnlinkatFlags::NoRemoveDir) {
                Err(Errno::EISDIR) => unlinkat(parent, name, UnlinkatFlags::RemoveDir)?,
                removed => removed?,
            }
            make()
        }
        made => made,
    }
}

fn copy_sparsely(from: &mut impl Read, to: &mut File, buffer: &mut [u8]) -> io::Result<()> {
    let mut hole = false;
    loop {
        let mut len = 0;
        while len < buffer.len() {
            match from.read(&mut buffer[len..])? {
                0 => break,
                count => len += count,
            }
        }
        if len == 0 {
            break;
        }
        hole = len == buffer.len() && buffer.iter().all(|byte| *byte == 0);
        if hole {
            to.seek(SeekFrom::Current(len as i64))?;
        } else {
            to.write_all(&buffer[..len])?;
        }
    }
    if hole {
        let size = to.stream_position()?;
        to.set_len(size)?;
    }
    Ok(())
}

fn link_name<'a>(entry: &'a Entry<'_, impl Read>) -> Result<Cow<'a, [u8]>> {
    let name = entry.link_name_bytes();
    name.ok_or_else(|| invalid("the archive has a link to nothing"))
}

/// A relative path without empty parts and dots.
fn clean(path: &[u8]) -> Result<Vec<u8>> {
    let mut clean = Vec::with_capacity(path.len());
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                let path = String::from_utf8_lossy(path);
                return Err(invalid(format!("the archive has a name with ..: {path}")));
            }
            part => {
                if !clean.is_empty() {
                    clean.push(b'/');
                }
                clean.extend_from_slice(part);
            }
        }
    }
    Ok(clean)
}

/// Directory and name; `None` for the empty path.
fn split(path: &[u8]) -> Option<(&[u8], &[u8])> {
    if path.is_empty() {
        return None;
    }
    Some(match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (b"", path),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_cleaned_or_refused() {
        assert_eq!(clean(b"/a//./b/").unwrap(), b"a/b");
        assert_eq!(clean(b"./").unwrap(), b"");
        assert!(clean(b"a/../b").is_err());
    }

    #[test]
    fn paths_are_split() {
        assert_eq!(split(b"a/b/c"), Some((&b"a/b"[..], &b"c"[..])));
        assert_eq!(split(b"a"), Some((&b""[..], &b"a"[..])));
        assert_eq!(split(b""), None);
    }
}
