//! Resolver, proxy and record of one machine, put together.

use std::fs::File;
use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::event::{Event, Excepted, Journal, WeakJournal, What};
use super::names::{Feed, Grant, Names};
use super::outgoing::Outgoing;
use super::policy::Policy;
use super::proxy::{Proxy, ProxyLimits, Redirect};
use super::record::{Learned, Rules, Summary, Taps, record};
use super::resolver::{Resolver, ResolverConfig, ResolverLimits, Serving, Sockets};
use crate::spec::Exception;

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
    /// Whom its resolver asks.
    pub upstreams: Vec<SocketAddr>,
    /// From where.
    pub from: Outgoing,
    /// The guest's addresses.
    pub guests: Vec<IpAddr>,
    /// The file that events are appended to, one a line.
    pub record: PathBuf,
}

/// Resolver, proxy and record of one machine; they end when this is dropped.
#[derive(Debug)]
pub struct Filter {
    policies: Policies,
    traffic: Traffic,
    /// Whether a part has ended.
    broken: watch::Receiver<bool>,
    /// Asks all parts to end.
    end: watch::Sender<bool>,
    parts: JoinSet<()>,
    writing: JoinSet<()>,
}

/// What one machine's filter holds it to. Cheap to clone; all clones are one.
#[derive(Debug, Clone)]
pub struct Policies {
    policy: watch::Sender<Arc<Policy>>,
    names: Names,
    rules: Rules,
    journal: WeakJournal,
}

impl Policies {
    /// What it is, as it changes.
    pub fn watch(&self) -> watch::Receiver<Arc<Policy>> {
        self.policy.subscribe()
    }

    /// What it is now.
    pub fn now(&self) -> Arc<Policy> {
        Arc::clone(&self.policy.borrow())
    }

    /// Changes it, and gives what is to be let through from now on, in the place of
    /// what was before. Proxied connections that it forbids are cut.
    pub fn set(&self, policy: Arc<Policy>) -> Vec<Grant> {
        // Before anything can be let through by it.
        self.rules.follow(Arc::clone(&policy));
        // First the new answers, then the old addresses: not the other way round.
        let before = self.policy.send_replace(Arc::clone(&policy));
        let (before, now) = (before.exceptions(), policy.exceptions());
        self.tell(now.difference(before), true);
        self.tell(before.difference(now), false);
        self.names.follow(&policy)
    }

    /// Has the record say what became of exceptions.
    fn tell<'e>(&self, exceptions: impl Iterator<Item = &'e Exception>, allowed: bool) {
        // When all has ended, there is no record any more.
        let Some(journal) = self.journal.upgrade() else {
            return;
        };
        for exception in exceptions {
            journal.note(What::Exception(Excepted {
                exception: *exception,
                allowed,
            }));
        }
    }
}

/// What the network of one machine comes to; goes on to say so when the machine
/// is gone. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Traffic(Arc<std::sync::Mutex<Account>>);

#[derive(Debug, Default)]
struct Account {
    summary: Summary,
    learned: Learned,
}

impl Traffic {
    /// What it came to so far.
    pub fn summary(&self) -> Summary {
        self.lock().summary.clone()
    }

    /// What was tried so far.
    pub fn learned(&self) -> Learned {
        self.lock().learned.clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Account> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
        let held = Arc::new(config.policy);
        let (policy, watched) = watch::channel(Arc::clone(&held));
        let (feed, fed) = mpsc::channel(32);
        let (end, ending) = watch::channel(false);
        let (last, told_last) = watch::channel(false);
        let (break_down, broken) = watch::channel(false);
        let names = Names::default();
        let policies = Policies {
            policy,
            rules: Rules::new(names.clone(), Arc::clone(&held)),
            journal: journal.downgrade(),
            names: names.clone(),
        };
        policies.tell(held.exceptions().iter(), true);
        let resolver = ResolverConfig {
            upstreams: config.upstreams,
            from: config.from,
            strict,
            limits: ResolverLimits::default(),
        };
        let resolver = Resolver::new(resolver, watched, names, feed, journal.clone());
        let recording = record(
            inside.taps,
            config.guests,
            policies.rules.clone(),
            journal.clone(),
            told_last,
        )?;
        let mut services = vec![resolver.serve(inside.sockets)?];
        if strict {
            let limits = ProxyLimits::default();
            let proxy = Proxy::new(resolver, inside.outgoing, journal, limits);
            services.push(proxy.serve(inside.proxy, Redirect::Nat)?);
        }
        let mut parts = JoinSet::new();
        parts.spawn(watch_over(services, recording, break_down, ending, last));
        let traffic = Traffic::default();
        let mut writing = JoinSet::new();
        writing.spawn(write(events, writer, traffic.clone()));
        let filter = Self {
            policies,
            traffic,
            broken,
            end,
            parts,
            writing,
        };
        Ok((filter, fed))
    }

