//! Connections from the host to services in the guest, without a network.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use bulkhead_agent::{Exit, HEADER_LEN, Kind, MAX_PAYLOAD, Reply};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

use crate::failure::{Context, Result, invalid};
use crate::server::Stream;

/// Connects to a port on loopback and carries bytes both ways, until the service
/// ends the connection.
pub(crate) async fn connect(stream: Arc<Stream>, port: u16) -> Exit {
    match carry(&stream, port).await {
        Ok(()) => Exit {
            code: Some(0),
            ..Exit::default()
        },
        Err(failure) => stream.refuse(failure),
    }
}

async fn carry(stream: &Arc<Stream>, port: u16) -> Result<()> {
    if port == 0 {
        return Err(invalid("0 is no port"));
    }
    let what = || format!("cannot connect to port {port} in the guest");
    // A service may listen for one of the two only.
    let four = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let six = SocketAddr::from((Ipv6Addr::LOCALHOST, port));
    let connection = match TcpStream::connect(four).await {
        Ok(connection) => connection,
        Err(error) => match TcpStream::connect(six).await {
            Ok(connection) => connection,
            Err(_) => return Err(error).context(what),
        },
    };
    connection.set_nodelay(true).context(what)?;
    stream.reply(&Reply::Started { pid: 0 });
    let (from_service, to_service) = connection.into_split();
    let mut sending = tokio::spawn(send(Arc::clone(stream), to_service));
    let given_up = async {
        if !matches!((&mut sending).await, Ok(Sent::GivenUp)) {
            std::future::pending::<()>().await;
        }
    };
    let result = tokio::select! {
        result = receive(stream, from_service) => result,
        () = given_up => Ok(()),
    };
    // What the host still sends has nobody to go to.
    sending.abort();
    result.context(|| format!("the connection to port {port} in the guest broke"))
}

/// How the host's side ended.
enum Sent {
    /// It said so, or the service takes no more.
    All,
    /// The host does not want the connection any more.
    GivenUp,
}

/// From the host to the service, and the end after it.
async fn send(stream: Arc<Stream>, mut to: OwnedWriteHalf) -> Sent {
    loop {
        match stream.next_input().await {
            Ok(Some(chunk)) => {
                // A service that is gone shows where it is read from.
                if to.write_all(&chunk).await.is_err() {
                    return Sent::All;
                }
            }
            Ok(None) => {
                let _ = to.shutdown().await;
                return Sent::All;
            }
            Err(_) => return Sent::GivenUp,
        }
    }
}

/// From the service to the host, to its end.
async fn receive(stream: &Stream, mut from: OwnedReadHalf) -> io::Result<()> {
    loop {
        from.readable().await?;
        let room = stream.room(MAX_PAYLOAD).await?;
        let mut frame = vec![0; HEADER_LEN + room.bytes];
        let count = match from.read(&mut frame[HEADER_LEN..]).await {
            Ok(count) => count,
            Err(error) => {
                stream.decline(room);
                return Err(error);
            }
        };
        if count == 0 {
            stream.decline(room);
            return Ok(());
        }
        frame.truncate(HEADER_LEN + count);
        frame.shrink_to_fit();
        stream.send(room, Kind::Out, frame);
    }
}
