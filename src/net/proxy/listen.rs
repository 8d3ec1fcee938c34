//! The sockets of a proxy.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{getsockopt, sockopt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::{Proxied, Proxy, What, refusal};
use crate::net::refusal::Code;
use crate::net::resolver::Serving;

/// How long to wait when no connection can be taken, for want of descriptors.
const BREATH: Duration = Duration::from_millis(100);

/// How connections come here that were meant for elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Redirect {
    /// By nft's `redirect`: the kernel tells where they were meant to go.
    Nat,
    /// By nft's `tproxy`: they keep their destination.
    Tproxy,
}

impl Proxy {
    /// Starts to serve connections that come to this listener.
    ///
    /// # Errors
    /// It cannot be watched.
    pub fn serve(&self, listeners: Vec<TcpListener>, redirect: Redirect) -> io::Result<Serving> {
        let places = Arc::new(Semaphore::new(self.0.limits.connections));
        let mut tasks = JoinSet::new();
        for listener in listeners {
            listener.set_nonblocking(true)?;
            let listener = tokio::net::TcpListener::from_std(listener)?;
            tasks.spawn(connections(
                self.clone(),
                listener,
                redirect,
                Arc::clone(&places),
            ));
        }
        Ok(Serving(tasks))
    }
}

async fn connections(
    proxy: Proxy,
    listener: tokio::net::TcpListener,
    redirect: Redirect,
    places: Arc<Semaphore>,
) {
    let mut tasks = JoinSet::new();
    loop {
        while tasks.try_join_next().is_some() {}
        let Ok((stream, source)) = listener.accept().await else {
            tokio::time::sleep(BREATH).await;
            continue;
        };
        // Not redirected, but sent here on purpose.
        let Ok(destination) = destination(&stream, redirect) else {
            continue;
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            let limit = proxy.0.limits.connections;
            let refusal = refusal(
                Code::TooManyConnections,
                &format!("the machine has {limit} connections already"),
                "Close connections that are not needed.",
            );
            proxy.0.journal.note(What::Proxied(Proxied {
                refusal: Some(refusal),
                ..Proxied::new(source, destination)
            }));
            continue;
        };
        let proxy = proxy.clone();
        tasks.spawn(async move {
            proxy.converse(stream, source, destination).await;
            drop(place);
        });
    }
}

/// Where the guest wanted to go.
fn destination(stream: &TcpStream, redirect: Redirect) -> io::Result<SocketAddr> {
    let local = stream.local_addr()?;
    if redirect == Redirect::Tproxy {
        return Ok(local);
    }
    if local.is_ipv4() {
        let raw = getsockopt(stream, sockopt::OriginalDst)?;
        let address = nix::sys::socket::SockaddrIn::from(raw);
        return Ok(SocketAddr::new(address.ip().into(), address.port()));
    }
    let raw = getsockopt(stream, sockopt::Ip6tOriginalDst)?;
    let address = nix::sys::socket::SockaddrIn6::from(raw);
    Ok(SocketAddr::new(address.ip().into(), address.port()))
}
