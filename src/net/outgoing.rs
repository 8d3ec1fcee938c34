//! Connections made on a machine's behalf, from inside its network namespace:
//! so they reach no more than the machine itself does.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, mpsc};

use nix::sched::{CloneFlags, setns};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::oneshot;

/// Opens sockets in one network namespace. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Outgoing(Where);

#[derive(Debug, Clone)]
enum Where {
    Here,
    /// A thread that is in that namespace, and ends with the last clone.
    Within(Arc<mpsc::Sender<Order>>),
}

/// Whether the socket is for IPv6, and who wants it.
type Order = (bool, oneshot::Sender<io::Result<TcpSocket>>);

impl Outgoing {
    /// In the namespace of whoever uses it.
    pub fn here() -> Self {
        Self(Where::Here)
    }

    /// In another namespace.
    ///
    /// # Errors
    /// It cannot be entered.
    pub fn within(namespace: OwnedFd) -> io::Result<Self> {
        let (orders, queue) = mpsc::channel::<Order>();
        let (entered, told) = mpsc::channel();
        let work = move || {
            let result = setns(&namespace, CloneFlags::CLONE_NEWNET);
            let inside = result.is_ok();
            // The one who waits is there until it is told.
            let _ = entered.send(result);
            if inside {
                for (v6, wanted) in queue {
                    // Whoever does not wait any more needs no socket.
                    let _ = wanted.send(open(v6));
                }
            }
        };
        std::thread::Builder::new()
            .name("outgoing".into())
            .spawn(work)?;
        told.recv().map_err(io::Error::other)??;
        Ok(Self(Where::Within(Arc::new(orders))))
    }

    /// Connects. The caller bounds the time this may take.
    ///
    /// # Errors
    /// As connect(2).
    pub async fn connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        let socket = match &self.0 {
            Where::Here => open(to.is_ipv6())?,
            Where::Within(orders) => {
                let gone = || io::Error::other("the thread in the namespace is gone");
                let (wanted, socket) = oneshot::channel();
                orders.send((to.is_ipv6(), wanted)).map_err(|_| gone())?;
                socket.await.map_err(|_| gone())??
            }
        };
        socket.connect(to).await
    }
}

fn open(v6: bool) -> io::Result<TcpSocket> {
    if v6 {
        TcpSocket::new_v6()
    } else {
        TcpSocket::new_v4()
    }
}
