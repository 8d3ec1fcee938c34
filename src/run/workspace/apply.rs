//! Staged changes brought into the workspace: all prepared, then all renamed.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io;
use std::ops::Bound;
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::renameat;
use nix::sys::stat::{Mode, fchmod, futimens, mkdirat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, symlinkat, unlinkat};
use rustix::fs::syncfs;

use super::conflict::{Now, conflicts, look};
use super::{Changes, Error};
use crate::guest::archive::{
    Beneath, HIDDEN_PREFIX, HostDir, Kind, Manifest, Name, Stamp, UnpackedEntry, Warnings,
    chown_link, copy_data, create_in, printable, stat_in, umask,
};

/// How to bring changes back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ApplyOptions {
    /// Replace and remove also what changed on the host since it was packed.
    pub force: bool,
}

/// What [`apply`] did.
#[derive(Debug, Clone, Default)]
pub struct Applied {
    /// Entries written.
    pub written: Vec<Name>,
    /// Entries removed.
    pub removed: Vec<Name>,
    /// What was left as it was.
    pub warnings: Warnings,
}

/// Brings `changes` into `dir`, which was packed with `manifest`.
///
/// Everything is first prepared in a hidden directory inside `dir`, so that a
/// full disk or an unreadable file leaves the workspace as it was; then it is
/// renamed into place. No symlink in `dir` is followed. Files belong to the
/// owner of `dir` when root applies; a mode the guest did not change stays, a
/// new one is subject to the umask. Hard links come back as separate files.
///
/// Between the last look at a host file and its replacement there is a moment
/// in which a change by another process is lost.
///
/// # Errors
/// [`Error::Conflict`] names what changed on the host since `manifest`, unless
/// forced; [`Error::NoSpace`] and [`Error::Host`] say what could not be
/// prepared. In all three cases nothing was applied. [`Error::Partial`] lists
/// what was and what was not, when a rename or removal failed; nothing is then
/// lost: what could not be put into place stays in the hidden directory, and
/// nothing is removed that is not in the way of something new.
pub fn apply(
    dir: &HostDir,
    changes: &Changes,
    manifest: &Manifest,
    options: &ApplyOptions,
) -> Result<Applied, Error> {
    let conflicts = conflicts(dir.beneath(), changes, manifest)?;
    if !conflicts.is_empty() && !options.force {
        return Err(Error::Conflict { paths: conflicts });
    }
    let mut work = Work::new(dir, changes, manifest, options)?;
    let result = work.prepare().map(|prepared| work.commit(&prepared));
    let kept = work.clean();
    result?;
    if work.failed.is_empty() {
        return Ok(work.applied);
    }
    let names = work.applied.written.iter().chain(&work.applied.removed);
    Err(Error::Partial {
        applied: names.map(Name::to_string).collect(),
        failed: work.failed,
        kept,
    })
}

struct Work<'a> {
    host: &'a Beneath,
    changes: &'a Changes,
    manifest: &'a Manifest,
    force: bool,
    umask: u32,
    owner: Option<(Uid, Gid)>,
    top: OwnedFd,
    temp_name: OsString,
    temp: OwnedFd,
    applied: Applied,
    failed: Vec<String>,
    /// Prepared entries that could not be put into place.
    unplaced: BTreeSet<OsString>,
}

