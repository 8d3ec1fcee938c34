//! Makes what a guest wrote into a shared workspace ordinary files of the host.
//!
//! Under `mapped-xattr` QEMU keeps the owner, mode and type the guest believes
//! in as extended attributes (`user.virtfs.*`), and the file itself belongs to
//! QEMU with mode 0600. Once the machine is gone, what bears such attributes
//! gets the guest's permission bits and the workspace's owner, links become
//! links if they lead nowhere outside, and the attributes go.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::renameat;
use nix::libc;
use nix::sys::stat::{FileStat, Mode, fchmod, fstat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, symlinkat, unlinkat};
use rustix::fs::{fgetxattr, fremovexattr};

use crate::guest::archive::{Beneath, HostDir, Name, chown_link, link_stays_inside, stat_in};

/// hw/9pfs/9p-local.c of QEMU.
const ATTRIBUTES: [&str; 4] = [
    "user.virtfs.uid",
    "user.virtfs.gid",
    "user.virtfs.mode",
    "user.virtfs.rdev",
];
const MODE: &str = ATTRIBUTES[2];
/// Longest link target Linux takes, in bytes (PATH_MAX).
const MAX_TARGET: u64 = 4096;
/// Warnings given one by one.
const MAX_WARNINGS: usize = 20;

/// Records in the directory of a run which directory it shares.
pub(super) fn record(run: &Path, share: &HostDir) -> io::Result<()> {
    std::fs::write(run.join(RECORD), format!("{:?}", share.id()))
}

/// Whether that run shared this directory.
pub(super) fn is_recorded(run: &Path, share: &HostDir) -> bool {
    std::fs::read_to_string(run.join(RECORD)).is_ok_and(|id| id == format!("{:?}", share.id()))
}

const RECORD: &str = "share";

/// What was done.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Settled {
    /// Files, directories and links that bore attributes.
    pub(super) entries: usize,
    /// What could not be made ordinary.
    pub(super) warnings: Vec<String>,
}

/// Settles everything below `dir`, which QEMU wrote to as this process's user.
/// No symbolic link is followed, and no other file system entered.
///
/// # Errors
/// `dir` itself cannot be used. What fails below it is a warning.
pub(super) fn settle(dir: &HostDir) -> io::Result<Settled> {
    let base = dir.beneath();
    let top = base.dir(&Name::default())?;
    let stat = fstat(&top)?;
    let mut work = Work {
        base,
        owner: (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid)),
        device: stat.st_dev,
        settled: Settled::default(),
        more: 0,
    };
    let (mut pending, mut dirs) = (vec![Name::default()], Vec::new());
    while let Some(name) = pending.pop() {
        if let Err(errno) = work.dir(&name, &mut pending) {
            work.warn(&name, errno.desc());
        }
        dirs.push(name);
    }
    // Last, and what is inside first: the mode may close it to this user.
    for name in dirs.into_iter().rev() {
        match base.dir(&name) {
            Ok(dir) => work.file(&name, &File::from(dir)),
            Err(Errno::ENOENT | Errno::ELOOP | Errno::ENOTDIR) => {}
            Err(errno) => work.warn(&name, errno.desc()),
        }
    }
    if work.more > 0 {
        let more = format!("and {} more like these", work.more);
        work.settled.warnings.push(more);
    }
    Ok(work.settled)
}

struct Work<'a> {
    base: &'a Beneath,
    owner: (Uid, Gid),
    device: libc::dev_t,
    settled: Settled,
    more: usize,
}

