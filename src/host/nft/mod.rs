//! nftables over netlink: rules in atomic batches, in the namespace of the
//! calling thread.

mod build;
mod counters;
mod dump;
mod expr;
mod operands;
mod raw;
mod readback;

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nftnl::{Batch, MsgType};
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, sendto,
    setsockopt, socket, sockopt,
};

use crate::plan::firewall::{Changes, Family, Ruleset, gate, gate_mark, gate_member};

pub use counters::{Counted, counters, counters_of};
pub(super) use dump::{TRIES, dump, restless};
pub use readback::{ChainShape, Leading, Shape, planned, ranges, rules};

/// How long the kernel may take to answer: it holds one lock for everybody who
/// changes rules.
const ANSWER: Duration = Duration::from_secs(30);
/// Some periods after which the kernel has let go of what was deleted.
const LINGER: Duration = Duration::from_millis(100);
/// Bytes of the largest batch: some thousand names.
const BATCH: usize = 8 << 20;
/// Part of the error that the kernel answers with (linux/netlink.h).
const NLMSG_ERROR: u16 = 2;
/// Marks attributes that have others in them (linux/netlink.h).
pub(super) const NESTED: u16 = 1 << 15;
/// Length of a netlink header.
pub(super) const HEADER: usize = 16;

/// What a map says of addresses that lead to a chain (see [`ranges`]).
pub fn leads_to(chain: &str) -> String {
    operands::goto(chain)
}

/// As [`leads_to`], of an element that leads nowhere: one of a set.
pub fn leads_nowhere() -> String {
    operands::verdict(&[])
}

/// Makes tables that are not there yet, all of them or none.
///
/// # Errors
/// The kernel refuses: no permission, or it lacks a part of nftables.
pub fn apply(rules: &Ruleset) -> io::Result<()> {
    let mut batch = Batch::new();
    for table in &rules.tables {
        build::add_table(&mut batch, table, false);
    }
    send(batch)
}

/// Takes a table with everything in it away; nothing happens where it is not
/// there.
///
/// # Errors
/// As [`apply`].
pub fn remove(family: Family, name: &str) -> io::Result<()> {
    let mut batch = Batch::new();
    batch.add(&build::table_named(family, name), MsgType::Del);
    gone(send(batch))
}

/// What is let through for a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Where to.
    pub address: IpAddr,
    /// At which TCP port; 0 for those of the policy.
    pub port: u16,
    /// For how long.
    pub time: Duration,
}

/// Replaces what can change of a machine's rules, at once; and, where `only` is
/// given, what is let through by name.
///
/// # Errors
/// As [`apply`]; then nothing has changed.
pub fn change(changes: &Changes, only: Option<&[Entry]>) -> io::Result<()> {
    let mut batch = Batch::new();
    build::change(&mut batch, changes);
    if let Some(only) = only {
        build::let_through(&mut batch, only, true);
    }
    send(batch)
}

/// Lets a machine reach addresses for a time; again, for that time from now.
///
/// # Errors
/// As [`apply`].
pub fn allow(entries: &[Entry]) -> io::Result<()> {
    Allowing::open()?.allow(entries)
}

/// Lets one machine reach addresses, as [`allow`] does, from any thread and without
/// a new socket each time.
#[derive(Debug)]
pub struct Allowing(Mutex<Socket>);

impl Allowing {
    /// That of the namespace of the calling thread.
    ///
    /// # Errors
    /// No netlink socket is to be had.
    pub fn open() -> io::Result<Self> {
        Ok(Self(Mutex::new(connect()?)))
    }

    /// As [`allow`].
    ///
    /// # Errors
    /// As [`apply`].
    pub fn allow(&self, entries: &[Entry]) -> io::Result<()> {
        let mut batch = Batch::new();
        build::let_through(&mut batch, entries, false);
        // Whoever panicked got no answer, and those are thrown away.
        send_over(
            &self.0.lock().unwrap_or_else(PoisonError::into_inner),
            batch,
        )
    }
}

/// Makes the host's table, or brings it up to date, and counts a machine in.
///
/// # Errors
/// As [`apply`].
pub fn enter_gate(token: &str) -> io::Result<()> {
    let (mark, member) = (gate_mark(), gate_member(token));
    let there = counters(Family::Inet)?;
    if there.contains_key(&mark) {
        let mut batch = Batch::new();
        count(&mut batch, &[&member], MsgType::Add);
        match send(batch) {
            // The last machine went out meanwhile, and the table with it.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            entered => return entered,
        }
    }
    let mut batch = Batch::new();
    build::add_table(&mut batch, &gate(), true);
    count(&mut batch, &[&mark, &member], MsgType::Add);
    send(batch)
}

/// Makes counters of the host's table, or removes them.
fn count(batch: &mut Batch, names: &[&String], kind: MsgType) {
    let table = build::table(Family::Inet);
    for name in names {
        let name = build::text(name);
        let counter = raw::Counter {
            table: &table,
            name,
        };
        batch.add(&counter, kind);
    }
}

