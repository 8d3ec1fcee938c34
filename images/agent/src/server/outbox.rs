//! Frames on their way to the host: urgent ones first, data in turn.
//!
//! Every stream has few data frames here, and all together at most
//! [`DATA_FRAMES`]; so streams take turns and memory is bounded.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_agent::{HEADER_LEN, Header, Kind};
use serde::Serialize;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

/// Most data frames waiting at once.
const DATA_FRAMES: usize = 64;
/// Above this many bytes of answers the host does not read, its frames wait.
const URGENT_LIMIT: usize = 1024 * 1024;

/// Most frames that are kept to be filled again.
const SPARE: usize = 8;
/// From so many bytes on a frame goes out from where it is.
const LARGE: usize = 4096;

/// A frame ready for the wire, and the turns it holds until it is sent.
pub(crate) type Entry = (Vec<u8>, Vec<OwnedSemaphorePermit>);

#[derive(Debug, Default)]
struct Queues {
    closed: bool,
    urgent: VecDeque<Vec<u8>>,
    urgent_bytes: usize,
    credits: BTreeMap<u32, u32>,
    data: VecDeque<Entry>,
    /// Frames that were sent, to be filled again.
    spare: Vec<Vec<u8>>,
}

/// The outgoing frames of one session.
#[derive(Debug)]
pub(crate) struct Outbox {
    queues: Mutex<Queues>,
    filled: Notify,
    drained: Notify,
    slots: Arc<Semaphore>,
}

