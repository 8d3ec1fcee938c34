//! Ports of the host that lead to services in the guest, over the guest channel:
//! the firewall stays as it is.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::resolver::Serving;
use crate::guest::{GuestError, Input, Output, Stream};

/// Connections of one port at a time; a connection to a supervisor carries 64
/// streams.
const MOST: usize = 48;
/// How long to wait when no connection can be taken, for want of descriptors.
const BREATH: Duration = Duration::from_millis(100);
/// Bytes read at a time.
const BUFFER: usize = 32 * 1024;

/// Carries each connection to `listener` over a stream of its own. `connect`
/// opens one that the guest has answered; `told` hears why one cannot be opened;
/// `connections` counts them.
///
/// # Errors
/// The listener cannot be watched.
pub fn forward<C, F>(
    listener: std::net::TcpListener,
    connect: C,
    told: impl Fn(GuestError) + Clone + Send + Sync + 'static,
    connections: Arc<Connections>,
) -> io::Result<Serving>
where
    C: Fn() -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Result<Stream, GuestError>> + Send,
{
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let mut serving = JoinSet::new();
    serving.spawn(async move {
        let places = Arc::new(Semaphore::new(MOST));
        let mut tasks = JoinSet::new();
        loop {
            while tasks.try_join_next().is_some() {}
            // The next one waits, in the kernel, until there is a place.
            let Ok(place) = Arc::clone(&places).acquire_owned().await else {
                return;
            };
            let Ok((connection, _)) = listener.accept().await else {
                tokio::time::sleep(BREATH).await;
                continue;
            };
            let (connect, told) = (connect.clone(), told.clone());
            let open = Connections::take(&connections);
            tasks.spawn(async move {
                match connect().await {
                    // A broken connection is its client's to notice.
                    Ok(stream) => drop(carry(connection, stream).await),
                    Err(error) => told(error),
                }
                drop((place, open));
            });
        }
    });
    Ok(Serving(serving))
}

/// Connections that are counted.
#[derive(Debug, Default)]
pub struct Connections {
    open: AtomicUsize,
    taken: AtomicU64,
}

impl Connections {
    /// How many there are.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// How many there were, ended ones included.
    pub fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }

    fn take(this: &Arc<Self>) -> Open {
        this.taken.fetch_add(1, Ordering::Relaxed);
        this.open.fetch_add(1, Ordering::Relaxed);
        Open(Arc::clone(this))
    }
}

/// One of those that are there, for as long as it lives.
struct Open(Arc<Connections>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Has the kernel find out within two minutes that a client is gone.
fn keep_alive(connection: &TcpStream) -> io::Result<()> {
    setsockopt(connection, sockopt::KeepAlive, &true)?;
    setsockopt(connection, sockopt::TcpKeepIdle, &60)?;
    setsockopt(connection, sockopt::TcpKeepInterval, &15)?;
    setsockopt(connection, sockopt::TcpKeepCount, &4)?;
    Ok(())
}

/// Carries bytes both ways until the service's end, or the client's fault.
async fn carry(mut connection: TcpStream, mut stream: Stream) -> io::Result<()> {
    connection.set_nodelay(true)?;
    keep_alive(&connection)?;
    let (mut from, mut to) = connection.split();
    let input = stream.input();
    let up = async {
        let mut buffer = vec![0; BUFFER];
        loop {
            let length = from.read(&mut buffer).await?;
            if length == 0 {
                end(&input).await;
                // The service may have more to say.
                return std::future::pending().await;
            }
            if !matches!(input.send(&buffer[..length]).await, Ok(true)) {
                return std::future::pending().await;
            }
        }
    };
    let down = async {
        loop {
            match stream.next().await {
                Ok(Output::Out(bytes)) => to.write_all(&bytes).await?,
                Ok(Output::Err(_)) => {}
                Ok(Output::Exit(_)) => return to.shutdown().await,
                Err(error) => return Err(io::Error::other(error.to_string())),
            }
        }
    };
    tokio::select! {
        result = down => result,
        result = up => result,
    }
}

async fn end(input: &Input) {
    // Where the stream is over, the reader sees it.
    let _ = input.end().await;
}
