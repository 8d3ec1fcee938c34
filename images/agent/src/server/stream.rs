//! One stream as the work behind it sees it: input, output, end.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_agent::{Exit, Failure, HEADER_LEN, Kind, MAX_PAYLOAD, Reply, WINDOW};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use super::outbox::Outbox;

/// Most data frames of one stream that wait to be sent at once.
const FRAMES: usize = 4;

/// What the host did wrong; ends the session.
pub(crate) type Violation = String;

#[derive(Debug, Default)]
struct Input {
    chunks: VecDeque<Vec<u8>>,
    /// Bytes the host has sent and not got back.
    unacknowledged: u32,
    ended: bool,
    cancelled: bool,
}

/// An open stream.
#[derive(Debug)]
pub(crate) struct Stream {
    id: u32,
    outbox: Arc<Outbox>,
    input: Mutex<Input>,
    arrived: Notify,
    window: Semaphore,
    turn: Arc<Semaphore>,
    answered: AtomicBool,
}

/// Leave to send some bytes.
pub(crate) struct Room {
    frame_room: Vec<OwnedSemaphorePermit>,
    /// How many bytes.
    pub(crate) bytes: usize,
}

impl Stream {
    pub(crate) fn new(id: u32, outbox: Arc<Outbox>) -> Self {
        Self {
            id,
            outbox,
            input: Mutex::default(),
            arrived: Notify::new(),
            window: Semaphore::new(WINDOW as usize),
            turn: Arc::new(Semaphore::new(FRAMES)),
            answered: AtomicBool::new(false),
        }
    }

    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    fn input(&self) -> MutexGuard<'_, Input> {
        self.input.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes an `In` frame.
    pub(super) fn receive(&self, bytes: Vec<u8>) -> Result<(), Violation> {
        let mut input = self.input();
        if input.ended {
            return Err(format!("input after the end of stream {}", self.id));
        }
        input.unacknowledged += bytes.len() as u32;
        if input.unacknowledged > WINDOW {
            return Err(format!("input past the window of stream {}", self.id));
        }
        match input.chunks.back_mut() {
            // Many small frames must not cost more than their bytes.
            Some(last) if last.len() + bytes.len() <= MAX_PAYLOAD => last.extend(bytes),
            _ => input.chunks.push_back(bytes),
        }
        self.arrived.notify_one();
        Ok(())
    }

    /// Takes an `End` frame.
    pub(super) fn end_input(&self) -> Result<(), Violation> {
        let mut input = self.input();
        if std::mem::replace(&mut input.ended, true) {
            return Err(format!("a second end of stream {}", self.id));
        }
        self.arrived.notify_one();
        Ok(())
    }

    /// Takes a `Credit` frame.
    pub(super) fn credit(&self, count: u32) -> Result<(), Violation> {
        if self.window.available_permits() + count as usize > WINDOW as usize {
            return Err(format!("credit past the window of stream {}", self.id));
        }
        self.window.add_permits(count as usize);
        Ok(())
    }

    /// Makes everything that waits on this stream give up.
    pub(crate) fn cancel(&self) {
        self.input().cancelled = true;
        self.window.close();
        self.turn.close();
        self.arrived.notify_one();
    }

    /// The next input; `None` at its end. The bytes count as consumed: the
    /// host may send as many again.
    ///
    /// # Errors
    /// The stream was cancelled.
    pub(crate) async fn next_input(&self) -> io::Result<Option<Vec<u8>>> {
        loop {
            {
                let mut input = self.input();
                if input.cancelled {
                    return Err(cancelled());
                }
                if let Some(chunk) = input.chunks.pop_front() {
                    input.unacknowledged -= chunk.len() as u32;
                    self.outbox.send_credit(self.id, chunk.len() as u32);
                    return Ok(Some(chunk));
                }
                if input.ended {
                    return Ok(None);
                }
            }
            self.arrived.notified().await;
        }
    }

    /// Waits until something may be sent: at most `limit` bytes.
    ///
    /// # Errors
    /// The stream was cancelled.
    pub(crate) async fn room(&self, limit: usize) -> io::Result<Room> {
        let first = self.window.acquire().await.map_err(|_| cancelled())?;
        first.forget();
        let mut bytes = 1;
        let more = (limit.min(MAX_PAYLOAD) - 1).min(self.window.available_permits());
        if let Ok(rest) = self.window.try_acquire_many(more as u32) {
            rest.forget();
            bytes += more;
        }
        // Only now, so that a stream without credit keeps no room from others.
        let frame_room = self.outbox.room(&self.turn).await.ok_or_else(cancelled)?;
        Ok(Room { frame_room, bytes })
    }

    /// Sends a frame in the room that was waited for. `frame` has
    /// [`HEADER_LEN`] bytes to spare at its start.
    pub(crate) fn send(&self, room: Room, kind: Kind, frame: Vec<u8>) {
        let used = frame.len() - HEADER_LEN;
        debug_assert!(used <= room.bytes);
        self.window.add_permits(room.bytes - used);
        if used > 0 {
            self.outbox.send_data(self.id, kind, frame, room.frame_room);
        }
    }

    /// A frame of that length, with anything in it. Those that were sent are used
    /// again: under emulation memory that comes and goes costs more than all
    /// copying of bytes.
    pub(crate) fn blank(&self, len: usize) -> Vec<u8> {
        let mut frame = self.outbox.spare();
        frame.resize(len, 0);
        frame
    }

