//! What a machine's network did, one event a line of JSON.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::bucket::Bucket;
use super::refusal::Refusal;
use crate::spec::Exception;

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Event {
    /// When, in milliseconds since 1970-01-01 UTC.
    pub at_ms: u64,
    /// Name of the machine.
    pub machine: String,
    /// What.
    #[serde(flatten)]
    pub what: What,
}

/// Kinds of events.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum What {
    /// The guest asked the resolver something.
    Query(Query),
    /// The kernel let a new connection through, or refused a packet.
    Packet(Packet),
    /// The kernel has forgotten a connection: it is over.
    Flow(Flow),
    /// The proxy has done with a connection.
    Proxied(Proxied),
    /// An exception from what no machine may reach is made, or made no more.
    Exception(Excepted),
    /// So many events before this one are missing: they came faster than they
    /// could be written, or the kernel dropped them.
    Lost {
        /// How many, at least.
        count: u64,
    },
}

impl What {
    /// Why it, or a part of it, was refused.
    pub fn refusal(&self) -> Option<&Refusal> {
        match self {
            Self::Query(query) => query.refusal.as_ref(),
            Self::Packet(packet) => packet.refusal.as_ref(),
            Self::Proxied(proxied) => proxied.refusal.as_ref(),
            Self::Flow(_) | Self::Exception(_) | Self::Lost { .. } => None,
        }
    }
}

/// A question to the resolver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Query {
    /// The name asked for, made printable.
    pub name: String,
    /// The type of records asked for: `A`, `TXT`.
    pub kind: String,
    /// What came of it.
    pub result: QueryResult,
    /// Addresses that were told.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpAddr>,
    /// The rule that allowed the name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// Why it, or a part of the answer, was refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusal: Option<Refusal>,
    /// Why nobody answered it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
    /// How long it took, in microseconds.
    pub us: u64,
}

/// What came of a question.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum QueryResult {
    /// It was answered with records.
    Answered,
    /// There are no such records.
    Empty,
    /// There is no such name.
    NoName,
    /// It was refused.
    Refused,
    /// The host's resolvers did not answer, or not in a way that can be used.
    Failed,
}

/// A packet that a firewall rule logged (NFLOG).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Packet {
    /// Protocol: `tcp`, `udp`, `icmp`, or its number.
    pub protocol: String,
    /// Where from, where it says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Endpoint>,
    /// Where to, where it says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination: Option<Endpoint>,
    /// The name that the resolver gave the address out for, where it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The rule that let it through: `allow-host:*.example.org`, `preset:dev:443`,
    /// `allow-port:8443`, `allow-cidr:10.1.2.3/32:5432`, `built-in:proxy`. Absent
    /// when it was refused, and in records of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// Why it was refused; absent when it was let through.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusal: Option<Refusal>,
}

impl Packet {
    /// Whether it goes to a part of the machine's own network, and no further.
    pub(super) fn is_built_in(&self) -> bool {
        let rule = self.rule.as_deref();
        rule.is_some_and(|rule| rule.starts_with("built-in:"))
    }
}

/// One end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Endpoint {
    /// Its address.
    pub address: IpAddr,
    /// Its port, for protocols that have such.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
}

/// A connection that is over (conntrack).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Flow {
    /// Protocol.
    pub protocol: String,
    /// Who began it.
    pub source: Endpoint,
    /// Whom it was meant for.
    pub destination: Endpoint,
    /// The name that the resolver gave the address out for, where it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The rule that let it through when it began, as in `packet`, or
    /// `built-in:resolver` or `built-in:ping`; absent in records of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// Bytes from the guest, headers of packets included.
    pub sent: u64,
    /// Bytes to the guest.
    pub received: u64,
    /// Whether these two are known (nf_conntrack_acct is on).
    pub counted: bool,
}

