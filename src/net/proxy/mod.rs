//! The proxy of strict mode: connections are let through by the name in them.
//!
//! Connections to ports 443 and 80 are redirected here. The name is read from
//! the TLS handshake or the HTTP request, the policy decides, and the bytes go
//! on as they came: nothing is decrypted. Where a connection goes is decided by
//! the resolver's answers for that name, not by the address the guest chose.

mod chunks;
#[cfg(fuzzing)]
pub(super) mod fuzz;
mod hello;
mod http;
mod listen;
mod relay;
mod request;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::Instant;

use super::event::{Journal, Proxied, What};
use super::outgoing::Outgoing;
use super::refusal::{Code, Refusal};
use super::resolver::{LookupError, Resolver};
use crate::spec::Domain;
pub use listen::Redirect;
use relay::{Account, End};

/// How much a proxy does for its machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxyLimits {
    /// Connections at a time.
    pub connections: usize,
    /// How long the handshake or a request's head may take, from its first byte on.
    pub head: Duration,
    /// How long it may take to reach the host.
    pub connect: Duration,
    /// How long a connection may be without a byte in either direction.
    pub idle: Duration,
}

impl Default for ProxyLimits {
    fn default() -> Self {
        Self {
            connections: 512,
            head: Duration::from_secs(10),
            connect: Duration::from_secs(15),
            idle: Duration::from_secs(600),
        }
    }
}

/// The proxy of one machine. Cheap to clone; all clones are one.
#[derive(Debug, Clone)]
pub struct Proxy(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    resolver: Resolver,
    outgoing: Outgoing,
    journal: Journal,
    limits: ProxyLimits,
}

/// How far a beginning has been read.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Progress<T> {
    /// So many bytes are needed to go on.
    More(usize),
    /// There it is.
    Done(T),
    /// It is not let through.
    Refused(Refusal),
}

fn refusal(code: Code, cause: &str, remedy: &str) -> Refusal {
    Refusal::built_in(code, cause, remedy)
}

/// Why a connection came to nothing, or to an early end.
#[derive(Debug)]
enum Stop {
    Refused(Refusal),
    Failed(String),
}

impl From<Refusal> for Stop {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<std::io::Error> for Stop {
    fn from(error: std::io::Error) -> Self {
        Self::Failed(error.to_string())
    }
}

/// A connection of the guest and what is known of it.
struct Client {
    stream: TcpStream,
    /// Where the guest wanted to go.
    destination: SocketAddr,
    /// What was read and not yet passed on.
    buffer: Vec<u8>,
    event: Proxied,
    account: Arc<Account>,
    since: Instant,
    journal: Journal,
    /// What is wrong with it if it ends now.
    failure: Option<String>,
}

/// However it ends, it is noted.
impl Drop for Client {
    fn drop(&mut self) {
        let mut event = self.event.clone();
        (event.sent, event.received) = self.account.bytes();
        event.ms = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        event.failure = self.failure.take();
        self.journal.note(What::Proxied(event));
    }
}

impl Proxy {
    /// A proxy that goes by the resolver's policy and answers, and connects
    /// through `outgoing`.
    pub fn new(
        resolver: Resolver,
        outgoing: Outgoing,
        journal: Journal,
        limits: ProxyLimits,
    ) -> Self {
        Self(Arc::new(Inner {
            resolver,
            outgoing,
            journal,
            limits,
        }))
    }

    /// Serves one connection to its end.
    async fn converse(&self, stream: TcpStream, source: SocketAddr, destination: SocketAddr) {
        let mut client = Client {
            stream,
            destination,
            buffer: Vec::new(),
            event: Proxied::new(source, destination),
            account: Arc::default(),
            since: Instant::now(),
            journal: self.0.journal.clone(),
            failure: Some("the machine's network ended".into()),
        };
        let result = self.serve_client(&mut client).await;
        client.failure = None;
        match result {
            Ok(()) => {}
            Err(Stop::Refused(refusal)) => client.event.refusal = Some(refusal),
            Err(Stop::Failed(why)) => client.failure = Some(why),
        }
    }

    async fn serve_client(&self, client: &mut Client) -> Result<(), Stop> {
        client.stream.set_nodelay(true)?;
        // Its first byte tells what it is, and so how a refusal is told.
        let first = self.first_byte(client).await?;
        if request::may_be(first) {
            client.event.protocol = "http".into();
            let result = self.http(client).await;
            if let (Err(stop), None) = (&result, client.event.connected) {
                client.answer(&http::answer(stop)).await;
            }
            return result;
        }
        client.event.protocol = "tls".into();
        let result = self.tls(client).await;
        if let (Err(Stop::Refused(_)), None) = (&result, client.event.connected) {
            client.answer(hello::DENIED).await;
        }
        result
    }

    async fn first_byte(&self, client: &mut Client) -> Result<u8, Stop> {
        let end = Instant::now() + self.0.limits.head;
        match client.more(end).await? {
            true => Ok(client.buffer[0]),
            false => Err(Stop::Failed("the guest closed it without a byte".into())),
        }
    }

