//! A host directory as a tar stream, with a manifest of what was packed.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat};
use tar::EntryType;

use super::beneath::{data_extents, stat_in};
use super::header::{self, Entry};
use super::{Error, HIDDEN_PREFIX, HostDir, Limits, MAX_DEPTH, Name, Warnings};

/// Bounds on what is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackLimits {
    /// Bytes of file content; holes do not count.
    pub bytes: u64,
    /// Entries of any type.
    pub entries: u64,
}

impl Default for PackLimits {
    /// What [`Limits::default`] accepts.
    fn default() -> Self {
        let Limits { bytes, entries, .. } = Limits::default();
        Self { bytes, entries }
    }
}

/// What an entry of a workspace is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Dir,
    /// A symbolic link.
    Symlink,
    /// Anything else: never packed, never unpacked.
    Other,
}

/// What identified an entry of the host when it was packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Stamp {
    /// What it was.
    pub kind: Kind,
    /// Permission bits, with set-id and sticky bits.
    pub mode: u32,
    /// Size in bytes.
    pub size: u64,
    /// Inode number.
    pub ino: u64,
    /// Device number.
    pub dev: u64,
    /// Modification time, seconds and nanoseconds.
    pub mtime: (i64, i64),
    /// Status change time, seconds and nanoseconds.
    pub ctime: (i64, i64),
}

impl Stamp {
    /// The stamp of something on disk.
    pub(crate) fn of(stat: &FileStat) -> Self {
        let kind = match SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) {
            SFlag::S_IFREG => Kind::File,
            SFlag::S_IFDIR => Kind::Dir,
            SFlag::S_IFLNK => Kind::Symlink,
            _ => Kind::Other,
        };
        Self {
            kind,
            mode: stat.st_mode & 0o7777,
            size: u64::try_from(stat.st_size).unwrap_or(0),
            ino: stat.st_ino,
            dev: stat.st_dev,
            mtime: (stat.st_mtime, stat.st_mtime_nsec),
            ctime: (stat.st_ctime, stat.st_ctime_nsec),
        }
    }
}

/// The entries of a directory as they were when it was packed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Manifest {
    /// By name; the directory itself is not in it.
    pub entries: BTreeMap<Name, Stamp>,
}

/// What [`pack`] did.
#[derive(Debug, Clone, Default)]
pub struct Packed {
    /// What was packed, for [`crate::run::workspace::apply`].
    pub manifest: Manifest,
    /// What was left out, or changed while it was read.
    pub warnings: Warnings,
    /// Bytes of file content sent.
    pub bytes: u64,
}

/// Packs everything below `dir` into `out`, in the order of the names' bytes.
///
/// Symlinks are packed as they are and never followed; other file systems
/// mounted below are entered. A second name of the same file becomes a hard
/// link, a sparse file a GNU sparse entry that costs only its data. Sockets,
/// FIFOs and devices are left out with a warning. Owners, extended attributes
/// and ACLs are not packed; times are whole seconds. A file that changes while
/// it is read is cut or filled with zeros to the size announced.
///
/// Blocks; memory is bounded by the number of names, not by their content.
///
/// # Errors
/// [`Error::Unreadable`] names the first thing that cannot be read or named
/// (deeper than [`MAX_DEPTH`], or longer than the default [`Limits`]),
/// [`Error::TooLarge`] what is over `limits`, [`Error::Send`] a closed `out`.
pub fn pack(dir: &HostDir, out: impl Write, limits: &PackLimits) -> Result<Packed, Error> {
    let unreadable = |errno: Errno| Error::unreadable(dir.path().as_os_str().as_bytes(), errno);
    let fd = dir.beneath().dir(&Name::default()).map_err(unreadable)?;
    let mut packer = Packer::new(dir.path(), out, limits);
    packer.tree(fd)?;
    packer.finish()
}

/// Packs one file into `out` as the entry `name`. Symlinks to it are followed.
///
/// # Errors
/// As [`pack`]; also when `path` is not a regular file.
pub fn pack_file(
    path: &Path,
    name: &OsStr,
    out: impl Write,
    limits: &PackLimits,
) -> Result<Packed, Error> {
    let name = Name::parse(name.as_bytes(), &Limits::default())?;
    let unreadable = |source: io::Error| Error::unreadable(path.as_os_str().as_bytes(), source);
    let file = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open(path)
        .map_err(unreadable)?;
    let stat = fstat(&file).map_err(|errno| unreadable(errno.into()))?;
    if Stamp::of(&stat).kind != Kind::File {
        return Err(unreadable(io::Error::other("not a regular file")));
    }
    let mut packer = Packer::new(path, out, limits);
    packer.count(&name)?;
    packer.file(&name, &file, &stat)?;
    packer.finish()
}

