//! The record of what a machine's network did, from the kernel's own words.

mod flow;
mod learn;
mod netlink;
mod packet;
mod rules;
mod summary;

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recvfrom, send,
    setsockopt, socket, sockopt,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::event::{Journal, What};
use super::resolver::Serving;
pub use learn::Learned;
pub use rules::Rules;
pub use summary::{Reached, Refused, Summary, Used};

/// Bytes of a logged packet that are looked at: headers with all their options.
const PACKET: u32 = 128;
/// What the kernel may keep for us.
const ROOM: usize = 4 << 20;
/// Group of netlink messages about connections that are over: bit 2.
const DESTROYED: u32 = 1 << 2;
/// Whether connections count their bytes, in each network namespace.
const ACCOUNTING: &str = "/proc/sys/net/netfilter/nf_conntrack_acct";

/// Sockets on which the kernel tells of packets and connections.
#[derive(Debug)]
pub struct Taps {
    packets: OwnedFd,
    flows: OwnedFd,
}

impl Taps {
    /// Opens them in the network namespace of the calling thread, and switches
    /// the counting of bytes on there. `group` is that of the rules that log.
    ///
    /// # Errors
    /// Not allowed, or somebody else has the group.
    pub fn open(group: u16) -> io::Result<Self> {
        // Without, connections are told of without bytes.
        let _ = std::fs::write(ACCOUNTING, "1");
        let packets = listen(0)?;
        let [a, b, c, d] = PACKET.to_be_bytes();
        // Bind; so many bytes of each packet; told at once, for nobody is to
        // wait at the end; each with its number.
        for attribute in [
            (1, &[1][..]),
            (2, &[a, b, c, d, 2, 0]),
            (5, &[0, 0, 0, 1]),
            (6, &[0, 1]),
        ] {
            order(
                &packets,
                &netlink::request(packet::CONFIG, group, &[attribute]),
            )?;
        }
        let flows = listen(DESTROYED)?;
        Ok(Self { packets, flows })
    }
}

fn listen(groups: u32) -> io::Result<OwnedFd> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkNetFilter,
    )?;
    // Beyond what is usual for all; a smaller one loses more.
    let _ = setsockopt(&socket, sockopt::RcvBufForce, &ROOM);
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
    Ok(socket)
}

fn order(socket: &OwnedFd, request: &[u8]) -> io::Result<()> {
    send(socket.as_raw_fd(), request, MsgFlags::empty())?;
    let mut answer = [0; 512];
    loop {
        let (length, _) = recvfrom::<NetlinkAddr>(socket.as_raw_fd(), &mut answer)?;
        match netlink::acknowledged(&answer[..length]) {
            Some(0) => return Ok(()),
            Some(error) => return Err(io::Error::from_raw_os_error(-error)),
            // A packet that is logged already.
            None => {}
        }
    }
}

/// Notes what the kernel tells, with the names that the resolver gave out and the
/// rules that let it through.
/// Connections of others than `guests` are the proxy's own, and not noted. When
/// `end` becomes true it takes in what the kernel has told so far, and ends.
///
/// # Errors
/// The sockets cannot be watched.
pub fn record(
    taps: Taps,
    guests: Vec<IpAddr>,
    rules: Rules,
    journal: Journal,
    end: watch::Receiver<bool>,
) -> io::Result<Serving> {
    let scribe = Scribe {
        guests,
        rules,
        journal,
        next: None,
    };
    let mut tasks = JoinSet::new();
    for fd in [taps.packets, taps.flows] {
        tasks.spawn(follow(
            crate::host::sys::watch(fd, Interest::READABLE)?,
            scribe.clone(),
            end.clone(),
        ));
    }
    Ok(Serving(tasks))
}

async fn follow(socket: AsyncFd<OwnedFd>, mut scribe: Scribe, mut end: watch::Receiver<bool>) {
    let mut buffer = vec![0; 1 << 16];
    let mut receive = |socket: &OwnedFd| {
        let fd = socket.as_fd().as_raw_fd();
        match nix::sys::socket::recv(fd, &mut buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(length) => scribe.take(&buffer[..length]),
            // The kernel had no room; it does not say for how many.
            Err(Errno::ENOBUFS) => scribe.journal.lost(1),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(io::Error::from(error)),
        }
        Ok(())
    };
    loop {
        let ready = tokio::select! {
            ready = socket.readable() => ready,
            Ok(_) = end.wait_for(|end| *end) => {
                while receive(socket.get_ref()).is_ok() {}
                return;
            }
        };
        let Ok(mut ready) = ready else { return };
        if let Ok(Err(_)) = ready.try_io(|socket| receive(socket.get_ref())) {
            return;
        }
    }
}

