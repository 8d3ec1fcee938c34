//! Descriptors the runtime watches.
#![allow(unsafe_code)] // tokio wants a promise about every descriptor

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Has the runtime watch `fd` for reading and writing. It is to be non-blocking.
pub(crate) fn both(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    with(fd, Interest::READABLE | Interest::WRITABLE)
}

/// Has the runtime watch `fd` for reading.
pub(crate) fn readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    with(fd, Interest::READABLE)
}

fn with(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd stays the same open descriptor until it is dropped,
    // and nothing here hands out a way to replace it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}