struct Packer<'a, W: Write> {
    root: &'a Path,
    /// Headers, content and padding go out together: a small file is one write.
    out: BufWriter<W>,
    limits: &'a PackLimits,
    entries: u64,
    packed: Packed,
    /// First name of every file with several.
    linked: HashMap<(u64, u64), Name>,
    buffer: Vec<u8>,
}

struct Frame {
    dir: OwnedFd,
    name: Name,
    left: std::vec::IntoIter<OsString>,
}

impl<'a, W: Write> Packer<'a, W> {
    fn new(root: &'a Path, out: W, limits: &'a PackLimits) -> Self {
        Self {
            root,
            out: BufWriter::with_capacity(64 * 1024, out),
            limits,
            entries: 0,
            packed: Packed::default(),
            linked: HashMap::new(),
            buffer: vec![0; 128 * 1024],
        }
    }

    /// Walks the tree with one open directory per level.
    fn tree(&mut self, root: OwnedFd) -> Result<(), Error> {
        let mut stack = vec![self.frame(root, Name::default())?];
        while let Some(frame) = stack.last_mut() {
            let Some(last) = frame.left.next() else {
                stack.pop();
                continue;
            };
            let name = frame.name.join(&last);
            let hidden = last.as_bytes().starts_with(HIDDEN_PREFIX.as_bytes());
            if hidden && frame.name.is_top() {
                let what = "left out: what an earlier run could not put into place";
                self.packed.warnings.add(&name, what);
                continue;
            }
            if let Some(dir) = self.entry(&frame.dir, &last, &name)? {
                if stack.len() == MAX_DEPTH {
                    let deep = io::Error::other(format!("more than {MAX_DEPTH} directories deep"));
                    return Err(self.unreadable(&name, deep));
                }
                stack.push(self.frame(dir, name)?);
            }
        }
        Ok(())
    }

    fn frame(&self, dir: OwnedFd, name: Name) -> Result<Frame, Error> {
        let listed = (|| {
            let mut names = Vec::new();
            for entry in Dir::from_fd(dir.try_clone().map_err(to_errno)?)?.iter() {
                let last = entry?.file_name().to_bytes().to_vec();
                if last != b"." && last != b".." {
                    names.push(OsStr::from_bytes(&last).to_owned());
                }
            }
            names.sort();
            Ok(names)
        })();
        let names: Vec<_> = listed.map_err(|errno: Errno| self.unreadable(&name, errno))?;
        Ok(Frame {
            dir,
            name,
            left: names.into_iter(),
        })
    }

    /// Packs one entry; gives the directory to walk next, where it is one.
    fn entry(
        &mut self,
        dir: &OwnedFd,
        last: &OsStr,
        name: &Name,
    ) -> Result<Option<OwnedFd>, Error> {
        if name.as_bytes().len() > Limits::default().path_len {
            return Err(self.unreadable(name, Errno::ENAMETOOLONG));
        }
        let Some(stat) = stat_in(dir, last).map_err(|errno| self.unreadable(name, errno))? else {
            self.packed
                .warnings
                .add(name, "vanished while the workspace was packed");
            return Ok(None);
        };
        let stamp = Stamp::of(&stat);
        let open = |flags| {
            openat(
                dir,
                last,
                flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC,
                Mode::empty(),
            )
        };
        match stamp.kind {
            Kind::Other => {
                self.packed
                    .warnings
                    .add(name, "left out: not a file, directory or symlink");
                return Ok(None);
            }
            Kind::Dir => {
                self.count(name)?;
                let fd = open(OFlag::O_RDONLY | OFlag::O_DIRECTORY)
                    .map_err(|errno| self.unreadable(name, errno))?;
                self.header(name, EntryType::Directory, &stat, b"", 0, &[])?;
                self.packed.manifest.entries.insert(name.clone(), stamp);
                return Ok(Some(fd));
            }
            Kind::Symlink => {
                self.count(name)?;
                let target = readlinkat(dir, last).map_err(|errno| self.unreadable(name, errno))?;
                self.header(name, EntryType::Symlink, &stat, target.as_bytes(), 0, &[])?;
                self.packed.manifest.entries.insert(name.clone(), stamp);
            }
            Kind::File => {
                self.count(name)?;
                // Non-blocking: it may have become a FIFO since the stat.
                let file = open(OFlag::O_RDONLY | OFlag::O_NONBLOCK)
                    .map_err(|errno| self.unreadable(name, errno))?;
                let stat = fstat(&file).map_err(|errno| self.unreadable(name, errno))?;
                if Stamp::of(&stat).kind != Kind::File {
                    self.packed
                        .warnings
                        .add(name, "left out: replaced while the workspace was packed");
                    return Ok(None);
                }
                self.file(name, &File::from(file), &stat)?;
            }
        }
        Ok(None)
    }