    /// What it holds the machine to.
    pub fn policies(&self) -> &Policies {
        &self.policies
    }

    /// What the machine's network comes to.
    pub fn traffic(&self) -> &Traffic {
        &self.traffic
    }

    /// Waits until a part has ended, which none does by itself: without it the
    /// machine has no name resolution or no record, and should be stopped.
    pub fn broken(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut broken = self.broken.clone();
        async move {
            if broken.wait_for(|broken| *broken).await.is_err() {
                // Ended on purpose.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Ends everything, and writes what is still to be written.
    pub async fn end(self) {
        let Self {
            end,
            mut parts,
            mut writing,
            ..
        } = self;
        end.send_replace(true);
        while parts.join_next().await.is_some() {}
        // The last journal is gone with them, and so the events come to an end.
        while writing.join_next().await.is_some() {}
    }
}

/// Waits for the end of one part, and ends all: the recording last, when it has
/// taken in everything.
async fn watch_over(
    mut services: Vec<Serving>,
    mut recording: Serving,
    broken: watch::Sender<bool>,
    mut end: watch::Receiver<bool>,
    last: watch::Sender<bool>,
) {
    let all = services.iter_mut().chain([&mut recording]);
    let mut ended: Vec<_> = all.map(|one| Box::pin(one.ended())).collect();
    let any = std::future::poll_fn(|context| {
        let any = ended
            .iter_mut()
            .any(|one| one.as_mut().poll(context).is_ready());
        match any {
            true => std::task::Poll::Ready(()),
            false => std::task::Poll::Pending,
        }
    });
    let failed = tokio::select! {
        () = any => true,
        _ = end.wait_for(|end| *end) => false,
    };
    if failed {
        broken.send_replace(true);
        let _ = end.wait_for(|end| *end).await;
    }
    drop(ended);
    for Serving(mut tasks) in services {
        tasks.shutdown().await;
    }
    last.send_replace(true);
    while recording.0.join_next().await.is_some() {}
}

/// Takes in events to their end. Where one cannot be written, those are counted
/// as missing, and written about when there is space again.
async fn write(mut events: mpsc::Receiver<Event>, mut writer: Writer, traffic: Traffic) {
    let mut some = Vec::new();
    let mut lost = 0;
    while events.recv_many(&mut some, 256).await > 0 {
        let mut lines = Vec::new();
        let mut count = 0;
        if lost > 0
            && let Some(first) = some.first()
        {
            let what = What::Lost { count: lost };
            some.insert(
                0,
                Event {
                    what,
                    ..first.clone()
                },
            );
        }
        {
            let mut account = traffic.lock();
            for event in some.drain(..) {
                account.summary.take(&event);
                account.learned.take(&event);
                // Plain data always has a JSON form.
                if serde_json::to_writer(&mut lines, &event).is_ok() {
                    lines.push(b'\n');
                }
                count += u64::from(!matches!(event.what, What::Lost { .. }));
            }
        }
        match writer.append(&lines) {
            Ok(()) => lost = 0,
            Err(error) => {
                if lost == 0 {
                    tracing::warn!("the record of the network cannot be written: {error}");
                }
                lost += count;
            }
        }
    }
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
        if let Err(error) = self.file.write_all(lines) {
            // No half of a line, for others come after it.
            self.file.set_len(self.size)?;
            return Err(error);
        }
        self.size += lines.len() as u64;
        Ok(())
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
