//! A terminal with a program on it, as a user has one.

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};

use nix::pty::{Winsize, openpty};

/// A program on a terminal.
pub(crate) struct Terminal {
    child: Child,
    screen: File,
    seen: String,
}

impl Terminal {
    /// Starts the program on a terminal of this size.
    pub(crate) fn start(mut command: Command, rows: u16, cols: u16) -> Self {
        let size = Winsize {
            ws_row: rows,
            ws_col: cols,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let pty = openpty(&size, None).unwrap();
        let end = || Stdio::from(pty.slave.try_clone().unwrap());
        let child = command
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .spawn()
            .unwrap();
        Self {
            child,
            screen: pty.master.into(),
            seen: String::new(),
        }
    }

    /// Waits until this was shown since the beginning.
    pub(crate) fn wait_for(&mut self, text: &str) {
        let mut buffer = [0; 1000];
        while !self.seen.contains(text) {
            let count = self.screen.read(&mut buffer).unwrap_or(0);
            assert!(count > 0, "{text} did not come: {}", self.seen);
            let new = String::from_utf8_lossy(&buffer[..count]);
            self.seen.push_str(&new);
        }
    }

    /// Types.
    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.screen.write_all(bytes).unwrap();
    }

    /// Gives the terminal another size, and tells the program.
    pub(crate) fn resize(&self, rows: u16, cols: u16) {
        let new = rustix::termios::Winsize {
            ws_row: rows,
            ws_col: cols,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        rustix::termios::tcsetwinsize(&self.screen, new).unwrap();
        // The kernel tells only the terminal's own session.
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGWINCH).unwrap();
    }

    /// Waits for the program's end.
    pub(crate) fn finish(mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
