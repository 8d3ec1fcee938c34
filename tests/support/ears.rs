//! Who hears what goes over the links of a namespace, and what came of a try.
#![allow(dead_code)] // each test file uses a part of it

use std::collections::BTreeMap;
use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use bulkhead::host::netns::Netns;
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, recvmsg, setsockopt,
    socket, sockopt,
};

/// What a frame that leaves is called (linux/if_packet.h).
const OUTGOING: u8 = 4;
/// How long a frame may take from the guest to its tap.
const ARRIVES: Duration = Duration::from_secs(10);
/// How long it may go on from there, which is one piece of work of the kernel's.
const GOES_ON: Duration = Duration::from_millis(20);

/// Hears every frame on every link of a namespace.
pub(crate) struct Ears(OwnedFd);

impl Ears {
    pub(crate) fn new(netns: &Netns) -> Self {
        let open = || {
            let (kind, all) = (SockType::Raw, SockProtocol::EthAll);
            socket(AddressFamily::Packet, kind, SockFlag::SOCK_CLOEXEC, all)
        };
        let ears = netns.run_in(open).unwrap().unwrap();
        setsockopt(&ears, sockopt::RcvBufForce, &(8 << 20)).unwrap();
        Self(ears)
    }

    /// Whether a frame with this mark came by since the last question. `leaving`:
    /// of those that leave, or of those that come in.
    pub(crate) fn heard(&self, mark: &[u8], leaving: bool) -> bool {
        let mut buffer = [0; 4096];
        let mut heard = false;
        loop {
            let Some((length, from)) = self.frame(&mut buffer) else {
                return heard;
            };
            let leaves = from.is_some_and(|from| from.pkttype() == OUTGOING);
            let frame = &buffer[..length.min(buffer.len())];
            heard |= leaves == leaving && frame.windows(mark.len()).any(|part| part == mark);
        }
    }

    fn frame(&self, buffer: &mut [u8]) -> Option<(usize, Option<LinkAddr>)> {
        let mut parts = [IoSliceMut::new(buffer)];
        let (fd, flags) = (self.0.as_raw_fd(), MsgFlags::MSG_DONTWAIT);
        let message = recvmsg::<LinkAddr>(fd, &mut parts, None, flags).ok()?;
        Some((message.bytes, message.address))
    }

    /// Waits until a frame with this mark comes by.
    pub(crate) async fn hears(&self, mark: &[u8], leaving: bool, within: Duration) -> bool {
        let begin = Instant::now();
        loop {
            if self.heard(mark, leaving) {
                return true;
            }
            if begin.elapsed() > within {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

/// Counters by name.
pub(crate) type Counts = BTreeMap<String, u64>;

/// What came of a try that was sent: `through`, `stopped as RULE`, `stopped`.
pub(crate) struct Judge<'j> {
    /// Where it comes in before any rule sees it.
    pub(crate) before: Ears,
    /// Where nothing that is stopped may come by; the nearest first.
    pub(crate) beyond: Vec<Ears>,
    /// Whether it leaves there, and does not come in.
    pub(crate) leaving: bool,
    /// What rules counted.
    pub(crate) counts: Box<dyn Fn() -> Counts + 'j>,
}

impl Judge<'_> {
    /// To be called before it is sent.
    pub(crate) fn counted(&self) -> Counts {
        (self.counts)()
    }

    /// To be called after. Of several rules that counted meanwhile, the expected
    /// one is named.
    pub(crate) async fn came(&self, mark: &[u8], before: &Counts, expected: &str) -> String {
        if !self.before.hears(mark, false, ARRIVES).await {
            return "not sent".into();
        }
        if expected != "through" {
            tokio::time::sleep(GOES_ON).await;
        } else if self.beyond[0].hears(mark, self.leaving, ARRIVES).await {
            return "through".into();
        }
        if self
            .beyond
            .iter()
            .any(|ears| ears.heard(mark, self.leaving))
        {
            return "through".into();
        }
        let after = (self.counts)();
        let rose = |name: &&String| after[*name] > before.get(*name).copied().unwrap_or(0);
        let counted: Vec<_> = after.keys().filter(rose).collect();
        let counted = counted.iter().map(|name| format!("stopped as {name}"));
        let counted: Vec<_> = counted.collect();
        match counted.iter().find(|one| *one == expected) {
            Some(one) => one.clone(),
            // What is counted while nothing goes on may be the guest's kernel's own.
            None if counted.is_empty() || expected == "stopped" => "stopped".into(),
            None => counted.join(", "),
        }
    }
}