    async fn tls(&self, client: &mut Client) -> Result<(), Stop> {
        let end = client.since + self.0.limits.head;
        let name = client.head(end, hello::read).await?;
        let mut server = self.connect(client, &name).await?;
        let first = std::mem::take(&mut client.buffer);
        tokio::io::AsyncWriteExt::write_all(&mut server, &first).await?;
        client.account.sent(first.len());
        let (from_guest, to_guest) = client.stream.split();
        let (from_server, to_server) = server.split();
        let account = &client.account;
        let both = async {
            tokio::try_join!(
                relay::pump(from_guest, to_server, |bytes| account.sent(bytes)),
                relay::pump(from_server, to_guest, |bytes| account.received(bytes)),
            )
        };
        let end = relay::until(both, self, account, &name, client.destination.port()).await;
        self.ended(end)
    }

    fn ended(&self, end: End<std::io::Result<((), ())>>) -> Result<(), Stop> {
        match end {
            End::Done(Ok(_)) => Ok(()),
            End::Done(Err(error)) => Err(error.into()),
            End::Idle => Err(Stop::Failed(format!(
                "no byte went through it for {} s",
                self.0.limits.idle.as_secs()
            ))),
            End::Denied(refusal) => Err(refusal.into()),
        }
    }

    /// Whether the name may be connected to, and the connection.
    async fn connect(&self, client: &mut Client, name: &Domain) -> Result<TcpStream, Stop> {
        client.event.name = Some(name.to_string());
        let port = client.destination.port();
        let allowed = self.0.resolver.policy().connect(name, port)?;
        client.event.rule = Some(allowed.rule);
        let wanted = client.destination.ip();
        let end = Instant::now() + self.0.limits.connect;
        let addresses = match self.0.resolver.names().is_current(name, wanted) {
            true => vec![wanted],
            // Its time is over, or the guest has it from elsewhere.
            false => {
                let found = self.0.resolver.lookup(name, wanted.is_ipv6()).await;
                let mut found = found.map_err(|error| match error {
                    LookupError::Refused(refusal) => Stop::Refused(refusal),
                    failed @ LookupError::Failed { .. } => Stop::Failed(failed.to_string()),
                })?;
                // The guest's own choice first, when it is one of them.
                found.sort_by_key(|address| *address != wanted);
                found
            }
        };
        let mut last = String::from("it has no address");
        for address in addresses {
            let to = SocketAddr::new(address, port);
            // One that does not answer does not take the time of the others.
            let patience = end.min(Instant::now() + self.0.limits.connect / 3);
            match tokio::time::timeout_at(patience, self.0.outgoing.connect(to)).await {
                Ok(Ok(stream)) => {
                    client.event.connected = Some(to);
                    stream.set_nodelay(true)?;
                    return Ok(stream);
                }
                Ok(Err(error)) => last = format!("cannot connect to {to}: {error}"),
                Err(_) => last = format!("{to} does not answer"),
            }
            if Instant::now() >= end {
                break;
            }
        }
        Err(Stop::Failed(last))
    }
}

impl Client {
    /// Reads until `read` has what it wants.
    async fn head<T>(
        &mut self,
        end: Instant,
        read: impl Fn(&[u8]) -> Progress<T>,
    ) -> Result<T, Stop> {
        let mut needed = 0;
        loop {
            if self.buffer.len() >= needed {
                match read(&self.buffer) {
                    Progress::Done(found) => return Ok(found),
                    Progress::Refused(refusal) => return Err(refusal.into()),
                    Progress::More(more) => needed = more,
                }
            }
            if !self.more(end).await? {
                return Err(Stop::Failed(
                    "the guest closed it before it was complete".into(),
                ));
            }
        }
    }

    /// Reads some bytes; `false` at the end of them.
    async fn more(&mut self, end: Instant) -> Result<bool, Stop> {
        use tokio::io::AsyncReadExt as _;
        let mut some = [0; 4096];
        match tokio::time::timeout_at(end, self.stream.read(&mut some)).await {
            Ok(length) => {
                let length = length?;
                self.buffer.extend_from_slice(&some[..length]);
                Ok(length > 0)
            }
            Err(_) => Err(Stop::Refused(refusal(
                Code::HeadTooSlow,
                "the connection does not say in time which host it is for",
                "Use TLS or HTTP at this port, with a client that speaks first.",
            ))),
        }
    }

    /// Says something to the guest and closes, so that it is read before the end.
    async fn answer(&mut self, bytes: &[u8]) {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let talk = async {
            self.stream.write_all(bytes).await?;
            self.stream.shutdown().await?;
            // Closing with something unread would take the answer back.
            let mut some = [0; 4096];
            let mut left = 64;
            while left > 0 && self.stream.read(&mut some).await? > 0 {
                left -= 1;
            }
            std::io::Result::Ok(())
        };
        // A guest that does not listen is not told.
        let _ = tokio::time::timeout(Duration::from_secs(2), talk).await;
    }
}
