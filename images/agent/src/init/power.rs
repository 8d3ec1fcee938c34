//! Bringing the machine to rest.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, sync};

use super::scratch::Scratch;
use crate::console::complain;

/// What processes get between SIGTERM and SIGKILL.
const GRACE: Duration = Duration::from_millis(300);
/// What processes get to be gone after SIGKILL.
const KILL_DEADLINE: Duration = Duration::from_secs(2);

/// Ends every process, writes everything to disk, and powers off. PID 1 only:
/// all other processes are its children by then.
pub(super) fn off(scratch: Option<&Scratch>) -> ! {
    let everyone = Pid::from_raw(-1);
    for (signals, grace) in [
        // SIGHUP because interactive shells ignore SIGTERM.
        (
            &[Signal::SIGTERM, Signal::SIGHUP, Signal::SIGCONT][..],
            GRACE,
        ),
        (&[Signal::SIGKILL][..], KILL_DEADLINE),
    ] {
        for signal in signals {
            let _ = kill(everyone, *signal);
        }
        if reap_all(grace) {
            break;
        }
    }
    sync();
    if let Some(Err(error)) = scratch.map(Scratch::freeze) {
        complain!("cannot bring the scratch file system to rest: {error}");
    }
    cut();
}

/// Has the image's own init power off; returns the exit code of this process.
pub(crate) fn ask() -> i32 {
    for program in ["/sbin/poweroff", "/usr/sbin/poweroff", "/bin/busybox"] {
        let mut command = Command::new(program);
        if program.ends_with("busybox") {
            command.arg("poweroff");
        }
        if command.status().is_ok_and(|status| status.success()) {
            return 0;
        }
    }
    complain!("the image's init has no poweroff: cutting the power");
    sync();
    cut()
}

/// Powers off at once. The kernel of a machine without ACPI cannot: there a
/// reboot ends the VMM, which runs with `-no-reboot`.
fn cut() -> ! {
    let how = if Path::new("/sys/firmware/acpi").exists() {
        RebootMode::RB_POWER_OFF
    } else {
        RebootMode::RB_AUTOBOOT
    };
    let Err(error) = reboot(how);
    complain!("cannot power off: {error}");
    std::process::exit(1)
}

/// Reaps until no child is left (`true`) or the time is over.
fn reap_all(limit: Duration) -> bool {
    let end = Instant::now() + limit;
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Err(Errno::ECHILD) => return true,
            Ok(WaitStatus::StillAlive) if Instant::now() > end => return false,
            Ok(WaitStatus::StillAlive) => std::thread::sleep(Duration::from_millis(1)),
            _ => {}
        }
    }
}
