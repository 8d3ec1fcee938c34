//! Starts a VMM process: the privileged sequence, top to bottom.
#![allow(unsafe_code)] // fork, and what may be called between fork and exec

use std::ffi::{CString, NulError};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use nix::libc;

use super::process::VmmProcess;
use crate::error::Explain;
use crate::host::fault;
use crate::host::lease::LeaseError;
use crate::plan::FIRST_FD;

/// What is started, and what it is given.
#[derive(Debug)]
pub struct Spawn {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Descriptors it gets, from [`FIRST_FD`] on.
    pub descriptors: Vec<OwnedFd>,
    /// Where its stderr and stdout go.
    pub log: OwnedFd,
    /// End it when the thread that starts it ends. Only right where that
    /// thread lives as long as the machine.
    pub die_with_thread: bool,
}

/// A step of the sequence, for naming the one that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum SpawnStep {
    /// The owner did not allow it to go on, or is gone.
    Permission = 1,
    /// Leaving the owner's session.
    Session = 2,
    /// Tying its life to the owner's.
    Death = 3,
    /// Putting the descriptors in place.
    Descriptors = 4,
    /// Executing the program.
    Exec = 5,
}

impl SpawnStep {
    fn from_byte(byte: u8) -> Self {
        match byte {
            1 => Self::Permission,
            2 => Self::Session,
            3 => Self::Death,
            4 => Self::Descriptors,
            _ => Self::Exec,
        }
    }
}

/// The process could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// No process or descriptor was to be had.
    #[error("cannot make a process for {program}")]
    Fork {
        /// The program.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// An argument has a zero byte.
    #[error("an argument of {program} contains a zero byte")]
    Argument {
        /// The program.
        program: PathBuf,
        /// Where.
        #[source]
        source: NulError,
    },
    /// A step of the sequence failed.
    #[error("cannot start {program} (step {step:?})")]
    Step {
        /// The program.
        program: PathBuf,
        /// The step.
        step: SpawnStep,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The lease for the process could not be written down; it was ended.
    #[error("cannot journal the process of {program}")]
    Lease {
        /// The program.
        program: PathBuf,
        /// Why.
        #[source]
        source: LeaseError,
    },
}

impl Explain for SpawnError {
    fn code(&self) -> &'static str {
        match self {
            Self::Lease { source, .. } => source.code(),
            Self::Step {
                step: SpawnStep::Exec,
                ..
            } => "qemu-not-executable",
            _ => "spawn-failed",
        }
    }

    fn remedy(&self) -> String {
        match self {
            Self::Lease { source, .. } => source.remedy(),
            Self::Step {
                step: SpawnStep::Exec,
                program,
                ..
            } => {
                format!("Check that {} is a QEMU for this host.", program.display())
            }
            _ => "Check the limits on processes and open files (ulimit -a).".into(),
        }
    }
}

impl Spawn {
    /// Starts the process. `journal` is called with its id before the program
    /// is executed: what it writes down is on disk before anything can leak.
    ///
    /// # Errors
    /// See [`SpawnError`]; no process is left.
    pub fn run(
        self,
        journal: impl FnOnce(&VmmProcess) -> Result<(), LeaseError>,
    ) -> Result<VmmProcess, SpawnError> {
        let fork_error = |source: io::Error| SpawnError::Fork {
            program: self.program.clone(),
            source,
        };
        let argv = self.argv().map_err(|source| SpawnError::Argument {
            program: self.program.clone(),
            source,
        })?;
        let mut pointers: Vec<*const libc::c_char> =
            argv.iter().map(|word| word.as_ptr()).collect();
        pointers.push(std::ptr::null());
        // QEMU needs no environment but this: it may be told where its modules
        // are, and TMPDIR decides where it puts what we did not name.
        let env: Vec<CString> = ["QEMU_MODULE_DIR", "LD_LIBRARY_PATH", "PATH"]
            .iter()
            .filter_map(|name| {
                let value = std::env::var_os(name)?;
                CString::new([name.as_bytes(), b"=", value.as_bytes()].concat()).ok()
            })
            .collect();
        let mut env_pointers: Vec<*const libc::c_char> =
            env.iter().map(|word| word.as_ptr()).collect();
        env_pointers.push(std::ptr::null());
        fault::at("fork").map_err(fork_error)?;
        let (go_read, go_write) = pipe().map_err(fork_error)?;
        let (fail_read, fail_write) = pipe().map_err(fork_error)?;
        let child = Child {
            argv: &pointers,
            env: &env_pointers,
            descriptors: &self
                .descriptors
                .iter()
                .map(AsRawFd::as_raw_fd)
                .collect::<Vec<_>>(),
            log: self.log.as_raw_fd(),
            go: go_read.as_raw_fd(),
            fail: fail_write.as_raw_fd(),
            owner_ends: [go_write.as_raw_fd(), fail_read.as_raw_fd()],
            die_with_thread: self.die_with_thread.then(|| nix::unistd::getpid().as_raw()),
        };
        // SAFETY: the child calls nothing but async-signal-safe functions on
        // memory prepared above, and ends in execve or _exit.
        let pid = match unsafe { libc::fork() } {
            -1 => return Err(fork_error(io::Error::last_os_error())),
            // SAFETY: as above.
            0 => unsafe { child.run() },
            pid => pid,
        };
        drop((go_read, fail_write));
        let process = VmmProcess::adopt_child(pid).map_err(fork_error)?;
        fault::at("forked").map_err(fork_error)?;
        journal(&process).map_err(|source| SpawnError::Lease {
            program: self.program.clone(),
            source,
        })?;
        let step_error = |step, source| SpawnError::Step {
            program: self.program.clone(),
            step,
            source,
        };
        fault::at("permit exec").map_err(|source| step_error(SpawnStep::Permission, source))?;
        io::Write::write_all(&mut std::fs::File::from(go_write), b"g")
            .map_err(|source| step_error(SpawnStep::Permission, source))?;
        // The pipe closes on a successful exec; a failed step sends itself.
        let mut report = Vec::new();
        std::fs::File::from(fail_read)
            .read_to_end(&mut report)
            .map_err(|source| step_error(SpawnStep::Exec, source))?;
        match report[..] {
            [step, a, b, c, d] => Err(step_error(
                SpawnStep::from_byte(step),
                io::Error::from_raw_os_error(i32::from_le_bytes([a, b, c, d])),
            )),
            _ => Ok(process),
        }
    }