impl Work<'_> {
    fn warn(&mut self, name: &Name, why: &str) {
        if self.settled.warnings.len() < MAX_WARNINGS {
            let warning = format!("{name} in the shared workspace: {why}");
            self.settled.warnings.push(warning);
        } else {
            self.more += 1;
        }
    }

    fn dir(&mut self, name: &Name, pending: &mut Vec<Name>) -> Result<(), Errno> {
        let mut dir = Dir::from_fd(self.base.dir(name)?)?;
        let mut names = Vec::new();
        for entry in dir.iter() {
            let entry = OsStr::from_bytes(entry?.file_name().to_bytes()).to_owned();
            if entry != "." && entry != ".." {
                names.push(entry);
            }
        }
        for last in names {
            let below = name.join(&last);
            let Some(stat) = stat_in(&dir, &last)? else {
                continue;
            };
            if stat.st_dev != self.device {
                continue;
            }
            let opened = match stat.st_mode & libc::S_IFMT {
                libc::S_IFDIR => self.base.dir(&below).map(File::from),
                libc::S_IFREG => self.base.file(&below),
                _ => continue,
            };
            match opened {
                Ok(file) => {
                    let is_dir = self.entry(&below, &dir, &last, &file);
                    if is_dir {
                        pending.push(below);
                    }
                }
                // Replaced by somebody meanwhile: theirs now.
                Err(Errno::ENOENT | Errno::ELOOP | Errno::ENOTDIR) => {}
                Err(errno) => self.warn(&below, errno.desc()),
            }
        }
        Ok(())
    }

    /// Settles one entry but a directory; says whether it is one.
    fn entry(&mut self, name: &Name, dir: &Dir, last: &OsStr, file: &File) -> bool {
        let Ok(stat) = fstat(file) else { return false };
        if attribute(file, MODE).map(|mode| mode & libc::S_IFMT) == Some(libc::S_IFLNK) {
            if let Err(why) = self.link(name, dir, last, file) {
                self.warn(name, &why);
            }
            return false;
        }
        if stat.st_mode & libc::S_IFMT == libc::S_IFDIR {
            return true;
        }
        self.file(name, file);
        false
    }

    /// A regular file or directory: permission bits, owner, no attributes.
    fn file(&mut self, name: &Name, file: &File) {
        let mapped = ATTRIBUTES.map(|key| attribute(file, key).is_some());
        if !mapped.contains(&true) {
            return;
        }
        let Ok(stat) = fstat(file) else { return };
        self.settled.entries += 1;
        match attribute(file, MODE).map(|mode| (mode, mode & libc::S_IFMT)) {
            Some((mode, 0 | libc::S_IFREG | libc::S_IFDIR)) if self.may_change(&stat) => {
                // Nothing a guest makes is set-uid or sticky here.
                let mode = Mode::from_bits_truncate(mode & 0o777);
                if let Err(errno) = fchmod(file, mode) {
                    self.warn(name, errno.desc());
                }
            }
            Some((_, 0 | libc::S_IFREG | libc::S_IFDIR)) | None => {}
            Some(_) => self.warn(name, "left as an empty file: a device, pipe or socket"),
        }
        if is_ours(Uid::from_raw(stat.st_uid))
            && let Err(errno) = fchown(file, Some(self.owner.0), Some(self.owner.1))
        {
            self.warn(name, errno.desc());
        }
        for key in ATTRIBUTES {
            let _ = fremovexattr(file, key);
        }
    }

    /// Files of third parties keep their modes: the guest's wish is not theirs.
    fn may_change(&self, stat: &FileStat) -> bool {
        let owner = Uid::from_raw(stat.st_uid);
        is_ours(owner) || owner == self.owner.0
    }

    /// A file that stands for a link becomes one.
    fn link(&mut self, name: &Name, dir: &Dir, last: &OsStr, file: &File) -> Result<(), String> {
        let desc = |errno: Errno| errno.desc().to_owned();
        let mut target = Vec::new();
        file.take(MAX_TARGET)
            .read_to_end(&mut target)
            .map_err(|error| error.to_string())?;
        // The directory's depth counts, not the link's.
        if !link_stays_inside(name.depth() - 1, &target) {
            return Err("left as a file: a link that may lead outside".into());
        }
        let (temporary, target) = (unused(last), OsString::from_vec(target));
        symlinkat(target.as_os_str(), dir, temporary.as_os_str()).map_err(desc)?;
        let (uid, gid) = self.owner;
        let placed = chown_link(dir, &temporary, uid, gid)
            .and_then(|()| renameat(dir, temporary.as_os_str(), dir, last));
        if placed.is_err() {
            let _ = unlinkat(dir, temporary.as_os_str(), UnlinkatFlags::NoRemoveDir);
        }
        self.settled.entries += 1;
        placed.map_err(desc)
    }
}

/// QEMU runs as this process's user.
fn is_ours(uid: Uid) -> bool {
    uid == Uid::effective()
}

/// A 32-bit attribute, as QEMU writes it.
fn attribute(file: impl AsFd, key: &str) -> Option<u32> {
    let mut bytes = [0; 8];
    match fgetxattr(&file, key, &mut bytes[..]).ok()? {
        // rdev has 8 bytes, of which nothing is used here.
        4 | 8 => Some(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])),
        _ => None,
    }
}

