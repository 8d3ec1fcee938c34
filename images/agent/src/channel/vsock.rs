//! Listening on vsock, for the host only.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

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
pub(crate) struct Listener(AsyncFd<OwnedFd>);

impl Listener {
    /// Listens on `port`.
    pub(super) fn bind(port: u32) -> Result<Self> {
        let listen = || -> io::Result<Self> {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let fd = socket(AddressFamily::Vsock, SockType::Stream, flags, None)?;
            bind(fd.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, port))?;
            listen(&fd, Backlog::new(4)?)?;
            Ok(Self(watch::readable(fd)?))
        };
        listen().context(|| format!("cannot listen on vsock port {port}"))
    }

    /// Waits until a connection can be accepted.
    pub(super) async fn pending(&self) {
        // A failure shows in the accept that follows.
        let _ = self.0.readable().await;
    }

    /// The next connection from the host; others are dropped.
    pub(super) async fn accept(&mut self) -> io::Result<OwnedFd> {
        loop {
            let mut guard = self.0.readable().await?;
            let accepted = guard.try_io(|fd| {
                let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
                Ok(accept4(fd.as_raw_fd(), flags)?)
            });
            let Ok(raw) = accepted else { continue };
            let fd = own(raw?);
            let peer: VsockAddr = getpeername(fd.as_raw_fd())?;
            if peer.cid() == libc::VMADDR_CID_HOST {
                return Ok(fd);
            }
            complain!(
                "dropped a vsock connection from CID {}: not the host",
                peer.cid()
            );
        }
    }
}

#[allow(unsafe_code)] // accept4 of nix still returns a bare number
fn own(raw: i32) -> OwnedFd {
    // SAFETY: accept4 just returned it, and nothing else has it.
    unsafe { OwnedFd::from_raw_fd(raw) }
}
