//! A name server with answers made up by a test, and a client for the resolver.
#![allow(dead_code)] // each test file uses a part of it

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bulkhead::net::{
    Code, Event, Feed, Grant, Journal, Names, Outgoing, Policy, QueryResult, Resolver,
    ResolverConfig, ResolverLimits, Serving, Sockets, What,
};
use bulkhead::spec::{NetworkPolicy, Preset};
use hickory_proto::op::{Edns, Message, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, CNAME, TXT};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{mpsc, watch};

/// What a made-up name server says.
pub(crate) enum Says {
    Records(Vec<Record>),
    Code(ResponseCode),
    /// Cut off, over UDP.
    Cut,
    Nothing,
    /// So late.
    Late(Duration, Vec<Record>),
}

/// A name server on loopback.
pub(crate) struct Upstream {
    pub(crate) address: SocketAddr,
    /// Questions it got; whether over TCP.
    pub(crate) asked: Arc<Mutex<Vec<(String, RecordType, bool)>>>,
}

pub(crate) fn name(text: &str) -> Name {
    // Label by label, so that a name may begin with a hyphen.
    let labels = text.split('.').filter(|label| !label.is_empty());
    Name::from_labels(labels.map(str::as_bytes)).unwrap()
}

pub(crate) fn a(owner: &str, address: &str, ttl: u32) -> Record {
    let data = match address.parse().unwrap() {
        IpAddr::V4(address) => RData::A(A(address)),
        IpAddr::V6(address) => RData::AAAA(AAAA(address)),
    };
    Record::from_rdata(name(owner), ttl, data)
}

pub(crate) fn cname(owner: &str, target: &str) -> Record {
    Record::from_rdata(name(owner), 60, RData::CNAME(CNAME(name(target))))
}

pub(crate) fn txt(owner: &str, bytes: usize) -> Record {
    let strings = vec!["x".repeat(200); bytes / 200];
    Record::from_rdata(name(owner), 60, RData::TXT(TXT::new(strings)))
}

impl Upstream {
    pub(crate) async fn new(
        say: impl Fn(&str, RecordType, bool) -> Says + Send + Sync + 'static,
    ) -> Self {
        Self::on(sockets("127.0.0.1:0"), say)
    }

    /// On sockets that were opened elsewhere.
    pub(crate) fn on(
        (sockets, address): (Sockets, SocketAddr),
        say: impl Fn(&str, RecordType, bool) -> Says + Send + Sync + 'static,
    ) -> Self {
        let Sockets { mut udp, mut tcp } = sockets;
        let (udp, tcp) = (udp.remove(0), tcp.remove(0));
        udp.set_nonblocking(true).unwrap();
        tcp.set_nonblocking(true).unwrap();
        let udp = tokio::net::UdpSocket::from_std(udp).unwrap();
        let tcp = tokio::net::TcpListener::from_std(tcp).unwrap();
        let asked: Arc<Mutex<Vec<_>>> = Arc::default();
        let (udp, say, log) = (Arc::new(udp), Arc::new(say), Arc::clone(&asked));
        let answer = move |bytes: &[u8], tcp: bool| {
            let request = Message::from_vec(bytes).unwrap();
            let query = request.queries[0].clone();
            let labels: Vec<_> = query.name.iter().map(String::from_utf8_lossy).collect();
            let text = labels.join(".");
            log.lock()
                .unwrap()
                .push((text.clone(), query.query_type, tcp));
            let mut reply = Message::response(request.metadata.id, request.metadata.op_code);
            reply.add_query(query.clone());
            reply.set_edns(Edns::new());
            let mut wait = Duration::ZERO;
            match say(&text, query.query_type, tcp) {
                Says::Records(records) => reply.insert_answers(records),
                Says::Code(code) => reply.metadata.response_code = code,
                Says::Cut => reply.metadata.truncation = true,
                Says::Nothing => return None,
                Says::Late(late, records) => {
                    wait = late;
                    reply.insert_answers(records);
                }
            }
            Some((wait, reply.to_vec().unwrap()))
        };
        let answer = Arc::new(answer);
        let packets = Arc::clone(&answer);
        tokio::spawn(async move {
            let mut buffer = [0; 4096];
            loop {
                let (length, peer) = udp.recv_from(&mut buffer).await.unwrap();
                if let Some((wait, bytes)) = packets(&buffer[..length], false) {
                    let udp = Arc::clone(&udp);
                    tokio::spawn(async move {
                        tokio::time::sleep(wait).await;
                        udp.send_to(&bytes, peer).await.unwrap();
                    });
                }
            }
        });
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = tcp.accept().await.unwrap();
                let answer = Arc::clone(&answer);
                tokio::spawn(async move {
                    let length = stream.read_u16().await.unwrap();
                    let mut bytes = vec![0; length.into()];
                    stream.read_exact(&mut bytes).await.unwrap();
                    if let Some((_, bytes)) = answer(&bytes, true) {
                        let length = u16::try_from(bytes.len()).unwrap();
                        stream.write_u16(length).await.unwrap();
                        stream.write_all(&bytes).await.unwrap();
                    }
                });
            }
        });
        Self { address, asked }
    }

    pub(crate) fn asked_names(&self) -> Vec<String> {
        let asked = self.asked.lock().unwrap();
        asked.iter().map(|(name, _, _)| name.clone()).collect()
    }
}

