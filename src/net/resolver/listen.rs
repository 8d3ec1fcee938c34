//! The sockets of a resolver.

use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::{Resolver, Step};

/// Longest question over TCP; over UDP more is cut off, and then no question.
const LONGEST: usize = 1024;
/// How long to wait when no connection can be taken, for want of descriptors.
const BREATH: Duration = Duration::from_millis(100);

/// Sockets that were opened in the machine's network namespace, on the address
/// of its gateway at port 53.
#[derive(Debug, Default)]
pub struct Sockets {
    /// For questions in packets.
    pub udp: Vec<UdpSocket>,
    /// For questions over connections.
    pub tcp: Vec<TcpListener>,
}

/// A service that listens; dropping it ends it and all its connections.
#[derive(Debug)]
#[must_use = "it ends when this is dropped"]
pub struct Serving(pub(crate) JoinSet<()>);

impl Serving {
    /// Waits until one of the listeners has ended. None does by itself: only a
    /// fault of ours ends one.
    pub async fn ended(&mut self) {
        if self.0.join_next().await.is_none() {
            std::future::pending::<()>().await;
        }
    }
}

impl Resolver {
    /// Starts to answer on these sockets.
    ///
    /// # Errors
    /// They cannot be watched.
    pub fn serve(&self, sockets: Sockets) -> io::Result<Serving> {
        let mut tasks = JoinSet::new();
        for socket in sockets.udp {
            socket.set_nonblocking(true)?;
            let socket = tokio::net::UdpSocket::from_std(socket)?;
            tasks.spawn(packets(self.clone(), Arc::new(socket)));
        }
        for listener in sockets.tcp {
            listener.set_nonblocking(true)?;
            let listener = tokio::net::TcpListener::from_std(listener)?;
            tasks.spawn(connections(self.clone(), listener));
        }
        Ok(Serving(tasks))
    }
}

/// Answers packets for good. What needs no upstream is answered here; the rest
/// is bounded by the places there are.
async fn packets(resolver: Resolver, socket: Arc<tokio::net::UdpSocket>) {
    let mut tasks = JoinSet::new();
    let mut buffer = [0; LONGEST];
    loop {
        while tasks.try_join_next().is_some() {}
        let (length, peer) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            // An ICMP error about an earlier answer; anything else does not
            // end by itself, and must not spin.
            Err(_) => {
                tokio::time::sleep(Duration::from_millis(1)).await;
                continue;
            }
        };
        let bytes = match resolver.step(&buffer[..length]) {
            Step::Nothing => None,
            Step::Bytes(bytes) => Some(bytes),
            Step::Reply(reply) => reply.udp(),
            Step::Forward(forward) => {
                let (resolver, socket) = (resolver.clone(), Arc::clone(&socket));
                tasks.spawn(async move {
                    let reply = resolver.forward(*forward).await;
                    if let Some(bytes) = reply.udp() {
                        send(&socket, &bytes, peer).await;
                    }
                });
                None
            }
        };
        if let Some(bytes) = bytes {
            send(&socket, &bytes, peer).await;
        }
    }
}

async fn send(socket: &tokio::net::UdpSocket, bytes: &[u8], peer: SocketAddr) {
    // Whoever does not get it asks again.
    let _ = socket.send_to(bytes, peer).await;
}

/// Takes connections for good.
async fn connections(resolver: Resolver, listener: tokio::net::TcpListener) {
    let places = Arc::new(Semaphore::new(resolver.0.limits.connections));
    let mut tasks = JoinSet::new();
    loop {
        while tasks.try_join_next().is_some() {}
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(BREATH).await;
            continue;
        };
        // One too many is closed at once.
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            continue;
        };
        let resolver = resolver.clone();
        tasks.spawn(async move {
            // However it ends, it is over.
            let _ = converse(&resolver, stream).await;
            drop(place);
        });
    }
}

/// Answers the questions of one connection, one after the other.
async fn converse(resolver: &Resolver, mut stream: TcpStream) -> io::Result<()> {
    let idle = resolver.0.limits.idle;
    loop {
        // The whole question in this time: one byte now and then does not hold a place.
        let question = tokio::time::timeout(idle, read(&mut stream)).await??;
        let bytes = match resolver.step(&question) {
            Step::Nothing => return Ok(()),
            Step::Bytes(bytes) => {
                let length = u16::try_from(bytes.len()).map_err(io::Error::other)?;
                Some([&length.to_be_bytes(), &bytes[..]].concat())
            }
            Step::Reply(reply) => reply.tcp(),
            Step::Forward(forward) => resolver.forward(*forward).await.tcp(),
        };
        let Some(bytes) = bytes else {
            return Ok(());
        };
        tokio::time::timeout(idle, stream.write_all(&bytes)).await??;
    }
}

async fn read(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let length = usize::from(stream.read_u16().await?);
    if length > LONGEST {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).await?;
    Ok(bytes)
}
