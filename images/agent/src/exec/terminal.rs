//! Pseudo-terminals for commands.
#![allow(unsafe_code)] // TIOCSWINSZ has no safe form

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use bulkhead_agent::Size;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::libc;
use nix::pty::{OpenptyResult, Winsize, openpty};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{Gid, Uid, fchown};

use super::user::User;

/// Group `tty` on Debian, as devpts has it.
const TTY_GROUP: u32 = 5;

nix::ioctl_write_ptr_bad!(set_size, libc::TIOCSWINSZ, Winsize);

/// Opens a terminal of the given size that belongs to `user`: our end, theirs.
pub(super) fn open(size: Size, user: &User) -> io::Result<(OwnedFd, OwnedFd)> {
    let OpenptyResult { master, slave } = openpty(Some(&winsize(size)), None)?;
    for fd in [&master, &slave] {
        fcntl(fd.as_fd(), FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    }
    // Without privileges the terminal is its opener's already.
    if Uid::effective().is_root() {
        let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(TTY_GROUP));
        fchown(&slave, Some(uid), Some(gid))?;
        fchmod(&slave, Mode::from_bits_truncate(0o620))?;
    }
    Ok((master, slave))
}

/// Changes the size; the foreground processes get SIGWINCH.
pub(super) fn resize(terminal: impl AsFd, size: Size) -> nix::Result<()> {
    // SAFETY: the descriptor is open and the argument outlives the call.
    unsafe { set_size(terminal.as_fd().as_raw_fd(), &winsize(size)) }.map(drop)
}

fn winsize(size: Size) -> Winsize {
    Winsize {
        ws_row: size.rows,
        ws_col: size.cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}