/// An exception, and what became of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Excepted {
    /// The exception, such as `10.1.2.3/32:5432`.
    pub exception: Exception,
    /// Whether it is made from now on, or made no more.
    pub allowed: bool,
}

/// A connection through the proxy of strict mode.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Proxied {
    /// `tls` or `http`.
    pub protocol: String,
    /// Who began it.
    pub source: SocketAddr,
    /// Where the guest wanted to go.
    pub destination: SocketAddr,
    /// Where the proxy went; absent when it went nowhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connected: Option<SocketAddr>,
    /// The name in the handshake or the request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The rule that allowed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// Bytes from the guest.
    pub sent: u64,
    /// Bytes to the guest.
    pub received: u64,
    /// How long it lasted, in milliseconds.
    pub ms: u64,
    /// Why it was refused, or cut off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusal: Option<Refusal>,
    /// What failed, where something did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
}

impl Proxied {
    /// One of which nothing is known yet but its ends.
    pub(super) fn new(source: SocketAddr, destination: SocketAddr) -> Self {
        Self {
            protocol: "unknown".into(),
            source,
            destination,
            connected: None,
            name: None,
            rule: None,
            sent: 0,
            received: 0,
            ms: 0,
            refusal: None,
            failure: None,
        }
    }
}

/// Events a second that are taken in for good: a guest can cause any number of
/// them, and somebody writes them to a disk.
const PER_SECOND: u32 = 200;

/// Takes events for one machine. Never waits: what the reader has no time for,
/// and what comes too fast for long, is counted and told as [`What::Lost`].
/// Cheap to clone.
#[derive(Debug, Clone)]
pub struct Journal {
    machine: Arc<str>,
    events: mpsc::Sender<Event>,
    lost: Arc<AtomicU64>,
    rate: Arc<Mutex<Bucket>>,
}

/// A journal that does not keep its reader waiting for more.
#[derive(Debug, Clone)]
pub(super) struct WeakJournal {
    machine: Arc<str>,
    events: mpsc::WeakSender<Event>,
    lost: Arc<AtomicU64>,
    rate: Arc<Mutex<Bucket>>,
}

impl WeakJournal {
    /// The journal, where somebody still has it.
    pub(super) fn upgrade(&self) -> Option<Journal> {
        Some(Journal {
            machine: Arc::clone(&self.machine),
            events: self.events.upgrade()?,
            lost: Arc::clone(&self.lost),
            rate: Arc::clone(&self.rate),
        })
    }
}

impl Journal {
    /// The same, for who may outlive all others who have it.
    pub(super) fn downgrade(&self) -> WeakJournal {
        WeakJournal {
            machine: Arc::clone(&self.machine),
            events: self.events.downgrade(),
            lost: Arc::clone(&self.lost),
            rate: Arc::clone(&self.rate),
        }
    }

    /// A journal and where its events come out; `room` of them may wait, and
    /// as many, but at least a thousand, may come at once.
    pub fn new(machine: &str, room: usize) -> (Self, mpsc::Receiver<Event>) {
        let (events, receiver) = mpsc::channel(room.max(2));
        let burst = u32::try_from(room.max(1000)).unwrap_or(u32::MAX);
        let rate = Bucket::new(burst, PER_SECOND, Instant::now());
        let journal = Self {
            rate: Arc::new(Mutex::new(rate)),
            machine: machine.into(),
            events,
            lost: Arc::new(AtomicU64::new(0)),
        };
        (journal, receiver)
    }

