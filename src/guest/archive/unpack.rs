//! An archive of the hostile guest, unpacked below one directory.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry as Slot;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::{Mode, fchmod, futimens};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, fchown, fchownat, linkat, symlinkat};
use tar::EntryType;

use super::beneath::{Beneath, CopyError, create_in};
use super::name::link_stays_inside;
use super::read::{Entry, Reader};
use super::{Error, Kind, Limits, Name, Warnings, umask};

/// Permissions of what is unpacked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Modes {
    /// Those of the archive, less the caller's umask and the special bits.
    Archive,
    /// Files 0600 and directories 0700, for a staging directory: the archive's
    /// modes are only reported.
    Private,
}

/// How to unpack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Bounds on the archive.
    pub limits: Limits,
    /// User and group that own everything; the caller's when absent.
    pub owner: Option<(u32, u32)>,
    /// Permissions.
    pub modes: Modes,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            limits: Limits::default(),
            owner: None,
            modes: Modes::Archive,
        }
    }
}

/// One entry that was unpacked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnpackedEntry {
    /// What it is; a hard link is a file.
    pub kind: Kind,
    /// Permission bits the archive asks for, special bits stripped.
    pub mode: u32,
    /// Apparent size in bytes.
    pub size: u64,
    /// Modification time, seconds since 1970.
    pub mtime: u64,
    /// Target of a symlink.
    pub link: Option<OsString>,
    /// Bytes stored for it, for hard links to it.
    stored: u64,
}

/// What [`unpack`] did.
#[derive(Debug, Clone, Default)]
pub struct Unpacked {
    /// What is in the directory now. Directories made on the way to an entry,
    /// without one of their own, are not in it.
    pub entries: BTreeMap<Name, UnpackedEntry>,
    /// What was skipped or altered.
    pub warnings: Warnings,
    /// Bytes written.
    pub bytes: u64,
}

/// Unpacks the archive that `reader` gives below `dir`, an existing directory
/// that is empty and that nobody else writes to. See [`super`] for the rules.
///
/// Blocks. Reads `reader` to its end when it succeeds.
///
/// # Errors
/// Any [`Error`] but `Unreadable` and `Send`. What was unpacked up to then
/// stays: unpack into a temporary directory and remove that.
pub fn unpack(reader: impl Read, dir: &Path, options: &Options) -> Result<Unpacked, Error> {
    let root =
        Beneath::open(dir).map_err(|errno| Error::write(dir.as_os_str().as_bytes(), errno))?;
    let mut archive = Reader::new(reader, &options.limits);
    let mut unpacker = Unpacker {
        root,
        options,
        umask: umask(),
        parent: None,
        seen: 0,
        names: 0,
        linked: 0,
        made: Vec::new(),
        unpacked: Unpacked::default(),
    };
    while let Some(entry) = archive.next()? {
        unpacker.entry(entry, &mut archive)?;
    }
    unpacker.finish()
}

struct Unpacker<'a> {
    root: Beneath,
    options: &'a Options,
    umask: u32,
    /// The directory of the last entry: most share it with the next.
    parent: Option<(Name, OwnedFd)>,
    /// Entries, and directories made without one of their own.
    seen: u64,
    /// Bytes of their names and link targets.
    names: u64,
    /// Bytes that hard links would take as copies.
    linked: u64,
    /// Directories made without an entry of their own.
    made: Vec<Name>,
    unpacked: Unpacked,
}

