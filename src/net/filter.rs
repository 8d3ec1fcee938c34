//! Resolver, proxy and record of one machine, put together.

use std::fs::File;
use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::event::{Event, Journal};
use super::names::{Feed, Grant, Names};
use super::outgoing::Outgoing;
use super::policy::Policy;
use super::proxy::{Proxy, ProxyLimits, Redirect};
use super::record::{Learned, Summary, Taps, record};
use super::resolver::{Reach, Resolver, ResolverConfig, ResolverLimits, Serving, Sockets};

/// Where name resolution is.
const DNS: u16 = 53;
/// Events that may wait to be written.
const WAITING: usize = 4096;
/// Size of a record from which on it is put aside and begun anew; so there are
/// at most two of this size.
const LARGEST: u64 = 32 << 20;

/// What is opened in the machine's network namespace.
#[derive(Debug)]
pub struct Inside {
    sockets: Sockets,
    proxy: Vec<TcpListener>,
    taps: Taps,
    outgoing: Outgoing,
}

impl Inside {
    /// Opens everything in the network namespace of the calling thread, on these
    /// addresses of the gateway. The proxy's port is `proxy`, where there is to
    /// be one; `group` is that of the rules that log.
    ///
    /// # Errors
    /// Not allowed, or an address or the group is not to be had.
    pub fn open(gateway: &[IpAddr], proxy: Option<u16>, group: u16) -> io::Result<Self> {
        let mut inside = Self {
            sockets: Sockets::default(),
            proxy: Vec::new(),
            taps: Taps::open(group)?,
            outgoing: Outgoing::within(File::open("/proc/thread-self/ns/net")?.into())?,
        };
        for &address in gateway {
            inside.sockets.udp.push(UdpSocket::bind((address, DNS))?);
            inside.sockets.tcp.push(TcpListener::bind((address, DNS))?);
            if let Some(port) = proxy {
                inside.proxy.push(TcpListener::bind((address, port))?);
            }
        }
        Ok(inside)
    }
}

/// What a machine's names and connections are held to, and where that is recorded.
#[derive(Debug, Clone)]
pub struct FilterConfig {
    /// The machine's name.
    pub machine: String,
    /// Its policy, to begin with.
    pub policy: Policy,
    /// Which addresses it may reach.
    pub reach: Reach,
    /// Whom its resolver asks.
    pub upstreams: Vec<SocketAddr>,
    /// The guest's addresses.
    pub guests: Vec<IpAddr>,
    /// The file that events are appended to, one a line.
    pub record: PathBuf,
}

/// Resolver, proxy and record of one machine; they end when this is dropped.
#[derive(Debug)]
pub struct Filter {
    policy: watch::Sender<Arc<Policy>>,
    names: Names,
    account: Arc<Mutex<Account>>,
    servings: Vec<Serving>,
    writing: JoinHandle<io::Result<()>>,
}

/// What the events come to so far.
#[derive(Debug, Default)]
struct Account {
    summary: Summary,
    learned: Learned,
}

impl Filter {
    /// Starts everything. What comes out has to be let through the firewall: each
    /// [`Feed`] is answered when that is done, and the guest waits for it. Strict
    /// mode is on where [`Inside`] has a proxy.
    ///
    /// # Errors
    /// The record cannot be written, or a socket cannot be watched.
    pub fn start(inside: Inside, config: FilterConfig) -> io::Result<(Self, mpsc::Receiver<Feed>)> {
        let strict = !inside.proxy.is_empty();
        let writer = Writer::open(&config.record)?;
        let (journal, events) = Journal::new(&config.machine, WAITING);
        let (policy, watched) = watch::channel(Arc::new(config.policy));
        let (feed, fed) = mpsc::channel(32);
        let names = Names::default();
        let resolver = ResolverConfig {
            upstreams: config.upstreams,
            strict,
            reach: config.reach,
            limits: ResolverLimits::default(),
        };
        let resolver = Resolver::new(resolver, watched, names.clone(), feed, journal.clone());
        let mut servings = vec![
            record(inside.taps, config.guests, names.clone(), journal.clone())?,
            resolver.serve(inside.sockets)?,
        ];
        if strict {
            let limits = ProxyLimits::default();
            let proxy = Proxy::new(resolver, inside.outgoing, journal, limits);
            servings.push(proxy.serve(inside.proxy, Redirect::Nat)?);
        }
        let account = Arc::default();
        let writing = tokio::spawn(write(events, writer, Arc::clone(&account)));
        let filter = Self {
            policy,
            names,
            account,
            servings,
            writing,
        };
        Ok((filter, fed))
    }

