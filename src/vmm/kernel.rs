//! The steps of the privileged sequence as system calls.
//!
//! All of it runs between fork and exec: plain system calls on integers and on
//! memory made before the fork; nothing allocates, locks or panics.
#![allow(unsafe_code)] // system calls that no crate offers without allocating

use std::ffi::CStr;
use std::os::fd::RawFd;

use nix::libc;
use seccompiler::sock_filter;

use super::jail::{Label, Landlock};
use super::sequence::{Kernel, Op};
use crate::plan::FIRST_FD;

/// All the child needs, made before the fork.
pub(super) struct Child<'a> {
    pub(super) program: *const libc::c_char,
    pub(super) argv: &'a [*const libc::c_char],
    pub(super) env: &'a [*const libc::c_char],
    pub(super) descriptors: &'a [RawFd],
    pub(super) log: RawFd,
    /// /dev/null.
    pub(super) null: RawFd,
    /// Open for as long as the owner lives; a byte is its permission.
    pub(super) go: RawFd,
    /// Files of its control group that take who writes to them.
    pub(super) group: &'a [RawFd],
    /// Whether it may go on where they do not.
    pub(super) group_optional: bool,
    /// Where it tells who answers for its memory.
    pub(super) ram: RawFd,
}

/// How many descriptors a VMM can be given.
pub(super) const MAX_DESCRIPTORS: usize = 32;

/// `struct mount_attr` of linux/mount.h.
#[repr(C)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns: u64,
}

const READ_ONLY: u64 = 1;
const NO_SUID: u64 = 2;
const NO_DEV: u64 = 4;
const AT_RECURSIVE: libc::c_int = 0x8000;
const MOVE_MOUNT_EMPTY_PATH: libc::c_uint = 4;

/// Lowest descriptor that is out of the way of those handed on.
pub(super) fn above(count: usize) -> RawFd {
    FIRST_FD + count as RawFd + 8
}

fn errno() -> i32 {
    // SAFETY: errno is this thread's own.
    unsafe { *libc::__errno_location() }
}

fn done(result: impl Into<i64>) -> Result<(), i32> {
    if result.into() < 0 {
        Err(errno())
    } else {
        Ok(())
    }
}

fn mount(
    source: Option<&CStr>,
    target: &CStr,
    kind: Option<&CStr>,
    flags: libc::c_ulong,
    data: Option<&CStr>,
) -> Result<(), i32> {
    let pointer = |text: Option<&CStr>| text.map_or(std::ptr::null(), CStr::as_ptr);
    // SAFETY: every pointer is null or a text that ends in zero.
    done(unsafe {
        libc::mount(
            pointer(source),
            target.as_ptr(),
            pointer(kind),
            flags,
            pointer(data).cast(),
        )
    })
}

fn mount_setattr(path: &CStr, flags: libc::c_int, set: u64, clear: u64) -> Result<(), i32> {
    let attr = MountAttr {
        set,
        clear,
        propagation: 0,
        userns: 0,
    };
    // SAFETY: the kernel reads a text and a structure of the given size.
    done(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            path.as_ptr(),
            flags,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    })
}

fn prctl(option: libc::c_int, a: libc::c_ulong, b: libc::c_ulong) -> Result<(), i32> {
    // SAFETY: the options used here take integers only.
    done(unsafe { libc::prctl(option, a, b, 0, 0) })
}

