//! Network namespaces: made, kept under a path, entered by threads of their own.
//!
//! A thread that has entered another namespace never goes on to do something
//! else: each piece of work gets a fresh thread, which ends with it. Sockets it
//! opens belong to the namespace and are used from anywhere.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

/// The calling thread's own.
const OWN: &str = "/proc/thread-self/ns/net";

/// A network namespace, for as long as this lives at least.
#[derive(Debug)]
pub struct Netns(OwnedFd);

impl Netns {
    /// The one kept under a path, such as `/run/netns/NAME`.
    ///
    /// # Errors
    /// There is none.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self(File::open(path)?.into()))
    }

    /// The calling thread's own.
    ///
    /// # Errors
    /// No /proc.
    pub fn own() -> io::Result<Self> {
        Self::open(Path::new(OWN))
    }

    /// Makes one with nothing in it, kept under `path` until [`release`].
    ///
    /// # Errors
    /// Not allowed, or something is at `path`.
    pub fn make(path: &Path) -> io::Result<Self> {
        let made = || {
            unshare(CloneFlags::CLONE_NEWNET)?;
            make_place(path)?;
            mount(
                Some(OWN),
                path,
                None::<&str>,
                MsFlags::MS_BIND,
                None::<&str>,
            )?;
            Self::open(path)
        };
        std::thread::scope(|scope| join(scope.spawn(made)))?
    }

    /// Keeps somebody else's under `path`, too, until [`release`]: it has a name
    /// then that whoever comes later finds it by.
    ///
    /// # Errors
    /// Not allowed, it is none, or something is at `path`.
    pub fn keep(theirs: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
        make_place(path)?;
        let from = format!("/proc/thread-self/fd/{}", theirs.as_raw_fd());
        let none = None::<&str>;
        Ok(mount(Some(&*from), path, none, MsFlags::MS_BIND, none)?)
    }

    /// Whether both are the same.
    ///
    /// # Errors
    /// One of them cannot be looked at.
    pub fn is(&self, other: &Self) -> io::Result<bool> {
        let [this, that] = [self, other].map(|one| nix::sys::stat::fstat(&one.0));
        let (this, that) = (this?, that?);
        Ok((this.st_dev, this.st_ino) == (that.st_dev, that.st_ino))
    }

    /// Does some work in a thread that is in this namespace, and waits for it.
    ///
    /// # Errors
    /// Not allowed to enter it, or no thread was to be had.
    pub fn run_in<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        let inside = || {
            setns(&self.0, CloneFlags::CLONE_NEWNET)?;
            Ok(work())
        };
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("netns".into());
            join(thread.spawn_scoped(scope, inside)?)
        })?
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for Netns {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

/// Makes a file to keep a namespace under. One that is there already without a
/// namespace was left by a power cut that took its lease with it (decision 0015).
fn make_place(path: &Path) -> io::Result<()> {
    match File::options().write(true).create_new(true).open(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let meta = std::fs::symlink_metadata(path)?;
            let parent = path.parent().map(std::fs::metadata).transpose()?;
            // A mount is on another device than the directory.
            let left = meta.is_file() && parent.is_some_and(|dir| dir.dev() == meta.dev());
            if left { Ok(()) } else { Err(error) }
        }
        made => made.map(drop),
    }
}

fn join<T>(thread: std::thread::ScopedJoinHandle<'_, T>) -> io::Result<T> {
    let panicked = |_| io::Error::other("a thread in another network namespace panicked");
    thread.join().map_err(panicked)
}

/// Lets go of a namespace kept under a path. It is gone, with all that is in
/// it, when nobody else has it open.
///
/// # Errors
/// It is still there.
pub fn release(path: &Path) -> io::Result<()> {
    match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        // Not mounted yet, or not there any more.
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
        Err(error) => return Err(error.into()),
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
