//! File operations below one directory that no symlink leads out of.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, open, openat, openat2};
use nix::libc;
use nix::sys::stat::{FileStat, Mode, fstat, fstatat, mkdirat};
use nix::unistd::{Gid, Uid, Whence, fchownat};

use super::Name;

/// A directory, held open; names are resolved below it by `openat2` (Linux
/// 5.6), which refuses every symlink on the way.
#[derive(Debug)]
pub(crate) struct Beneath {
    root: OwnedFd,
}

impl Beneath {
    /// Opens `dir`, whose own path is the caller's and may hold symlinks.
    pub(crate) fn open(dir: &Path) -> Result<Self, Errno> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(Self {
            root: open(dir, flags, Mode::empty())?,
        })
    }

    /// Opens a directory below the root.
    pub(crate) fn dir(&self, name: &Name) -> Result<OwnedFd, Errno> {
        let path = if name.is_top() {
            Path::new(".")
        } else {
            name.as_path()
        };
        resolve(
            &self.root,
            path,
            OFlag::O_RDONLY | OFlag::O_DIRECTORY,
            Mode::empty(),
        )
    }

    /// Opens a directory below the root, making what is missing with mode 0700
    /// (less the umask); `made` is told each name that was made, and may end it.
    pub(crate) fn make_dirs(
        &self,
        name: &Name,
        made: &mut dyn FnMut(&Name) -> Result<(), Errno>,
    ) -> Result<OwnedFd, Errno> {
        match self.dir(name) {
            Err(Errno::ENOENT) => {}
            other => return other,
        }
        let Some((parent, last)) = name.split() else {
            return Err(Errno::ENOENT);
        };
        let parent = self.make_dirs(&parent, made)?;
        match mkdirat(&parent, last, Mode::S_IRWXU) {
            Ok(()) => made(name)?,
            Err(Errno::EEXIST) => {}
            Err(errno) => return Err(errno),
        }
        self.dir(name)
    }

    /// Opens a regular file below the root for reading, never blocking on a
    /// FIFO; the caller checks the type.
    pub(crate) fn file(&self, name: &Name) -> Result<File, Errno> {
        resolve(
            &self.root,
            name.as_path(),
            OFlag::O_RDONLY | OFlag::O_NONBLOCK,
            Mode::empty(),
        )
        .map(File::from)
    }

    /// What is at `name`; `None` when there is nothing.
    pub(crate) fn stat(&self, name: &Name) -> Result<Option<FileStat>, Errno> {
        let Some((parent, last)) = name.split() else {
            return fstat(&self.root).map(Some);
        };
        let parent = match self.dir(&parent) {
            Ok(parent) => parent,
            Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(None),
            Err(errno) => return Err(errno),
        };
        stat_in(&parent, last)
    }
}

impl AsFd for Beneath {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }
}

/// What is at `name` in an open directory; `None` when there is nothing.
pub(crate) fn stat_in(dir: impl AsFd, name: &OsStr) -> Result<Option<FileStat>, Errno> {
    match fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::ENOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// Gives away a symlink that was just made. Its directory may be somebody
/// else's, who may have put another file under its name: that one stays.
pub(crate) fn chown_link(dir: impl AsFd, name: &OsStr, uid: Uid, gid: Gid) -> Result<(), Errno> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let link = openat(dir, name, flags, Mode::empty())?;
    let stat = fstat(&link)?;
    if stat.st_mode & libc::S_IFMT != libc::S_IFLNK || stat.st_uid != Uid::effective().as_raw() {
        return Err(Errno::ESTALE);
    }
    fchownat(&link, "", Some(uid), Some(gid), AtFlags::AT_EMPTY_PATH)
}

/// Makes a file that did not exist, mode 0600.
pub(crate) fn create_in(dir: impl AsFd, name: &OsStr) -> Result<File, Errno> {
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL;
    resolve(dir, Path::new(name), flags, Mode::S_IRUSR | Mode::S_IWUSR).map(File::from)
}

