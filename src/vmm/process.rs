//! A running VMM process, held by a pidfd: never polled, never mistaken.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Mutex;

use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::host::lease::Lease;
use crate::host::{process as host_process, sys};

/// How a VMM process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitStatus {
    /// Its exit code, unless a signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
}

impl ExitStatus {
    /// That of somebody else's child.
    pub const UNKNOWN: Self = Self {
        code: None,
        signal: None,
    };
}

/// A VMM process: a child, or one that was taken over from a dead owner.
/// Dropping it kills it and waits for its end.
#[derive(Debug)]
pub struct VmmProcess {
    pid: i32,
    /// Somebody else's child has no status for us.
    child: bool,
    start_time: u64,
    pidfd: AsyncFd<OwnedFd>,
    /// Set once the process was reaped: its id is free for others from then on.
    ended: Mutex<Option<ExitStatus>>,
}

impl VmmProcess {
    /// Takes over a child that was just forked; kills it if that fails.
    ///
    /// # Errors
    /// No descriptor left.
    pub(super) fn adopt_child(pid: i32) -> io::Result<Self> {
        let open = || {
            let pidfd = sys::watch(sys::pidfd_open(pid)?, Interest::READABLE)?;
            let start_time = host_process::start_time(pid).ok_or(io::ErrorKind::NotFound)?;
            Ok(Self {
                pid,
                child: true,
                start_time,
                pidfd,
                ended: Mutex::new(None),
            })
        };
        open().inspect_err(|_: &io::Error| {
            let pid = nix::unistd::Pid::from_raw(pid);
            // Our own child, not yet waited for: the id cannot be another's.
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::SIGKILL);
            let _ = nix::sys::wait::waitpid(pid, None);
        })
    }

    /// Takes over the process that started at `start_time`, whose owner died.
    ///
    /// # Errors
    /// It is gone (`NotFound`), or no descriptor left.
    pub fn take_over(pid: i32, start_time: u64) -> io::Result<Self> {
        let pidfd = sys::pidfd_open(pid)?;
        // Read after the pidfd was opened: from here on it is this process or none.
        if !host_process::is_same(pid, start_time) {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(Self {
            pid,
            child: false,
            start_time,
            pidfd: sys::watch(pidfd, Interest::READABLE)?,
            ended: Mutex::new(None),
        })
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// When it started, in clock ticks since the host's boot.
    pub fn start_time(&self) -> u64 {
        self.start_time
    }

    /// What is written down about it.
    pub fn lease(&self) -> Lease {
        Lease::Process {
            pid: self.pid,
            start_time: self.start_time,
            boot_id: host_process::boot_id(),
        }
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// Somebody else reaped the child.
    pub async fn wait(&self) -> io::Result<ExitStatus> {
        loop {
            if let Some(status) = self.try_wait()? {
                return Ok(status);
            }
            // A pidfd stays readable once the process has ended.
            let _ = self.pidfd.readable().await?;
        }
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    /// Somebody else reaped the child.
    pub fn try_wait(&self) -> io::Result<Option<ExitStatus>> {
        self.reap(WaitPidFlag::WNOHANG)
    }

    /// Ends it at once. Succeeds when it has ended already.
    ///
    /// # Errors
    /// It is not ours to signal.
    pub fn kill(&self) -> io::Result<()> {
        match sys::pidfd_send_signal(self.pidfd.get_ref().as_fd(), libc::SIGKILL) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            other => other,
        }
    }

    /// Peak resident memory in KiB and CPU time in milliseconds so far.
    pub fn usage(&self) -> Option<(u64, u64)> {
        let kib = memory_kib(self.pid, "VmHWM:")?;
        let stat = format!("/proc/{}/stat", self.pid);
        Some((kib, host_process::cpu_ms(Path::new(&stat)).ok()?))
    }

    /// Resident memory right now, in KiB.
    pub fn memory(&self) -> Option<u64> {
        memory_kib(self.pid, "VmRSS:")
    }

    fn reap(&self, flag: WaitPidFlag) -> io::Result<Option<ExitStatus>> {
        let mut ended = self
            .ended
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        if ended.is_none() && !self.child {
            // Its new parent reaps it; a pidfd is readable from the end on.
            let mut set = [PollFd::new(self.pidfd.get_ref().as_fd(), PollFlags::POLLIN)];
            let over = poll(&mut set, PollTimeout::ZERO)? > 0;
            *ended = over.then_some(ExitStatus::UNKNOWN);
        } else if ended.is_none() {
            *ended = match waitid(
                Id::PIDFd(self.pidfd.get_ref().as_fd()),
                WaitPidFlag::WEXITED | flag,
            ) {
                Ok(WaitStatus::Exited(_, code)) => Some(ExitStatus {
                    code: Some(code),
                    signal: None,
                }),
                Ok(WaitStatus::Signaled(_, signal, _)) => Some(ExitStatus {
                    code: None,
                    signal: Some(signal as i32),
                }),
                // A pidfd opened with PIDFD_NONBLOCK answers EAGAIN.
                Ok(_) | Err(nix::errno::Errno::EAGAIN) => None,
                Err(error) => return Err(error.into()),
            };
        }
        Ok(*ended)
    }
}

impl Drop for VmmProcess {
    fn drop(&mut self) {
        if matches!(self.try_wait(), Ok(None)) && self.kill().is_ok() && self.child {
            let pid = nix::unistd::Pid::from_raw(self.pid);
            let _ = nix::sys::wait::waitpid(pid, None);
        }
    }
}

/// A figure in KiB of a process's status, by its name there.
fn memory_kib(pid: i32, name: &str) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let figure = status.lines().find_map(|line| line.strip_prefix(name))?;
    figure.trim().trim_end_matches(" kB").parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_falls_and_its_peak_does_not() {
        let me = i32::try_from(std::process::id()).unwrap();
        let much = vec![1_u8; 256 << 20];
        let with = memory_kib(me, "VmRSS:").unwrap();
        drop(much);
        let without = memory_kib(me, "VmRSS:").unwrap();
        let peak = memory_kib(me, "VmHWM:").unwrap();
        assert!(without + (128 << 10) < with, "{with} to {without}");
        // Each processor counts a little by itself for a while.
        assert!(peak + (16 << 10) >= with, "{peak}, {with}");
        assert_eq!(memory_kib(me, "VmNone:"), None);
    }
}
