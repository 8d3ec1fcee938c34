//! Blocking work on a stream: a thread that reads its input or writes its output.

use std::io::{self, Read, Write};
use std::sync::Arc;

use bulkhead_agent::{Exit, FailureKind, HEADER_LEN, Kind, MAX_PAYLOAD};
use tokio::runtime::Handle;

use crate::failure::{Context, Result, failure};
use crate::server::Stream;

/// Runs `work` on a thread of its own, to the end of the stream.
pub(crate) async fn run(
    stream: Arc<Stream>,
    work: impl FnOnce() -> Result<()> + Send + 'static,
) -> Exit {
    let done = tokio::task::spawn_blocking(work).await;
    let done = done.unwrap_or_else(|error| {
        Err(failure(
            FailureKind::System,
            format!("the work broke off: {error}"),
        ))
    });
    match done {
        Ok(()) => Exit {
            code: Some(0),
            ..Exit::default()
        },
        Err(failure) => stream.refuse(failure),
    }
}

/// The input of a stream.
pub(super) struct Input {
    runtime: Handle,
    stream: Arc<Stream>,
    chunk: Vec<u8>,
    read: usize,
}

impl Input {
    pub(super) fn new(stream: &Arc<Stream>) -> Self {
        Self {
            runtime: Handle::current(),
            stream: Arc::clone(stream),
            chunk: Vec::new(),
            read: 0,
        }
    }
}

impl Read for Input {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.read == self.chunk.len() {
            let next = self.runtime.block_on(self.stream.next_input())?;
            let Some(chunk) = next else { return Ok(0) };
            (self.chunk, self.read) = (chunk, 0);
        }
        let count = buffer.len().min(self.chunk.len() - self.read);
        buffer[..count].copy_from_slice(&self.chunk[self.read..][..count]);
        self.read += count;
        Ok(count)
    }
}

/// One of the outputs of a stream, in full frames.
pub(super) struct Output {
    runtime: Handle,
    stream: Arc<Stream>,
    kind: Kind,
    /// The next frame, with room for its header. It goes out as it is: bytes
    /// are not copied from here.
    frame: Vec<u8>,
}

/// A frame without payload, and with room for all of it.
fn fresh() -> Vec<u8> {
    let mut frame = Vec::with_capacity(FULL);
    frame.resize(HEADER_LEN, 0);
    frame
}

/// Length of a frame that takes no more.
const FULL: usize = HEADER_LEN + MAX_PAYLOAD;

impl Output {
    pub(super) fn new(stream: &Arc<Stream>, kind: Kind) -> Self {
        Self {
            runtime: Handle::current(),
            stream: Arc::clone(stream),
            kind,
            frame: fresh(),
        }
    }

    /// Writes all of `bytes`.
    pub(super) fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.write_all(bytes).context(|| "cannot send".into())
    }

    /// Reads up to `size` bytes from `source`, straight into frames; gives how
    /// many there were.
    pub(super) fn take(&mut self, source: &mut impl Read, size: u64) -> io::Result<u64> {
        let mut left = size;
        while left > 0 {
            let room = (FULL - self.frame.len()) as u64;
            let part = &mut source.take(left.min(room));
            let count = part.read_to_end(&mut self.frame)? as u64;
            if count == 0 {
                break;
            }
            left -= count;
            if self.frame.len() == FULL {
                self.flush()?;
            }
        }
        Ok(size - left)
    }

    /// Sends what is still here.
    pub(super) fn finish(mut self) -> Result<()> {
        self.flush().context(|| "cannot send".into())
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(FULL - self.frame.len());
        self.frame.extend_from_slice(&bytes[..count]);
        if self.frame.len() == FULL {
            self.flush()?;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        while self.frame.len() > HEADER_LEN {
            let room = self.stream.room(self.frame.len() - HEADER_LEN);
            let room = self.runtime.block_on(room)?;
            let sent = HEADER_LEN + room.bytes;
            let frame = if sent == self.frame.len() {
                std::mem::replace(&mut self.frame, fresh())
            } else {
                let now = self.frame[..sent].to_vec();
                self.frame.drain(HEADER_LEN..sent);
                now
            };
            self.stream.send(room, self.kind, frame);
        }
        Ok(())
    }
}
