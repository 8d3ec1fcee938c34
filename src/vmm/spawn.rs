//! Starts a VMM process: the owner's side of it.
#![allow(unsafe_code)] // fork, and what may be called between fork and exec

use std::ffi::{CString, NulError};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use nix::libc;

use super::jail::Jail;
use super::kernel::{Child, MAX_DESCRIPTORS, above};
use super::process::VmmProcess;
use super::sequence::{SpawnStep, confine};
use crate::error::Explain;
use crate::host::cgroup::{CgroupError, Entrance};
use crate::host::fault;
use crate::host::lease::LeaseError;

/// What is started, and what it is given.
#[derive(Debug)]
pub struct Spawn {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Descriptors it gets, from [`FIRST_FD`](crate::plan::FIRST_FD) on.
    pub descriptors: Vec<OwnedFd>,
    /// Where its stderr and stdout go.
    pub log: OwnedFd,
    /// End it when the thread that starts it ends. Only right where that
    /// thread lives as long as the machine.
    pub die_with_thread: bool,
    /// How it is confined.
    pub jail: Jail,
    /// The file with its memory, where its jail says there is one.
    pub ram: Option<File>,
    /// Its control group, if it has one.
    pub group: Option<Entrance>,
    /// Start it also where it cannot enter that.
    pub group_optional: bool,
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
    #[error("cannot start {program} (step {step:?}{})", on(.entry))]
    Step {
        /// The program.
        program: PathBuf,
        /// The step.
        step: SpawnStep,
        /// The entry of the root it failed on.
        entry: Option<String>,
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

fn on(entry: &Option<String>) -> String {
    entry
        .as_ref()
        .map_or_else(String::new, |entry| format!(" on {entry}"))
}

impl Explain for SpawnError {
    fn code(&self) -> &'static str {
        match self {
            Self::Lease { source, .. } => source.code(),
            Self::Step {
                step: SpawnStep::Exec,
                ..
            } => "qemu-not-executable",
            Self::Step {
                step: SpawnStep::Group,
                ..
            } => "cgroup-refused",
            Self::Step { step, .. } if step.is_jail() => "jail-failed",
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
            Self::Step {
                step: SpawnStep::Group,
                ..
            } => CgroupError::remedy(),
            Self::Step { step, .. } if step.is_jail() => {
                "The jail cannot be made on this host (`bulkhead doctor`); it needs Linux 5.12. \
                 A layer can be left out with --waive LAYER."
                    .into()
            }
            _ => "Check the limits on processes and open files (ulimit -a).".into(),
        }
    }
}

impl Spawn {
    /// Starts the process. `journal` is called with its id before it does
    /// anything: what it writes down is kept before anything can leak.
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
        let of_owner = || {
            ["QEMU_MODULE_DIR", "LD_LIBRARY_PATH", "PATH"]
                .iter()
                .filter_map(|name| {
                    let value = std::env::var_os(name)?;
                    CString::new([name.as_bytes(), b"=", value.as_bytes()].concat()).ok()
                })
                .collect()
        };
        let mut env: Vec<CString> = self.jail.environment.clone().unwrap_or_else(of_owner);
        if self.jail.small {
            // mallopt(3)
            env.push(c"MALLOC_ARENA_MAX=1".to_owned());
        }
        let mut env_pointers: Vec<*const libc::c_char> =
            env.iter().map(|word| word.as_ptr()).collect();
        env_pointers.push(std::ptr::null());
        fault::at("fork").map_err(fork_error)?;
        let mut null = std::fs::File::options();
        let null = null.read(true).write(true);
        let null = null.open("/dev/null").map_err(fork_error)?;
        let (go_read, go_write) = pipe().map_err(fork_error)?;
        let (fail_read, fail_write) = pipe().map_err(fork_error)?;
        let (ram_ours, ram_theirs) = UnixStream::pair().map_err(fork_error)?;
        let program = match &self.jail.root {
            Some(_) => c"/qemu".as_ptr(),
            None => pointers[0],
        };
        let raw: Vec<RawFd> = self.descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        if raw.len() > MAX_DESCRIPTORS {
            return Err(fork_error(io::ErrorKind::ArgumentListTooLong.into()));
        }
        let group = self.group.as_ref().map(Entrance::files);
        let group = group.unwrap_or_default();
        let mut child = Child {
            program,
            argv: &pointers,
            env: &env_pointers,
            descriptors: &raw,
            log: self.log.as_raw_fd(),
            null: null.as_raw_fd(),
            go: go_read.as_raw_fd(),
            group: &group,
            group_optional: self.group_optional,
            ram: ram_theirs.as_raw_fd(),
        };
        let owner_ends = [go_write.as_raw_fd(), fail_read.as_raw_fd()];
        let flags = self.jail.clone_flags();
        let born_in = self.group.as_ref().and_then(Entrance::birthplace);
        // SAFETY: the child calls nothing but async-signal-safe functions on
        // memory prepared above, and ends in execve or _exit.
        let born = born_in.map(|group| unsafe { fork_into(flags, group) });
        // An older kernel, or one that refuses it, may do without.
        let pid = match born {
            Some(pid) if pid >= 0 => {
                child.group = &[];
                pid
            }
            // SAFETY: as above.
            _ => unsafe { fork(flags) },
        };
        let pid = match pid {
            -1 => return Err(fork_error(io::Error::last_os_error())),
            // SAFETY: as above.
            0 => unsafe {
                let fail = fail_write.as_raw_fd();
                run_child(
                    &mut child,
                    &self.jail,
                    self.die_with_thread,
                    fail,
                    owner_ends,
                )
            },
            pid => pid,
        };
        drop((go_read, fail_write, ram_theirs));
        let process = VmmProcess::adopt_child(pid).map_err(fork_error)?;
        fault::at("forked").map_err(fork_error)?;
        journal(&process).map_err(|source| SpawnError::Lease {
            program: self.program.clone(),
            source,
        })?;
        let step_error = |step, entry, source| SpawnError::Step {
            program: self.program.clone(),
            step,
            entry,
            source,
        };
        let refused = |source| step_error(SpawnStep::Permission, None, source);
        if self.jail.user_namespace {
            map_user(pid).map_err(refused)?;
        }
        fault::at("permit exec").map_err(refused)?;
        // Kept open until it executes: its closing tells of our end.
        let mut go = std::fs::File::from(go_write);
        io::Write::write_all(&mut go, b"g").map_err(refused)?;
        // The pipe closes on a successful exec; a failed step sends itself.
        let mut report = Vec::new();
        std::fs::File::from(fail_read)
            .read_to_end(&mut report)
            .map_err(|source| step_error(SpawnStep::Exec, None, source))?;
        drop(go);
        match <[u8; REPORT]>::try_from(report) {
            Ok([step, a, b, c, d, rest @ ..]) => {
                let step = SpawnStep::from_byte(step);
                let entry = (step == SpawnStep::Entry)
                    .then(|| self.jail.entry_name(u32::from_le_bytes(rest)))
                    .flatten();
                let errno = i32::from_le_bytes([a, b, c, d]);
                Err(step_error(step, entry, io::Error::from_raw_os_error(errno)))
            }
            Err(_) => {
                if let Some(ram) = self.ram {
                    fault::at("give memory")
                        .and_then(|()| super::ram::listener(&ram_ours))
                        .and_then(|listener| super::ram::serve(listener, ram))
                        .map_err(|source| step_error(SpawnStep::Ram, None, source))?;
                }
                Ok(process)
            }
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

/// Bytes a failed step sends: the step, errno, the entry of the root.
const REPORT: usize = 9;

/// fork(2) into namespaces of its own.
///
/// # Safety
/// As `fork`: the child may call async-signal-safe functions only.
unsafe fn fork(namespaces: libc::c_int) -> i32 {
    let flags = (namespaces | libc::SIGCHLD) as libc::c_ulong;
    let none = 0usize;
    // SAFETY: without a stack of its own the child goes on with a copy of ours.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, none, none, none, none) };
    pid as i32
}

/// CLONE_INTO_CGROUP of linux/sched.h; libc's is too narrow for it.
const INTO_CGROUP: u64 = 1 << 33;

/// As [`fork`], into a control group of v2: no thread of it is ever outside, and
/// the kernel need not wait for all its processors, as it does to move one.
///
/// # Safety
/// As `fork`.
unsafe fn fork_into(namespaces: libc::c_int, group: RawFd) -> i32 {
    // SAFETY: zero is a value of all of its parts.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = namespaces as u64 | INTO_CGROUP;
    args.exit_signal = libc::SIGCHLD as u64;
    args.cgroup = group as u64;
    // SAFETY: a structure of the given size; without a stack as in `fork`.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw const args,
            size_of::<libc::clone_args>(),
        )
    };
    pid as i32
}

/// The child: the sequence, or a report of what failed.
///
/// # Safety
/// Only in a child just forked; nothing here allocates or locks.
unsafe fn run_child(
    child: &mut Child<'_>,
    jail: &Jail,
    end_with_owner: bool,
    fail: RawFd,
    owner_ends: [RawFd; 2],
) -> ! {
    // SAFETY: plain system calls on integers and on memory that outlives them.
    unsafe {
        // Out of the way of the descriptors that are put in place.
        let fail = libc::fcntl(fail, libc::F_DUPFD_CLOEXEC, above(child.descriptors.len()));
        // The child must not hold them, or it would not see the owner die.
        for end in owner_ends {
            libc::close(end);
        }
        if let Err(failed) = confine(child, jail, end_with_owner) {
            let mut report = [failed.step as u8; REPORT];
            let (errno, entry) = (failed.errno.to_le_bytes(), failed.entry.to_le_bytes());
            for (slot, byte) in report[1..].iter_mut().zip(errno.iter().chain(&entry)) {
                *slot = *byte;
            }
            libc::write(fail, report.as_ptr().cast(), report.len());
        }
        libc::_exit(1)
    }
}

/// Gives a child in a user namespace our own user and group, and no other.
fn map_user(pid: i32) -> io::Result<()> {
    let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
    let write = |name: &str, text: String| std::fs::write(format!("/proc/{pid}/{name}"), text);
    // user_namespaces(7): without this an ordinary user may not map a group.
    write("setgroups", "deny".into())?;
    write("uid_map", format!("{uid} {uid} 1"))?;
    write("gid_map", format!("{gid} {gid} 1"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::cgroup::Cgroup;
    use std::os::unix::process::ExitStatusExt;

    fn spawn(program: &str, args: &[&str], descriptors: Vec<OwnedFd>) -> (Spawn, std::fs::File) {
        let log = tempfile::tempfile().unwrap();
        let spawn = Spawn {
            program: program.into(),
            args: args.iter().map(|word| (*word).to_owned()).collect(),
            descriptors,
            log: log.try_clone().unwrap().into(),
            die_with_thread: false,
            jail: Jail::default(),
            ram: None,
            group: None,
            group_optional: false,
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

    #[tokio::test]
    async fn nothing_runs_outside_of_its_group() {
        let dir = tempfile::tempdir().unwrap();
        let canary = dir.path().join("ran");
        // No control group: the file takes no write, and nobody is born there.
        let group = || {
            let root = || std::fs::File::open("/").unwrap().into();
            Some(Entrance {
                birthplace: Some(root()),
                files: vec![root()],
            })
        };
        let argument = canary.to_str().unwrap();
        let (mut refused, _log) = spawn("/bin/touch", &[argument], Vec::new());
        refused.group = group();
        let error = refused.run(|_| Ok(())).unwrap_err();
        let SpawnError::Step { step, .. } = &error else {
            panic!("{error:?}")
        };
        assert_eq!((*step, error.code()), (SpawnStep::Group, "cgroup-refused"));
        assert!(!canary.exists());
        let (mut optional, _log) = spawn("/bin/touch", &[argument], Vec::new());
        optional.group = group();
        optional.group_optional = true;
        let process = optional.run(|_| Ok(())).unwrap();
        assert_eq!(process.wait().await.unwrap().code, Some(0));
        assert!(canary.exists());
    }

    /// The groups that a program sees itself in.
    async fn seen_from(entrance: Entrance) -> String {
        let (mut spawn, log) = spawn("/bin/cat", &["/proc/self/cgroup"], Vec::new());
        spawn.group = Some(entrance);
        let process = spawn.run(|_| Ok(())).unwrap();
        assert_eq!(process.wait().await.unwrap().code, Some(0));
        text(log)
    }

    #[tokio::test]
    async fn it_executes_in_its_group_however_it_gets_there() {
        let group = match Cgroup::choose(&"spawn-test".parse().unwrap()) {
            Ok(group) => group,
            Err(error) => {
                println!("skipped: control_group: {error}");
                return;
            }
        };
        group.make().unwrap();
        let Entrance { birthplace, files } = group.entrance().unwrap();
        let moved = Entrance {
            birthplace: None,
            files,
        };
        let mut seen = vec![seen_from(moved).await];
        if birthplace.is_some() {
            let born = Entrance {
                birthplace,
                files: Vec::new(),
            };
            seen.push(seen_from(born).await);
        }
        for lease in group.leases() {
            lease.release().unwrap();
        }
        for seen in seen {
            let name = group.dirs()[0].file_name().unwrap().to_str().unwrap();
            let places = seen.lines().filter(|line| line.contains(name));
            assert_eq!(places.count(), group.dirs().len(), "{seen}");
        }
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
