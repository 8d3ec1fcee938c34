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

/// Reads frames. Its buffer is made once and never cleared: a port gives a page
/// at a time, and clearing what a frame may need would cost more than reading.
#[derive(Debug)]
pub(super) struct Reader {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Default for Reader {
    fn default() -> Self {
        Self {
            buffer: vec![0; 2 * READ_SIZE].into(),
            start: 0,
            end: 0,
        }
    }
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
            while self.start < self.end {
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
        let Some(header) = self.buffer[self.start..self.end].first_chunk::<HEADER_LEN>() else {
            return Look::Partial;
        };
        match Header::decode(*header) {
            Ok(Header {
                kind: Kind::Hello,
                len,
                ..
            }) if len <= LONGEST_HELLO => {
                let body = self.start + HEADER_LEN;
                let Some(body) = self.buffer[..self.end].get(body..body + len as usize) else {
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
        let bytes = &self.buffer[self.start..self.end];
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

    /// Reads once. Nothing is lost when this is cancelled: it is the last step.
    async fn fill(&mut self, channel: &Channel) -> io::Result<usize> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.buffer.len() - self.end < READ_SIZE {
            // At most one frame is incomplete, so half of the buffer is free then.
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let count = channel.read(&mut self.buffer[self.end..]).await?;
        self.end += count;
        Ok(count)
    }
}

enum Look {
    Found(Hello),
    Partial,
    No,
}

/// Writes frames. What is in its buffer ends at the end of a frame.
#[derive(Debug, Default)]
pub(super) struct Writer {
    buffer: Vec<u8>,
    sent: usize,
}

impl Writer {
    /// Sends what is in `outbox` as far as it fits now.
    pub(super) fn push(&mut self, channel: &Channel, outbox: &Outbox) -> io::Result<()> {
        loop {
            if self.buffer.is_empty() {
                outbox.take(&mut self.buffer, MAX_PAYLOAD / 2);
            }
            if self.buffer.is_empty() {
                return Ok(());
            }
            match channel.try_write(&self.buffer[self.sent..])? {
                Some(count) => self.wrote(outbox, count),
                None => return Ok(()),
            }
        }
    }

    /// Waits until there is more to send, or the host takes more of what did not
    /// fit; an error when it is gone. Cancel-safe.
    pub(super) async fn more(&mut self, channel: &Channel, outbox: &Outbox) -> io::Result<()> {
        if self.buffer.is_empty() {
            outbox.filled().await;
        } else {
            let count = channel.write(&self.buffer[self.sent..]).await?;
            self.wrote(outbox, count);
        }
        Ok(())
    }

    /// Sends what is still queued.
    pub(super) async fn finish(&mut self, channel: &Channel, outbox: &Outbox) -> io::Result<()> {
        self.push(channel, outbox)?;
        while !self.buffer.is_empty() {
            self.more(channel, outbox).await?;
            self.push(channel, outbox)?;
        }
        Ok(())
    }

    fn wrote(&mut self, outbox: &Outbox, count: usize) {
        self.sent += count;
        if self.sent == self.buffer.len() {
            outbox.give_back(std::mem::take(&mut self.buffer));
            self.sent = 0;
        }
    }
}