/// Counts a machine out, and takes the table away with the last one. Nothing
/// happens where it is out already.
///
/// # Errors
/// As [`apply`].
pub fn leave_gate(token: &str) -> io::Result<()> {
    let mut batch = Batch::new();
    count(&mut batch, &[&gate_member(token)], MsgType::Del);
    gone(send(batch))?;
    // Only to save the kernel a refusal, which takes it long.
    let there = counters(Family::Inet)?;
    if there.keys().any(|name| name.starts_with(&gate_member(""))) {
        return Ok(());
    }
    // The kernel refuses all of it while another machine is counted in: nobody
    // can come in between.
    let mut batch = Batch::new();
    let data = gate();
    let table = build::table(Family::Inet);
    let chains: Vec<_> = data
        .chains
        .iter()
        .map(|chain| nftnl::Chain::new(build::text(&chain.name), &table))
        .collect();
    for chain in &chains {
        batch.add(&raw::NoRules(chain), MsgType::Del);
    }
    for chain in &chains {
        batch.add(chain, MsgType::Del);
    }
    // Also marks of other versions.
    count(&mut batch, &there.keys().collect::<Vec<_>>(), MsgType::Del);
    batch.add(&raw::EmptyTable(&table), MsgType::Del);
    match gone(send(batch)) {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(()),
        left => left,
    }
}

/// That it is not there is what was wanted.
fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        other => other,
    }
}

/// A socket to the kernel's netfilter, of the thread's namespace it was made in.
///
/// Whoever closes one waits until what anybody deleted in that namespace is
/// gone, and has everybody else who changes rules there wait, too (RCU under
/// the lock; net/netfilter/nf_tables_api.c, `nft_rcv_nl_event`). So a thread of
/// its own does, when most likely nothing is left to wait for.
#[derive(Debug)]
pub(super) struct Socket(Option<OwnedFd>);

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_ref().map_or(-1, AsRawFd::as_raw_fd)
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let socket = self.0.take();
        let thread = std::thread::Builder::new().name("netfilter".into());
        // Without a thread it is closed here.
        let _ = thread.spawn(move || {
            std::thread::sleep(LINGER);
            drop(socket);
        });
    }
}

/// Opens one in the thread's namespace.
pub(super) fn connect() -> io::Result<Socket> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkNetFilter,
    )?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    // Beyond what is usual for all: a batch is one message.
    let _ = setsockopt(&socket, sockopt::SndBufForce, &BATCH);
    let time = nix::sys::time::TimeVal::new(ANSWER.as_secs() as i64, 0);
    setsockopt(&socket, sockopt::ReceiveTimeout, &time)?;
    Ok(Socket(Some(socket)))
}

/// Sends a batch and waits until the kernel has taken all of it.
fn send(batch: Batch) -> io::Result<()> {
    send_over(&connect()?, batch)
}

/// As [`send`], over a socket of which nobody else waits for answers.
fn send_over(socket: &Socket, batch: Batch) -> io::Result<()> {
    let batch = batch.finalize();
    // The last that is answered: older kernels do not answer a batch's end.
    let last = batch.sequence_numbers().end.saturating_sub(1);
    // One message to the kernel is one transaction.
    let mut bytes: Vec<u8> = batch.iter().flatten().copied().collect();
    answer_only(&mut bytes, last);
    let mut answers = vec![0; 1 << 16];
    // What is left of answers to a batch that was refused.
    while recv(socket.as_raw_fd(), &mut answers, MsgFlags::MSG_DONTWAIT).is_ok() {}
    let to = NetlinkAddr::new(0, 0);
    sendto(socket.as_raw_fd(), &bytes, &to, MsgFlags::empty())?;
    loop {
        let length = receive(socket, &mut answers)?;
        for (kind, seq, content) in messages(&answers[..length]) {
            let Some(code) = content.first_chunk().filter(|_| kind == NLMSG_ERROR) else {
                continue;
            };
            match i32::from_ne_bytes(*code) {
                // What one message is refused, all are.
                0 if seq >= last => return Ok(()),
                0 => {}
                code => return Err(io::Error::from_raw_os_error(-code)),
            }
        }
    }
}

/// Has the kernel answer the last of these messages alone, and what it refuses.
fn answer_only(bytes: &mut [u8], last: u32) {
    let mut at = 0;
    while let Some(head) = bytes.get_mut(at..at + HEADER) {
        let word =
            |at: usize| u32::from_ne_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let (length, seq) = (word(0) as usize, word(8));
        if seq != last {
            let flags = u16::from_ne_bytes([head[6], head[7]]) & !(libc::NLM_F_ACK as u16);
            head[6..8].copy_from_slice(&flags.to_ne_bytes());
        }
        at += length.next_multiple_of(4).max(HEADER);
    }
}

pub(super) fn receive(socket: &Socket, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match recv(socket.as_raw_fd(), buffer, MsgFlags::empty()) {
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Err(io::ErrorKind::TimedOut.into()),
            received => return Ok(received?),
        }
    }
}

/// The messages in what was received: type, number, content.
pub(super) fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, u32, &[u8])> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
        let message = bytes
            .get(..length)
            .filter(|message| message.len() >= HEADER)?;
        let kind = u16::from_ne_bytes([message[4], message[5]]);
        let seq = u32::from_ne_bytes([message[8], message[9], message[10], message[11]]);
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, seq, &message[HEADER..]))
    })
}

/// Attributes in a message: type, and all of its bytes with its header.
pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
        let whole = bytes.get(..length).filter(|whole| whole.len() >= 4)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([whole[2], whole[3]]) & !NESTED, whole))
    })
}
