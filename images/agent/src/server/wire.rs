//! Frames out of and into a [`Channel`]; both halves survive cancellation.

use std::io;

use bulkhead_agent::{HEADER_LEN, Header, Hello, Kind, MAX_PAYLOAD};

use super::outbox::Outbox;
use super::stream::Violation;
use crate::channel::Channel;

/// Bytes asked for at once.
const READ_SIZE: usize = HEADER_LEN + MAX_PAYLOAD;
/// Longest `Hello` looked for after lost step.
const LONGEST_HELLO: u32 = 4096;

/// Reads frames.
#[derive(Debug, Default)]
pub(super) struct Reader {
    buffer: Vec<u8>,
    start: usize,
}

impl Reader {
    /// The next frame; `None` when the host is gone.
    pub(super) async fn frame(
        &mut self,
        channel: &Channel,
    ) -> io::Result<Result<Option<(Header, Vec<u8>)>, Violation>> {
        loop {
            match self.parse() {
                Ok(None) => {}
                done => return Ok(done),
            }
            if self.fill(channel).await? == 0 {
                return Ok(Ok(None));
            }
        }
    }

    /// Skips input up to the next `Hello`; `None` when the host is gone.
    pub(super) async fn hello(&mut self, channel: &Channel) -> io::Result<Option<Hello>> {
        loop {
            while self.start < self.buffer.len() {
                match self.hello_here() {
                    Look::Found(hello) => return Ok(Some(hello)),
                    Look::Partial => break,
                    Look::No => self.start += 1,
                }
            }
            if self.fill(channel).await? == 0 {
                return Ok(None);
            }
        }
    }

    fn hello_here(&mut self) -> Look {
        let Some(header) = self.buffer[self.start..].first_chunk::<HEADER_LEN>() else {
            return Look::Partial;
        };
        match Header::decode(*header) {
            Ok(Header {
                kind: Kind::Hello,
                len,
                ..
            }) if len <= LONGEST_HELLO => {
                let body = self.start + HEADER_LEN;
                let Some(body) = self.buffer.get(body..body + len as usize) else {
                    return Look::Partial;
                };
                match serde_json::from_slice(body) {
                    Ok(hello) => {
                        self.start += HEADER_LEN + len as usize;
                        Look::Found(hello)
                    }
                    Err(_) => Look::No,
                }
            }
            _ => Look::No,
        }
    }

    fn parse(&mut self) -> Result<Option<(Header, Vec<u8>)>, Violation> {
        let bytes = &self.buffer[self.start..];
        let Some(header) = bytes.first_chunk::<HEADER_LEN>() else {
            return Ok(None);
        };
        let header = Header::decode(*header).map_err(|error| error.to_string())?;
        let end = HEADER_LEN + header.len as usize;
        let Some(payload) = bytes.get(HEADER_LEN..end) else {
            return Ok(None);
        };
        let payload = payload.to_vec();
        self.start += end;
        Ok(Some((header, payload)))
    }

    async fn fill(&mut self, channel: &Channel) -> io::Result<usize> {
        self.buffer.drain(..self.start);
        self.start = 0;
        let len = self.buffer.len();
        self.buffer.resize(len + READ_SIZE, 0);
        let mut guard = Truncate {
            buffer: &mut self.buffer,
            len,
        };
        let count = channel.read(&mut guard.buffer[len..]).await?;
        guard.len += count;
        Ok(count)
    }
}

enum Look {
    Found(Hello),
    Partial,
    No,
}

/// Cuts the buffer back to what was really read, also when cancelled.
struct Truncate<'a> {
    buffer: &'a mut Vec<u8>,
    len: usize,
}

impl Drop for Truncate<'_> {
    fn drop(&mut self) {
        self.buffer.truncate(self.len);
    }
}

/// Writes frames. What is in its buffer ends at the end of a frame.
#[derive(Debug, Default)]
pub(super) struct Writer {
    buffer: Vec<u8>,
    sent: usize,
}

impl Writer {
    /// Sends what comes into `outbox`, until the channel fails.
    pub(super) async fn run(&mut self, channel: &Channel, outbox: &Outbox) -> io::Error {
        loop {
            if let Err(error) = self.flush(channel).await {
                return error;
            }
            outbox.take(&mut self.buffer, MAX_PAYLOAD / 2).await;
        }
    }

    /// Sends what is still queued.
    pub(super) async fn finish(&mut self, channel: &Channel, outbox: &Outbox) -> io::Result<()> {
        self.flush(channel).await?;
        while !outbox.is_empty() {
            outbox.take(&mut self.buffer, MAX_PAYLOAD / 2).await;
            self.flush(channel).await?;
        }
        Ok(())
    }

    /// Sends what is in the buffer.
    async fn flush(&mut self, channel: &Channel) -> io::Result<()> {
        while self.sent < self.buffer.len() {
            self.sent += channel.write(&self.buffer[self.sent..]).await?;
        }
        self.buffer.clear();
        self.sent = 0;
        Ok(())
    }
}
