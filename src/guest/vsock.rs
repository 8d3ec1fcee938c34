//! A vsock connection as a stream of bytes for the runtime.

use std::io;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, VsockAddr as Address, bind, connect as connect_socket,
    socket,
};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use vsock::{VMADDR_CID_ANY, VsockStream};

use crate::host::sys;

/// Pause between attempts while the guest is not listening yet.
const RETRY: Duration = Duration::from_millis(2);

/// Connects to `port` of the guest `cid`, as often as it takes. The caller
/// bounds the time.
///
/// # Errors
/// A failure that waiting does not cure.
pub(crate) async fn connect(cid: u32, port: u32) -> io::Result<VsockIo> {
    debug_assert_ne!(cid, VMADDR_CID_ANY);
    loop {
        let attempt = tokio::task::spawn_blocking(move || attempt(cid, port));
        match attempt.await.map_err(io::Error::other)? {
            Ok(stream) => return VsockIo::new(stream),
            // Not booted, driver not loaded, agent not listening.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(
                        nix::libc::ENODEV
                            | nix::libc::ECONNRESET
                            | nix::libc::ECONNREFUSED
                            | nix::libc::ETIMEDOUT
                            | nix::libc::EHOSTUNREACH
                            | nix::libc::EINTR
                    )
                ) => {}
            Err(error) => return Err(error),
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Connects from a privileged port: the agent hears no others, because any
/// local user may connect to a guest. Needs CAP_NET_BIND_SERVICE (vsock(7)).
fn attempt(cid: u32, port: u32) -> io::Result<VsockStream> {
    for from in bulkhead_agent::VSOCK_HOST_PORTS {
        let fd = socket(
            AddressFamily::Vsock,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC,
            None,
        )?;
        match bind(fd.as_raw_fd(), &Address::new(VMADDR_CID_ANY, from)) {
            Err(Errno::EADDRINUSE) => continue,
            bound => bound?,
        }
        connect_socket(fd.as_raw_fd(), &Address::new(cid, port))?;
        return Ok(sys::vsock_stream(fd));
    }
    Err(io::ErrorKind::AddrInUse.into())
}

/// A non-blocking vsock connection.
#[derive(Debug)]
pub(crate) struct VsockIo {
    watched: AsyncFd<std::os::fd::OwnedFd>,
    stream: VsockStream,
}

impl VsockIo {
    fn new(stream: VsockStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let copy = stream.as_fd().try_clone_to_owned()?;
        let watched = sys::watch(copy, Interest::READABLE | Interest::WRITABLE)?;
        Ok(Self { watched, stream })
    }
}

impl AsyncRead for VsockIo {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            let mut guard = ready!(this.watched.poll_read_ready(cx))?;
            match guard.try_io(|_| this.stream.read(buf.initialize_unfilled())) {
                Ok(result) => return Poll::Ready(result.map(|read| buf.advance(read))),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for VsockIo {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        loop {
            let mut guard = ready!(this.watched.poll_write_ready(cx))?;
            match guard.try_io(|_| this.stream.write(bytes)) {
                Ok(result) => return Poll::Ready(result),
                Err(_would_block) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.stream.shutdown(std::net::Shutdown::Write))
    }
}
