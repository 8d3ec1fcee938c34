//! The files that hold a machine's names, and how a clone's get theirs without
//! its disk.
//!
//! To write three small files was the larger part of what a clone does before it
//! is handed out: under emulation all of the kernel's code for it has to be
//! translated first. So a machine that is to be cloned has them with room for
//! any name, and holds their pages writable when it is saved; a clone stores its
//! names there. They reach the disk as everything does that was written.
#![allow(unsafe_code)] // memory that is a file's

use std::fs::{self, File};
use std::num::NonZeroUsize;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;

use nix::libc::{MADV_POPULATE_WRITE, c_void, madvise};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use crate::failure::{Context, Result};

const MACHINE_ID: &str = "etc/machine-id";
const HOSTNAME: &str = "etc/hostname";
const HOSTS: &str = "etc/hosts";
/// Longest host name.
pub(crate) const LONGEST: usize = 64;
/// Debian's address for a machine's own name.
const OWN: &str = "127.0.1.1";
/// A machine id and a line feed.
const ID_SIZE: usize = 33;

/// Writes a machine id.
///
/// # Errors
/// The disk does not take it.
pub(crate) fn write_id(root: &Path, id: &str) -> Result<()> {
    write(root, MACHINE_ID, &format!("{id}\n"), 0o444)
}

/// Writes a host name, with room for any other where it is asked for.
///
/// # Errors
/// The disk does not take it.
pub(crate) fn write_host(root: &Path, name: &str, room: bool) -> Result<()> {
    let hosts = fs::read_to_string(root.join(HOSTS)).unwrap_or_default();
    let (text, line) = match room {
        true => (roomy(name), own_line(name)),
        false => (format!("{name}\n"), format!("{OWN} {name}\n")),
    };
    write(root, HOSTNAME, &text, 0o644)?;
    write(root, HOSTS, &hosts_with(&hosts, &line), 0o644)
}

/// A host name and line feeds, which a shell takes off and other readers skip.
fn roomy(name: &str) -> String {
    format!("{name:\n<LONGEST$}\n")
}

/// A line of hosts, with blanks at its end.
fn own_line(name: &str) -> String {
    format!("{OWN} {name:<LONGEST$}\n")
}

/// The line for the machine's own name, in the place of an older one.
fn hosts_with(hosts: &str, line: &str) -> String {
    let mut text: String = hosts
        .lines()
        .filter(|line| line.split_whitespace().next() != Some(OWN))
        .map(|line| format!("{line}\n"))
        .collect();
    if hosts.trim().is_empty() {
        text = "127.0.0.1 localhost\n::1 localhost\n".into();
    }
    text + line
}

fn write(root: &Path, path: &str, text: &str, mode: u32) -> Result<()> {
    let path = root.join(path);
    // A read-only file of an image is in the way of its own replacement.
    let _ = fs::remove_file(&path);
    fs::write(&path, text)
        .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(mode)))
        .context(|| format!("cannot write {}", path.display()))
}

/// The files' pages, kept writable from before a machine was saved.
#[derive(Debug)]
pub(crate) struct Held {
    id: Page,
    host: Page,
    hosts: Page,
    /// Where in `hosts` the own line begins.
    line: usize,
}

impl Held {
    /// Takes hold of the files, where they have room for any name.
    pub(crate) fn take(root: &Path) -> Option<Self> {
        let [id, host, hosts] = [MACHINE_ID, HOSTNAME, HOSTS].map(|path| Page::map(root, path));
        let (id, host, hosts) = (id?, host?, hosts?);
        if id.size != ID_SIZE || host.size != LONGEST + 1 {
            return None;
        }
        let text = fs::read_to_string(root.join(HOSTS)).ok()?;
        let line = text.rfind(OWN)?;
        let own = text.get(line..line + own_line("").len())?;
        let name = own[OWN.len()..].trim();
        let fits = own == own_line(name) && (line == 0 || text[..line].ends_with('\n'));
        // Last: it changes when they were written.
        let held = |page: &Page| page.is_still_there() && page.takes_a_store();
        let all = fits && text.len() == hosts.size && [&id, &host, &hosts].into_iter().all(held);
        all.then_some(Self {
            id,
            host,
            hosts,
            line,
        })
    }

    /// Gives the machine other names; false where the files are not what they
    /// were, and nothing was changed.
    pub(crate) fn store(&self, id: &str, name: &str) -> bool {
        let (id, host, line) = (format!("{id}\n"), roomy(name), own_line(name));
        let all = [
            (&self.id, 0, &id),
            (&self.host, 0, &host),
            (&self.hosts, self.line, &line),
        ];
        let fit = |(page, at, text): &(&Page, usize, &String)| {
            at + text.len() <= page.size && page.is_still_there() && page.takes_a_store()
        };
        if !all.iter().all(fit) {
            return false;
        }
        for (page, at, text) in all {
            page.store(at, text.as_bytes());
        }
        true
    }
}