/// A resolver on loopback, and all that comes out of it.
pub(crate) struct Rig {
    pub(crate) resolver: Resolver,
    pub(crate) address: SocketAddr,
    pub(crate) policy: watch::Sender<Arc<Policy>>,
    pub(crate) grants: Arc<Mutex<Vec<Grant>>>,
    pub(crate) events: mpsc::Receiver<Event>,
    pub(crate) journal: Journal,
    pub(crate) serving: Serving,
}

/// What differs from the usual.
pub(crate) struct Wish<'a> {
    pub(crate) preset: Preset,
    pub(crate) allow: &'a [&'a str],
    pub(crate) deny: &'a [&'a str],
    pub(crate) strict: bool,
    pub(crate) ipv6: bool,
    pub(crate) exceptions: &'a [&'a str],
    pub(crate) limits: ResolverLimits,
}

impl Default for Wish<'_> {
    fn default() -> Self {
        Self {
            preset: Preset::Dev,
            allow: &[],
            deny: &[],
            strict: false,
            ipv6: false,
            exceptions: &[],
            limits: ResolverLimits::default(),
        }
    }
}

pub(crate) fn policy(preset: Preset, allow: &[&str], deny: &[&str]) -> Policy {
    let wish = Wish {
        preset,
        allow,
        deny,
        ..Wish::default()
    };
    wish.policy()
}

impl Wish<'_> {
    pub(crate) fn policy(&self) -> Policy {
        let patterns = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        let exceptions = self.exceptions.iter().map(|text| text.parse().unwrap());
        Policy::new(&NetworkPolicy {
            allow_hosts: patterns(self.allow),
            deny_hosts: patterns(self.deny),
            ipv6: self.ipv6,
            exceptions: exceptions.collect(),
            ..NetworkPolicy::of_preset(self.preset)
        })
    }
}

/// Sockets on a port of loopback, the same for packets and connections.
pub(crate) fn sockets(at: &str) -> (Sockets, SocketAddr) {
    loop {
        let udp = UdpSocket::bind(at).unwrap();
        let address = udp.local_addr().unwrap();
        // Another test may have the port for connections.
        if let Ok(tcp) = TcpListener::bind(address) {
            let sockets = Sockets {
                udp: vec![udp],
                tcp: vec![tcp],
            };
            return (sockets, address);
        }
    }
}

impl Rig {
    pub(crate) fn new(upstreams: Vec<SocketAddr>, wish: Wish<'_>) -> Self {
        let (sockets, address) = sockets("127.0.0.1:0");
        Self::on(sockets, address, upstreams, wish)
    }

