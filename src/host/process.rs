//! Processes of this host, told apart by id and start time.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, SystemTime};

use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::time::{ClockId, clock_gettime};

use super::sys;

/// This boot of the host (`/proc/sys/kernel/random/boot_id`).
pub fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|text| text.trim().to_owned())
        .unwrap_or_default()
}

/// When the host started, by its clock as it is now.
pub fn booted() -> Option<SystemTime> {
    let up = clock_gettime(ClockId::CLOCK_BOOTTIME).ok()?;
    SystemTime::now().checked_sub(up.into())
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

/// Whether somebody who has a lock (flock(2)) on a file is on its way out: killed,
/// but a thread of it is still inside the kernel, and the lock goes with the last.
///
/// # Errors
/// The file is gone, or /proc/locks cannot be read.
pub fn is_lock_of_dying(file: &Path) -> io::Result<bool> {
    let inode = fs::metadata(file)?.ino();
    let locks = fs::read_to_string("/proc/locks")?;
    Ok(lock_holders(&locks, inode).any(is_zombie))
}

/// Who has a flock on the file with this inode number, by /proc/locks (proc(5)):
/// `1: FLOCK  ADVISORY  WRITE 1234 fe:00:5678 0 EOF`. Those of another pid
/// namespace have no number. Devices are not compared: some file systems give
/// stat(2) another one.
fn lock_holders(locks: &str, inode: u64) -> impl Iterator<Item = i32> {
    locks.lines().filter_map(move |line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let (kind, pid) = (fields.next()?, fields.nth(2)?);
        let file = fields.next()?.rsplit_once(':')?.1;
        let pid = pid.parse().ok().filter(|pid| *pid > 0)?;
        (kind == "FLOCK" && file.parse::<u64>() == Ok(inode)).then_some(pid)
    })
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
    let timeout = PollTimeout::try_from(Duration::from_secs(30)).map_err(io::Error::other)?;
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
    #[test]
    fn a_lock_tells_who_has_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let holders = || {
            let locks = fs::read_to_string("/proc/locks").unwrap();
            let inode = file.as_file().metadata().unwrap().ino();
            lock_holders(&locks, inode).collect::<Vec<i32>>()
        };
        assert!(holders().is_empty());
        let lock = nix::fcntl::Flock::lock(
            file.reopen().unwrap(),
            nix::fcntl::FlockArg::LockExclusiveNonblock,
        )
        .unwrap();
        assert_eq!(holders(), [std::process::id().cast_signed()]);
        // We live.
        assert!(!is_lock_of_dying(file.path()).unwrap());
        drop(lock);
        assert!(holders().is_empty());
    }

    #[test]
    fn only_who_has_a_flock_on_this_file_counts() {
        let locks = "1: POSIX  ADVISORY  WRITE 10 fe:00:77 0 EOF\n\
                     2: FLOCK  ADVISORY  WRITE 11 fe:00:77 0 EOF\n\
                     2: -> FLOCK  ADVISORY  WRITE 12 fe:00:77 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 13 fe:00:78 0 EOF\n\
                     4: FLOCK  ADVISORY  WRITE 0 fe:00:77 0 EOF\n";
        assert_eq!(lock_holders(locks, 77).collect::<Vec<i32>>(), [11]);
    }
}