/// A small file in memory.
#[derive(Debug)]
struct Page {
    path: PathBuf,
    file: File,
    at: NonNull<c_void>,
    size: usize,
}

// SAFETY: the memory is used through this only, and by one thread at a time.
unsafe impl Send for Page {}

impl Page {
    /// A regular file, from its beginning.
    fn map(root: &Path, path: &str) -> Option<Self> {
        let path = root.join(path);
        let link = fs::symlink_metadata(&path).ok()?;
        let file = File::options().read(true).write(true).open(&path).ok()?;
        let size = usize::try_from(link.len()).ok()?;
        let long = NonZeroUsize::new(size).filter(|size| link.is_file() && size.get() <= 4096)?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping, where the kernel has room for it.
        let at = unsafe { mmap(None, long, access, MapFlags::MAP_SHARED, &file, 0) }.ok()?;
        Some(Self {
            path,
            file,
            at,
            size,
        })
    }

    /// Whether the file still has its size, and its name no other file.
    fn is_still_there(&self) -> bool {
        let (Ok(file), Ok(named)) = (self.file.metadata(), fs::symlink_metadata(&self.path)) else {
            return false;
        };
        let same = (file.dev(), file.ino()) == (named.dev(), named.ino());
        same && u64::try_from(self.size) == Ok(file.len())
    }

    /// Whether its memory takes a store. One into a file that was cut off, or
    /// that the disk has no room for, would be the end of this program.
    fn takes_a_store(&self) -> bool {
        // SAFETY: the range is the mapping's.
        unsafe { madvise(self.at.as_ptr(), self.size, MADV_POPULATE_WRITE) == 0 }
    }

    fn store(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.size);
        // SAFETY: it lies within the mapping, which is writable, and nothing in
        // this program reads it.
        unsafe {
            let to = self.at.as_ptr().cast::<u8>().add(at);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: it was mapped with this size, and is used no more.
        let _ = unsafe { munmap(self.at, self.size) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(room: bool) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        fs::write(root.path().join(HOSTS), "127.0.0.1 localhost\n# end\n").unwrap();
        write_id(root.path(), &"a".repeat(32)).unwrap();
        write_host(root.path(), "template", room).unwrap();
        root
    }

    fn read(root: &tempfile::TempDir, path: &str) -> String {
        fs::read_to_string(root.path().join(path)).unwrap()
    }

    #[test]
    fn the_own_name_is_replaced_in_hosts() {
        let hosts = "127.0.0.1 localhost\n127.0.1.1 old\n# end\n";
        let expected = "127.0.0.1 localhost\n# end\n127.0.1.1 new\n";
        assert_eq!(hosts_with(hosts, "127.0.1.1 new\n"), expected);
        assert!(hosts_with("", "127.0.1.1 new\n").starts_with("127.0.0.1 localhost\n"));
    }

    #[test]
    fn names_are_stored_where_there_is_room() {
        let root = root(true);
        let held = Held::take(root.path()).unwrap();
        for name in ["clone", &"x".repeat(LONGEST), "c"] {
            let id = "b".repeat(32);
            assert!(held.store(&id, name));
            assert_eq!(read(&root, MACHINE_ID), format!("{id}\n"));
            assert_eq!(read(&root, HOSTNAME).trim_end_matches('\n'), name);
            let hosts = read(&root, HOSTS);
            let lines: Vec<_> = hosts.lines().map(str::trim_end).collect();
            let own = format!("127.0.1.1 {name}");
            assert_eq!(lines, ["127.0.0.1 localhost", "# end", &own]);
        }
        // What was stored has room for the next.
        drop(held);
        assert!(Held::take(root.path()).is_some());
    }

    #[test]
    fn what_has_no_room_or_is_another_file_is_left_alone() {
        assert!(Held::take(root(false).path()).is_none());
        let id = "b".repeat(32);
        for path in [MACHINE_ID, HOSTNAME, HOSTS] {
            let root = root(true);
            let held = Held::take(root.path()).unwrap();
            let whole = root.path().join(path);
            fs::remove_file(&whole).unwrap();
            fs::write(&whole, "another").unwrap();
            assert!(!held.store(&id, "clone"), "{path}");
            assert!(Held::take(root.path()).is_none(), "{path}");
            assert_eq!(read(&root, path), "another");
            assert!(!read(&root, HOSTNAME).contains("clone"));
            // Nor where it has moved, and a copy is in its place.
            let root = self::root(true);
            let held = Held::take(root.path()).unwrap();
            let (whole, moved) = (root.path().join(path), root.path().join("moved"));
            fs::rename(&whole, &moved).unwrap();
            fs::copy(&moved, &whole).unwrap();
            assert!(!held.store(&id, "clone"), "{path} has moved");
            let root = self::root(true);
            let held = Held::take(root.path()).unwrap();
            fs::write(root.path().join(path), "").unwrap();
            assert!(!held.store(&id, "clone"), "{path} is cut off");
        }
    }
}
