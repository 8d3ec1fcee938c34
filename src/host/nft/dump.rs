//! Lists of what the kernel has: whole, or not at all.

use std::io;
use std::os::fd::AsRawFd;

use nix::sys::socket::{MsgFlags, NetlinkAddr, sendto};

use super::{HEADER, NLMSG_ERROR, Socket, messages, receive};

/// End of a list (linux/netlink.h).
const NLMSG_DONE: u16 = 3;
/// Marks a list that somebody changed while it was told: something may be in it
/// twice, or not at all (linux/netlink.h).
const NLM_F_DUMP_INTR: u16 = 0x10;
/// How often a list is asked for that others keep changing.
pub(in crate::host) const TRIES: u32 = 64;

/// Asks for all there is of a kind, and gives the messages of the answer with
/// their headers. A list that changed while it was told is asked for again.
///
/// # Errors
/// The kernel does not answer, or refuses; or the list never stood still.
pub(in crate::host) fn dump(socket: &Socket, ask: &[u8]) -> io::Result<Vec<Vec<u8>>> {
    for _ in 0..TRIES {
        let to = NetlinkAddr::new(0, 0);
        sendto(socket.as_raw_fd(), ask, &to, MsgFlags::empty())?;
        let mut list = List::default();
        let mut buffer = vec![0; 1 << 16];
        loop {
            let length = receive(socket, &mut buffer)?;
            if list.take(&buffer[..length])? {
                break;
            }
        }
        if !list.interrupted {
            return Ok(list.messages);
        }
    }
    Err(restless())
}

/// That a list changed each time it was asked for.
pub(in crate::host) fn restless() -> io::Error {
    io::Error::other(format!(
        "the kernel's list changed each of the {TRIES} times it was read"
    ))
}

/// A list, as far as it was told.
#[derive(Debug, Default)]
struct List {
    messages: Vec<Vec<u8>>,
    /// Whether it is not what there was at any one time.
    interrupted: bool,
}

impl List {
    /// Takes in a piece of the kernel's answer. Gives whether it was the last.
    fn take(&mut self, bytes: &[u8]) -> io::Result<bool> {
        let mut at = 0;
        for (kind, _, content) in messages(bytes) {
            let length = HEADER + content.len();
            let message = &bytes[at..at + length];
            at += length.next_multiple_of(4);
            // The end may be what has the mark: the last message was told before.
            let flags = u16::from_ne_bytes([message[6], message[7]]);
            self.interrupted |= flags & NLM_F_DUMP_INTR != 0;
            if kind != NLMSG_DONE && kind != NLMSG_ERROR {
                self.messages.push(message.to_vec());
                continue;
            }
            let code = content.first_chunk().copied().map_or(0, i32::from_ne_bytes);
            return match code {
                0.. => Ok(true),
                code => Err(io::Error::from_raw_os_error(-code)),
            };
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MULTI: u16 = 2;

    fn message(kind: u16, flags: u16, content: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(((HEADER + content.len()) as u32).to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend(content);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn done(flags: u16, code: i32) -> Vec<u8> {
        message(NLMSG_DONE, MULTI | flags, &code.to_ne_bytes())
    }

    #[test]
    fn a_list_comes_in_pieces_and_has_an_end() {
        let mut list = List::default();
        let (one, two) = (message(100, MULTI, b"one"), message(100, MULTI, b"two!"));
        assert!(!list.take(&[one.clone(), two].concat()).unwrap());
        assert!(list.take(&[one, done(0, 0)].concat()).unwrap());
        assert!(!list.interrupted);
        let contents = list.messages.iter().map(|message| &message[HEADER..]);
        assert_eq!(contents.collect::<Vec<_>>(), [&b"one"[..], b"two!", b"one"]);
    }

    #[test]
    fn what_changed_while_it_was_told_is_no_list() {
        let plain = message(100, MULTI, b"rule");
        let marked = message(100, MULTI | NLM_F_DUMP_INTR, b"rule");
        // In any of its messages, once; or where the last was told before, at its end.
        for pieces in [
            vec![marked.clone(), plain.clone(), done(0, 0)],
            vec![plain.clone(), marked, done(0, 0)],
            vec![plain, done(NLM_F_DUMP_INTR, 0)],
            vec![done(NLM_F_DUMP_INTR, 0)],
        ] {
            let mut list = List::default();
            let ended: Vec<_> = pieces
                .iter()
                .map(|piece| list.take(piece).unwrap())
                .collect();
            assert_eq!(ended.iter().filter(|ended| **ended).count(), 1);
            assert!(ended.last() == Some(&true) && list.interrupted, "{list:?}");
        }
    }

    #[test]
    fn an_error_is_one_also_at_the_end() {
        let refused = message(NLMSG_ERROR, 0, &(-2_i32).to_ne_bytes());
        for bytes in [refused, done(0, -2)] {
            let error = List::default().take(&bytes).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::NotFound);
        }
    }
}
