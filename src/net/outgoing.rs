//! Connections made on a machine's behalf, from inside its network namespace:
//! so they reach no more than the machine itself does.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError, mpsc};

use nix::sched::{CloneFlags, setns};
use tokio::net::{TcpSocket, TcpStream, UdpSocket};
use tokio::sync::oneshot;

/// Opens sockets in one network namespace. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Outgoing(Where);

#[derive(Debug, Clone)]
enum Where {
    Here,
    /// A thread that is in that namespace, and ends with the last clone.
    Within(Arc<Within>),
}

#[derive(Debug)]
struct Within {
    orders: mpsc::Sender<Order>,
    /// Sockets for the next connections over IPv4 and IPv6, so that nobody waits for
    /// the thread: they are nothing yet but of that namespace.
    next: [Spare; 2],
}

type Spare = Arc<Mutex<Option<TcpSocket>>>;

/// What to do there.
type Order = Box<dyn FnOnce() + Send>;

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
                queue.into_iter().for_each(|order| order());
            }
        };
        std::thread::Builder::new()
            .name("outgoing".into())
            .spawn(work)?;
        told.recv().map_err(io::Error::other)??;
        let next = [Spare::default(), Spare::default()];
        let within = Within { orders, next };
        within.refill(false);
        Ok(Self(Where::Within(Arc::new(within))))
    }

    /// Connects. The caller bounds the time this may take.
    ///
    /// # Errors
    /// As connect(2).
    pub async fn connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        let v6 = to.is_ipv6();
        let socket = match &self.0 {
            Where::Within(within) => within.next(v6),
            Where::Here => None,
        };
        let socket = match socket {
            Some(socket) => socket,
            None => self.open(move || unconnected(v6)).await?,
        };
        socket.connect(to).await
    }

    /// A socket for packets to and from this peer only.
    ///
    /// # Errors
    /// As bind(2) and connect(2).
    pub async fn packets(&self, to: SocketAddr) -> io::Result<UdpSocket> {
        let any: SocketAddr = match to {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let open = move || {
            let socket = std::net::UdpSocket::bind(any)?;
            socket.connect(to)?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        };
        UdpSocket::from_std(self.open(open).await?)
    }

    async fn open<S: Send + 'static>(
        &self,
        open: impl FnOnce() -> io::Result<S> + Send + 'static,
    ) -> io::Result<S> {
        let orders = match &self.0 {
            Where::Here => return open(),
            Where::Within(within) => &within.orders,
        };
        let gone = || io::Error::other("the thread in the namespace is gone");
        let (wanted, socket) = oneshot::channel();
        // Whoever does not wait any more needs no socket.
        let order: Order = Box::new(move || drop(wanted.send(open())));
        orders.send(order).map_err(|_| gone())?;
        socket.await.map_err(|_| gone())?
    }
}

impl Within {
    /// The socket that is ready; another is opened behind the caller's back.
    fn next(&self, v6: bool) -> Option<TcpSocket> {
        let spare = &self.next[usize::from(v6)];
        let next = spare.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.refill(v6);
        next
    }

    fn refill(&self, v6: bool) {
        let spare = Arc::clone(&self.next[usize::from(v6)]);
        let order: Order = Box::new(move || {
            // Without one, the next connection opens its own, and says why it cannot.
            let socket = unconnected(v6).ok();
            *spare.lock().unwrap_or_else(PoisonError::into_inner) = socket;
        });
        // Where the thread is gone, whoever connects is told.
        let _ = self.orders.send(order);
    }
}

fn unconnected(v6: bool) -> io::Result<TcpSocket> {
    match v6 {
        false => TcpSocket::new_v4(),
        true => TcpSocket::new_v6(),
    }
}