/// A name nobody has by accident.
fn unused(last: &OsStr) -> OsString {
    let mut bytes = [0; 8];
    crate::spec::fill_random(&mut bytes);
    let mut name = OsString::from(format!(".bulkhead-{:016x}", u64::from_le_bytes(bytes)));
    // Only for people who find it after a crash.
    name.push(OsStr::from_bytes(&last.as_bytes()[..last.len().min(16)]));
    name
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    use std::path::Path;

    use rustix::fs::{XattrFlags, setxattr};

    use super::*;

    /// A file as QEMU leaves it; `None` where the file system has no attributes.
    fn mapped(path: &Path, mode: u32) -> Option<()> {
        fs::set_permissions(path, PermissionsExt::from_mode(0o600)).unwrap();
        for (key, value) in [
            (ATTRIBUTES[0], 1000_u32),
            (ATTRIBUTES[1], 1000),
            (MODE, mode),
        ] {
            let set = setxattr(path, key, &value.to_le_bytes(), XattrFlags::empty());
            if set == Err(rustix::io::Errno::OPNOTSUPP) {
                println!("skipped: share_settles: no extended attributes here");
                return None;
            }
            set.unwrap();
        }
        Some(())
    }

    #[test]
    fn what_a_guest_wrote_becomes_ordinary() {
        let temp = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let dir = temp.path();
        let path = |name: &str| dir.join(name);
        fs::create_dir(path("d")).unwrap();
        fs::write(path("d/tool"), "#!/bin/sh\n").unwrap();
        fs::write(path("d/link"), "tool").unwrap();
        fs::write(path("out"), "../../etc/passwd").unwrap();
        fs::write(path("pipe"), "").unwrap();
        fs::write(path("mine"), "untouched").unwrap();
        let mine = fs::metadata(path("mine")).unwrap();
        let made = || {
            mapped(&path("d/tool"), libc::S_IFREG | 0o4755)?;
            mapped(&path("d/link"), libc::S_IFLNK | 0o777)?;
            mapped(&path("out"), libc::S_IFLNK | 0o777)?;
            mapped(&path("pipe"), libc::S_IFIFO | 0o644)
        };
        if made().is_none() {
            return;
        }
        let settled = settle(&HostDir::open(dir).unwrap()).unwrap();
        let mode = |name| fs::metadata(path(name)).unwrap().mode() & 0o7777;
        assert_eq!(mode("d/tool"), 0o755);
        assert_eq!(fs::read_link(path("d/link")).unwrap(), Path::new("tool"));
        assert!(fs::symlink_metadata(path("out")).unwrap().is_file());
        assert_eq!(settled.warnings.len(), 2, "{settled:?}");
        let file = File::open(path("d/tool")).unwrap();
        assert_eq!(attribute(&file, MODE), None);
        let now = fs::metadata(path("mine")).unwrap();
        assert_eq!(
            (mine.ctime(), mine.ctime_nsec()),
            (now.ctime(), now.ctime_nsec())
        );
        // A second look finds nothing to do but what could not be done.
        assert_eq!(
            settle(&HostDir::open(dir).unwrap()).unwrap().warnings.len(),
            1
        );
    }

    #[test]
    fn a_closed_directory_is_settled_with_what_is_in_it() {
        const HELPER: &str = "BH_SETTLE_IN";
        let name = "run::share::tests::a_closed_directory_is_settled_with_what_is_in_it";
        if let Some(dir) = std::env::var_os(HELPER) {
            let settled = settle(&HostDir::open(Path::new(&dir)).unwrap()).unwrap();
            assert_eq!(
                (settled.entries, settled.warnings.len()),
                (3, 0),
                "{settled:?}"
            );
            return;
        }
        let temp = tempfile::tempdir().unwrap();
        let (dir, exe) = (temp.path().join("in"), temp.path().join("test"));
        let path = |name: &str| dir.join(name);
        fs::create_dir_all(path("closed/deep")).unwrap();
        fs::write(path("closed/deep/f"), "x").unwrap();
        let made = || {
            mapped(&path("closed/deep/f"), libc::S_IFREG | 0o640)?;
            mapped(&path("closed/deep"), libc::S_IFDIR | 0o750)?;
            mapped(&path("closed"), libc::S_IFDIR)
        };
        if made().is_none() {
            return;
        }
        for (name, mode) in [
            ("closed", 0o700),
            ("closed/deep", 0o700),
            ("", 0o700),
            ("..", 0o755),
        ] {
            fs::set_permissions(path(name), PermissionsExt::from_mode(mode)).unwrap();
        }
        // Root may walk everything: somebody else does it.
        fs::copy(std::env::current_exe().unwrap(), &exe).unwrap();
        let mut helper = std::process::Command::new(&exe);
        helper.args(["--exact", name]).env(HELPER, &dir);
        if Uid::effective().is_root() {
            for name in ["", "closed", "closed/deep", "closed/deep/f"] {
                std::os::unix::fs::chown(path(name), Some(65534), Some(65534)).unwrap();
            }
            std::os::unix::process::CommandExt::gid(&mut helper, 65534);
            std::os::unix::process::CommandExt::uid(&mut helper, 65534);
        }
        let output = helper.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success() && text.contains("1 passed"),
            "{text}"
        );
        let mode = |name| fs::metadata(path(name)).unwrap().mode() & 0o7777;
        assert_eq!(mode("closed"), 0);
        fs::set_permissions(path("closed"), PermissionsExt::from_mode(0o700)).unwrap();
        assert_eq!((mode("closed/deep"), mode("closed/deep/f")), (0o750, 0o640));
    }

    #[test]
    fn links_of_others_are_not_followed() {
        let temp = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let (dir, outside) = (temp.path().join("in"), temp.path().join("out"));
        fs::create_dir_all(&dir).unwrap();
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("f"), "x").unwrap();
        if mapped(&outside.join("f"), libc::S_IFREG | 0o777).is_none() {
            return;
        }
        std::os::unix::fs::symlink(&outside, dir.join("d")).unwrap();
        std::os::unix::fs::symlink(outside.join("f"), dir.join("f")).unwrap();
        assert_eq!(
            settle(&HostDir::open(&dir).unwrap()).unwrap(),
            Settled::default()
        );
        let mode = fs::metadata(outside.join("f")).unwrap().mode() & 0o777;
        assert_eq!(mode, 0o600);
    }
}