impl Kernel for Child<'_> {
    fn call(&mut self, op: Op<'_>) -> Result<(), i32> {
        match op {
            Op::EndWithOwner => prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as _, 0),
            Op::SmallPages => {
                // It takes more memory without, and works.
                let _ = prctl(libc::PR_SET_THP_DISABLE, 1, 0);
                Ok(())
            }
            Op::AwaitPermission => self.await_permission(),
            Op::EnterGroup => self.enter_group(),
            // SAFETY: no arguments.
            Op::LeaveSession => done(unsafe { libc::setsid() }),
            Op::LeaveKeyring => leave_keyring(),
            Op::ResetSignals => reset_signals(),
            // SAFETY: an integer.
            Op::UnshareCgroup => done(unsafe { libc::unshare(libc::CLONE_NEWCGROUP) }),
            Op::SetHostName => {
                let name = b"jail";
                // SAFETY: the pointer is valid for the length given.
                done(unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) })
            }
            Op::SetLabel(label) => set_label(label),
            Op::PrivateMounts => mount(None, c"/", None, libc::MS_REC | libc::MS_PRIVATE, None),
            Op::MountRoot(dir) => {
                let flags = libc::MS_NOSUID | libc::MS_NOEXEC | libc::MS_NOATIME;
                let size = c"mode=755,size=256k,nr_inodes=512";
                mount(Some(c"jail"), dir, Some(c"tmpfs"), flags, Some(size))?;
                // SAFETY: a text that ends in zero.
                done(unsafe { libc::chdir(dir.as_ptr()) })
            }
            // SAFETY: a text that ends in zero, and an integer.
            Op::MakeDir(to) => done(unsafe { libc::mkdir(to.as_ptr(), 0o755) }),
            Op::BindFile { from, to } => {
                let flags = libc::O_CREAT | libc::O_EXCL | libc::O_CLOEXEC | libc::O_NOFOLLOW;
                // SAFETY: a text that ends in zero, and integers.
                let fd = unsafe { libc::open(to.as_ptr(), flags, 0o444) };
                done(fd)?;
                // SAFETY: a descriptor of ours.
                unsafe { libc::close(fd) };
                mount(Some(from), to, None, libc::MS_BIND, None)
            }
            Op::MountDevices(dir) => {
                let flags = libc::MS_NOSUID | libc::MS_NOEXEC | libc::MS_NOATIME;
                let size = c"mode=755,size=4k,nr_inodes=8";
                mount(Some(c"jail"), dir, Some(c"tmpfs"), flags, Some(size))
            }
            Op::MakeDevice { to, number, owner } => {
                // SAFETY: texts that end in zero, and integers.
                unsafe {
                    done(libc::mknod(to.as_ptr(), libc::S_IFCHR | 0o600, number))?;
                    done(libc::chown(to.as_ptr(), owner, owner))
                }
            }
            Op::MountProc(to) => {
                let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
                mount(Some(c"proc"), to, Some(c"proc"), flags, Some(c"subset=pid"))
            }
            Op::MakeReadOnly => mount_setattr(c".", AT_RECURSIVE, READ_ONLY | NO_SUID | NO_DEV, 0),
            Op::AllowDevices(to) => mount_setattr(to, 0, 0, NO_DEV),
            // SAFETY: descriptors, texts that end in zero, an integer.
            Op::PlaceTree { mount, to } => done(unsafe {
                libc::syscall(
                    libc::SYS_move_mount,
                    mount,
                    c"".as_ptr(),
                    libc::AT_FDCWD,
                    to.as_ptr(),
                    MOVE_MOUNT_EMPTY_PATH,
                )
            }),
            // The old root is stacked below the new one, and goes (pivot_root(2)).
            // SAFETY: texts that end in zero, and integers.
            Op::PivotRoot => unsafe {
                let dot = c".".as_ptr();
                done(libc::syscall(libc::SYS_pivot_root, dot, dot))?;
                done(libc::umount2(dot, libc::MNT_DETACH))?;
                done(libc::chdir(c"/".as_ptr()))
            },
            Op::PlaceDescriptors => self.place_descriptors(),
            Op::SetLimit { resource, value } => {
                let limit = libc::rlimit {
                    rlim_cur: value,
                    rlim_max: value,
                };
                // SAFETY: the kernel reads one structure.
                done(unsafe { libc::setrlimit(resource, &raw const limit) })
            }
            Op::DropBoundingSet => {
                for capability in 0..64 {
                    match prctl(libc::PR_CAPBSET_DROP, capability, 0) {
                        // The kernel knows no higher one.
                        Err(libc::EINVAL) => break,
                        other => other?,
                    }
                }
                Ok(())
            }
            // NOROOT, NO_CAP_AMBIENT_RAISE, and locks on all (capabilities(7)):
            // no program gets any by belonging to root.
            Op::LockSecureBits => prctl(libc::PR_SET_SECUREBITS, 0b1110_1011, 0),
            // The library would tell other threads, which are not there.
            // SAFETY: integers, and a list of none.
            Op::DropGroups => done(unsafe {
                libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>())
            }),
            // SAFETY: integers.
            Op::BecomeUser { uid, gid } => unsafe {
                done(libc::syscall(libc::SYS_setresgid, gid, gid, gid))?;
                done(libc::syscall(libc::SYS_setresuid, uid, uid, uid))
            },
            // SAFETY: integers.
            Op::EnterUserNamespace(fd) => done(unsafe { libc::setns(fd, libc::CLONE_NEWUSER) }),
            Op::DropCapabilities => drop_capabilities(),
            Op::CheckOwner => self.check_owner(),
            Op::SetUmask => {
                // SAFETY: an integer.
                unsafe { libc::umask(0o077) };
                Ok(())
            }
            Op::NoNewPrivs => prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0),
            // SAFETY: between fork and exec.
            Op::AskForRam => unsafe { super::ram::ask(self.ram) },
            Op::Landlock(landlock) => restrict(landlock),
            Op::Seccomp(filter) => install(filter),
            Op::Exec => {
                // SAFETY: lists of texts that end in zero, ended by null.
                unsafe { libc::execve(self.program, self.argv.as_ptr(), self.env.as_ptr()) };
                Err(errno())
            }
        }
    }
}

