//! The network, and sockets of every family.

use nix::libc;

use crate::{Attempt, Came, call, deep, flat};

const STREAM: usize = libc::SOCK_STREAM as usize;
const DATAGRAM: usize = libc::SOCK_DGRAM as usize;
const RAW: usize = libc::SOCK_RAW as usize;

fn socket(family: i32, kind: usize) -> Came {
    call(libc::SYS_socket, &[family as usize, kind, 0])
}

/// Connects a new socket to an address.
fn connect(family: i32, kind: usize, address: &[u8]) -> Came {
    // SAFETY: integers.
    let fd = unsafe { libc::syscall(libc::SYS_socket, family, kind, 0) };
    if fd < 0 {
        return Came::Refused(std::io::Error::last_os_error().to_string());
    }
    call(
        libc::SYS_connect,
        &[fd as usize, address.as_ptr() as usize, address.len()],
    )
}

fn ipv4(port: u16, host: [u8; 4]) -> Vec<u8> {
    let mut address = (libc::AF_INET as u16).to_ne_bytes().to_vec();
    address.extend(port.to_be_bytes());
    address.extend(host);
    address.extend([0; 8]);
    address
}

/// The abstract socket that the probe listens on (`xtask/src/probe/vmm.rs`).
fn abstract_socket() -> Vec<u8> {
    let mut address = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
    address.extend(b"\0bulkhead-probe-canary");
    address
}

/// A socket that can change the network, if it may.
fn add_link() -> Came {
    // SAFETY: integers.
    let fd = unsafe { libc::syscall(libc::SYS_socket, libc::AF_NETLINK, RAW, 0) };
    if fd < 0 {
        return Came::Refused(std::io::Error::last_os_error().to_string());
    }
    // RTM_NEWLINK with NLM_F_REQUEST, ACK, CREATE and EXCL: a dummy of no name.
    let mut message = Vec::new();
    message.extend(32u32.to_ne_bytes());
    message.extend(16u16.to_ne_bytes());
    message.extend(0x605_u16.to_ne_bytes());
    message.extend([0; 24]);
    let sent = [
        fd as usize,
        message.as_ptr() as usize,
        message.len(),
        0,
        0,
        0,
    ];
    if let Came::Refused(why) = call(libc::SYS_sendto, &sent) {
        return Came::Refused(why);
    }
    let mut answer = [0u8; 256];
    // SAFETY: a buffer of the size given.
    unsafe { libc::recv(fd as i32, answer.as_mut_ptr().cast(), answer.len(), 0) };
    match i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]) {
        0 => Came::Out("a link was made".into()),
        error => Came::Refused(std::io::Error::from_raw_os_error(-error).to_string()),
    }
}

/// Every descriptor it was given, used as a way to others.
fn connect_given() -> Came {
    let address = abstract_socket();
    for fd in 0..64 {
        let arguments = [fd, address.as_ptr() as usize, address.len()];
        if let Came::Out(why) = call(libc::SYS_connect, &arguments) {
            return Came::Out(why);
        }
    }
    Came::Refused("none connects".into())
}

pub(crate) const ATTEMPTS: &[Attempt] = &[
    flat("make a Unix socket", || socket(libc::AF_UNIX, STREAM)),
    flat("make an IPv4 socket", || socket(libc::AF_INET, STREAM)),
    flat("make an IPv6 socket", || socket(libc::AF_INET6, STREAM)),
    flat("make a netlink socket", || socket(libc::AF_NETLINK, RAW)),
    deep("make a packet socket", || socket(libc::AF_PACKET, RAW)),
    deep("make a raw socket", || {
        call(libc::SYS_socket, &[libc::AF_INET as usize, RAW, 1])
    }),
    flat("make a vsock socket", || socket(libc::AF_VSOCK, STREAM)),
    flat("make a crypto socket", || {
        socket(libc::AF_ALG, libc::SOCK_SEQPACKET as usize)
    }),
    flat("make an XDP socket", || socket(libc::AF_XDP, RAW)),
    flat("make a CAN socket", || socket(libc::AF_CAN, RAW)),
    flat("make a Bluetooth socket", || {
        socket(libc::AF_BLUETOOTH, RAW)
    }),
    flat("make a key socket", || socket(15, RAW)),
    flat("make a TIPC socket", || socket(30, STREAM)),
    flat("make a pair of sockets", || {
        let mut pair = [0i32; 2];
        call(
            libc::SYS_socketpair,
            &[1, STREAM, 0, pair.as_mut_ptr() as usize],
        )
    }),
    deep("connect to the host's loopback", || {
        connect(libc::AF_INET, STREAM, &ipv4(45_871, [127, 0, 0, 1]))
    }),
    deep("send a datagram out", || {
        connect(libc::AF_INET, DATAGRAM, &ipv4(53, [192, 0, 2, 1]))
    }),
    deep("reach the metadata service", || {
        connect(libc::AF_INET, STREAM, &ipv4(80, [169, 254, 169, 254]))
    }),
    deep("connect to an abstract socket of the host", || {
        connect(libc::AF_UNIX, STREAM, &abstract_socket())
    }),
    deep("connect to a socket by its path", || {
        let mut address = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
        address.extend(b"/run/dbus/system_bus_socket\0");
        connect(libc::AF_UNIX, STREAM, &address)
    }),
    flat("connect a socket it was given", connect_given),
    deep("make a network link", add_link),
];
