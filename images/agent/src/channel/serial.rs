//! A virtio-serial port, which outlives its connections.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::libc::O_NONBLOCK;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

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
}

impl Port {
    /// Opens the device node.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let mut options = File::options();
        options.read(true).write(true).custom_flags(O_NONBLOCK);
        let file = options
            .open(path)
            .context(|| format!("cannot open port {}", path.display()))?;
        Ok(Self { file })
    }

    /// Waits until the host has the other end open.
    pub(super) async fn connected(&mut self) -> io::Result<OwnedFd> {
        if self.hung_up()? {
            self.reconnected().await?;
        }
        // The runtime gets a descriptor of its own: registering is per connection.
        self.file.as_fd().try_clone_to_owned()
    }

    /// Waits for the end of a hang-up.
    ///
    /// The runtime keeps a hang-up for ever once it has seen one, so it cannot
    /// wait for the port itself; an edge-triggered epoll between the two wakes
    /// it up once per change instead. That epoll must be gone before a
    /// connection is served: the kernel's driver takes arrived data from the
    /// device whenever anybody polls the port, and then raises no further
    /// event, so of two edge-triggered waiters one would miss it.
    async fn reconnected(&self) -> io::Result<()> {
        let edges = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let kinds = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
        edges.add(&self.file, EpollEvent::new(kinds, 0))?;
        let changes = watch::readable(edges.0.try_clone()?)?;
        while self.hung_up()? {
            let mut guard = changes.readable().await?;
            let mut events = [EpollEvent::empty()];
            edges.wait(&mut events, EpollTimeout::ZERO)?;
            guard.clear_ready();
        }
        Ok(())
    }

    fn hung_up(&self) -> io::Result<bool> {
        let mut fds = [PollFd::new(self.file.as_fd(), PollFlags::POLLOUT)];
        poll(&mut fds, PollTimeout::ZERO)?;
        Ok(fds[0]
            .revents()
            .is_some_and(|events| events.contains(PollFlags::POLLHUP)))
    }
}