impl Child<'_> {
    fn await_permission(&self) -> Result<(), i32> {
        let mut byte = 0u8;
        // SAFETY: one byte is written to a valid place.
        match unsafe { libc::read(self.go, (&raw mut byte).cast(), 1) } {
            1 => Ok(()),
            // SAFETY: ends this process; nobody is there to be told.
            _ => unsafe { libc::_exit(1) },
        }
    }

    /// Who names itself need not wait for all the host's processors, as the kernel
    /// does where one process moves another.
    fn enter_group(&self) -> Result<(), i32> {
        for file in self.group {
            // SAFETY: one byte of a constant.
            let written = unsafe { libc::write(*file, b"0".as_ptr().cast(), 1) };
            if let Err(errno) = done(written as i64)
                && !self.group_optional
            {
                return Err(errno);
            }
        }
        Ok(())
    }

    /// The owner holds its end until we execute: is it there still?
    fn check_owner(&self) -> Result<(), i32> {
        let mut set = libc::pollfd {
            fd: self.go,
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one valid structure.
        done(unsafe { libc::poll(&raw mut set, 1, 0) })?;
        if set.revents != 0 {
            // SAFETY: ends this process.
            unsafe { libc::_exit(1) }
        }
        Ok(())
    }

    /// First all out of the way, then each in its place.
    fn place_descriptors(&mut self) -> Result<(), i32> {
        let count = self.descriptors.len();
        let mut moved = [-1 as RawFd; MAX_DESCRIPTORS + 3];
        let standard = [self.null, self.log, self.log];
        let all = standard.iter().chain(self.descriptors);
        for (slot, fd) in moved.iter_mut().zip(all) {
            // SAFETY: integers.
            *slot = unsafe { libc::fcntl(*fd, libc::F_DUPFD_CLOEXEC, above(count)) };
            done(*slot)?;
        }
        // SAFETY: integers.
        self.go = unsafe { libc::fcntl(self.go, libc::F_DUPFD_CLOEXEC, above(count)) };
        done(self.go)?;
        if self.ram >= 0 {
            // SAFETY: integers.
            self.ram = unsafe { libc::fcntl(self.ram, libc::F_DUPFD_CLOEXEC, above(count)) };
            done(self.ram)?;
        }
        for (to, fd) in (0..).zip(moved.iter().take(count + 3)) {
            // SAFETY: integers.
            done(unsafe { libc::dup2(*fd, to) })?;
        }
        // Everything above ends at exec, whoever opened it.
        let first = FIRST_FD as libc::c_uint + count as libc::c_uint;
        let cloexec = 4;
        // SAFETY: integers.
        done(unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, cloexec) })
    }
}