#[derive(Debug, Clone)]
struct Scribe {
    guests: Vec<IpAddr>,
    rules: Rules,
    journal: Journal,
    /// The number that the next logged packet has, if none is lost.
    next: Option<u32>,
}

impl Scribe {
    /// Notes what is in a piece of the kernel's messages.
    fn take(&mut self, bytes: &[u8]) {
        for message in netlink::messages(bytes) {
            match message.kind {
                packet::PACKET => self.packet(&message),
                flow::DELETE => self.flow(&message),
                _ => {}
            }
        }
    }

    fn packet(&mut self, message: &netlink::Message<'_>) {
        let Some(logged) = packet::read(message) else {
            return;
        };
        let packet::Logged {
            mut packet,
            number,
            mark,
        } = logged;
        if let Some(number) = number {
            let missing = number.wrapping_sub(self.next.unwrap_or(number));
            // A number before the last one is a new count.
            if (1..1 << 24).contains(&missing) {
                self.journal.lost(missing.into());
            }
            self.next = Some(number.wrapping_add(1));
        }
        self.rules.tell_packet(&mut packet, mark, &self.guests);
        self.journal.note(What::Packet(packet));
    }

    fn flow(&mut self, message: &netlink::Message<'_>) {
        let Some((mut flow, mark)) = flow::read(message) else {
            return;
        };
        if !self.guests.contains(&flow.source.address) {
            return;
        }
        self.rules.tell_flow(&mut flow, mark);
        self.journal.note(What::Flow(flow));
    }
}

/// For the fuzzer: takes in what a kernel might say.
#[cfg(fuzzing)]
pub fn take_bytes(bytes: &[u8], names: super::Names, journal: Journal) {
    let policy = crate::spec::NetworkPolicy::of_preset(crate::spec::Preset::Dev);
    let policy = std::sync::Arc::new(super::Policy::new(&policy));
    let rules = Rules::new(names, policy);
    let guests = vec![IpAddr::from([198, 18, 0, 2])];
    Scribe {
        guests,
        rules,
        journal,
        next: None,
    }
    .take(bytes);
}

#[cfg(test)]
mod tests {
    use super::super::names::Names;
    use super::super::policy::Policy;
    use super::*;
    use crate::plan::firewall::Through;
    use crate::spec::{Domain, NetworkPolicy};

    #[tokio::test]
    async fn packets_and_connections_have_names_and_losses_are_told() {
        let (journal, mut events) = Journal::new("m", 100);
        let names = Names::default();
        let name = Domain::parse("example.org").unwrap();
        names.give_out(
            &name,
            [1, 2, 3, 4].into(),
            std::time::Duration::from_secs(60),
        );
        let policy = NetworkPolicy {
            exceptions: ["9.9.9.9".parse().unwrap()].into(),
            ..NetworkPolicy::default()
        };
        let mut scribe = Scribe {
            guests: vec![[198, 18, 0, 2].into()],
            rules: Rules::new(names, Policy::new(&policy).into()),
            journal,
            next: None,
        };
        let (packet, over) = (packet::tests::logged, flow::tests::over);
        let [port, nine] = [
            Through::Port,
            Through::Exception("9.9.9.9".parse().unwrap()),
        ]
        .map(|through| through.mark());
        scribe.take(&packet(b"new:", [1, 2, 3, 4], 5, port));
        scribe.take(
            &[
                packet(b"refused:private", [10, 0, 0, 1], 6, 0),
                over([1, 2, 3, 4], true, port),
            ]
            .concat(),
        );
        scribe.take(&packet(b"new:", [9, 9, 9, 9], 10, nine));
        // Its beginning is not known: its mark is.
        scribe.take(&over([9, 9, 9, 8], true, nine));
        let mut all = Vec::new();
        while let Ok(event) = events.try_recv() {
            all.push(event.what);
        }
        match &all[..] {
            [
                What::Packet(new),
                What::Packet(refused),
                What::Flow(flow),
                What::Lost { count: 3 },
                What::Packet(excepted),
                What::Flow(ended),
            ] => {
                assert_eq!(new.name.as_deref(), Some("example.org"));
                assert!(refused.name.is_none() && refused.refusal.is_some());
                assert_eq!(flow.name.as_deref(), Some("example.org"));
                for (rule, expected) in [
                    (&new.rule, Some("preset:dev:443")),
                    (&refused.rule, None),
                    (&flow.rule, Some("preset:dev:443")),
                    (&excepted.rule, Some("allow-cidr:9.9.9.9/32")),
                    (&ended.rule, Some("allow-cidr:9.9.9.9/32")),
                ] {
                    assert_eq!(rule.as_deref(), expected);
                }
            }
            other => panic!("{other:?}"),
        }
    }
}
