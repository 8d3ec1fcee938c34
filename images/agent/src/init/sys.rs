//! The ioctls and the fork of PID 1.
#![allow(unsafe_code)] // ioctls and fork(2) have no safe form

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;

use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::unistd::{ForkResult, Pid, fork};

// linux/fs/ext4/ext4.h, linux/fs.h
nix::ioctl_write_ptr!(ext4_resize, b'f', 16, u64);
nix::ioctl_write_ptr!(ext4_checkpoint, b'f', 43, u32);
nix::ioctl_readwrite!(fs_freeze, b'X', 119, libc::c_int);

/// Grows a mounted ext4 file system to `blocks` of its blocks.
pub(super) fn resize_ext4(dir: &File, blocks: u64) -> nix::Result<()> {
    // SAFETY: the descriptor is open and the argument outlives the call.
    unsafe { ext4_resize(dir.as_raw_fd(), &blocks) }.map(drop)
}

/// Has ext4 commit its running transaction and write it to its place.
pub(super) fn flush_journal(dir: &File) -> nix::Result<()> {
    // SAFETY: the descriptor is open and the flags outlive the call.
    unsafe { ext4_checkpoint(dir.as_raw_fd(), &0) }.map(drop)
}

/// Writes everything of a file system to its disk and stops further writes, so
/// that the disk is consistent without a journal replay.
pub(super) fn freeze(dir: &File) -> nix::Result<()> {
    let mut unused = 0;
    // SAFETY: the descriptor is open; FIFREEZE does not use its argument.
    unsafe { fs_freeze(dir.as_raw_fd(), &mut unused) }.map(drop)
}

/// Brings the loopback interface up.
pub(super) fn loopback_up() -> io::Result<()> {
    link_up("lo")
}

fn control(family: AddressFamily) -> nix::Result<std::os::fd::OwnedFd> {
    socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
}

/// A request about a device (netdevice(7)).
fn request(device: &str) -> libc::ifreq {
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero.
    let name = request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1);
    for (to, from) in name.zip(device.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

/// Brings a device up.
pub(super) fn link_up(device: &str) -> io::Result<()> {
    let control = control(AddressFamily::Inet)?;
    let mut request = request(device);
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads an ifreq, which outlives the call.
    let done = unsafe { libc::ioctl(control.as_raw_fd(), libc::SIOCSIFFLAGS, &request) };
    nix::errno::Errno::result(done)?;
    Ok(())
}

/// An IPv4 address as the kernel wants it.
fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let [a, b, c, d] = address.octets();
    libc::sockaddr {
        sa_family: libc::AF_INET as libc::sa_family_t,
        // Two bytes of port before the address.
        sa_data: [0, 0, a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0].map(|byte| byte as libc::c_char),
    }
}

/// Gives a device its IPv4 address.
pub(super) fn set_address(device: &str, address: Ipv4Addr, prefix: u8) -> io::Result<()> {
    let control = control(AddressFamily::Inet)?;
    let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
    let requests = [
        (libc::SIOCSIFADDR, address),
        (libc::SIOCSIFNETMASK, Ipv4Addr::from(mask)),
    ];
    for (code, address) in requests {
        let mut request = request(device);
        request.ifr_ifru.ifru_addr = socket_address(address);
        // SAFETY: both read an ifreq, which outlives the call.
        let done = unsafe { libc::ioctl(control.as_raw_fd(), code, &request) };
        nix::errno::Errno::result(done)?;
    }
    Ok(())
}

/// Sends all other IPv4 to a gateway.
pub(super) fn add_default_route(gateway: Ipv4Addr) -> io::Result<()> {
    let control = control(AddressFamily::Inet)?;
    // SAFETY: all zeroes is a valid rtentry: no device, no addresses.
    let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
    route.rt_dst = socket_address(Ipv4Addr::UNSPECIFIED);
    route.rt_genmask = socket_address(Ipv4Addr::UNSPECIFIED);
    route.rt_gateway = socket_address(gateway);
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    // SAFETY: SIOCADDRT reads an rtentry, which outlives the call.
    let done = unsafe { libc::ioctl(control.as_raw_fd(), libc::SIOCADDRT, &route) };
    nix::errno::Errno::result(done)?;
    Ok(())
}

/// `struct in6_ifreq` (linux/ipv6.h).
#[repr(C)]
struct Address6 {
    address: [u8; 16],
    prefix: u32,
    index: libc::c_int,
}

/// Gives a device an IPv6 address.
pub(super) fn add_address6(index: u32, address: Ipv6Addr, prefix: u8) -> io::Result<()> {
    let control = control(AddressFamily::Inet6)?;
    let request = Address6 {
        address: address.octets(),
        prefix: prefix.into(),
        index: index as libc::c_int,
    };
    // SAFETY: for this family SIOCSIFADDR reads an in6_ifreq, which outlives the call.
    let done = unsafe { libc::ioctl(control.as_raw_fd(), libc::SIOCSIFADDR, &request) };
    nix::errno::Errno::result(done)?;
    Ok(())
}

/// `struct in6_rtmsg` (linux/ipv6_route.h).
#[repr(C)]
struct Route6 {
    to: [u8; 16],
    from: [u8; 16],
    gateway: [u8; 16],
    kind: u32,
    to_length: u16,
    from_length: u16,
    metric: u32,
    info: libc::c_ulong,
    flags: u32,
    index: libc::c_int,
}

/// Sends all other IPv6 to a gateway on a device.
pub(super) fn add_default_route6(index: u32, gateway: Ipv6Addr) -> io::Result<()> {
    let control = control(AddressFamily::Inet6)?;
    let route = Route6 {
        to: [0; 16],
        from: [0; 16],
        gateway: gateway.octets(),
        kind: 0,
        to_length: 0,
        from_length: 0,
        metric: 1,
        info: 0,
        flags: u32::from(libc::RTF_UP | libc::RTF_GATEWAY),
        index: index as libc::c_int,
    };
    // SAFETY: for this family SIOCADDRT reads an in6_rtmsg, which outlives the call.
    let done = unsafe { libc::ioctl(control.as_raw_fd(), libc::SIOCADDRT, &route) };
    nix::errno::Errno::result(done)?;
    Ok(())
}

/// Forks; `child` runs in the child, which exits with what it returns.
pub(super) fn fork_child(child: impl FnOnce() -> i32) -> nix::Result<Pid> {
    // SAFETY: PID 1 has a single thread at this point, so the child may do
    // anything the parent could.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => std::process::exit(child()),
    }
}
