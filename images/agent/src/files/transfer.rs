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

/// Runs `work` on a thread that has ended when this is over. One of the runtime's
/// is kept for a while, and each clone of this machine would have to end it.
pub(crate) async fn alone<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (over, is_over) = tokio::sync::oneshot::channel::<()>();
    let thread = std::thread::Builder::new().stack_size(512 * 1024);
    let thread = thread.spawn(move || {
        // Dropped however it ends.
        let _over = over;
        work()
    });
    let thread = thread.context(|| "cannot start a thread".into())?;
    let _ = is_over.await;
    // What is left of it takes no time.
    thread.join().unwrap_or_else(|_| {
        let what = "the work broke off".to_owned();
        Err(failure(FailureKind::System, what))
    })
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
    /// Full ones that are still here.
    full: Vec<Vec<u8>>,
    /// The next frame, as long as one that is full, with room for its header.
    /// It goes out as it is: bytes are not copied from here.
    frame: Vec<u8>,
    /// So much of it is used.
    used: usize,
}

/// Length of a frame that takes no more: a port takes 32 KiB at a time, and a few
/// bytes beyond that cost it as much.
const FULL: usize = MAX_PAYLOAD;
/// Full frames that are sent together.
const TOGETHER: usize = 4;

impl Output {
    pub(super) fn new(stream: &Arc<Stream>, kind: Kind) -> Self {
        Self {
            runtime: Handle::current(),
            stream: Arc::clone(stream),
            kind,
            full: Vec::new(),
            frame: stream.blank(FULL),
            used: HEADER_LEN,
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
            let room = left.min((FULL - self.used) as u64) as usize;
            match source.read(&mut self.frame[self.used..][..room]) {
                Ok(0) => break,
                Ok(count) => {
                    self.used += count;
                    left -= count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            self.pass_on()?;
        }
        Ok(size - left)
    }

    /// Puts a frame aside that is full, and sends them when there are enough.
    fn pass_on(&mut self) -> io::Result<()> {
        if self.used == FULL {
            self.put_aside();
        }
        match self.full.len() {
            TOGETHER => self.send(),
            _ => Ok(()),
        }
    }

    fn put_aside(&mut self) {
        let mut frame = std::mem::replace(&mut self.frame, self.stream.blank(FULL));
        frame.truncate(self.used);
        self.full.push(frame);
        self.used = HEADER_LEN;
    }

    fn send(&mut self) -> io::Result<()> {
        let frames = std::mem::take(&mut self.full);
        self.runtime
            .block_on(self.stream.send_all(self.kind, frames))
    }

    /// Sends what is still here.
    pub(super) fn finish(mut self) -> Result<()> {
        self.flush().context(|| "cannot send".into())
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(FULL - self.used);
        self.frame[self.used..][..count].copy_from_slice(&bytes[..count]);
        self.used += count;
        self.pass_on()?;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.used > HEADER_LEN {
            self.put_aside();
        }
        self.send()
    }
}
