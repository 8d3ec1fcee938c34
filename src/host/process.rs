//! Processes of this host, told apart by id and start time.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::sys;

/// This boot of the host (`/proc/sys/kernel/random/boot_id`).
pub fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|text| text.trim().to_owned())
        .unwrap_or_default()
}

/// Start time of a process in clock ticks since boot (proc(5), field 22 of
/// /proc/PID/stat); `None` when there is no such process.
pub fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may contain anything, spaces included.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// CPU time in milliseconds out of the `stat` file of a process or a thread.
///
/// # Errors
/// It is gone.
pub fn cpu_ms(stat: &Path) -> io::Result<u64> {
    let text = fs::read_to_string(stat)?;
    // utime and stime, fields 14 and 15 (proc(5)), in ticks of USER_HZ, which
    // is 100 on every x86-64 Linux.
    let ticks = text.rsplit_once(')').and_then(|(_, rest)| {
        let mut fields = rest.split_ascii_whitespace().skip(11);
        let user: u64 = fields.next()?.parse().ok()?;
        Some(user + fields.next()?.parse::<u64>().ok()?)
    });
    Ok(ticks.ok_or(io::ErrorKind::InvalidData)? * 10)
}

/// Whether a process is a thread of the kernel's own: it has no program, and
/// nothing in user space can look like that (PF_KTHREAD; field 9 of
/// /proc/PID/stat).
pub fn is_kernel_thread(pid: i32) -> bool {
    const PF_KTHREAD: u32 = 0x0020_0000;
    let flags = || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (_, rest) = stat.rsplit_once(')')?;
        rest.split_whitespace().nth(6)?.parse::<u32>().ok()
    };
    flags().is_some_and(|flags| flags & PF_KTHREAD != 0)
}

/// Whether a process that has ended waits only for its parent to look.
fn is_zombie(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .ok()
        .and_then(|stat| {
            Some(
                stat.rsplit_once(')')?
                    .1
                    .trim_start()
                    .starts_with(['Z', 'X']),
            )
        })
        .unwrap_or(true)
}

/// Whether the process that started at `start` lives.
pub fn is_same(pid: i32, start: u64) -> bool {
    start_time(pid) == Some(start) && !is_zombie(pid)
}

/// Kills a process if it is the one that started at `start_time`, and waits up
/// to five seconds until it has ended.
pub(super) fn kill_if_same(pid: i32, start: u64) -> io::Result<()> {
    let pidfd = match sys::pidfd_open(pid) {
        Ok(pidfd) => pidfd,
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
        Err(error) => return Err(error),
    };
    // Read after the pidfd was opened: from here on it is this process or none.
    if !is_same(pid, start) {
        return Ok(());
    }
    match sys::pidfd_send_signal(pidfd.as_fd(), libc::SIGKILL) {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
        other => other?,
    }
    let mut set = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(Duration::from_secs(5)).map_err(io::Error::other)?;
    let ended = loop {
        match poll(&mut set, timeout) {
            Err(nix::errno::Errno::EINTR) => {}
            other => break other?,
        }
    };
    match ended {
        0 => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "it does not end after SIGKILL",
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_of_the_kernel_are_told_apart() {
        assert!(!is_kernel_thread(std::process::id().cast_signed()));
        if fs::read_to_string("/proc/2/comm").is_ok_and(|name| name == "kthreadd\n") {
            assert!(is_kernel_thread(2));
        }
    }
}