    fn file(&mut self, name: &Name, file: &File, stat: &FileStat) -> Result<(), Error> {
        let stamp = Stamp::of(stat);
        self.packed.manifest.entries.insert(name.clone(), stamp);
        if stat.st_nlink > 1 {
            if let Some(first) = self.linked.get(&(stamp.dev, stamp.ino)).cloned() {
                return self.header(name, EntryType::Link, stat, first.as_bytes(), 0, &[]);
            }
            self.linked.insert((stamp.dev, stamp.ino), name.clone());
        }
        let sparse = u64::try_from(stat.st_blocks).unwrap_or(0) * 512 < stamp.size;
        let extents = if sparse {
            data_extents(file, stamp.size)
        } else {
            vec![(0, stamp.size)]
        };
        let stored: u64 = extents.iter().map(|(_, len)| len).sum();
        if self.packed.bytes.saturating_add(stored) > self.limits.bytes {
            return Err(Error::too_large(name, self.limits.bytes, "bytes"));
        }
        if stored == stamp.size {
            self.header(name, EntryType::Regular, stat, b"", stored, &[])?;
        } else {
            self.header(name, EntryType::GNUSparse, stat, b"", stamp.size, &extents)?;
        }
        for &(start, len) in &extents {
            self.data(name, file, start, len)?;
        }
        header::pad(&mut self.out, stored).map_err(|error| send(name, error))?;
        self.packed.bytes += stored;
        let after = fstat(file).map_err(|errno| self.unreadable(name, errno))?;
        if (Stamp::of(&after).size, Stamp::of(&after).mtime) != (stamp.size, stamp.mtime) {
            self.packed
                .warnings
                .add(name, "changed while it was packed");
        }
        Ok(())
    }

    /// Sends exactly `len` bytes from `start`, zeros where the file has shrunk.
    fn data(&mut self, name: &Name, file: &File, start: u64, len: u64) -> Result<(), Error> {
        let mut sent = 0;
        while sent < len {
            let want = self
                .buffer
                .len()
                .min(usize::try_from(len - sent).unwrap_or(usize::MAX));
            let got = match file.read_at(&mut self.buffer[..want], start + sent) {
                Ok(0) => {
                    self.buffer[..want].fill(0);
                    want
                }
                Ok(got) => got,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.unreadable(name, error)),
            };
            self.out
                .write_all(&self.buffer[..got])
                .map_err(|error| send(name, error))?;
            sent += got as u64;
        }
        Ok(())
    }

    fn header(
        &mut self,
        name: &Name,
        kind: EntryType,
        stat: &FileStat,
        link: &[u8],
        size: u64,
        extents: &[(u64, u64)],
    ) -> Result<(), Error> {
        let mut bytes = name.as_bytes().to_vec();
        if kind.is_dir() {
            bytes.push(b'/');
        }
        let entry = Entry {
            kind,
            name: &bytes,
            link,
            mode: stat.st_mode & 0o777,
            mtime: u64::try_from(stat.st_mtime).unwrap_or(0),
            size,
            extents,
        };
        entry
            .write(&mut self.out)
            .map_err(|error| send(name, error))
    }

    fn count(&mut self, name: &Name) -> Result<(), Error> {
        self.entries += 1;
        if self.entries > self.limits.entries {
            return Err(Error::too_large(name, self.limits.entries, "entries"));
        }
        Ok(())
    }

    fn unreadable(&self, name: &Name, source: impl Into<io::Error>) -> Error {
        let path = self.root.join(name.as_path());
        Error::unreadable(path.as_os_str().as_bytes(), source)
    }

    fn finish(mut self) -> Result<Packed, Error> {
        header::finish(&mut self.out)
            .and_then(|()| self.out.flush())
            .map_err(|error| send(&Name::default(), error))?;
        Ok(self.packed)
    }
}

fn send(name: &Name, source: io::Error) -> Error {
    Error::Send {
        path: name.to_string(),
        source,
    }
}

fn to_errno(error: io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(nix::libc::EIO))
}