fn resolve(dir: impl AsFd, path: &Path, flags: OFlag, mode: Mode) -> Result<OwnedFd, Errno> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW)
        .mode(mode)
        .resolve(
            ResolveFlag::RESOLVE_BENEATH
                | ResolveFlag::RESOLVE_NO_SYMLINKS
                | ResolveFlag::RESOLVE_NO_MAGICLINKS,
        );
    // EAGAIN: a rename somewhere made the kernel unsure; it asks to try again.
    for _ in 0..64 {
        match openat2(&dir, path, how) {
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            other => return other,
        }
    }
    Err(Errno::EAGAIN)
}

/// The extents of `file` that hold data, as (offset, length), each aligned to
/// 512 bytes except for the file's end. One extent where holes are not told.
pub(crate) fn data_extents(file: &File, size: u64) -> Vec<(u64, u64)> {
    const ALIGN: u64 = 512;
    let mut extents: Vec<(u64, u64)> = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match seek(file, at, Whence::SeekData) {
            Ok(start) if start < size => start / ALIGN * ALIGN,
            Ok(_) | Err(Errno::ENXIO) => break,
            Err(_) => return vec![(0, size)],
        };
        let end = match seek(file, start, Whence::SeekHole) {
            Ok(end) => end.max(start + 1).next_multiple_of(ALIGN).min(size),
            Err(_) => return vec![(0, size)],
        };
        match extents.last_mut() {
            Some((last, len)) if *last + *len >= start => *len = end - *last,
            _ => extents.push((start, end - start)),
        }
        at = end;
    }
    extents
}

fn seek(file: &File, at: u64, whence: Whence) -> Result<u64, Errno> {
    let at = i64::try_from(at).map_err(|_| Errno::EOVERFLOW)?;
    let found = nix::unistd::lseek(file, at, whence)?;
    u64::try_from(found).map_err(|_| Errno::EOVERFLOW)
}

/// Copies `from` to `to`, leaving its holes holes. Both are at offset 0.
pub(crate) fn copy_data(from: &File, to: &File) -> io::Result<()> {
    let size = from.metadata()?.len();
    let mut buffer = vec![0; 128 * 1024];
    for (start, len) in data_extents(from, size) {
        let mut at = start;
        while at < start + len {
            let want = buffer
                .len()
                .min(usize::try_from(start + len - at).unwrap_or(usize::MAX));
            let got = from.read_at(&mut buffer[..want], at)?;
            if got == 0 {
                break;
            }
            to.write_all_at(&buffer[..got], at)?;
            at += got as u64;
        }
    }
    to.set_len(size)
}

/// Copies exactly `len` bytes, through `buffer`.
pub(crate) fn copy_exact(
    reader: &mut impl Read,
    writer: &mut impl Write,
    mut len: u64,
    buffer: &mut [u8],
) -> Result<(), CopyError> {
    while len > 0 {
        let want = buffer.len().min(usize::try_from(len).unwrap_or(usize::MAX));
        let got = match reader.read(&mut buffer[..want]) {
            Ok(0) => return Err(CopyError::Ended),
            Ok(got) => got,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(CopyError::Read(error)),
        };
        writer.write_all(&buffer[..got]).map_err(CopyError::Write)?;
        len -= got as u64;
    }
    Ok(())
}

/// Which side of a copy failed.
#[derive(Debug)]
pub(crate) enum CopyError {
    /// The reader ended early.
    Ended,
    /// Reading failed.
    Read(io::Error),
    /// Writing failed.
    Write(io::Error),
}

/// The process's umask, read without changing it (proc(5), Linux 4.7).
pub(crate) fn umask() -> u32 {
    std::fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|status| {
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix("Umask:"))?;
            u32::from_str_radix(line.trim(), 8).ok()
        })
        .unwrap_or(0o077)
}
