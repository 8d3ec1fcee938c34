//! Listening on vsock, for the host only.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bulkhead_agent::VSOCK_HOST_PORTS;
use nix::libc;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept4, bind, getpeername, listen,
    socket,
};
use tokio::io::unix::AsyncFd;

use crate::console::complain;
use crate::failure::{Context, Result};
use crate::watch;

/// A listening vsock socket.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: AsyncFd<OwnedFd>,
    /// Accepted already, while another was served.
    next: Mutex<Option<OwnedFd>>,
}

impl Listener {
    /// Listens on `port`.
    pub(super) fn bind(port: u32) -> Result<Self> {
        let listen = || -> io::Result<Self> {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let fd = socket(AddressFamily::Vsock, SockType::Stream, flags, None)?;
            bind(fd.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, port))?;
            listen(&fd, Backlog::new(4)?)?;
            Ok(Self {
                socket: watch::readable(fd)?,
                next: Mutex::default(),
            })
        };
        listen().context(|| format!("cannot listen on vsock port {port}"))
    }

    fn next(&self) -> MutexGuard<'_, Option<OwnedFd>> {
        self.next.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the host wants another connection. Cancel-safe.
    pub(super) async fn pending(&self) {
        if self.next().is_some() {
            return;
        }
        if let Ok(fd) = self.accept_host().await {
            *self.next() = Some(fd);
        }
        // A failure shows in the accept that follows.
    }

    /// The next connection from the host; others are dropped.
    pub(super) async fn accept(&mut self) -> io::Result<OwnedFd> {
        if let Some(fd) = self.next().take() {
            return Ok(fd);
        }
        self.accept_host().await
    }

    /// A connection from the host, and there from somebody who may: an
    /// ordinary user of it can connect to any guest, but from no such port.
    async fn accept_host(&self) -> io::Result<OwnedFd> {
        loop {
            let mut guard = self.socket.readable().await?;
            let accepted = guard.try_io(|fd| {
                let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
                Ok(accept4(fd.as_raw_fd(), flags)?)
            });
            let Ok(raw) = accepted else { continue };
            let fd = own(raw?);
            // A peer that is gone again is nobody's loss.
            let Ok(peer) = getpeername::<VsockAddr>(fd.as_raw_fd()) else {
                continue;
            };
            if may_connect(peer.cid(), peer.port()) {
                return Ok(fd);
            }
            complain!(
                "dropped a vsock connection from CID {} port {}: not from the host's root",
                peer.cid(),
                peer.port()
            );
        }
    }
}

fn may_connect(cid: u32, port: u32) -> bool {
    cid == libc::VMADDR_CID_HOST && VSOCK_HOST_PORTS.contains(&port)
}

#[allow(unsafe_code)] // accept4 of nix still returns a bare number
fn own(raw: i32) -> OwnedFd {
    // SAFETY: accept4 just returned it, and nothing else has it.
    unsafe { OwnedFd::from_raw_fd(raw) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_hosts_privileged_ports_are_heard() {
        assert!(may_connect(2, 1023));
        for (cid, port) in [(2, 1024), (2, 4_000_000_000), (2, 1), (1, 600), (3, 600)] {
            assert!(!may_connect(cid, port), "{cid}:{port}");
        }
    }
}