impl Unpacker<'_> {
    fn entry<R: Read>(&mut self, entry: Entry, archive: &mut Reader<'_, R>) -> Result<(), Error> {
        let limits = &self.options.limits;
        self.seen += 1;
        self.names += (entry.name.len() + entry.link.len()) as u64;
        self.within_limits(&entry.name)?;
        let name = Name::parse(&entry.name, limits)?;
        let Some((parent, last)) = name.split() else {
            // The top directory itself: its mode is the caller's business.
            return match entry.kind {
                EntryType::Directory => Ok(()),
                _ => Err(Error::hostile(&entry.name, "has no name")),
            };
        };
        let kind = match entry.kind {
            EntryType::Regular | EntryType::GNUSparse | EntryType::Link => Kind::File,
            EntryType::Directory => Kind::Dir,
            EntryType::Symlink => Kind::Symlink,
            _ => {
                let what = "skipped: a device, FIFO, socket or unknown type";
                self.unpacked.warnings.add(&name, what);
                return Ok(());
            }
        };
        if kind == Kind::Symlink && !link_stays_inside(parent.depth(), &entry.link) {
            let target = super::printable(&entry.link);
            let what = format!("skipped: a symlink to `{target}`, which may be outside");
            self.unpacked.warnings.add(&name, what);
            return Ok(());
        }
        if entry.mode & 0o7000 != 0 && kind != Kind::Symlink {
            let what = "set-user-id, set-group-id or sticky bit removed";
            self.unpacked.warnings.add(&name, what);
        }
        self.enter(&name, &parent)?;
        let record = UnpackedEntry {
            kind,
            mode: entry.mode & 0o777,
            size: entry.size,
            // The far future is where file systems disagree.
            mtime: entry.mtime.min(u64::from(u32::MAX)),
            link: (kind == Kind::Symlink).then(|| OsString::from_vec(entry.link.clone())),
            stored: entry.extents.iter().map(|(_, len)| len).sum(),
        };
        let record = match entry.kind {
            EntryType::Directory => return self.dir(name, record),
            EntryType::Link => self.hard_link(&name, last, &entry)?,
            EntryType::Symlink => self.symlink(&name, last, record)?,
            _ => self.file(&name, last, record, &entry, archive)?,
        };
        self.unpacked.entries.insert(name, record);
        Ok(())
    }

    /// Makes `parent` the current directory, refusing names seen before.
    fn enter(&mut self, name: &Name, parent: &Name) -> Result<(), Error> {
        let repeats = |known: &UnpackedEntry| known.kind != Kind::Dir;
        if self.unpacked.entries.get(name).is_some_and(repeats) {
            return Err(Error::hostile(name, "comes twice"));
        }
        if self
            .parent
            .as_ref()
            .is_some_and(|(current, _)| current == parent)
        {
            return Ok(());
        }
        let (made, limits) = (&mut self.made, &self.options.limits);
        let (seen, names) = (&mut self.seen, &mut self.names);
        let fd = match self.root.make_dirs(parent, &mut |dir| {
            made.push(dir.clone());
            *seen += 1;
            *names += dir.as_bytes().len() as u64;
            match *seen > limits.entries || *names > limits.name_bytes {
                true => Err(Errno::E2BIG),
                false => Ok(()),
            }
        }) {
            Ok(fd) => fd,
            Err(Errno::E2BIG) => {
                self.within_limits(name)?;
                return Err(Error::write(name, Errno::E2BIG));
            }
            Err(Errno::ELOOP | Errno::ENOTDIR | Errno::EXDEV) => {
                return Err(Error::hostile(name, "goes through a symlink or a file"));
            }
            Err(errno) => return Err(Error::write(name, errno)),
        };
        for dir in std::mem::take(&mut self.made) {
            let fd = self
                .root
                .dir(&dir)
                .map_err(|errno| Error::write(&dir, errno))?;
            self.own(&dir, &fd)?;
            if self.options.modes == Modes::Archive {
                let mode = Mode::from_bits_truncate(0o777 & !self.umask);
                fchmod(&fd, mode).map_err(|errno| Error::write(&dir, errno))?;
            }
        }
        self.parent = Some((parent.clone(), fd));
        Ok(())
    }

    fn within_limits(&self, name: impl AsRef<[u8]>) -> Result<(), Error> {
        let Limits {
            entries,
            name_bytes,
            ..
        } = self.options.limits;
        if self.seen > entries {
            return Err(Error::too_large(name, entries, "entries"));
        }
        if self.names > name_bytes {
            return Err(Error::too_large(name, name_bytes, "bytes of names"));
        }
        Ok(())
    }

    fn current(&self) -> Result<&OwnedFd, Error> {
        let (_, fd) = self.parent.as_ref().ok_or(Error::Truncated)?;
        Ok(fd)
    }

    /// Makes a directory; its mode and time are set when all is in it.
    fn dir(&mut self, name: Name, record: UnpackedEntry) -> Result<(), Error> {
        // All above it is there: this makes the one that was counted.
        let fd = match self.root.make_dirs(&name, &mut |_| Ok(())) {
            Ok(fd) => fd,
            Err(Errno::ELOOP | Errno::ENOTDIR | Errno::EXDEV) => {
                return Err(Error::hostile(&name, "comes twice"));
            }
            Err(errno) => return Err(Error::write(&name, errno)),
        };
        self.own(&name, &fd)?;
        match self.unpacked.entries.entry(name) {
            Slot::Vacant(slot) => {
                slot.insert(record);
            }
            Slot::Occupied(mut slot) => {
                slot.insert(record);
            }
        }
        Ok(())
    }

    fn symlink(
        &mut self,
        name: &Name,
        last: &OsStr,
        record: UnpackedEntry,
    ) -> Result<UnpackedEntry, Error> {
        let target = record.link.clone().unwrap_or_default();
        let current = self.current()?;
        symlinkat(target.as_os_str(), current, last).map_err(|errno| exists(name, errno))?;
        if let Some((uid, gid)) = self.options.owner {
            let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
            fchownat(
                current,
                last,
                Some(uid),
                Some(gid),
                AtFlags::AT_SYMLINK_NOFOLLOW,
            )
            .map_err(|errno| Error::write(name, errno))?;
        }
        Ok(record)
    }

    /// Links to a file unpacked before from this archive, to nothing else.
    fn hard_link(
        &mut self,
        name: &Name,
        last: &OsStr,
        entry: &Entry,
    ) -> Result<UnpackedEntry, Error> {
        let outside = "is a hard link to something that is not a file of this archive";
        let target = Name::parse(&entry.link, &self.options.limits)
            .map_err(|_| Error::hostile(name, outside))?;
        let record = match self.unpacked.entries.get(&target) {
            Some(record) if record.kind == Kind::File => record.clone(),
            _ => return Err(Error::hostile(name, outside)),
        };
        // Whoever copies the tree writes the content once per name.
        self.linked = self.linked.saturating_add(record.stored);
        if self.linked > self.options.limits.bytes {
            return Err(Error::too_large(name, self.options.limits.bytes, "bytes"));
        }
        let (dir, file) = target
            .split()
            .ok_or_else(|| Error::hostile(name, outside))?;
        let dir = self
            .root
            .dir(&dir)
            .map_err(|errno| Error::write(name, errno))?;
        linkat(&dir, file, self.current()?, last, AtFlags::empty())
            .map_err(|errno| exists(name, errno))?;
        Ok(record)
    }

    fn file<R: Read>(
        &mut self,
        name: &Name,
        last: &OsStr,
        record: UnpackedEntry,
        entry: &Entry,
        archive: &mut Reader<'_, R>,
    ) -> Result<UnpackedEntry, Error> {
        let mut file = create_in(self.current()?, last).map_err(|errno| exists(name, errno))?;
        for &(offset, len) in &entry.extents {
            file.seek(SeekFrom::Start(offset))
                .map_err(|error| Error::write(name, error))?;
            archive.copy(len, &mut file).map_err(|error| match error {
                CopyError::Ended => Error::Truncated,
                CopyError::Read(error) => Error::Receive(error),
                CopyError::Write(error) => Error::write(name, error),
            })?;
            self.unpacked.bytes += len;
        }
        file.set_len(entry.size)
            .map_err(|error| Error::write(name, error))?;
        self.own(name, &file)?;
        self.settle(name, &file, &record)?;
        Ok(record)
    }

    fn own(&self, name: &Name, fd: impl AsFd) -> Result<(), Error> {
        let Some((uid, gid)) = self.options.owner else {
            return Ok(());
        };
        fchown(fd, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
            .map_err(|errno| Error::write(name, errno))
    }

    /// Final permissions and time.
    fn settle(&self, name: &Name, fd: impl AsFd, record: &UnpackedEntry) -> Result<(), Error> {
        if self.options.modes == Modes::Private {
            return Ok(());
        }
        let mode = Mode::from_bits_truncate(record.mode & !self.umask);
        fchmod(&fd, mode).map_err(|errno| Error::write(name, errno))?;
        let mtime = TimeSpec::new(i64::try_from(record.mtime).unwrap_or(0), 0);
        futimens(&fd, &TimeSpec::UTIME_OMIT, &mtime).map_err(|errno| Error::write(name, errno))
    }

    fn finish(mut self) -> Result<Unpacked, Error> {
        self.parent = None;
        // Deepest first: a directory may end up closed to its owner.
        for (name, record) in self.unpacked.entries.iter().rev() {
            if record.kind == Kind::Dir {
                let fd = self
                    .root
                    .dir(name)
                    .map_err(|errno| Error::write(name, errno))?;
                self.settle(name, File::from(fd), record)?;
            }
        }
        Ok(self.unpacked)
    }
}

fn exists(name: &Name, errno: Errno) -> Error {
    match errno {
        Errno::EEXIST => Error::hostile(name, "comes twice"),
        errno => Error::write(name, errno),
    }
}
