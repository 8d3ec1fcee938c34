//! System calls that the crates we use do not wrap.
#![allow(unsafe_code)] // each call below says why it is sound

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::libc;

/// A descriptor that names a process for good (pidfd_open(2)).
///
/// # Errors
/// No such process, or no descriptor left.
pub(crate) fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes two integers; a non-negative result is a new descriptor
    // that nobody else owns.
    unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, pid, libc::PIDFD_NONBLOCK);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(
            i32::try_from(fd).map_err(io::Error::other)?,
        ))
    }
}

/// Sends a signal to the process a pidfd names (pidfd_send_signal(2)).
///
/// # Errors
/// The process is gone (`ESRCH`), or it is not ours to signal.
pub(crate) fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: a valid descriptor, an integer, and a null siginfo, which the
    // system call allows.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

mod ioctl {
    nix::ioctl_write_ptr!(vhost_vsock_set_guest_cid, 0xAF, 0x60, u64);
}

/// Claims a vsock address on an open /dev/vhost-vsock. The claim ends with the
/// last copy of the descriptor.
///
/// # Errors
/// `EADDRINUSE` when another machine has it.
pub(crate) fn set_guest_cid(vhost: BorrowedFd<'_>, cid: u64) -> io::Result<()> {
    // SAFETY: the descriptor is valid and the kernel reads eight bytes from a
    // valid pointer (linux/vhost.h, VHOST_VSOCK_SET_GUEST_CID).
    unsafe { ioctl::vhost_vsock_set_guest_cid(vhost.as_raw_fd(), &cid) }?;
    Ok(())
}

mod tun {
    nix::ioctl_write_ptr_bad!(
        set_iff,
        nix::request_code_write!(b'T', 202, size_of::<nix::libc::c_int>()),
        nix::libc::ifreq
    );
    nix::ioctl_read_bad!(
        get_iff,
        nix::request_code_read!(b'T', 210, size_of::<nix::libc::c_uint>()),
        nix::libc::ifreq
    );
    nix::ioctl_none_bad!(get_netns, nix::request_code_none!(b'T', 227));
    nix::ioctl_write_int_bad!(
        set_persist,
        nix::request_code_write!(b'T', 203, size_of::<nix::libc::c_int>())
    );
}

/// Makes a tap of this name in the thread's network namespace; it is there for
/// as long as that, so that nobody who closes it waits until the kernel has
/// taken it away. Packets have a virtio-net header, as QEMU wants them
/// (linux/if_tun.h).
///
/// # Errors
/// No /dev/net/tun, not allowed, or the name is taken.
pub(crate) fn open_tap(name: &str) -> io::Result<OwnedFd> {
    let tap = attach_tap(name)?;
    // SAFETY: a valid descriptor, and the argument is a number.
    unsafe { tun::set_persist(tap.as_raw_fd(), 1) }?;
    Ok(tap)
}

/// Takes the other end of a tap of this name in the thread's network namespace,
/// which stays as it is; makes one for as long as it is open where there is none.
///
/// # Errors
/// As [`open_tap`]; somebody has its other end, or it is no tap.
pub(crate) fn attach_tap(name: &str) -> io::Result<OwnedFd> {
    let tap = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    // SAFETY: all zeroes is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero.
    for (to, from) in request
        .ifr_name
        .iter_mut()
        .take(libc::IFNAMSIZ - 1)
        .zip(name.bytes())
    {
        *to = from as libc::c_char;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: a valid descriptor, and the kernel reads and writes one `ifreq`.
    unsafe { tun::set_iff(tap.as_raw_fd(), &raw const request) }?;
    Ok(tap.into())
}

/// The name of the tap whose other end this is, and the network namespace it is
/// in; no name where it is a tun, or nothing of the kind.
///
/// # Errors
/// Not allowed, or the kernel is older than Linux 5.2.
pub(crate) fn tap_of(end: BorrowedFd<'_>) -> io::Result<(Option<String>, OwnedFd)> {
    // SAFETY: all zeroes is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: a valid descriptor, and the kernel writes one `ifreq`, whose flags
    // it has set then; a name ends with a zero, and so does what is none.
    let name = unsafe {
        tun::get_iff(end.as_raw_fd(), &raw mut request)?;
        request.ifr_name[libc::IFNAMSIZ - 1] = 0;
        let tap = i32::from(request.ifr_ifru.ifru_flags) & libc::IFF_TAP != 0;
        tap.then(|| std::ffi::CStr::from_ptr(request.ifr_name.as_ptr()))
    };
    let name = name.map(|name| name.to_string_lossy().into_owned());
    // SAFETY: a valid descriptor; the answer is a new one that nobody else owns.
    let netns = unsafe { OwnedFd::from_raw_fd(tun::get_netns(end.as_raw_fd())?) };
    Ok((name, netns))
}

/// Lets the runtime watch a descriptor.
///
/// # Errors
/// Not inside a runtime with I/O, or the descriptor cannot be polled.
pub(crate) fn watch(
    fd: OwnedFd,
    interest: tokio::io::Interest,
) -> io::Result<tokio::io::unix::AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is the same open descriptor until it is dropped.
    unsafe { tokio::io::unix::AsyncFd::register_with_interest(fd, interest) }.map_err(Into::into)
}