    /// Sends all of `frames`, which have [`HEADER_LEN`] bytes to spare at their
    /// start. Where there is room for several, they go together: whoever works
    /// on a thread of its own is not to change places with the server for each.
    ///
    /// # Errors
    /// The stream was cancelled.
    pub(crate) async fn send_all(&self, kind: Kind, frames: Vec<Vec<u8>>) -> io::Result<()> {
        let mut left = VecDeque::from(frames);
        while let Some(first) = left.front() {
            let room = self.room(first.len() - HEADER_LEN).await?;
            let mut batch = vec![(Self::cut(&mut left, room.bytes), room.frame_room)];
            while let Some(next) = left.front()
                && let Some(room) = self.room_now(next.len() - HEADER_LEN)
            {
                batch.push((Self::cut(&mut left, room.bytes), room.frame_room));
            }
            self.outbox.send_batch(self.id, kind, batch);
        }
        Ok(())
    }

    /// Takes the first frame, or so many bytes of it; the rest stays.
    fn cut(frames: &mut VecDeque<Vec<u8>>, bytes: usize) -> Vec<u8> {
        let end = HEADER_LEN + bytes;
        match frames.front_mut() {
            Some(first) if first.len() > end => {
                let now = first[..end].to_vec();
                first.drain(HEADER_LEN..end);
                now
            }
            _ => frames.pop_front().unwrap_or_default(),
        }
    }

    /// Room for a whole frame, where nobody has to be waited for.
    fn room_now(&self, bytes: usize) -> Option<Room> {
        let window = self.window.try_acquire_many(bytes as u32).ok()?;
        let frame_room = self.outbox.room_now(&self.turn)?;
        window.forget();
        Some(Room { frame_room, bytes })
    }

    /// Gives room back unused.
    pub(crate) fn decline(&self, room: Room) {
        self.window.add_permits(room.bytes);
    }

    /// Answers the request.
    pub(crate) fn reply(&self, reply: &Reply) {
        self.answered.store(true, Ordering::Relaxed);
        self.outbox.send_urgent(self.id, Kind::Reply, reply);
    }

    /// Refuses the request, unless it was answered; the exit says why in any case.
    pub(crate) fn refuse(&self, failure: Failure) -> Exit {
        if !self.answered.load(Ordering::Relaxed) {
            self.reply(&Reply::Refused(failure.clone()));
        }
        Exit {
            failure: Some(failure),
            ..Exit::default()
        }
    }

    /// The last frame of the stream.
    pub(super) fn exit(&self, exit: &Exit) {
        self.outbox.send_last(self.id, Kind::Exit, exit);
    }
}

/// The error of a stream nobody wants any more.
fn cancelled() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "given up by the host")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream() -> Stream {
        Stream::new(1, Arc::new(Outbox::new()))
    }

    #[tokio::test]
    async fn the_host_may_not_send_more_than_the_window() {
        let stream = stream();
        for _ in 0..WINDOW as usize / MAX_PAYLOAD {
            stream.receive(vec![0; MAX_PAYLOAD]).unwrap();
        }
        assert!(stream.receive(vec![0]).is_err());
    }

    #[tokio::test]
    async fn input_that_was_read_may_be_sent_again() {
        let stream = stream();
        for _ in 0..3 * WINDOW as usize / MAX_PAYLOAD {
            stream.receive(vec![0; MAX_PAYLOAD]).unwrap();
            stream.next_input().await.unwrap();
        }
        stream.end_input().unwrap();
        assert_eq!(stream.next_input().await.unwrap(), None);
    }

    #[tokio::test]
    async fn the_host_may_not_credit_what_was_not_sent() {
        let stream = stream();
        assert!(stream.credit(1).is_err());
        let room = stream.room(10).await.unwrap();
        assert_eq!(room.bytes, 10);
        stream.send(room, Kind::Out, vec![0; HEADER_LEN + 4]);
        assert!(stream.credit(5).is_err());
        assert!(stream.credit(4).is_ok());
    }

    #[tokio::test]
    async fn what_goes_together_arrives_in_order_and_within_the_window() {
        let outbox = Arc::new(Outbox::new());
        let stream = Arc::new(Stream::new(1, Arc::clone(&outbox)));
        let frame = |byte| {
            let mut frame = stream.blank(MAX_PAYLOAD);
            frame[HEADER_LEN..].fill(byte);
            frame
        };
        let frames: Vec<_> = (0..20).map(frame).collect();
        let sent: Vec<u8> = frames
            .iter()
            .flat_map(|frame| frame[HEADER_LEN..].to_vec())
            .collect();
        let own = Arc::clone(&stream);
        let sender = tokio::spawn(async move { own.send_all(Kind::Out, frames).await });
        let mut came = Vec::new();
        while came.len() < sent.len() {
            tokio::task::yield_now().await;
            let mut bytes = Vec::new();
            outbox.take(&mut bytes, 1);
            if bytes.is_empty() {
                // An odd number, so that frames are cut.
                let count = (WINDOW as usize - stream.window.available_permits()).min(40_001);
                stream.credit(count as u32).unwrap();
                continue;
            }
            came.extend_from_slice(&bytes[HEADER_LEN..]);
            outbox.give_back(bytes);
        }
        sender.await.unwrap().unwrap();
        assert!(came == sent, "other bytes came than were sent");
    }
}
