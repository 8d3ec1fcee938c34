//! Bytes from one socket to another.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::Instant;

use super::Proxy;
use crate::net::refusal::Refusal;
use crate::spec::Domain;

/// Bytes on their way in one direction.
const BUFFER: usize = 32 * 1024;

/// What went through a connection. Told from both directions.
#[derive(Debug, Default)]
pub(super) struct Account {
    sent: AtomicU64,
    received: AtomicU64,
}

impl Account {
    pub(super) fn sent(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn received(&self, bytes: usize) {
        self.received.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// From the guest, and to it.
    pub(super) fn bytes(&self) -> (u64, u64) {
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        (load(&self.sent), load(&self.received))
    }
}

/// Passes on what comes until it ends, and then the end. What the receiver does
/// not take is not read.
pub(super) async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    count: impl Fn(usize),
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let length = from.read(&mut buffer).await?;
        if length == 0 {
            return to.shutdown().await;
        }
        to.write_all(&buffer[..length]).await?;
        count(length);
    }
}

/// How a conversation ended.
#[derive(Debug)]
pub(super) enum End<T> {
    Done(T),
    /// Nothing went through it for long.
    Idle,
    /// A new policy does not allow it.
    Denied(Refusal),
}

/// Does `work` until it is done, nothing goes through any more, or the policy
/// changes to one that forbids it.
pub(super) async fn until<T>(
    work: impl Future<Output = T>,
    proxy: &Proxy,
    account: &Account,
    name: &Domain,
    port: u16,
) -> End<T> {
    tokio::select! {
        done = work => End::Done(done),
        () = idle(account, proxy.0.limits.idle) => End::Idle,
        refusal = denied(proxy, name, port) => End::Denied(refusal),
    }
}

async fn idle(account: &Account, limit: Duration) {
    let (mut seen, mut since) = (account.bytes(), Instant::now());
    while since.elapsed() < limit {
        // Looked at now and then: exact to a quarter.
        tokio::time::sleep(limit / 4).await;
        let now = account.bytes();
        if now != seen {
            (seen, since) = (now, Instant::now());
        }
    }
}

async fn denied(proxy: &Proxy, name: &Domain, port: u16) -> Refusal {
    let mut policy = proxy.0.resolver.watch_policy();
    loop {
        let now = std::sync::Arc::clone(&policy.borrow_and_update());
        if let Err(refusal) = now.connect(name, port) {
            return refusal;
        }
        if policy.changed().await.is_err() {
            // Nobody is left to change it.
            std::future::pending::<()>().await;
        }
    }
}