    pub(crate) fn on(
        sockets: Sockets,
        address: SocketAddr,
        upstreams: Vec<SocketAddr>,
        wish: Wish<'_>,
    ) -> Self {
        let (journal, events) = Journal::new("test", 100_000);
        let (policy, watched) = watch::channel(Arc::new(wish.policy()));
        let (feed, mut fed) = mpsc::channel::<Feed>(8);
        let grants: Arc<Mutex<Vec<Grant>>> = Arc::default();
        let sink = Arc::clone(&grants);
        tokio::spawn(async move {
            while let Some(Feed { grants, done }) = fed.recv().await {
                sink.lock().unwrap().extend(grants);
                let _ = done.send(Ok(()));
            }
        });
        let config = ResolverConfig {
            upstreams,
            from: Outgoing::here(),
            strict: wish.strict,
            limits: wish.limits,
        };
        let resolver = Resolver::new(config, watched, Names::default(), feed, journal.clone());
        let serving = resolver.serve(sockets).unwrap();
        Self {
            resolver,
            address,
            policy,
            grants,
            events,
            journal,
            serving,
        }
    }

    /// The answer to a question over UDP.
    pub(crate) async fn ask(&self, host: &str, kind: RecordType) -> Message {
        self.ask_raw(&question(host, kind))
            .await
            .expect("it answers")
    }

    /// The answer to any message over UDP; none in a moment is none.
    pub(crate) async fn ask_raw(&self, bytes: &[u8]) -> Option<Message> {
        let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
        socket.connect(self.address).await.unwrap();
        socket.send(bytes).await.unwrap();
        let mut buffer = [0; 65_536];
        let wait = Duration::from_secs(8);
        let length = tokio::time::timeout(wait, socket.recv(&mut buffer))
            .await
            .ok()?
            .unwrap();
        Some(Message::from_vec(&buffer[..length]).unwrap())
    }

    /// The answer to a question over TCP.
    pub(crate) async fn ask_tcp(&self, host: &str, kind: RecordType) -> Message {
        let mut stream = tokio::net::TcpStream::connect(self.address).await.unwrap();
        let bytes = question(host, kind);
        stream
            .write_u16(u16::try_from(bytes.len()).unwrap())
            .await
            .unwrap();
        stream.write_all(&bytes).await.unwrap();
        let mut answer = vec![0; stream.read_u16().await.unwrap().into()];
        stream.read_exact(&mut answer).await.unwrap();
        Message::from_vec(&answer).unwrap()
    }

    /// All events so far.
    pub(crate) fn told(&mut self) -> Vec<What> {
        let mut all = Vec::new();
        while let Ok(event) = self.events.try_recv() {
            all.push(event.what);
        }
        all
    }

    pub(crate) fn granted(&self) -> Vec<IpAddr> {
        self.grants
            .lock()
            .unwrap()
            .iter()
            .map(|grant| grant.address)
            .collect()
    }
}

pub(crate) fn question(host: &str, kind: RecordType) -> Vec<u8> {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(name(host), kind));
    let mut edns = Edns::new();
    edns.set_max_payload(4096);
    message.set_edns(edns);
    message.to_vec().unwrap()
}

/// The addresses in an answer.
pub(crate) fn addresses(message: &Message) -> Vec<IpAddr> {
    let address = |record: &Record| match &record.data {
        RData::A(a) => Some(IpAddr::V4(a.0)),
        RData::AAAA(aaaa) => Some(IpAddr::V6(aaaa.0)),
        _ => None,
    };
    message.answers.iter().filter_map(address).collect()
}

/// What an extended error says (RFC 8914).
pub(crate) fn told_why(message: &Message) -> String {
    use hickory_proto::rr::rdata::opt::{EdnsCode, EdnsOption};
    let edns = message.edns.as_ref().expect("it understands EDNS");
    match edns.option(EdnsCode::Unknown(15)) {
        Some(EdnsOption::Unknown(_, data)) => String::from_utf8(data[2..].to_vec()).unwrap(),
        _ => String::new(),
    }
}

pub(crate) const PUBLIC: Ipv4Addr = Ipv4Addr::new(93, 184, 215, 14);

/// A name server that knows one address for everything.
pub(crate) async fn one_for_all() -> Upstream {
    Upstream::new(|name, kind, _| match kind {
        RecordType::A => Says::Records(vec![a(name, &PUBLIC.to_string(), 300)]),
        _ => Says::Records(vec![]),
    })
    .await
}

pub(crate) fn refused(event: &What) -> Option<Code> {
    match event {
        What::Query(query) if query.result == QueryResult::Refused => {
            Some(query.refusal.as_ref().expect("a refusal says why").code)
        }
        _ => None,
    }
}
