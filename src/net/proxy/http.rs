//! HTTP/1 connections: every request on one is for the same allowed host.

use std::io;

use serde::Serialize;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::net::tcp::ReadHalf;
use tokio::time::Instant;

use super::chunks::Chunks;
use super::relay::{self, Account, End};
use super::request::{self, Body, Head};
use super::{Client, Code, Progress, Proxy, Refusal, Stop, refusal};
use crate::spec::Domain;

/// Bytes read at a time.
const BUFFER: usize = 32 * 1024;

impl Proxy {
    pub(super) async fn http(&self, client: &mut Client) -> Result<(), Stop> {
        let end = client.since + self.0.limits.head;
        let head = client.head(end, request::read).await?;
        let mut server = self.connect(client, &head.name).await?;
        let (from_guest, to_guest) = client.stream.split();
        let (from_server, to_server) = server.split();
        let account = &client.account;
        let name = head.name.clone();
        let requests = Requests {
            proxy: self,
            name: &name,
            from: from_guest,
            to: to_server,
            buffer: std::mem::take(&mut client.buffer),
            account,
            port: client.destination.port(),
        };
        let both = async {
            let answers = async {
                relay::pump(from_server, to_guest, |bytes| account.received(bytes)).await?;
                Ok::<_, Stop>(())
            };
            tokio::pin!(answers);
            // The server has the last word: when it closes, it is over.
            tokio::select! {
                result = requests.pass_on(head) => match result {
                    Ok(()) => answers.await,
                    Err(stop) => Err(stop),
                },
                result = &mut answers => result,
            }
        };
        match relay::until(both, self, account, &name, client.destination.port()).await {
            End::Done(result) => result,
            End::Idle => self.ended(End::Idle),
            End::Denied(refusal) => Err(refusal.into()),
        }
    }
}

/// The requests of one connection, one after the other.
struct Requests<'a, W> {
    proxy: &'a Proxy,
    name: &'a Domain,
    from: ReadHalf<'a>,
    to: W,
    /// What was read and not passed on.
    buffer: Vec<u8>,
    account: &'a Account,
    port: u16,
}

impl<W: AsyncWrite + Unpin> Requests<'_, W> {
    /// Passes on request after request, each to its exact end, until the guest
    /// sends no more.
    async fn pass_on(mut self, first: Head) -> Result<(), Stop> {
        let mut head = first;
        loop {
            self.write(head.length).await?;
            match head.body {
                Body::Length(mut left) => {
                    while left > 0 {
                        self.fill().await?;
                        let here = self
                            .buffer
                            .len()
                            .min(usize::try_from(left).unwrap_or(usize::MAX));
                        self.write(here).await?;
                        left -= here as u64;
                    }
                }
                Body::Chunked => {
                    let mut chunks = Chunks::new();
                    while !chunks.is_done() {
                        self.fill().await?;
                        let here = chunks.follow(&self.buffer)?;
                        self.write(here).await?;
                    }
                }
            }
            match self.next_head().await? {
                Some(next) => head = next,
                None => {
                    self.to.shutdown().await?;
                    return Ok(());
                }
            }
        }
    }

    /// The next request's head, allowed like the first; `None` at the end.
    async fn next_head(&mut self) -> Result<Option<Head>, Stop> {
        // Between requests it may be idle; from the first byte on it may not.
        if self.buffer.is_empty() && !self.read().await? {
            return Ok(None);
        }
        let end = Instant::now() + self.proxy.0.limits.head;
        let mut needed = 0;
        let head = loop {
            if self.buffer.len() >= needed {
                match request::read(&self.buffer) {
                    Progress::Done(head) => break head,
                    Progress::Refused(refusal) => return Err(refusal.into()),
                    Progress::More(more) => needed = more,
                }
            }
            match tokio::time::timeout_at(end, self.read()).await {
                Ok(Ok(true)) => {}
                Ok(Ok(false)) => return Err(cut_off()),
                Ok(Err(error)) => return Err(error.into()),
                Err(_) => {
                    return Err(Stop::Refused(refusal(
                        Code::HeadTooSlow,
                        "a request on the connection does not say in time which host it is for",
                        "Send the head of a request at once.",
                    )));
                }
            }
        };
        if head.name != *self.name {
            let cause = format!(
                "a connection to {} is used for a request to {}",
                self.name, head.name
            );
            let remedy = "Open a connection of its own for each host.";
            return Err(refusal(Code::HostChanged, &cause, remedy).into());
        }
        self.proxy
            .0
            .resolver
            .policy()
            .connect(&head.name, self.port)?;
        Ok(Some(head))
    }

    /// Has something in the buffer.
    async fn fill(&mut self) -> Result<(), Stop> {
        if self.buffer.is_empty() && !self.read().await? {
            return Err(cut_off());
        }
        Ok(())
    }

    /// Reads some more; `false` at the end.
    async fn read(&mut self) -> io::Result<bool> {
        use tokio::io::AsyncReadExt as _;
        self.buffer.reserve(BUFFER);
        let length = (&mut self.from)
            .take(BUFFER as u64)
            .read_buf(&mut self.buffer)
            .await?;
        Ok(length > 0)
    }

    /// Passes on the first bytes of the buffer.
    async fn write(&mut self, length: usize) -> io::Result<()> {
        self.to.write_all(&self.buffer[..length]).await?;
        self.account.sent(length);
        self.buffer.drain(..length);
        Ok(())
    }
}

fn cut_off() -> Stop {
    Stop::Failed("the guest closed it within a request".into())
}

/// What the guest is told, in the one shape of all refusals.
#[derive(Serialize)]
struct Told<'a> {
    error: &'a Refusal,
}

/// The response to a request that is not passed on.
pub(super) fn answer(stop: &Stop) -> Vec<u8> {
    let (status, body) = match stop {
        Stop::Refused(refusal) => {
            let told = serde_json::to_string(&Told { error: refusal });
            ("403 Forbidden", told.unwrap_or_default())
        }
        Stop::Failed(why) => (
            "502 Bad Gateway",
            serde_json::json!({ "error": { "code": "failed", "cause": why } }).to_string(),
        ),
    };
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
         Connection: close\r\nServer: bulkhead\r\n\r\n{body}\n",
        body.len() + 1
    )
    .into_bytes()
}