/// As a program expects them: std ignores SIGPIPE.
fn reset_signals() -> Result<(), i32> {
    // SAFETY: integers, and a set made right here.
    unsafe {
        for signal in 1..32 {
            if signal != libc::SIGKILL && signal != libc::SIGSTOP {
                libc::signal(signal, libc::SIG_DFL);
            }
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        done(libc::sigprocmask(
            libc::SIG_SETMASK,
            &raw const none,
            std::ptr::null_mut(),
        ))
    }
}

/// What the kernel is to label us by at the next exec.
fn set_label(label: &Label) -> Result<(), i32> {
    let [first, second] = label.files;
    let flags = libc::O_WRONLY | libc::O_CLOEXEC;
    // SAFETY: texts that end in zero, integers, and a buffer of its length.
    unsafe {
        let mut fd = libc::open(first.as_ptr(), flags);
        if fd < 0 && errno() == libc::ENOENT {
            fd = libc::open(second.as_ptr(), flags);
        }
        done(fd)?;
        let text = label.text.as_bytes();
        let wrote = libc::write(fd, text.as_ptr().cast(), text.len());
        done(wrote as i64)?;
        libc::close(fd);
    }
    Ok(())
}

/// A session keyring of its own, empty (keyctl(2)).
fn leave_keyring() -> Result<(), i32> {
    let join_session_keyring = 1;
    let no_name = std::ptr::null::<libc::c_char>();
    // SAFETY: an integer, and no text.
    match done(unsafe { libc::syscall(libc::SYS_keyctl, join_session_keyring, no_name) }) {
        // A kernel without keys, or a filter above us, which stays above QEMU.
        Err(libc::ENOSYS | libc::EPERM) => Ok(()),
        other => other,
    }
}

fn drop_capabilities() -> Result<(), i32> {
    // Kernels before 4.3 have no ambient set.
    let clear_all = 4;
    match prctl(libc::PR_CAP_AMBIENT, clear_all, 0) {
        Err(libc::EINVAL) => {}
        other => other?,
    }
    // capset(2): version 3 has two words for each of three sets.
    let header = [0x2008_0522_u32, 0];
    let none = [0u32; 6];
    // SAFETY: structures of the size this version has.
    done(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) })
}

fn restrict(landlock: &Landlock) -> Result<(), i32> {
    // SAFETY: the kernel reads structures of the sizes given.
    unsafe {
        let rules = libc::syscall(
            libc::SYS_landlock_create_ruleset,
            landlock.handled.as_ptr(),
            landlock.size,
            0,
        );
        done(rules)?;
        for (path, rights) in &landlock.rules {
            let fd = libc::open(path.as_ptr(), libc::O_PATH | libc::O_CLOEXEC);
            done(fd)?;
            // struct landlock_path_beneath_attr, which is packed.
            let mut attr = [0u8; 12];
            let (left, right) = attr.split_at_mut(8);
            left.copy_from_slice(&rights.to_ne_bytes());
            right.copy_from_slice(&fd.to_ne_bytes());
            let beneath = 1;
            done(libc::syscall(
                libc::SYS_landlock_add_rule,
                rules,
                beneath,
                attr.as_ptr(),
                0,
            ))?;
            libc::close(fd);
        }
        done(libc::syscall(libc::SYS_landlock_restrict_self, rules, 0))?;
        libc::close(rules as RawFd);
    }
    Ok(())
}

fn install(filter: &[sock_filter]) -> Result<(), i32> {
    let program = libc::sock_fprog {
        len: filter.len() as libc::c_ushort,
        filter: filter.as_ptr().cast_mut().cast(),
    };
    let set_mode_filter = 1;
    // SAFETY: the kernel reads as many instructions as there are.
    done(unsafe { libc::syscall(libc::SYS_seccomp, set_mode_filter, 0, &raw const program) })
}
