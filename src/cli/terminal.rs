//! The user's own terminal: size, raw mode, and its return.
#![allow(unsafe_code)] // one ioctl without a wrapper

use std::io::{IsTerminal, stdin, stdout};
use std::os::fd::AsRawFd;

use bulkhead_agent::Size;
use nix::libc;
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// Raw mode for as long as it lives.
pub(super) struct RawMode(Termios);

impl RawMode {
    /// Enters raw mode if stdin is a terminal.
    pub(super) fn enter() -> Option<Self> {
        if !stdin().is_terminal() {
            return None;
        }
        let before = tcgetattr(stdin()).ok()?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(stdin(), SetArg::TCSADRAIN, &raw).ok()?;
        Some(Self(before))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        let _ = tcsetattr(stdin(), SetArg::TCSADRAIN, &self.0);
    }
}

/// Whether stdin may be read: that of a job in the background stops the program.
pub(super) fn has_input() -> bool {
    // An error: no terminal, or not the one that has jobs.
    nix::unistd::tcgetpgrp(stdin()).map_or(true, |group| group == nix::unistd::getpgrp())
}

/// Size of the terminal; 24 by 80 where there is none.
pub(super) fn size() -> Size {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: a valid descriptor and a valid pointer to what TIOCGWINSZ fills in.
    let result = unsafe { libc::ioctl(stdout().as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
    if result == 0 && size.ws_row > 0 && size.ws_col > 0 {
        Size {
            rows: size.ws_row,
            cols: size.ws_col,
        }
    } else {
        Size { rows: 24, cols: 80 }
    }
}