    /// Takes in an event that happens now.
    pub fn note(&self, what: What) {
        // Exceptions are the user's doing, not the guest's: nothing crowds them out.
        let free = matches!(what, What::Exception(_));
        let mut rate = self.rate.lock().unwrap_or_else(PoisonError::into_inner);
        let within = free || rate.take(1, Instant::now());
        drop(rate);
        if !within {
            self.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let lost = self.lost.swap(0, Ordering::Relaxed);
        if lost > 0 && !self.offer(What::Lost { count: lost }) {
            self.lost.fetch_add(lost, Ordering::Relaxed);
        }
        if !self.offer(what) {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Takes in that so many events will never come.
    pub(crate) fn lost(&self, count: u64) {
        self.lost.fetch_add(count, Ordering::Relaxed);
    }

    fn offer(&self, what: What) -> bool {
        let event = Event {
            at_ms: now_ms(),
            machine: self.machine.to_string(),
            what,
        };
        self.events.try_send(event).is_ok()
    }
}

/// Milliseconds since 1970-01-01 UTC.
fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_lost_is_counted() {
        let (journal, mut events) = Journal::new("m", 2);
        let query = Query {
            name: "example.org".into(),
            kind: "A".into(),
            result: QueryResult::Empty,
            addresses: vec![],
            rule: None,
            refusal: None,
            failure: None,
            us: 1,
        };
        for _ in 0..5 {
            journal.note(What::Query(query.clone()));
        }
        assert!(matches!(events.recv().await.unwrap().what, What::Query(_)));
        assert!(matches!(events.recv().await.unwrap().what, What::Query(_)));
        journal.note(What::Query(query));
        let lost = events.recv().await.unwrap().what;
        assert_eq!(lost, What::Lost { count: 3 });
        assert!(matches!(events.recv().await.unwrap().what, What::Query(_)));
    }

    /// A guest that has used up what may be noted hides no exception of its user's.
    #[test]
    fn exceptions_are_noted_whatever_the_guest_does() {
        let (journal, mut events) = Journal::new("m", 5000);
        let excepted = What::Exception(Excepted {
            exception: "10.1.2.3".parse().unwrap(),
            allowed: true,
        });
        *journal.rate.lock().unwrap() = Bucket::new(0, 0, Instant::now());
        journal.note(What::Lost { count: 1 });
        assert!(events.try_recv().is_err());
        journal.note(excepted.clone());
        let mut noted = std::iter::from_fn(|| events.try_recv().ok());
        assert!(noted.any(|event| event.what == excepted));
    }

    /// What earlier versions wrote is read, and what they read is as it was.
    #[test]
    fn a_rule_is_there_where_it_is_known() {
        let old = r#"{"at_ms":1,"machine":"m","event":"flow","protocol":"tcp","source":{"address":"198.18.0.2","port":1},"destination":{"address":"1.2.3.4","port":443},"sent":1,"received":2,"counted":true}"#;
        let mut event = serde_json::from_str::<Event>(old).unwrap();
        assert_eq!(serde_json::to_string(&event).unwrap(), old);
        let What::Flow(flow) = &mut event.what else {
            panic!("{event:?}")
        };
        assert_eq!(flow.rule, None);
        flow.rule = Some("allow-port:443".into());
        let new = serde_json::to_string(&event).unwrap();
        assert!(new.contains(r#""rule":"allow-port:443""#), "{new}");
        assert_eq!(serde_json::from_str::<Event>(&new).unwrap(), event);
        let event = Event {
            what: What::Exception(Excepted {
                exception: "10.1.2.3:5432".parse().unwrap(),
                allowed: true,
            }),
            ..event
        };
        let json = serde_json::to_string(&event).unwrap();
        assert_eq!(
            json,
            r#"{"at_ms":1,"machine":"m","event":"exception","exception":"10.1.2.3/32:5432","allowed":true}"#
        );
        assert_eq!(serde_json::from_str::<Event>(&json).unwrap(), event);
    }

    #[test]
    fn an_event_is_a_line_of_json() {
        let event = Event {
            at_ms: 1,
            machine: "m".into(),
            what: What::Lost { count: 2 },
        };
        let json = serde_json::to_string(&event).unwrap();
        assert_eq!(
            json,
            r#"{"at_ms":1,"machine":"m","event":"lost","count":2}"#
        );
        assert_eq!(serde_json::from_str::<Event>(&json).unwrap(), event);
    }
}
