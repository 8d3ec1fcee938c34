//! Gives QEMU the file with a guest's memory.
//!
//! QEMU opens that file by its name and for writing, also where it maps it
//! privately (only from 8.2 on it can be told otherwise). A clone's QEMU must
//! not be able to write to what other clones read. So the call is answered in
//! the kernel's stead (seccomp_unotify(2)): QEMU gets the descriptor we opened,
//! for reading only where it is a clone's. A private mapping needs no more.
#![allow(unsafe_code)] // structures and calls of seccomp_unotify(2), a message with a descriptor

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use seccompiler::sock_filter;

use crate::plan::ram::RAM;

/// `seccomp_data` of linux/seccomp.h: number, architecture, and the low half
/// of the third argument, as offsets.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const FLAGS: u32 = 32;
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;

const fn op(code: u16, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

/// Asks us for every `openat` that wants to read and write, and allows all
/// else (bpf(2): load, compare, mask, return).
pub(super) const FILTER: [sock_filter; 9] = [
    op(0x20, 0, 0, ARCHITECTURE),
    op(0x15, 0, 6, AUDIT_ARCH_X86_64),
    op(0x20, 0, 0, NUMBER),
    op(0x15, 0, 4, libc::SYS_openat as u32),
    op(0x20, 0, 0, FLAGS),
    op(0x54, 0, 0, libc::O_ACCMODE as u32),
    op(0x15, 0, 1, libc::O_RDWR as u32),
    op(0x06, 0, 0, libc::SECCOMP_RET_USER_NOTIF),
    op(0x06, 0, 0, libc::SECCOMP_RET_ALLOW),
];

mod ioctl {
    use nix::libc::{seccomp_notif, seccomp_notif_addfd, seccomp_notif_resp};
    nix::ioctl_readwrite!(receive, b'!', 0, seccomp_notif);
    nix::ioctl_readwrite!(send, b'!', 1, seccomp_notif_resp);
    nix::ioctl_write_ptr!(add_fd, b'!', 3, seccomp_notif_addfd);
}

/// Installs [`FILTER`] and sends who answers it over `socket`.
///
/// # Safety
/// Between fork and exec: async-signal-safe calls on memory of this frame.
pub(super) unsafe fn ask(socket: RawFd) -> Result<(), i32> {
    let program = libc::sock_fprog {
        len: FILTER.len() as libc::c_ushort,
        filter: FILTER.as_ptr().cast_mut().cast(),
    };
    let (set_mode_filter, new_listener) = (1, 1 << 3);
    // SAFETY: the kernel reads as many instructions as there are; a message of
    // one byte and one descriptor, all in this frame.
    unsafe {
        let listener = libc::syscall(
            libc::SYS_seccomp,
            set_mode_filter,
            new_listener,
            &raw const program,
        );
        if listener < 0 {
            return Err(*libc::__errno_location());
        }
        let listener = listener as RawFd;
        let mut byte = 0u8;
        let mut part = libc::iovec {
            iov_base: (&raw mut byte).cast(),
            iov_len: 1,
        };
        // Room for a header and one descriptor (cmsg(3)), aligned as a header is.
        let mut control = [0u64; 4];
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(size_of::<RawFd>() as u32) as _;
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(size_of::<RawFd>() as u32) as _;
        libc::CMSG_DATA(header)
            .cast::<RawFd>()
            .write_unaligned(listener);
        if libc::sendmsg(socket, &raw const message, 0) < 0 {
            return Err(*libc::__errno_location());
        }
        libc::close(listener);
    }
    Ok(())
}

/// Takes what [`ask`] sent.
pub(super) fn listener(socket: &UnixStream) -> io::Result<OwnedFd> {
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
    let mut byte = [0];
    let mut parts = [io::IoSliceMut::new(&mut byte)];
    let mut control = nix::cmsg_space!(RawFd);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
    for one in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = one
            && let [fd] = fds[..]
        {
            // SAFETY: it came with this message, and nobody else has it.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
    Err(io::ErrorKind::UnexpectedEof.into())
}

/// Answers for as long as QEMU lives, in a thread of its own.
///
/// # Errors
/// No thread.
pub(super) fn serve(listener: OwnedFd, ram: File) -> io::Result<()> {
    std::thread::Builder::new()
        .name("ram".into())
        .stack_size(64 << 10)
        .spawn(move || {
            if let Err(error) = answer(&listener, &ram) {
                tracing::warn!("nobody opens files for QEMU any more: {error}");
            }
        })
        .map(drop)
}

fn answer(listener: &OwnedFd, ram: &File) -> io::Result<()> {
    loop {
        let mut set = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        match poll(&mut set, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            other => other?,
        };
        let events = set[0].revents().unwrap_or(PollFlags::empty());
        if !events.contains(PollFlags::POLLIN) {
            // The last process with this filter has ended.
            return Ok(());
        }
        // SAFETY: all zeroes is what the kernel wants to be given.
        let mut asked: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel writes one structure to a valid place.
        match unsafe { ioctl::receive(listener.as_raw_fd(), &raw mut asked) } {
            // Who asked has been killed meanwhile.
            Err(Errno::ENOENT | Errno::EINTR) => continue,
            other => other?,
        };
        let answered = match wants_ram(&asked) {
            true => give(listener, ram, asked.id),
            false => go_on(listener, asked.id),
        };
        match answered {
            Err(Errno::ENOENT | Errno::EINPROGRESS) | Ok(()) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Whether the name it opens is that of its memory. QEMU could change it once
/// it was looked at, and would get no more by that.
fn wants_ram(asked: &libc::seccomp_notif) -> bool {
    let mut name = [0; RAM.len() + 1];
    File::open(format!("/proc/{}/mem", asked.pid))
        .and_then(|memory| memory.read_exact_at(&mut name, asked.data.args[1]))
        .is_ok_and(|()| name.split_last() == Some((&0, RAM.as_bytes())))
}

fn give(listener: &OwnedFd, ram: &File, id: u64) -> nix::Result<()> {
    let fd = libc::seccomp_notif_addfd {
        id,
        // The number it gets is the result of its call.
        flags: libc::SECCOMP_ADDFD_FLAG_SEND as u32,
        srcfd: ram.as_raw_fd() as u32,
        newfd: 0,
        newfd_flags: libc::O_CLOEXEC as u32,
    };
    // SAFETY: the kernel reads one structure.
    unsafe { ioctl::add_fd(listener.as_raw_fd(), &raw const fd) }.map(drop)
}

/// What else is opened is decided as if nobody had asked.
fn go_on(listener: &OwnedFd, id: u64) -> nix::Result<()> {
    let mut answer = libc::seccomp_notif_resp {
        id,
        val: 0,
        error: 0,
        flags: libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
    };
    // SAFETY: the kernel reads one structure.
    unsafe { ioctl::send(listener.as_raw_fd(), &raw mut answer) }.map(drop)
}
