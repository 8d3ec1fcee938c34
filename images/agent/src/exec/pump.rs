//! Moving bytes between a command and its stream.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use crate::server::Stream;
use crate::watch;
use bulkhead_agent::{HEADER_LEN, Kind, MAX_PAYLOAD};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{read, write};
use tokio::io::unix::AsyncFd;

/// After a command's exit, how long its output may be silent, yet held open by
/// something in the background, before the stream ends without it.
pub(super) const QUIET: Duration = Duration::from_millis(250);

/// Bytes read at once until a command has written as much.
const FIRST_READ: usize = 4096;

/// Our end of a pipe or a terminal. Both ends of a terminal share it.
pub(super) type End = Arc<AsyncFd<OwnedFd>>;

/// What is done with an [`End`].
#[derive(Debug, Clone, Copy)]
pub(super) enum Side {
    Reading,
    /// Writing, or both.
    Both,
}

/// Makes a descriptor usable here.
pub(super) fn end(fd: OwnedFd, interest: Side) -> io::Result<End> {
    let flags = OFlag::from_bits_retain(fcntl(fd.as_fd(), FcntlArg::F_GETFL)?);
    fcntl(fd.as_fd(), FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(Arc::new(match interest {
        Side::Reading => watch::readable(fd)?,
        Side::Both => watch::both(fd)?,
    }))
}

/// Sends everything from `source` as `kind`, until its end, the cancellation of
/// the stream, or [`QUIET`] after `exited` turned true.
pub(super) async fn output(
    source: End,
    stream: Arc<Stream>,
    kind: Kind,
    mut exited: tokio::sync::watch::Receiver<bool>,
) {
    let quiet = async |exited: &mut tokio::sync::watch::Receiver<bool>| {
        // An error means that the sender is gone, so the command is over.
        let _ = exited.wait_for(|exited| *exited).await;
        tokio::time::sleep(QUIET).await;
    };
    // Most commands write little, and some nothing: no frame is made before
    // there is something to put in it, and only as large.
    let mut buffer = vec![0; FIRST_READ];
    let mut flows = false;
    loop {
        let ready = tokio::select! {
            biased;
            ready = source.readable() => ready,
            () = quiet(&mut exited) => return,
        };
        let Ok(mut ready) = ready else { return };
        let Ok(room) = stream.room(MAX_PAYLOAD).await else {
            return;
        };
        let wanted = room.bytes.min(buffer.len());
        if flows {
            // A command in full flow fills its pipe first, rather than being
            // interrupted for every line. Where nobody else has work to do this
            // costs nothing.
            let _ = nix::sched::sched_yield();
        }
        match ready.try_io(|fd| Ok(read(fd.get_ref(), &mut buffer[..wanted])?)) {
            Ok(Ok(count)) if count > 0 => {
                let mut frame = Vec::with_capacity(HEADER_LEN + count);
                frame.extend_from_slice(&[0; HEADER_LEN]);
                frame.extend_from_slice(&buffer[..count]);
                stream.send(room, kind, frame);
                flows = true;
                if count == buffer.len() {
                    buffer.resize(MAX_PAYLOAD, 0);
                }
            }
            Err(_would_block) => {
                flows = false;
                stream.decline(room);
            }
            // The end; for a terminal that is EIO.
            Ok(_) => return stream.decline(room),
        }
    }
}

/// Writes the stream's input to `target` (or nowhere) until its end.
/// `end_of_file` is what to write then, for a target that is not closed.
pub(super) async fn input(stream: Arc<Stream>, mut target: Option<End>, end_of_file: &[u8]) {
    let mut in_line = false;
    while let Ok(Some(chunk)) = stream.next_input().await {
        in_line = chunk
            .last()
            .is_some_and(|byte| !matches!(byte, b'\n' | b'\r'));
        if let Some(open) = &target
            && write_all(open, &chunk).await.is_err()
        {
            // Nobody reads it any more: the host may still send the rest.
            target = None;
        }
    }
    if let Some(open) = &target {
        // Within a line the first ^D only hands the line over.
        for _ in 0..=usize::from(in_line) {
            let _ = write_all(open, end_of_file).await;
        }
    }
}

async fn write_all(target: &End, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let mut ready = target.writable().await?;
        match ready.try_io(|fd| Ok(write(fd.get_ref(), bytes)?)) {
            Ok(Ok(count)) => bytes = &bytes[count..],
            Ok(Err(error)) if error.raw_os_error() == Some(Errno::EINTR as i32) => {}
            Ok(Err(error)) => return Err(error),
            Err(_would_block) => {}
        }
    }
    Ok(())
}