    /// Changes the policy, and gives what is to be let through from now on, in the
    /// place of what was before. Proxied connections that it forbids are cut.
    pub fn set_policy(&self, policy: Policy) -> Vec<Grant> {
        let policy = Arc::new(policy);
        // First the new answers, then the old addresses: not the other way round.
        self.policy.send_replace(Arc::clone(&policy));
        self.names.follow(&policy)
    }

    /// What the machine's network came to so far.
    pub fn summary(&self) -> Summary {
        self.account().summary.clone()
    }

    /// What it tried so far.
    pub fn learned(&self) -> Learned {
        self.account().learned.clone()
    }

    fn account(&self) -> std::sync::MutexGuard<'_, Account> {
        self.account.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until a part has ended, which none does by itself: without it the
    /// machine has no name resolution or no record, and should be stopped.
    pub async fn broken(&mut self) {
        let ended = self.servings.iter_mut().map(|one| Box::pin(one.ended()));
        let mut ended: Vec<_> = ended.collect();
        std::future::poll_fn(|context| {
            let any = ended
                .iter_mut()
                .any(|one| one.as_mut().poll(context).is_ready());
            if any {
                std::task::Poll::Ready(())
            } else {
                std::task::Poll::Pending
            }
        })
        .await;
    }

    /// Ends everything, writes what is still to be written, and gives the whole.
    ///
    /// # Errors
    /// The record could not be written; the whole is not lost with it.
    pub async fn end(self) -> (Summary, Learned, io::Result<()>) {
        let Self {
            policy,
            names: _,
            account,
            servings,
            writing,
        } = self;
        for Serving(mut tasks) in servings {
            tasks.shutdown().await;
        }
        drop(policy);
        // The last journal is gone with them, and so the events come to an end.
        let written = writing
            .await
            .unwrap_or_else(|error| Err(io::Error::other(error)));
        let account = std::mem::take(&mut *account.lock().unwrap_or_else(PoisonError::into_inner));
        (account.summary, account.learned, written)
    }
}

/// Takes in events to their end. One that cannot be written ends the writing,
/// not the counting.
async fn write(
    mut events: mpsc::Receiver<Event>,
    mut writer: Writer,
    account: Arc<Mutex<Account>>,
) -> io::Result<()> {
    let mut result = Ok(());
    let mut some = Vec::new();
    while events.recv_many(&mut some, 256).await > 0 {
        let mut lines = Vec::new();
        {
            let mut account = account.lock().unwrap_or_else(PoisonError::into_inner);
            for event in some.drain(..) {
                account.summary.take(&event);
                account.learned.take(&event);
                // Plain data always has a JSON form.
                if serde_json::to_writer(&mut lines, &event).is_ok() {
                    lines.push(b'\n');
                }
            }
        }
        if result.is_ok() {
            result = writer.append(&lines);
        }
    }
    result
}

/// The file of the record.
#[derive(Debug)]
struct Writer {
    path: PathBuf,
    file: File,
    size: u64,
}

impl Writer {
    fn open(path: &Path) -> io::Result<Self> {
        let file = File::options().create(true).append(true).open(path)?;
        let size = file.metadata()?.len();
        let path = path.to_owned();
        Ok(Self { path, file, size })
    }

    fn append(&mut self, lines: &[u8]) -> io::Result<()> {
        if self.size >= LARGEST {
            let mut aside = self.path.clone().into_os_string();
            aside.push(".1");
            std::fs::rename(&self.path, aside)?;
            *self = Self::open(&self.path)?;
        }
        self.size += lines.len() as u64;
        self.file.write_all(lines)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_put_aside_before_it_is_too_large() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("network.jsonl");
        let mut writer = Writer::open(&path).unwrap();
        let block = vec![b'\n'; 1 << 20];
        for _ in 0..80 {
            writer.append(&block).unwrap();
        }
        let size = |name: &str| std::fs::metadata(dir.path().join(name)).unwrap().len();
        assert_eq!(size("network.jsonl.1"), LARGEST);
        assert_eq!(size("network.jsonl"), 16 << 20);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}