/// The Landlock ABI of the running kernel (landlock(7)).
///
/// # Errors
/// The kernel has none, or it is switched off.
pub(crate) fn landlock_abi() -> io::Result<i64> {
    const LANDLOCK_CREATE_RULESET_VERSION: u32 = 1;
    // SAFETY: with this flag the kernel reads no memory.
    let abi = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<libc::c_void>(),
            0usize,
            LANDLOCK_CREATE_RULESET_VERSION,
        )
    };
    if abi < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(abi)
    }
}

/// Whether the kernel knows mount_setattr(2), which is of Linux 5.12.
pub(crate) fn has_mount_setattr() -> bool {
    // SAFETY: with a size of zero the kernel reads no structure: it answers EINVAL.
    unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            -1,
            c"".as_ptr(),
            0,
            std::ptr::null::<u8>(),
            0usize,
        )
    };
    io::Error::last_os_error().raw_os_error() != Some(libc::ENOSYS)
}

/// Asks nftables for its generation (NFT_MSG_GETGEN): it answers or it is not there.
///
/// # Errors
/// No netlink, no nftables, or no permission.
pub(crate) fn nftables_generation() -> io::Result<()> {
    use nix::sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto,
        socket,
    };
    let protocol = SockProtocol::NetlinkNetFilter;
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        protocol,
    )?;
    // nlmsghdr (length, type, flags, sequence, port) and nfgenmsg (linux/netlink.h,
    // linux/netfilter/nf_tables.h): subsystem 10, message 16, NLM_F_REQUEST.
    let mut message = Vec::with_capacity(20);
    message.extend(20u32.to_ne_bytes());
    message.extend(((10u16 << 8) | 16).to_ne_bytes());
    message.extend(1u16.to_ne_bytes());
    message.extend([0; 12]);
    sendto(
        socket.as_raw_fd(),
        &message,
        &NetlinkAddr::new(0, 0),
        MsgFlags::empty(),
    )?;
    let mut answer = [0; 256];
    let length = recv(socket.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT)?;
    // NLMSG_ERROR is type 2 and carries a negative errno.
    match answer[..length] {
        [
            _,
            _,
            _,
            _,
            2,
            0,
            _,
            _,
            _,
            _,
            _,
            _,
            _,
            _,
            _,
            _,
            a,
            b,
            c,
            d,
            ..,
        ] => Err(io::Error::from_raw_os_error(-i32::from_ne_bytes([
            a, b, c, d,
        ]))),
        _ => Ok(()),
    }
}

/// A connected vsock socket as the stream it is.
pub(crate) fn vsock_stream(fd: OwnedFd) -> vsock::VsockStream {
    use std::os::fd::{FromRawFd, IntoRawFd};
    // SAFETY: the descriptor is open, a vsock socket, and given up here.
    unsafe { vsock::VsockStream::from_raw_fd(fd.into_raw_fd()) }
}
