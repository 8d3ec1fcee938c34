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
    buffer: Vec<u8>,
}

impl Output {
    pub(super) fn new(stream: &Arc<Stream>, kind: Kind) -> Self {
        Self {
            runtime: Handle::current(),
            stream: Arc::clone(stream),
            kind,
            buffer: Vec::with_capacity(MAX_PAYLOAD),
        }
    }

    /// Writes all of `bytes`.
    pub(super) fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.write_all(bytes).context(|| "cannot send".into())
    }

    /// Sends what is still here.
    pub(super) fn finish(mut self) -> Result<()> {
        self.flush().context(|| "cannot send".into())
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(MAX_PAYLOAD - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..count]);
        if self.buffer.len() == MAX_PAYLOAD {
            self.flush()?;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        let mut rest = &self.buffer[..];
        while !rest.is_empty() {
            let room = self.runtime.block_on(self.stream.room(rest.len()))?;
            let (now, later) = rest.split_at(room.bytes);
            let mut frame = vec![0; HEADER_LEN];
            frame.extend_from_slice(now);
            self.stream.send(room, self.kind, frame);
            rest = later;
        }
        self.buffer.clear();
        Ok(())
    }
}