impl Outbox {
    pub(crate) fn new() -> Self {
        Self {
            queues: Mutex::default(),
            filled: Notify::new(),
            drained: Notify::new(),
            slots: Arc::new(Semaphore::new(DATA_FRAMES)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a message ahead of all data.
    pub(crate) fn send_urgent(&self, stream: u32, kind: Kind, message: &impl Serialize) {
        let frame = encode(stream, kind, message);
        let mut queues = self.lock();
        if !queues.closed {
            queues.urgent_bytes += frame.len();
            queues.urgent.push_back(frame);
            self.filled.notify_one();
        }
    }

    /// Queues a message behind the data that is already there.
    pub(crate) fn send_last(&self, stream: u32, kind: Kind, message: &impl Serialize) {
        self.push(vec![(encode(stream, kind, message), Vec::new())]);
    }

    /// Returns `count` consumed bytes to the host.
    pub(crate) fn send_credit(&self, stream: u32, count: u32) {
        let mut queues = self.lock();
        if !queues.closed && count > 0 {
            *queues.credits.entry(stream).or_default() += count;
            self.filled.notify_one();
        }
    }

    /// Waits for room for one data frame of a stream whose turn is `turn`.
    pub(crate) async fn room(&self, turn: &Arc<Semaphore>) -> Option<Vec<OwnedSemaphorePermit>> {
        let own = Arc::clone(turn).acquire_owned().await.ok()?;
        let any = Arc::clone(&self.slots).acquire_owned().await.ok()?;
        Some(vec![own, any])
    }

    /// Room for one data frame, where nobody has to be waited for.
    pub(crate) fn room_now(&self, turn: &Arc<Semaphore>) -> Option<Vec<OwnedSemaphorePermit>> {
        let own = Arc::clone(turn).try_acquire_owned().ok()?;
        let any = Arc::clone(&self.slots).try_acquire_owned().ok()?;
        Some(vec![own, any])
    }

    /// Queues a data frame in the room that was waited for. `frame` starts
    /// with [`HEADER_LEN`] bytes to be filled in.
    pub(crate) fn send_data(
        &self,
        stream: u32,
        kind: Kind,
        frame: Vec<u8>,
        room: Vec<OwnedSemaphorePermit>,
    ) {
        self.send_batch(stream, kind, vec![(frame, room)]);
    }

    /// As [`Outbox::send_data`], several at once.
    pub(crate) fn send_batch(&self, stream: u32, kind: Kind, mut batch: Vec<Entry>) {
        for (frame, _) in &mut batch {
            fill_header(frame, stream, kind);
        }
        self.push(batch);
    }

    fn push(&self, entries: Vec<Entry>) {
        let mut queues = self.lock();
        if !queues.closed {
            queues.data.extend(entries);
            self.filled.notify_one();
        }
    }

    /// A frame that was sent, or an empty one.
    pub(crate) fn spare(&self) -> Vec<u8> {
        self.lock().spare.pop().unwrap_or_default()
    }

    /// Takes a frame that was sent.
    pub(crate) fn give_back(&self, frame: Vec<u8>) {
        let mut queues = self.lock();
        if frame.capacity() >= LARGE && queues.spare.len() < SPARE {
            queues.spare.push(frame);
        }
    }

    /// Waits until something was queued. It may have been taken since.
    pub(crate) async fn filled(&self) {
        self.filled.notified().await;
    }

    /// The next frames, appended to `buffer` up to about `limit` bytes.
    pub(crate) fn take(&self, buffer: &mut Vec<u8>, limit: usize) {
        let mut queues = self.lock();
        while buffer.len() < limit {
            if let Some(frame) = queues.urgent.pop_front() {
                queues.urgent_bytes -= frame.len();
                buffer.extend(frame);
            } else if let Some((stream, count)) = queues.credits.pop_first() {
                let mut frame = vec![0; HEADER_LEN];
                frame.extend(count.to_le_bytes());
                fill_header(&mut frame, stream, Kind::Credit);
                buffer.extend(frame);
            } else if let Some((frame, _turns)) = queues.data.pop_front() {
                match buffer.is_empty() && frame.len() >= LARGE {
                    true => *buffer = frame,
                    false => buffer.extend(frame),
                }
            } else {
                break;
            }
        }
        self.drained.notify_one();
    }

    /// Waits until the host has read enough of its answers.
    pub(crate) async fn calm(&self) {
        while self.lock().urgent_bytes > URGENT_LIMIT {
            self.drained.notified().await;
        }
    }

    /// Drops what is queued, and all that will be.
    pub(crate) fn close(&self) {
        self.slots.close();
        *self.lock() = Queues {
            closed: true,
            ..Queues::default()
        };
    }
}

fn encode(stream: u32, kind: Kind, message: &impl Serialize) -> Vec<u8> {
    let mut frame = vec![0; HEADER_LEN];
    // The messages are plain data: they always have a JSON form.
    serde_json::to_writer(&mut frame, message).expect("a message is representable");
    fill_header(&mut frame, stream, kind);
    frame
}

fn fill_header(frame: &mut [u8], stream: u32, kind: Kind) {
    let header = Header {
        len: (frame.len() - HEADER_LEN) as u32,
        stream,
        kind,
    };
    frame[..HEADER_LEN].copy_from_slice(&header.encode());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn answers_overtake_data_but_the_exit_does_not() {
        let outbox = Outbox::new();
        let turn = Arc::new(Semaphore::new(1));
        let room = outbox.room(&turn).await.unwrap();
        outbox.send_data(1, Kind::Out, vec![7; HEADER_LEN + 1], room);
        outbox.send_last(1, Kind::Exit, &1);
        outbox.send_credit(2, 5);
        outbox.send_credit(2, 6);
        outbox.send_urgent(3, Kind::Reply, &2);
        let mut kinds = Vec::new();
        loop {
            let mut bytes = Vec::new();
            outbox.take(&mut bytes, 1);
            if bytes.is_empty() {
                break;
            }
            kinds.push((Kind::try_from(bytes[8]).unwrap(), bytes[HEADER_LEN]));
        }
        let expected = [
            (Kind::Reply, b'2'),
            (Kind::Credit, 11),
            (Kind::Out, 7),
            (Kind::Exit, b'1'),
        ];
        assert_eq!(kinds, expected);
        assert_eq!(turn.available_permits(), 1);
    }
}
