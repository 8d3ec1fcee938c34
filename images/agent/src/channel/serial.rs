//! A virtio-serial port, which outlives its connections.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::libc::O_NONBLOCK;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use tokio::io::unix::AsyncFd;

use crate::failure::{Context, Result};
use crate::watch;

/// The device node of the port with this name.
pub(super) fn find(name: &str) -> Option<PathBuf> {
    fs::read_dir("/sys/class/virtio-ports")
        .ok()?
        .flatten()
        .find(|entry| {
            fs::read_to_string(entry.path().join("name")).is_ok_and(|found| found.trim() == name)
        })
        .map(|entry| Path::new("/dev").join(entry.file_name()))
        .filter(|path| path.exists())
}

/// An open port.
#[derive(Debug)]
pub(crate) struct Port {
    file: File,
    edges: Epoll,
    changes: AsyncFd<OwnedFd>,
}

// The runtime keeps a hang-up for ever once it has seen one, so a port cannot
// be waited on directly across connections. An edge-triggered epoll between
// the two wakes up once per change instead.
impl Port {
    /// Opens the device node.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let open = || -> io::Result<Self> {
            let file = File::options()
                .read(true)
                .write(true)
                .custom_flags(O_NONBLOCK)
                .open(path)?;
            let edges = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
            let kinds = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
            edges.add(&file, EpollEvent::new(kinds, 0))?;
            Ok(Self {
                file,
                changes: watch::readable(edges.0.try_clone()?)?,
                edges,
            })
        };
        open().context(|| format!("cannot open port {}", path.display()))
    }

    /// Waits until the host has the other end open.
    pub(super) async fn connected(&mut self) -> io::Result<OwnedFd> {
        while self.hung_up()? {
            let mut guard = self.changes.readable().await?;
            let mut events = [EpollEvent::empty()];
            self.edges.wait(&mut events, EpollTimeout::ZERO)?;
            guard.clear_ready();
        }
        // The runtime gets a descriptor of its own: registering is per connection.
        self.file.as_fd().try_clone_to_owned()
    }

    fn hung_up(&self) -> io::Result<bool> {
        let mut fds = [PollFd::new(self.file.as_fd(), PollFlags::POLLOUT)];
        poll(&mut fds, PollTimeout::ZERO)?;
        Ok(fds[0]
            .revents()
            .is_some_and(|events| events.contains(PollFlags::POLLHUP)))
    }
}
