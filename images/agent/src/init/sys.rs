//! The ioctls and the fork of PID 1.
#![allow(unsafe_code)] // ioctls and fork(2) have no safe form

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::unistd::{ForkResult, Pid, fork};

// linux/fs/ext4/ext4.h, linux/fs.h
nix::ioctl_write_ptr!(ext4_resize, b'f', 16, u64);
nix::ioctl_readwrite!(fs_freeze, b'X', 119, libc::c_int);

/// Grows a mounted ext4 file system to `blocks` of its blocks.
pub(super) fn resize_ext4(dir: &File, blocks: u64) -> nix::Result<()> {
    // SAFETY: the descriptor is open and the argument outlives the call.
    unsafe { ext4_resize(dir.as_raw_fd(), &blocks) }.map(drop)
}

/// Writes everything of a file system to its disk and stops further writes, so
/// that the disk is consistent without a journal replay.
pub(super) fn freeze(dir: &File) -> nix::Result<()> {
    let mut unused = 0;
    // SAFETY: the descriptor is open; FIFREEZE does not use its argument.
    unsafe { fs_freeze(dir.as_raw_fd(), &mut unused) }.map(drop)
}

/// Brings the loopback interface up.
pub(super) fn loopback_up() -> io::Result<()> {
    let control = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads an ifreq, which outlives the call.
    let done = unsafe { libc::ioctl(control.as_raw_fd(), libc::SIOCSIFFLAGS, &request) };
    nix::errno::Errno::result(done)?;
    Ok(())
}

/// Forks; `child` runs in the child, which exits with what it returns.
pub(super) fn fork_child(child: impl FnOnce() -> i32) -> nix::Result<Pid> {
    // SAFETY: PID 1 has a single thread at this point, so the child may do
    // anything the parent could.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => std::process::exit(child()),
    }
}
