//! Directories by descriptor, so that nothing below them leads elsewhere.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2};
use nix::libc;
use nix::sys::stat::{FileStat, fstat, fstatat};
use nix::unistd::{Gid, Uid, fchown};

use super::Owner;
use crate::failure::{Context, Result, invalid};

/// Opens a directory named by the host.
pub(super) fn open(path: &str) -> Result<OwnedFd> {
    if !path.starts_with('/') {
        return Err(invalid(format!("{path} is not an absolute path")));
    }
    let file = File::open(path).context(|| format!("cannot open {path}"))?;
    let meta = file
        .metadata()
        .context(|| format!("cannot examine {path}"))?;
    if !meta.is_dir() {
        return Err(invalid(format!("{path} is not a directory")));
    }
    Ok(file.into())
}

/// Opens a directory, making it and its parents where missing.
pub(super) fn make(path: &str, owner: Owner) -> Result<OwnedFd> {
    if !path.starts_with('/') {
        return Err(invalid(format!("{path} is not an absolute path")));
    }
    let mut missing: Vec<&Path> = Path::new(path)
        .ancestors()
        .take_while(|dir| !dir.exists())
        .collect();
    while let Some(dir) = missing.pop() {
        match fs::create_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => {
                made.context(|| format!("cannot make {}", dir.display()))?;
                let made = open(&dir.to_string_lossy())?;
                give(&made, owner)
                    .context(|| format!("cannot change the owner of {}", dir.display()))?;
            }
        }
    }
    open(path)
}

/// Changes the owner of an open file or directory.
pub(super) fn give(file: impl AsFd, owner: Owner) -> nix::Result<()> {
    let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
    // Everything new is ours already.
    if (uid, gid) == (Uid::effective(), Gid::effective()) && fstat(&file)?.st_uid == owner.uid {
        return Ok(());
    }
    fchown(file, Some(uid), Some(gid))
}

/// Opens `path` below `base`; a symbolic link cannot lead out.
pub(super) fn below(
    base: impl AsFd,
    path: &[u8],
    flags: OFlag,
    resolve: ResolveFlag,
) -> nix::Result<OwnedFd> {
    let path = if path.is_empty() { b"." } else { path };
    let resolve = resolve | ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(resolve);
    openat2(base, path, how)
}

/// Joins a relative path and a name.
pub(super) fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    if dir.is_empty() {
        return name.to_vec();
    }
    [dir, b"/", name].concat()
}

/// An entry met by [`walk`].
pub(super) struct Met<'a> {
    /// Path relative to the start.
    pub(super) path: &'a [u8],
    /// The directory it is in.
    pub(super) dir: BorrowedFd<'a>,
    pub(super) name: &'a CStr,
    pub(super) stat: &'a FileStat,
}

/// Visits everything below `base`, a directory before what is in it, without
/// following links or entering other file systems. What vanishes meanwhile is
/// left out.
pub(super) fn walk(base: &OwnedFd, mut visit: impl FnMut(&Met<'_>) -> Result<()>) -> Result<()> {
    let show = |path: &[u8]| String::from_utf8_lossy(path).into_owned();
    let device = fstat(base)
        .context(|| "cannot examine the directory".into())?
        .st_dev;
    let mut pending = vec![Vec::new()];
    while let Some(path) = pending.pop() {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
        let mut dir = match below(base, &path, flags, ResolveFlag::RESOLVE_NO_SYMLINKS) {
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => continue,
            opened => opened
                .and_then(Dir::from_fd)
                .context(|| format!("cannot open directory {}", show(&path)))?,
        };
        let mut names = Vec::new();
        for entry in dir.iter() {
            let entry = entry.context(|| format!("cannot read directory {}", show(&path)))?;
            if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
                names.push(entry.file_name().to_owned());
            }
        }
        names.sort();
        let first = pending.len();
        for name in &names {
            let path = join(&path, name.to_bytes());
            let stat = match fstatat(dir.as_fd(), name.as_c_str(), AtFlags::AT_SYMLINK_NOFOLLOW) {
                Err(Errno::ENOENT) => continue,
                stat => stat.context(|| format!("cannot examine {}", show(&path)))?,
            };
            visit(&Met {
                path: &path,
                dir: dir.as_fd(),
                name,
                stat: &stat,
            })?;
            if kind(&stat) == libc::S_IFDIR && stat.st_dev == device {
                pending.push(path);
            }
        }
        // Taken from the end, so that they come in order.
        pending[first..].reverse();
    }
    Ok(())
}

/// The type bits of a mode.
pub(super) fn kind(stat: &FileStat) -> libc::mode_t {
    stat.st_mode & libc::S_IFMT
}
