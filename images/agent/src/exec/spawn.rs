//! Making a process: everything is prepared, then forked, then executed.
#![allow(unsafe_code)] // clone3(2) and what a child may do before it executes

use std::ffi::{CString, c_char};
use std::fs::File;
use std::io::{self, Read};
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::libc::{self, c_int, rlim_t};
use nix::unistd::pipe2;

use super::user::User;

/// From linux/sched.h; the constant of libc is too narrow for it.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// A process to be made.
pub(crate) struct Plan<'a> {
    /// Paths to try, in this order.
    pub(crate) programs: Vec<CString>,
    pub(crate) argv: Vec<CString>,
    /// `NAME=value`.
    pub(crate) env: Vec<CString>,
    pub(crate) cwd: CString,
    pub(crate) user: &'a User,
    /// Standard input, output and error.
    pub(crate) stdio: [BorrowedFd<'a>; 3],
    /// Standard input becomes the controlling terminal.
    pub(crate) terminal: bool,
    /// The group to be born into.
    pub(crate) cgroup: Option<&'a File>,
    /// Soft and hard limit of open files.
    pub(crate) files: (rlim_t, rlim_t),
}

/// A process that was made, though it may yet fail to execute its program.
#[derive(Debug)]
pub(crate) struct Child {
    pub(crate) pid: libc::pid_t,
    pub(crate) pidfd: OwnedFd,
    /// Empty at its end, or a [`Stumble`].
    pub(crate) report: OwnedFd,
}

/// Where a child failed on its way to its program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Step {
    Session = 1,
    Stdio = 2,
    Terminal = 3,
    User = 4,
    Cwd = 5,
    Program = 6,
}

/// A failed step and its error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stumble {
    pub(crate) step: Step,
    pub(crate) error: Errno,
}

impl Stumble {
    /// Reads a child's report; `None` when its program runs.
    pub(crate) fn read(mut report: impl Read) -> io::Result<Option<Self>> {
        let mut bytes = [0; 5];
        if report.read(&mut bytes)? < bytes.len() {
            return Ok(None);
        }
        let step = match bytes[0] {
            1 => Step::Session,
            2 => Step::Stdio,
            3 => Step::Terminal,
            4 => Step::User,
            5 => Step::Cwd,
            _ => Step::Program,
        };
        let error = i32::from_le_bytes([bytes[1], bytes[2], bytes[3], bytes[4]]);
        Ok(Some(Self {
            step,
            error: Errno::from_raw(error),
        }))
    }
}

/// Null-terminated pointers to strings that stay where they are.
fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    let mut pointers: Vec<_> = strings.iter().map(|s| s.as_ptr()).collect();
    pointers.push(ptr::null());
    pointers
}

