//! Bytes between the guest's streams and threads of the host that block.

use std::path::PathBuf;
use std::time::Duration;

use bulkhead_agent::Failure;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::exchange::ExchangeError;
use super::workspace;
use crate::guest::archive;
use crate::guest::{Channel, GuestError, Output, Stream};

/// How long the guest may take to take, or give, the next bytes.
const STALLED: Duration = Duration::from_secs(60);
/// How long one exchange may take in all, however steadily it trickles.
const TRANSFER: Duration = Duration::from_secs(60 * 60);

/// A pipe between a thread that blocks and the runtime.
pub(super) fn pipe() -> Result<(UnixStream, std::os::unix::net::UnixStream), super::RunError> {
    let pair = || {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        Ok((UnixStream::from_std(ours)?, theirs))
    };
    pair().map_err(|source| {
        let path = PathBuf::from("(a socket pair)");
        super::MachineError::Io {
            action: "make",
            path,
            source,
        }
        .into()
    })
}

/// Bounds the time in which the guest must take or give the next bytes.
pub(super) async fn in_time<T>(
    what: &str,
    work: impl Future<Output = Result<T, GuestError>>,
) -> Result<T, GuestError> {
    let silent = |_| GuestError::Timeout {
        what: what.to_owned(),
        after: STALLED,
    };
    tokio::time::timeout(STALLED, work).await.map_err(silent)?
}

/// Bounds a whole exchange.
async fn in_all<T>(
    what: &str,
    work: impl Future<Output = Result<T, super::RunError>>,
) -> Result<T, super::RunError> {
    let endless = |_| GuestError::Timeout {
        what: what.to_owned(),
        after: TRANSFER,
    };
    tokio::time::timeout(TRANSFER, work)
        .await
        .map_err(endless)?
}

/// Sends what `produce` writes, from a thread of its own, as the input of a request.
pub async fn send<T: Send + 'static>(
    channel: &Channel,
    request: &impl serde::Serialize,
    what: &str,
    produce: impl FnOnce(std::os::unix::net::UnixStream) -> Result<T, archive::Error> + Send + 'static,
) -> Result<T, super::RunError> {
    in_all(what, async {
        let mut stream = channel.open_with(request).await?;
        // Its answer is not waited for: a window of bytes may be on its way
        // before, and a refusal is the end of the stream, whenever it comes.
        let (mut ours, theirs) = pipe()?;
        let producer = tokio::task::spawn_blocking(move || produce(theirs));
        let input = stream.input();
        let mut buffer = vec![0; 64 * 1024];
        // A broken pipe is the producer's failure, which it reports itself.
        while let Ok(mut count @ 1..) = ours.read(&mut buffer).await {
            // Few large frames: each costs the guest as much as its bytes do.
            while let Ok(more @ 1..) = ours.try_read(&mut buffer[count..]) {
                count += more;
            }
            if !in_time(what, input.send(&buffer[..count])).await? {
                break;
            }
        }
        drop(ours);
        match joined(producer.await) {
            Ok(produced) => {
                in_time(what, input.end()).await?;
                in_time(what, stream.finished(what)).await?;
                Ok(produced)
            }
            // The guest stopped taking it, and says why.
            Err(error @ archive::Error::Send { .. }) => {
                in_time(what, stream.finished(what)).await?;
                Err(ExchangeError::from(error).into())
            }
            Err(error) => Err(ExchangeError::from(error).into()),
        }
    })
    .await
}

/// Gives the output of a request to `consume`, which runs in a thread of its
/// own and only stages it: whether the guest meant it shows at the end.
pub async fn receive<T: Send + 'static>(
    channel: &Channel,
    request: &impl serde::Serialize,
    what: &str,
    consume: impl FnOnce(
        std::os::unix::net::UnixStream,
        std::os::unix::net::UnixStream,
    ) -> Result<T, workspace::Error>
    + Send
    + 'static,
) -> Result<T, super::RunError> {
    in_all(what, async {
        let mut stream = channel.open_with(request).await?;
        in_time(what, stream.started(what)).await?;
        let (out, out_reader) = pipe()?;
        let (err, err_reader) = pipe()?;
        let consumer = tokio::task::spawn_blocking(move || consume(out_reader, err_reader));
        let carried = carry(&mut stream, what, out, err).await;
        // Its pipes are closed now, so it ends.
        let consumed = joined(consumer.await);
        match carried? {
            Some(failure) => Err(GuestError::Refused {
                what: what.to_owned(),
                failure,
            }
            .into()),
            None => Ok(consumed.map_err(ExchangeError::from)?),
        }
    })
    .await
}

/// Carries output to two pipes until the end, or until nobody takes it.
async fn carry(
    stream: &mut Stream,
    what: &str,
    mut out: UnixStream,
    mut err: UnixStream,
) -> Result<Option<Failure>, GuestError> {
    loop {
        let written = match in_time(what, stream.next()).await? {
            Output::Out(bytes) => out.write_all(&bytes).await,
            Output::Err(bytes) => err.write_all(&bytes).await,
            Output::Exit(exit) => return Ok(exit.failure),
        };
        if written.is_err() {
            // The consumer has seen enough, and says why.
            return Ok(None);
        }
    }
}

/// What a thread gave; its panic goes on here.
pub(super) fn joined<T>(result: Result<T, tokio::task::JoinError>) -> T {
    match result {
        Ok(value) => value,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // Blocking tasks are only cancelled with the whole runtime.
            Err(error) => panic!("a worker thread was cancelled: {error}"),
        },
    }
}
