//! A directory of the host as a mount of its own, in which the user of a jail
//! stands for the directory's owner.
//!
//! What the directory's owner may do, the jail's user may do there and nowhere
//! else; what it makes belongs to the directory's owner. Files of others are
//! for it as they are for any third party. In a user namespace of the same
//! map it also sees the owner's own number, and so does the guest.
#![allow(unsafe_code)] // system calls without a wrapper, and a fork

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::libc;
use nix::sys::stat::fstat;
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

/// `struct mount_attr` of linux/mount.h.
#[repr(C)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns: u64,
}

const OPEN_TREE_CLONE: libc::c_uint = 1;
/// RDONLY, NOSUID, NODEV, NOEXEC and IDMAP (linux/mount.h).
const READ_ONLY: u64 = 1;
const NO_SUID_DEV_EXEC: u64 = 2 | 4 | 8;
const ID_MAPPED: u64 = 0x0010_0000;

/// A mount that is nowhere yet.
#[derive(Debug)]
pub struct Detached {
    /// The mount.
    pub mount: OwnedFd,
    /// Who owns the directory, for those who are in the namespace.
    pub owner: User,
}

/// Who a VMM becomes.
#[derive(Debug)]
pub struct User {
    /// User id, as the namespace counts them.
    pub uid: u32,
    /// Group id, likewise.
    pub gid: u32,
    /// The user namespace it enters first.
    pub namespace: Option<OwnedFd>,
}

impl User {
    /// A user of the host's, in the group of the same number.
    pub const fn plain(uid: u32) -> Self {
        Self {
            uid,
            gid: uid,
            namespace: None,
        }
    }
}

fn descriptor(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = i32::try_from(result).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes a mount of `dir` that is nowhere yet. With `user` its owner becomes
/// that user in it.
///
/// # Errors
/// The kernel or the file system cannot map ids (`EINVAL`), or no privilege.
pub fn detach(dir: BorrowedFd<'_>, user: Option<u32>, read_only: bool) -> io::Result<Detached> {
    let flags =
        OPEN_TREE_CLONE | libc::O_CLOEXEC as libc::c_uint | libc::AT_EMPTY_PATH as libc::c_uint;
    // SAFETY: a descriptor, a text that ends in zero, an integer.
    let tree = descriptor(unsafe {
        libc::syscall(libc::SYS_open_tree, dir.as_raw_fd(), c"".as_ptr(), flags)
    })?;
    let mut attr = MountAttr {
        set: NO_SUID_DEV_EXEC | if read_only { READ_ONLY } else { 0 },
        clear: 0,
        propagation: 0,
        userns: 0,
    };
    let stat = fstat(dir)?;
    let (uid, gid) = (stat.st_uid, stat.st_gid);
    let map = user.map(|user| user_namespace((uid, gid), user));
    let map = map.transpose()?;
    if let Some(map) = &map {
        attr.set |= ID_MAPPED;
        attr.userns = map.as_raw_fd() as u64;
    }
    // SAFETY: the kernel reads a structure of the size given.
    let set = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    match set {
        0 => Ok(Detached {
            mount: tree,
            owner: User {
                uid,
                gid,
                namespace: map.map(Into::into),
            },
        }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A user namespace that says which id on disk stands for which user. It
/// exists for as long as the descriptor, or a mount made with it.
fn user_namespace((uid, gid): (u32, u32), user: u32) -> io::Result<File> {
    let (wait, end) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    let flags = (libc::CLONE_NEWUSER | libc::SIGCHLD) as libc::c_ulong;
    let none = 0usize;
    // SAFETY: the child calls read and _exit only.
    let pid = match unsafe { libc::syscall(libc::SYS_clone, flags, none, none, none, none) } {
        -1 => return Err(io::Error::last_os_error()),
        // SAFETY: as above; it is over when the owner has closed its end.
        0 => unsafe {
            libc::close(end.as_raw_fd());
            let mut byte = 0u8;
            libc::read(wait.as_raw_fd(), (&raw mut byte).cast(), 1);
            libc::_exit(0)
        },
        pid => i32::try_from(pid).map_err(io::Error::other)?,
    };
    let make = || {
        std::fs::write(format!("/proc/{pid}/uid_map"), format!("{uid} {user} 1"))?;
        std::fs::write(format!("/proc/{pid}/gid_map"), format!("{gid} {user} 1"))?;
        File::open(format!("/proc/{pid}/ns/user"))
    };
    let made = make();
    drop(end);
    let _ = waitpid(Pid::from_raw(pid), None);
    made
}
