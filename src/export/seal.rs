//! The outside of an export: links of a chain, each with the digest of all
//! before it, so that nothing damaged is ever decompressed.

use std::io::{self, BufRead, Read, Write};

use sha2::{Digest as _, Sha256};

use super::error::Flaw;

/// First bytes of every export.
const MAGIC: [u8; 8] = *b"BULKHEAD";
/// Format of what follows.
const FORMAT: u32 = 1;
/// Most bytes in a link.
const MOST: usize = 1 << 20;
/// Bytes of a digest.
const DIGEST: usize = 32;

/// Writes a chain: its beginning, then links of a length (32 bits, little
/// endian), so many bytes, and the SHA-256 of everything up to there but the
/// digests. One without bytes is the last.
pub(super) struct Sealing<W> {
    to: W,
    hash: Sha256,
    bytes: Vec<u8>,
    written: u64,
}

impl<W: Write> Sealing<W> {
    pub(super) fn new(mut to: W) -> io::Result<Self> {
        let begin = [&MAGIC[..], &FORMAT.to_le_bytes()].concat();
        to.write_all(&begin)?;
        Ok(Self {
            to,
            hash: Sha256::new_with_prefix(&begin),
            bytes: Vec::with_capacity(MOST),
            written: begin.len() as u64,
        })
    }

    fn link(&mut self) -> io::Result<()> {
        let len = u32::try_from(self.bytes.len()).map_err(io::Error::other)?;
        let len = len.to_le_bytes();
        self.hash.update(len);
        self.hash.update(&self.bytes);
        let digest = self.hash.clone().finalize();
        for part in [&len[..], &self.bytes, &digest] {
            self.to.write_all(part)?;
            self.written += part.len() as u64;
        }
        self.bytes.clear();
        Ok(())
    }

    /// Writes the end; gives how many bytes there are in all.
    pub(super) fn finish(mut self) -> io::Result<u64> {
        if !self.bytes.is_empty() {
            self.link()?;
        }
        self.link()?;
        self.to.flush()?;
        Ok(self.written)
    }
}

impl<W: Write> Write for Sealing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(MOST - self.bytes.len());
        self.bytes.extend_from_slice(&bytes[..count]);
        if self.bytes.len() == MOST {
            self.link()?;
        }
        Ok(count)
    }

    /// A link is as long as it can be: only the end writes a shorter one.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads a chain; each link is checked before any of it is given away. Errors
/// of reading carry a [`Flaw`].
pub(super) struct Sealed<R> {
    from: R,
    hash: Sha256,
    bytes: Vec<u8>,
    at: usize,
    over: bool,
}

impl<R: Read> Sealed<R> {
    pub(super) fn new(mut from: R) -> Result<Self, Flaw> {
        let mut begin = [0; MAGIC.len() + 4];
        fill(&mut from, &mut begin).map_err(|flaw| match flaw {
            Flaw::Truncated => Flaw::NoExport,
            other => other,
        })?;
        let (magic, format) = begin.split_at(MAGIC.len());
        let found = format.try_into().map_or(0, u32::from_le_bytes);
        match (magic == MAGIC, found) {
            (false, _) => Err(Flaw::NoExport),
            (true, FORMAT) => Ok(Self {
                from,
                hash: Sha256::new_with_prefix(begin),
                bytes: Vec::new(),
                at: 0,
                over: false,
            }),
            (true, found) => Err(Flaw::Format {
                found,
                known: FORMAT,
            }),
        }
    }

    fn link(&mut self) -> Result<(), Flaw> {
        let mut len = [0; 4];
        fill(&mut self.from, &mut len)?;
        let count = u32::from_le_bytes(len) as usize;
        if count > MOST {
            let told = format!("a part of {count} bytes, and {MOST} are the most");
            return Err(Flaw::Corrupt(told));
        }
        self.at = 0;
        self.bytes.resize(count, 0);
        fill(&mut self.from, &mut self.bytes)?;
        self.hash.update(len);
        self.hash.update(&self.bytes);
        let mut digest = [0; DIGEST];
        fill(&mut self.from, &mut digest)?;
        if self.hash.clone().finalize()[..] != digest {
            // Nobody gets at it by trying again.
            self.bytes.clear();
            return Err(Flaw::Corrupt("a digest is wrong".into()));
        }
        if count == 0 {
            self.over = true;
            let more = io::copy(&mut self.from.by_ref().take(1), &mut io::sink());
            if more.map_err(Flaw::Unreadable)? > 0 {
                return Err(Flaw::Trailing);
            }
        }
        Ok(())
    }
}

fn fill(from: &mut impl Read, bytes: &mut [u8]) -> Result<(), Flaw> {
    from.read_exact(bytes).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => Flaw::Truncated,
        _ => Flaw::Unreadable(error),
    })
}

impl<R: Read> BufRead for Sealed<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.at == self.bytes.len() && !self.over {
            self.link().map_err(io::Error::other)?;
        }
        Ok(&self.bytes[self.at..])
    }

    fn consume(&mut self, count: usize) {
        self.at += count;
    }
}

impl<R: Read> Read for Sealed<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = self.fill_buf()?.read(bytes)?;
        self.consume(count);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sealed(bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        let mut sealing = Sealing::new(&mut out).unwrap();
        sealing.write_all(bytes).unwrap();
        let written = sealing.finish().unwrap();
        assert_eq!(written, out.len() as u64);
        out
    }

    fn opened(bytes: &[u8]) -> Result<Vec<u8>, Flaw> {
        let mut out = Vec::new();
        let mut chain = Sealed::new(bytes)?;
        chain.read_to_end(&mut out).map_err(Flaw::of)?;
        Ok(out)
    }

    #[test]
    fn what_was_sealed_comes_out() {
        for size in [0, 1, MOST - 1, MOST, 2 * MOST + 5] {
            let bytes: Vec<u8> = (0..size).map(|at| (at % 251) as u8).collect();
            assert_eq!(opened(&sealed(&bytes)).unwrap(), bytes, "{size}");
        }
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let whole = sealed(b"some bytes");
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut bad = whole.clone();
                bad[at] ^= 1 << bit;
                assert!(opened(&bad).is_err(), "byte {at}, bit {bit}");
            }
        }
    }

    #[test]
    fn every_end_but_its_own_is_refused_by_name() {
        let whole = sealed(b"some bytes");
        for len in 0..whole.len() {
            let flaw = opened(&whole[..len]).unwrap_err();
            let told = match len < MAGIC.len() + 4 {
                true => matches!(flaw, Flaw::NoExport),
                false => matches!(flaw, Flaw::Truncated),
            };
            assert!(told, "{len}: {flaw:?}");
        }
        let more = [&whole[..], b"\0"].concat();
        assert!(matches!(opened(&more), Err(Flaw::Trailing)));
        let two = [&whole[..], &whole].concat();
        assert!(matches!(opened(&two), Err(Flaw::Trailing)));
        let mut newer = whole.clone();
        newer[MAGIC.len()] = 2;
        assert!(matches!(opened(&newer), Err(Flaw::Format { found: 2, .. })));
        assert!(matches!(
            opened(b"\x1f\x8b\x08 a tarball"),
            Err(Flaw::NoExport)
        ));
    }

    #[test]
    fn a_link_of_another_chain_does_not_fit() {
        let (one, other) = (sealed(b"one"), sealed(b"two"));
        let last = 4 + DIGEST;
        let mixed = [&one[..one.len() - last], &other[other.len() - last..]].concat();
        assert!(matches!(opened(&mixed), Err(Flaw::Corrupt(_))));
    }
}
