//! Where the body of a request ends that comes in chunks.

use super::request::ambiguous;
use crate::net::refusal::Refusal;

/// Follows chunks (RFC 9112, 7.1) to their end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Chunks {
    state: Chunk,
    /// Bytes of the present line, or of all trailers.
    line: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Chunk {
    /// Digits of the size so far: how many, and their value.
    Size(u8, u64),
    /// An extension, which nobody uses.
    Extension(u64),
    /// The end of the size's line.
    SizeEnd(u64),
    Data(u64),
    DataEnd,
    DataEndLf,
    /// At the start of a trailer's line, in one, or at its end.
    TrailerStart,
    Trailer,
    TrailerEnd,
    LastLf,
    Done,
}

/// Longest line of a size, and all trailers together.
const LINE: usize = 1024;

impl Chunks {
    pub(super) fn new() -> Self {
        Self {
            state: Chunk::Size(0, 0),
            line: 0,
        }
    }

    /// Whether the last chunk and what follows it are over.
    pub(super) fn is_done(&self) -> bool {
        self.state == Chunk::Done
    }

    /// Follows `bytes`, and gives how many of them belong to the chunks.
    pub(super) fn follow(&mut self, bytes: &[u8]) -> Result<usize, Refusal> {
        let wrong = || ambiguous("has chunks that are read differently");
        let mut at = 0;
        while at < bytes.len() && !self.is_done() {
            if let Chunk::Data(left) = self.state {
                let here = usize::try_from(left)
                    .unwrap_or(usize::MAX)
                    .min(bytes.len() - at);
                at += here;
                // At most what is left.
                self.state = match left - here as u64 {
                    0 => Chunk::DataEnd,
                    left => Chunk::Data(left),
                };
                continue;
            }
            self.line += 1;
            if self.line > LINE {
                return Err(wrong());
            }
            self.state = self.next(bytes[at]).ok_or_else(wrong)?;
            at += 1;
        }
        Ok(at)
    }

    fn next(&mut self, byte: u8) -> Option<Chunk> {
        let text = byte == b'\t' || (0x20..0x7f).contains(&byte);
        Some(match (self.state, byte) {
            (Chunk::Size(1.., size), b'\r') => Chunk::SizeEnd(size),
            (Chunk::Size(1.., size), b';') => Chunk::Extension(size),
            (Chunk::Size(digits @ ..15, size), _) => {
                let digit = char::from(byte).to_digit(16)?;
                Chunk::Size(digits + 1, size * 16 + u64::from(digit))
            }
            (Chunk::Extension(size), b'\r') => Chunk::SizeEnd(size),
            (Chunk::Extension(size), _) if text => Chunk::Extension(size),
            (Chunk::SizeEnd(size), b'\n') => {
                self.line = 0;
                if size > 0 {
                    Chunk::Data(size)
                } else {
                    Chunk::TrailerStart
                }
            }
            (Chunk::DataEnd, b'\r') => Chunk::DataEndLf,
            (Chunk::DataEndLf, b'\n') => {
                self.line = 0;
                Chunk::Size(0, 0)
            }
            (Chunk::TrailerStart, b'\r') => Chunk::LastLf,
            (Chunk::Trailer, b'\r') => Chunk::TrailerEnd,
            (Chunk::TrailerStart | Chunk::Trailer, _) if text => Chunk::Trailer,
            (Chunk::TrailerEnd, b'\n') => Chunk::TrailerStart,
            (Chunk::LastLf, b'\n') => Chunk::Done,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn chunks_are_followed_to_their_end() {
        let body =
            b"5\r\nhello\r\n1A;x=\"y\"\r\nabcdefghijklmnopqrstuvwxyz\r\n0\r\nT: v\r\n\r\nGET";
        for step in [1, 2, 7, 1000] {
            let mut chunks = Chunks::new();
            let mut taken = 0;
            while !chunks.is_done() {
                let end = body.len().min(taken + step);
                taken += chunks.follow(&body[taken..end]).unwrap();
            }
            assert_eq!(&body[taken..], b"GET", "{step}");
        }
    }

    #[test]
    fn chunks_that_are_read_differently_are_refused() {
        for body in [
            &b"\r\n"[..],
            b"5\nhello",
            b"0x5\r\nhello",
            b" 5\r\nhello",
            b"5 \r\nhello",
            b"-1\r\n",
            b"5\r\nhelloX",
            b"5\r\nhello\n",
            b"1111111111111111\r\n",
            b"0\r\nT: v\n\r\n",
            b"1;\x01\r\n",
        ] {
            assert!(Chunks::new().follow(body).is_err(), "{body:?}");
        }
        let trailers = [b"0\r\n", &b"T: v\r\n".repeat(1000)[..]].concat();
        assert!(Chunks::new().follow(&trailers).is_err());
    }

    proptest! {
        #[test]
        fn any_chunks_have_an_answer(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut chunks = Chunks::new();
            if let Ok(taken) = chunks.follow(&bytes) {
                prop_assert!(taken == bytes.len() || chunks.is_done());
            }
        }
    }
}