/// Makes the process.
///
/// # Errors
/// No process could be made.
pub(crate) fn spawn(plan: &Plan<'_>) -> nix::Result<Child> {
    let (report, failed) = pipe2(OFlag::O_CLOEXEC)?;
    let argv = pointers(&plan.argv);
    let env = pointers(&plan.env);
    let mut pidfd: c_int = -1;
    // SAFETY: all zeroes is a valid clone_args.
    let mut args: libc::clone_args = unsafe { zeroed() };
    args.flags = libc::CLONE_PIDFD as u64;
    args.pidfd = ptr::from_mut(&mut pidfd) as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    if let Some(cgroup) = plan.cgroup {
        // Far cheaper than moving the process there later.
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: without CLONE_VM this is fork(2): the child has its own copy of
    // this stack. Other threads do not exist in it, so until it executes its
    // program it calls async-signal-safe functions only and never returns.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &mut args, size_of::<libc::clone_args>()) };
    if pid == 0 {
        // SAFETY: this is the child, and the pointers are its own copies.
        unsafe { become_program(plan, &argv, &env, failed.as_raw_fd()) }
    }
    let pid = Errno::result(pid)? as libc::pid_t;
    // SAFETY: the kernel stored a new descriptor there.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Child { pid, pidfd, report })
}

/// Runs in the child.
///
/// # Safety
/// Only in a child that just came out of fork; `argv` and `env` are
/// null-terminated arrays of C strings.
unsafe fn become_program(
    plan: &Plan<'_>,
    argv: &[*const c_char],
    env: &[*const c_char],
    failed: RawFd,
) -> ! {
    // SAFETY: passed on from the caller.
    let (step, error) = unsafe { try_become(plan, argv, env) };
    let mut report = [0; 5];
    report[0] = step as u8;
    report[1..].copy_from_slice(&(error as i32).to_le_bytes());
    // SAFETY: async-signal-safe, on memory of this frame.
    unsafe {
        libc::write(failed, report.as_ptr().cast(), report.len());
        libc::_exit(127)
    }
}

/// The steps to the program; returns only when one failed.
///
/// # Safety
/// As for [`become_program`].
unsafe fn try_become(
    plan: &Plan<'_>,
    argv: &[*const c_char],
    env: &[*const c_char],
) -> (Step, Errno) {
    macro_rules! step {
        ($step:ident, $call:expr) => {
            if $call < 0 {
                return (Step::$step, Errno::last());
            }
        };
    }
    // SAFETY: all of these are async-signal-safe system calls on values that
    // were prepared before the fork.
    unsafe {
        let mut none: libc::sigset_t = zeroed();
        libc::sigemptyset(&mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &none, ptr::null_mut());
        for signal in 1..32 {
            libc::signal(signal, libc::SIG_DFL);
        }
        step!(Session, libc::setsid());
        for (target, source) in plan.stdio.iter().enumerate() {
            step!(Stdio, libc::dup2(source.as_raw_fd(), target as c_int));
        }
        if plan.terminal {
            step!(Terminal, libc::ioctl(0, libc::TIOCSCTTY, 0));
        }
        reset_oom_score();
        let files = libc::rlimit {
            rlim_cur: plan.files.0,
            rlim_max: plan.files.1,
        };
        // Fewer files than wished for is no reason not to run.
        libc::setrlimit(libc::RLIMIT_NOFILE, &files);
        libc::umask(0o022);
        let user = plan.user;
        if libc::geteuid() == 0 || libc::geteuid() != user.uid {
            step!(
                User,
                libc::setgroups(user.groups.len(), user.groups.as_ptr())
            );
            step!(User, libc::setresgid(user.gid, user.gid, user.gid));
            step!(User, libc::setresuid(user.uid, user.uid, user.uid));
        }
        step!(Cwd, libc::chdir(plan.cwd.as_ptr()));
        // Ours are close-on-exec; this is for those somebody else left open.
        libc::syscall(
            libc::SYS_close_range,
            3_u32,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        );
        let mut error = Errno::ENOENT;
        for program in &plan.programs {
            libc::execve(program.as_ptr(), argv.as_ptr(), env.as_ptr());
            match Errno::last() {
                Errno::ENOENT | Errno::ENOTDIR => {}
                // As shells do: keep looking, but say this if nothing is found.
                Errno::EACCES => error = Errno::EACCES,
                other => return (Step::Program, other),
            }
        }
        (Step::Program, error)
    }
}

/// The agent is exempt from the OOM killer; what it starts is not.
///
/// # Safety
/// Async-signal-safe.
unsafe fn reset_oom_score() {
    // SAFETY: constants only.
    unsafe {
        let fd = libc::open(
            c"/proc/self/oom_score_adj".as_ptr(),
            libc::O_WRONLY | libc::O_CLOEXEC,
        );
        if fd >= 0 {
            libc::write(fd, b"0".as_ptr().cast(), 1);
            libc::close(fd);
        }
    }
}

/// How a process ended and what it used.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ended {
    pub(crate) status: c_int,
    pub(crate) cpu_us: u64,
    pub(crate) max_rss_kib: u64,
}

/// Reaps a child that has ended.
pub(crate) fn reap(pid: libc::pid_t) -> nix::Result<Ended> {
    let mut status = 0;
    // SAFETY: all zeroes is a valid rusage.
    let mut usage: libc::rusage = unsafe { zeroed() };
    // SAFETY: both results outlive the call.
    Errno::result(unsafe { libc::wait4(pid, &mut status, 0, &mut usage) })?;
    let us = |time: libc::timeval| time.tv_sec as u64 * 1_000_000 + time.tv_usec as u64;
    Ok(Ended {
        status,
        cpu_us: us(usage.ru_utime) + us(usage.ru_stime),
        max_rss_kib: usage.ru_maxrss as u64,
    })
}