impl<'a> Work<'a> {
    fn new(
        dir: &'a HostDir,
        changes: &'a Changes,
        manifest: &'a Manifest,
        options: &ApplyOptions,
    ) -> Result<Self, Error> {
        let host = dir.beneath();
        let failed = |errno: Errno| Error::host("prepare changes in", dir.path(), errno);
        let top = host.dir(&Name::default()).map_err(failed)?;
        let stat = nix::sys::stat::fstat(&top).map_err(failed)?;
        let owner = Uid::effective()
            .is_root()
            .then(|| (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid)));
        let mut random = [0; 8];
        crate::spec::fill_random(&mut random);
        let random = u64::from_le_bytes(random);
        let temp_name = OsString::from(format!("{HIDDEN_PREFIX}{random:016x}"));
        mkdirat(&top, temp_name.as_os_str(), Mode::S_IRWXU).map_err(failed)?;
        let fd = host
            .dir(&Name::default().join(&temp_name))
            .map_err(failed)?;
        Ok(Self {
            host,
            changes,
            manifest,
            force: options.force,
            umask: umask(),
            owner,
            top,
            temp_name,
            temp: fd,
            applied: Applied::default(),
            failed: Vec::new(),
            unplaced: BTreeSet::new(),
        })
    }

    /// Copies all files and symlinks into the hidden directory, as numbers.
    fn prepare(&self) -> Result<Vec<(&'a Name, &'a UnpackedEntry, OsString)>, Error> {
        let staged = self.changes.files()?;
        let mut prepared = Vec::new();
        for (name, entry) in &self.changes.staged.entries {
            let temp = OsString::from(prepared.len().to_string());
            let mode = self
                .mode(name, entry)
                .map_err(|errno| Error::host("look at", name.as_path(), errno))?;
            self.make(&staged, name, entry, mode, &self.temp, &temp)
                .map_err(|source| Error::host("prepare", name.as_path(), source))?;
            prepared.push((name, entry, temp));
        }
        // A full disk may only be found out now; and a crash in between must
        // not leave empty files where there were others.
        syncfs(&self.temp)
            .map_err(|errno| Error::host("write out", self.temp_name.as_os_str(), errno))?;
        Ok(prepared)
    }

    /// Makes a copy of a staged file or symlink; directories come later.
    fn make(
        &self,
        staged: &Beneath,
        name: &Name,
        entry: &UnpackedEntry,
        mode: Mode,
        dir: &OwnedFd,
        last: &OsString,
    ) -> io::Result<()> {
        match entry.kind {
            Kind::Symlink => {
                symlinkat(
                    entry.link.as_deref().unwrap_or_default(),
                    dir,
                    last.as_os_str(),
                )?;
                if let Some((uid, gid)) = self.owner {
                    chown_link(dir, last, uid, gid)?;
                }
            }
            Kind::File => {
                let to = create_in(dir, last)?;
                copy_data(&staged.file(name)?, &to)?;
                self.own(&to)?;
                fchmod(&to, mode)?;
                let mtime = TimeSpec::new(i64::try_from(entry.mtime).unwrap_or(0), 0);
                futimens(&to, &TimeSpec::UTIME_OMIT, &mtime)?;
            }
            Kind::Dir | Kind::Other => {}
        }
        Ok(())
    }

    /// The mode to give: the host's own where the guest left it alone.
    fn mode(&self, name: &Name, entry: &UnpackedEntry) -> Result<Mode, Errno> {
        let packed = self.manifest.entries.get(name);
        let untouched =
            packed.is_some_and(|then| then.kind == entry.kind && then.mode & 0o777 == entry.mode);
        let mode = match look(self.host, name)? {
            Now::There(now) if untouched && now.kind == entry.kind => match entry.kind {
                // New content must not inherit set-id bits.
                Kind::File => now.mode & 0o777,
                _ => now.mode,
            },
            _ => entry.mode & !self.umask,
        };
        Ok(Mode::from_bits_truncate(mode))
    }

    fn own(&self, fd: impl AsFd) -> Result<(), Errno> {
        match self.owner {
            Some((uid, gid)) => fchown(fd, Some(uid), Some(gid)),
            None => Ok(()),
        }
    }

    /// Removes what is in the way, makes directories, renames, removes the
    /// rest; notes what fails and goes on, but then removes nothing more.
    fn commit(&mut self, prepared: &[(&'a Name, &'a UnpackedEntry, OsString)]) {
        let changes = self.changes;
        let (blocking, others): (Vec<&Name>, Vec<&Name>) = (changes.removed.iter().rev())
            .filter(|name| !changes.staged.entries.contains_key(*name))
            .partition(|name| self.in_the_way(name));
        self.remove_all(&blocking);
        let mut dirs = Vec::new();
        for (name, entry, temp) in prepared {
            let done = match entry.kind {
                Kind::Dir => self
                    .dir(name, entry)
                    .map(|mode| dirs.extend(mode.map(|mode| (*name, mode)))),
                _ => self.place(name, entry, temp),
            };
            match done {
                Ok(()) => self.applied.written.push((*name).clone()),
                Err(error) => {
                    if entry.kind == Kind::Dir {
                        self.fail(name, &error);
                        continue;
                    }
                    let (hidden, temp_name) = (self.temp_name.display(), temp.display());
                    let why = format!("{error}; now in {hidden}/{temp_name}");
                    self.fail(name, &io::Error::other(why));
                    self.unplaced.insert(temp.clone());
                }
            }
        }
        if self.failed.is_empty() {
            self.remove_all(&others);
        } else {
            let why = io::Error::other("not removed, because something else failed");
            for name in others {
                self.fail(name, &why);
            }
        }
        // Deepest first, once everything is inside.
        for (name, mode) in dirs.into_iter().rev() {
            if let Err(errno) = self.host.dir(name).and_then(|fd| fchmod(&fd, mode)) {
                self.fail(name, &errno.into());
            }
        }
    }

    /// Whether a new entry needs the place of this removed one: a directory
    /// where it is not one, or something else than a directory above it.
    fn in_the_way(&self, name: &Name) -> bool {
        let entries = &self.changes.staged.entries;
        let after = (Bound::Excluded(name), Bound::Unbounded);
        // Names below a directory follow it in the order of paths.
        let is_above = (entries.range::<Name, _>(after).next())
            .is_some_and(|(next, _)| next.as_path().starts_with(name.as_path()));
        let is_below = || {
            (name.ancestors().skip(1))
                .filter_map(|above| entries.get(&above))
                .any(|above| above.kind != Kind::Dir)
        };
        let is_dir =
            || matches!(look(self.host, name), Ok(Now::There(now)) if now.kind == Kind::Dir);
        is_below() || is_above && !is_dir()
    }

    fn remove_all(&mut self, names: &[&Name]) {
        for &name in names {
            match self.remove(name) {
                Ok(true) => self.applied.removed.push(name.clone()),
                Ok(false) => {}
                Err(error) => self.fail(name, &error),
            }
        }
    }

    fn fail(&mut self, name: &Name, error: &io::Error) {
        let why = printable(error.to_string().as_bytes());
        self.failed.push(format!("{name} ({why})"));
    }

    /// Removes a name; `false` when a directory still has other things in it,
    /// or the guest never had it.
    fn remove(&mut self, name: &Name) -> io::Result<bool> {
        if !self.manifest.entries.contains_key(name) {
            let what = "kept: the guest never had it, and cannot remove it";
            self.applied.warnings.add(name, what);
            return Ok(false);
        }
        let Some((parent, last)) = name.split() else {
            return Ok(false);
        };
        let dir = match self.host.dir(&parent) {
            Ok(dir) => dir,
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => return Ok(true),
            Err(errno) => return Err(errno.into()),
        };
        let Some(stat) = stat_in(&dir, last)? else {
            return Ok(true);
        };
        let now = Stamp::of(&stat);
        self.unchanged(name, &now)?;
        if now.kind != Kind::Dir {
            unlinkat(&dir, last, UnlinkatFlags::NoRemoveDir)?;
            return Ok(true);
        }
        match unlinkat(&dir, last, UnlinkatFlags::RemoveDir) {
            Ok(()) => Ok(true),
            Err(Errno::ENOTEMPTY | Errno::EEXIST) => {
                let what = "directory kept: it holds what was not packed, or was not removed";
                self.applied.warnings.add(name, what);
                Ok(false)
            }
            Err(errno) => Err(errno.into()),
        }
    }

    /// Makes a directory in place of whatever is there; gives the mode to set.
    fn dir(&self, name: &Name, entry: &UnpackedEntry) -> io::Result<Option<Mode>> {
        let mode = self.mode(name, entry)?;
        let (parent, last) = self.parent(name)?;
        match stat_in(&parent, &last)?.map(|stat| Stamp::of(&stat)) {
            Some(now) if now.kind == Kind::Dir => {
                return Ok(
                    (now.mode != mode.bits() && self.manifest.entries.contains_key(name))
                        .then_some(mode),
                );
            }
            Some(now) => {
                self.unchanged(name, &now)?;
                unlinkat(&parent, last.as_os_str(), UnlinkatFlags::NoRemoveDir)?;
            }
            None => {}
        }
        mkdirat(&parent, last.as_os_str(), Mode::S_IRWXU)?;
        // Only what was made here changes hands; others stay their owner's.
        self.own(self.host.dir(name)?)?;
        Ok(Some(mode))
    }

    /// Renames a prepared file or symlink into place.
    fn place(&self, name: &Name, entry: &UnpackedEntry, temp: &OsString) -> io::Result<()> {
        let (parent, last) = self.parent(name)?;
        if let Some(stat) = stat_in(&parent, &last)? {
            let now = Stamp::of(&stat);
            self.unchanged(name, &now)?;
            if now.kind == Kind::Dir {
                unlinkat(&parent, last.as_os_str(), UnlinkatFlags::RemoveDir)?;
            }
        }
        match renameat(&self.temp, temp.as_os_str(), &parent, last.as_os_str()) {
            Err(Errno::EXDEV) => self.place_beside(name, entry, &parent, &last),
            other => Ok(other?),
        }
    }

    /// As [`Self::place`], where another file system is mounted.
    fn place_beside(
        &self,
        name: &Name,
        entry: &UnpackedEntry,
        parent: &OwnedFd,
        last: &OsString,
    ) -> io::Result<()> {
        let mut temp = self.temp_name.clone();
        temp.push("-file");
        let staged = self.changes.files().map_err(io::Error::other)?;
        let placed = self
            .make(&staged, name, entry, self.mode(name, entry)?, parent, &temp)
            .and_then(|()| {
                Ok(renameat(
                    parent,
                    temp.as_os_str(),
                    parent,
                    last.as_os_str(),
                )?)
            });
        if placed.is_err() {
            let _ = unlinkat(parent, temp.as_os_str(), UnlinkatFlags::NoRemoveDir);
        }
        placed
    }

    /// Opens the directory of a name, making what is missing.
    fn parent(&self, name: &Name) -> io::Result<(OwnedFd, OsString)> {
        let (parent, last) = name.split().ok_or(Errno::EINVAL)?;
        let mut made = Vec::new();
        let fd = self.host.make_dirs(&parent, &mut |dir| {
            made.push(dir.clone());
            Ok(())
        })?;
        for dir in made {
            let fd = self.host.dir(&dir)?;
            self.own(&fd)?;
            fchmod(&fd, Mode::from_bits_truncate(0o777 & !self.umask))?;
        }
        Ok((fd, last.to_owned()))
    }

    /// A last look. The status change time is left out: replacing one name of a
    /// file with several changes it on the others.
    fn unchanged(&self, name: &Name, now: &Stamp) -> io::Result<()> {
        let same = self.manifest.entries.get(name).is_some_and(|then| {
            let key = |stamp: &Stamp| (stamp.kind, stamp.ino, stamp.dev, stamp.size, stamp.mtime);
            now.kind == Kind::Dir && then.kind == Kind::Dir || key(now) == key(then)
        });
        match same || self.force {
            true => Ok(()),
            false => Err(io::Error::other("changed on the host just now")),
        }
    }

    /// Removes the hidden directory and what was not renamed out of it, but for
    /// what could not be put into place: then it gives the directory's name.
    fn clean(&mut self) -> Option<String> {
        for number in 0..self.changes.staged.entries.len() {
            let name = OsString::from(number.to_string());
            if !self.unplaced.contains(&name) {
                let _ = unlinkat(&self.temp, name.as_os_str(), UnlinkatFlags::NoRemoveDir);
            }
        }
        if !self.unplaced.is_empty() {
            // Whoever owns the workspace must be able to look into it.
            let _ = self.own(&self.temp);
            return Some(printable(self.temp_name.as_encoded_bytes()));
        }
        if let Err(errno) = unlinkat(
            &self.top,
            self.temp_name.as_os_str(),
            UnlinkatFlags::RemoveDir,
        ) {
            let what = format!("hidden directory could not be removed: {errno}");
            self.applied
                .warnings
                .add(self.temp_name.as_encoded_bytes(), what);
        }
        None
    }
}