    fn argv(&self) -> Result<Vec<CString>, NulError> {
        let program = CString::new(self.program.as_os_str().as_bytes());
        let args = self.args.iter().map(|word| CString::new(word.as_bytes()));
        std::iter::once(program).chain(args).collect()
    }
}

/// A pipe whose ends do not survive an exec.
fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?)
}

/// All the child needs, made before the fork.
struct Child<'a> {
    argv: &'a [*const libc::c_char],
    env: &'a [*const libc::c_char],
    descriptors: &'a [RawFd],
    log: RawFd,
    go: RawFd,
    fail: RawFd,
    /// The owner's ends of the two pipes: the child must not hold them, or it
    /// would not see the owner die.
    owner_ends: [RawFd; 2],
    die_with_thread: Option<i32>,
}

impl Child<'_> {
    /// The sequence.
    ///
    /// # Safety
    /// Only in a child just forked; nothing here allocates or locks.
    unsafe fn run(&self) -> ! {
        use SpawnStep as Step;
        // SAFETY: plain system calls on integers and on memory that `self`
        // keeps alive; all are async-signal-safe (signal-safety(7)).
        unsafe {
            // Failures are told over a descriptor that step 5 does not overwrite.
            let count = self.descriptors.len() as RawFd;
            let above = FIRST_FD + count + 8;
            let fail = libc::fcntl(self.fail, libc::F_DUPFD_CLOEXEC, above);
            if fail < 0 {
                Self::fail(self.fail, Step::Descriptors);
            }
            for end in self.owner_ends {
                libc::close(end);
            }
            // 1. Wait until the owner has written us down.
            let mut byte = 0u8;
            if libc::read(self.go, (&raw mut byte).cast(), 1) != 1 {
                libc::_exit(1);
            }
            // 2. Out of the terminal's reach: Ctrl-C is for the command.
            Self::check(fail, Step::Session, libc::setsid());
            // 3. End with the owner. It may have died before this took effect.
            if let Some(owner) = self.die_with_thread {
                Self::check(
                    fail,
                    Step::Death,
                    libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL),
                );
                if libc::getppid() != owner {
                    libc::_exit(1);
                }
            }
            // 4. Signals as a program expects them: std ignores SIGPIPE.
            for signal in 1..32 {
                if signal != libc::SIGKILL && signal != libc::SIGSTOP {
                    libc::signal(signal, libc::SIG_DFL);
                }
            }
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
            // 5. Descriptors: first all out of the way, then each in its place.
            let log = libc::fcntl(self.log, libc::F_DUPFD_CLOEXEC, above);
            Self::check(fail, Step::Descriptors, log);
            let mut moved = [0 as RawFd; 32];
            for (at, fd) in self.descriptors.iter().enumerate() {
                let Some(slot) = moved.get_mut(at) else {
                    libc::_exit(1)
                };
                *slot = libc::fcntl(*fd, libc::F_DUPFD_CLOEXEC, above);
                Self::check(fail, Step::Descriptors, *slot);
            }
            let null = libc::open(c"/dev/null".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC);
            Self::check(fail, Step::Descriptors, null);
            Self::check(fail, Step::Descriptors, libc::dup2(null, 0));
            Self::check(fail, Step::Descriptors, libc::dup2(log, 1));
            Self::check(fail, Step::Descriptors, libc::dup2(log, 2));
            for at in 0..count {
                Self::check(
                    fail,
                    Step::Descriptors,
                    libc::dup2(moved[at as usize], FIRST_FD + at),
                );
            }
            // Everything above ends at exec, whoever opened it. Kernels before
            // 5.11 refuse; ours are all marked already.
            let first = (FIRST_FD + count) as libc::c_uint;
            libc::syscall(
                libc::SYS_close_range,
                first,
                libc::c_uint::MAX,
                4, /* CLOEXEC */
            );
            // 6. Files it makes are nobody else's.
            libc::umask(0o077);
            libc::execve(self.argv[0], self.argv.as_ptr(), self.env.as_ptr());
            Self::fail(fail, Step::Exec)
        }
    }

    /// Ends the child with a report if a call failed.
    unsafe fn check(pipe: RawFd, step: SpawnStep, result: libc::c_int) {
        if result < 0 {
            // SAFETY: as `run`.
            unsafe { Self::fail(pipe, step) }
        }
    }

    unsafe fn fail(pipe: RawFd, step: SpawnStep) -> ! {
        // SAFETY: as `run`; errno is this thread's own.
        unsafe {
            let [a, b, c, d] = (*libc::__errno_location()).to_le_bytes();
            let report = [step as u8, a, b, c, d];
            libc::write(pipe, report.as_ptr().cast(), report.len());
            libc::_exit(1)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    fn spawn(program: &str, args: &[&str], descriptors: Vec<OwnedFd>) -> (Spawn, std::fs::File) {
        let log = tempfile::tempfile().unwrap();
        let spawn = Spawn {
            program: program.into(),
            args: args.iter().map(|word| (*word).to_owned()).collect(),
            descriptors,
            log: log.try_clone().unwrap().into(),
            die_with_thread: false,
        };
        (spawn, log)
    }

    fn text(mut file: std::fs::File) -> String {
        use std::io::Seek;
        file.rewind().unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        text
    }

    #[tokio::test]
    async fn it_gets_its_descriptors_and_no_others() {
        let (_r, w) = nix::unistd::pipe().unwrap(); // without CLOEXEC: must not leak
        let descriptors = vec![w.try_clone().unwrap(), w.try_clone().unwrap()];
        // A shell opens descriptors of its own; ls shows its own directory as one more.
        let (spawn, log) = spawn("/bin/ls", &["/proc/self/fd"], descriptors);
        let process = spawn.run(|_| Ok(())).unwrap();
        assert_eq!(process.wait().await.unwrap().code, Some(0));
        assert_eq!(
            text(log).split_whitespace().collect::<Vec<_>>(),
            ["0", "1", "2", "3", "4", "5"]
        );
    }

    #[tokio::test]
    async fn a_missing_program_is_named_with_its_step() {
        let (spawn, _log) = spawn("/nowhere/qemu", &[], Vec::new());
        let error = spawn.run(|_| Ok(())).unwrap_err();
        let SpawnError::Step { step, source, .. } = &error else {
            panic!("{error:?}")
        };
        assert_eq!(*step, SpawnStep::Exec);
        assert_eq!(source.kind(), io::ErrorKind::NotFound);
    }

    #[tokio::test]
    async fn nothing_runs_that_was_not_written_down() {
        let dir = tempfile::tempdir().unwrap();
        let canary = dir.path().join("ran");
        let (spawn, _log) = spawn("/bin/touch", &[canary.to_str().unwrap()], Vec::new());
        let mut pid = 0;
        let refused = spawn.run(|process| {
            pid = process.pid();
            Err(LeaseError::Journal {
                path: "leases".into(),
                source: io::ErrorKind::StorageFull.into(),
            })
        });
        assert!(matches!(refused, Err(SpawnError::Lease { .. })));
        assert!(!canary.exists());
        assert_eq!(
            crate::host::process::start_time(pid),
            None,
            "no process is left"
        );
    }

    #[test]
    fn it_ends_with_the_thread_that_made_it() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let process = std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    let _guard = runtime.enter();
                    let (mut spawn, _log) = spawn("/bin/sleep", &["60"], Vec::new());
                    spawn.die_with_thread = true;
                    spawn.run(|_| Ok(())).unwrap()
                })
                .join()
                .unwrap()
        });
        let status = runtime.block_on(process.wait()).unwrap();
        assert_eq!(status.signal, Some(libc::SIGKILL));
        assert_eq!(
            std::process::ExitStatus::from_raw(9).signal(),
            status.signal
        );
    }
}
