//! The proxy of strict mode, over real sockets, against clients that mean no good.
//!
//! On loopback connections keep their destination, which is the proxy's own
//! address; hosts are at other addresses of loopback. tests/strict.rs has them
//! redirected by the kernel.

#[path = "support/dns.rs"]
mod dns;
#[path = "support/tls.rs"]
mod tls;

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bulkhead::net::{
    Code, Journal, Outgoing, Proxied, Proxy, ProxyLimits, Redirect, Serving, What,
};
use bulkhead::spec::Preset;
use dns::{Rig, Says, Upstream, Wish, a};
use hickory_proto::rr::RecordType;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

/// Where the allowed host is.
const HOST: &str = "127.0.0.2";

/// A host that records what it gets, connection by connection.
type Got = Arc<Mutex<Vec<Vec<u8>>>>;

struct Strict {
    rig: Rig,
    address: SocketAddr,
    got: Got,
    events: mpsc::Receiver<bulkhead::net::Event>,
    serving: Option<Serving>,
}

/// What the host does with a connection.
#[derive(Clone, Copy, PartialEq)]
enum Host {
    /// Sends back what it gets, to the end.
    Echoes,
    /// Answers each read with a response that has a length.
    Responds,
    /// Never reads.
    Sleeps,
}

impl Strict {
    async fn new(host: Host, limits: ProxyLimits) -> Self {
        let (listener, server) = loop {
            let server = TcpListener::bind((HOST, 0)).unwrap();
            let port = server.local_addr().unwrap().port();
            if let Ok(listener) = TcpListener::bind(("127.0.0.1", port)) {
                break (listener, server);
            }
        };
        let address = listener.local_addr().unwrap();
        let port = address.port();
        let got = Got::default();
        server.set_nonblocking(true).unwrap();
        let server = tokio::net::TcpListener::from_std(server).unwrap();
        tokio::spawn(be_host(server, host, Arc::clone(&got)));
        let upstream = Upstream::new(|name, kind, _| match kind {
            RecordType::A if name == "dead.example.org" => {
                Says::Records(vec![a(name, "127.0.0.9", 60)])
            }
            RecordType::A => Says::Records(vec![a(name, HOST, 60)]),
            _ => Says::Records(vec![]),
        })
        .await;
        let (at_port, other) = (
            format!("allowed.org:{port}"),
            format!("*.example.org:{port}"),
        );
        let wish = Wish {
            preset: Preset::Offline,
            allow: &[&at_port, &other, "elsewhere.org:1"],
            deny: &["denied.example.org"],
            strict: true,
            exceptions: &["127.0.0.0/8"],
            ..Wish::default()
        };
        let rig = Rig::new(vec![upstream.address], wish);
        let (journal, events) = Journal::new("test", 100_000);
        let proxy = Proxy::new(rig.resolver.clone(), Outgoing::here(), journal, limits);
        let serving = Some(proxy.serve(vec![listener], Redirect::Tproxy).unwrap());
        Self {
            rig,
            address,
            got,
            events,
            serving,
        }
    }

    async fn echo() -> Self {
        Self::new(Host::Echoes, ProxyLimits::default()).await
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// Sends bytes and gives all that comes back.
    async fn say(&self, bytes: &[u8]) -> Vec<u8> {
        let mut stream = self.connect().await;
        // It may be closed before all is sent.
        let _ = stream.write_all(bytes).await;
        let _ = stream.shutdown().await;
        all(&mut stream).await
    }

    /// What the next connection came to.
    async fn event(&mut self) -> Proxied {
        let event = tokio::time::timeout(Duration::from_secs(10), self.events.recv());
        match event.await.expect("it is noted").unwrap().what {
            What::Proxied(event) => event,
            other => panic!("{other:?}"),
        }
    }

    fn got(&self) -> Vec<Vec<u8>> {
        self.got.lock().unwrap().clone()
    }
}

async fn all(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let read = stream.read_to_end(&mut bytes);
    // A reset loses nothing that was read.
    let _ = tokio::time::timeout(Duration::from_secs(10), read)
        .await
        .expect("it ends");
    bytes
}

async fn be_host(server: tokio::net::TcpListener, host: Host, got: Got) {
    loop {
        let (mut stream, _) = server.accept().await.unwrap();
        let got = Arc::clone(&got);
        let index = {
            let mut got = got.lock().unwrap();
            got.push(Vec::new());
            got.len() - 1
        };
        tokio::spawn(async move {
            if host == Host::Sleeps {
                tokio::time::sleep(Duration::from_secs(60)).await;
            }
            let mut buffer = vec![0; 65_536];
            while let Ok(length @ 1..) = stream.read(&mut buffer).await {
                got.lock().unwrap()[index].extend_from_slice(&buffer[..length]);
                let answer = match host {
                    Host::Responds => b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok".to_vec(),
                    _ => buffer[..length].to_vec(),
                };
                if stream.write_all(&answer).await.is_err() {
                    break;
                }
            }
            let _ = stream.shutdown().await;
        });
    }
}

fn refused(event: &Proxied) -> Code {
    event
        .refusal
        .as_ref()
        .unwrap_or_else(|| panic!("{event:?}"))
        .code
}

fn one_hello(sni: &str) -> Vec<u8> {
    tls::records(&tls::hello(Some(sni), &[]), 5000)
}

#[tokio::test]
async fn an_allowed_name_is_spliced_to_its_own_address() {
    let mut strict = Strict::echo().await;
    let hello = one_hello("Allowed.org");
    let mut stream = strict.connect().await;
    stream.write_all(&hello).await.unwrap();
    let mut back = vec![0; hello.len()];
    stream.read_exact(&mut back).await.unwrap();
    assert_eq!(back, hello);
    // Half-closed: what was sent last still comes back.
    stream.write_all(&[7; 100_000]).await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(all(&mut stream).await.len(), 100_000);
    let event = strict.event().await;
    assert_eq!(
        (event.protocol.as_str(), event.name.as_deref()),
        ("tls", Some("allowed.org"))
    );
    let total = hello.len() as u64 + 100_000;
    assert_eq!((event.sent, event.received), (total, total));
    assert_eq!(
        event.connected.unwrap().ip(),
        HOST.parse::<IpAddr>().unwrap()
    );
    assert!(event.rule.unwrap().starts_with("allow-host:allowed.org:"));
    assert!(event.refusal.is_none() && event.failure.is_none());
}

#[tokio::test]
async fn a_name_that_is_not_allowed_gets_an_alert_and_reaches_nobody() {
    let mut strict = Strict::echo().await;
    for (sni, code) in [
        ("evil.com", Code::HostNotAllowed),
        ("denied.example.org", Code::HostDenied),
        ("allowed.org.evil.com", Code::HostNotAllowed),
        ("elsewhere.org", Code::PortNotAllowed),
        ("127.0.0.2", Code::SniInvalid),
    ] {
        let answer = strict.say(&one_hello(sni)).await;
        assert_eq!(answer, [21, 3, 3, 0, 2, 2, 49], "{sni}");
        assert_eq!(refused(&strict.event().await), code, "{sni}");
    }
    let none = tls::records(&tls::hello(None, &[]), 5000);
    strict.say(&none).await;
    assert_eq!(refused(&strict.event().await), Code::SniMissing);
    for ech in [0xfe0d, 0xffce] {
        let hidden = tls::hello(Some("allowed.org"), &[(ech, &[0; 50])]);
        strict.say(&tls::records(&hidden, 5000)).await;
        assert_eq!(refused(&strict.event().await), Code::Ech);
    }
    strict.say(b"SSH-2.0-OpenSSH\r\n\r\n").await;
    assert_eq!(refused(&strict.event().await), Code::NotHttp);
    strict.say(&[0x80, 0x2e, 1, 0, 2]).await;
    assert_eq!(refused(&strict.event().await), Code::NotTls);
    assert!(strict.got().is_empty(), "nobody was connected to");
}

#[tokio::test]
async fn a_handshake_in_many_segments_and_records_is_read() {
    let mut strict = Strict::echo().await;
    let message = tls::hello(Some("allowed.org"), &[(10, &[0; 1200])]);
    for each in [50, 400, 5000] {
        let bytes = tls::records(&message, each);
        let mut stream = strict.connect().await;
        stream.set_nodelay(true).unwrap();
        for part in bytes.chunks(97) {
            stream.write_all(part).await.unwrap();
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let mut back = vec![0; bytes.len()];
        stream.read_exact(&mut back).await.unwrap();
        assert_eq!(back, bytes);
        drop(stream);
        strict.event().await;
    }
    // A forbidden name is not missed for that.
    let bytes = tls::records(&tls::hello(Some("evil.com"), &[]), 3);
    let mut stream = strict.connect().await;
    for part in bytes.chunks(1) {
        if stream.write_all(part).await.is_err() {
            break;
        }
    }
    let code = refused(&strict.event().await);
    assert!(
        matches!(code, Code::HostNotAllowed | Code::HeadTooLarge),
        "{code:?}"
    );
    let endless = [&[22, 3, 1, 0x40, 0, 1, 0, 0x3f, 0xf0][..], &[0; 40_000]].concat();
    strict.say(&endless).await;
    refused(&strict.event().await);
}

#[tokio::test]
async fn http_requests_go_on_one_after_the_other() {
    let mut strict = Strict::new(Host::Responds, ProxyLimits::default()).await;
    let mut stream = strict.connect().await;
    let post = b"POST /x HTTP/1.1\r\nHost: allowed.org\r\nContent-Length: 5\r\n\r\nhello";
    let get = b"GET /y HTTP/1.1\r\nHost: ALLOWED.org\r\n\r\n";
    let chunked = b"POST /z HTTP/1.1\r\nHost: allowed.org\r\nTransfer-Encoding: chunked\r\n\r\n\
                    3\r\nabc\r\n0\r\n\r\n";
    let mut buffer = [0; 1000];
    for request in [&post[..], get, chunked] {
        stream.write_all(request).await.unwrap();
        let length = stream.read(&mut buffer).await.unwrap();
        assert!(buffer[..length].starts_with(b"HTTP/1.1 200"));
    }
    // And several at once.
    stream
        .write_all(&[&post[..], get, chunked].concat())
        .await
        .unwrap();
    stream.shutdown().await.unwrap();
    all(&mut stream).await;
    let event = strict.event().await;
    let twice = 2 * (post.len() + get.len() + chunked.len());
    assert_eq!((event.sent, event.failure), (twice as u64, None));
    assert_eq!(strict.got()[0].len(), twice);
}

#[tokio::test]
async fn a_later_request_for_another_host_is_not_passed_on() {
    let mut strict = Strict::new(Host::Responds, ProxyLimits::default()).await;
    let good = "GET /1 HTTP/1.1\r\nHost: allowed.org\r\n\r\n";
    for (second, code) in [
        (
            "GET /2 HTTP/1.1\r\nHost: evil.com\r\n\r\n",
            Code::HostChanged,
        ),
        (
            "GET /2 HTTP/1.1\r\nHost: also.example.org\r\n\r\n",
            Code::HostChanged,
        ),
        (
            "GET /2 HTTP/1.1\r\nHost: allowed.org\r\nHost: evil.com\r\n\r\n",
            Code::HostAmbiguous,
        ),
        (
            "CONNECT evil.com:443 HTTP/1.1\r\nHost: allowed.org\r\n\r\n",
            Code::RequestKind,
        ),
        (
            "PUT /2 HTTP/1.1\r\nHost: allowed.org\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
            Code::RequestAmbiguous,
        ),
    ] {
        // In one packet with the first, and in one of its own.
        for together in [true, false] {
            let before = strict.got().len();
            let mut stream = strict.connect().await;
            if together {
                stream
                    .write_all(format!("{good}{second}").as_bytes())
                    .await
                    .unwrap();
            } else {
                stream.write_all(good.as_bytes()).await.unwrap();
                assert!(stream.read(&mut [0; 1000]).await.unwrap() > 0);
                stream.write_all(second.as_bytes()).await.unwrap();
            }
            all(&mut stream).await;
            assert_eq!(refused(&strict.event().await), code, "{second:?}");
            for got in &strict.got()[before..] {
                let text = String::from_utf8_lossy(got);
                assert!(!text.contains("/2") && !text.contains("evil"), "{text}");
            }
        }
    }
}

#[tokio::test]
async fn a_refused_request_is_told_in_the_one_shape() {
    let mut strict = Strict::echo().await;
    for (request, code) in [
        (
            "GET / HTTP/1.1\r\nHost: evil.com\r\n\r\n",
            "host-not-allowed",
        ),
        (
            "GET http://evil.com/ HTTP/1.1\r\nHost: allowed.org\r\n\r\n",
            "host-ambiguous",
        ),
        (
            "CONNECT allowed.org:443 HTTP/1.1\r\nHost: allowed.org:443\r\n\r\n",
            "request-kind",
        ),
        ("GET / HTTP/1.1\r\n\r\n", "host-missing"),
        ("GET / HTTP/1.1\r\nHost: 127.0.0.2\r\n\r\n", "host-missing"),
    ] {
        let answer = String::from_utf8(strict.say(request.as_bytes()).await).unwrap();
        let (head, body) = answer
            .split_once("\r\n\r\n")
            .unwrap_or_else(|| panic!("{answer:?}"));
        assert!(head.starts_with("HTTP/1.1 403 ") && head.contains("Connection: close"));
        let told: serde_json::Value = serde_json::from_str(body).unwrap();
        assert_eq!(told["error"]["code"], code, "{request:?}");
        for key in ["cause", "remedy", "rule"] {
            assert!(
                told["error"][key]
                    .as_str()
                    .is_some_and(|text| !text.is_empty())
            );
        }
        assert!(strict.event().await.refusal.is_some());
    }
    let answer = strict
        .say(b"GET / HTTP/1.1\r\nHost: dead.example.org\r\n\r\n")
        .await;
    assert!(
        answer.starts_with(b"HTTP/1.1 502 "),
        "{}",
        String::from_utf8_lossy(&answer)
    );
    assert!(strict.event().await.failure.unwrap().contains("127.0.0.9"));
    assert!(strict.got().is_empty());
}

#[tokio::test]
async fn slow_beginnings_give_their_place_back() {
    let limits = ProxyLimits {
        connections: 16,
        head: Duration::from_millis(800),
        ..ProxyLimits::default()
    };
    let mut strict = Strict::new(Host::Echoes, limits).await;
    // A byte now and then, on all places (slowloris), and nothing at all.
    let mut slow = Vec::new();
    for number in 0..16 {
        let mut stream = strict.connect().await;
        slow.push(tokio::spawn(async move {
            for byte in b"GET / HTTP/1.1\r\nX-".iter().cycle() {
                if number % 2 == 0 && stream.write_all(&[*byte]).await.is_err() {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
                if matches!(stream.try_read(&mut [0; 500]), Ok(0)) {
                    return;
                }
            }
        }));
    }
    let start = Instant::now();
    for _ in 0..16 {
        assert_eq!(refused(&strict.event().await), Code::HeadTooSlow);
    }
    assert!(
        start.elapsed() < Duration::from_secs(5),
        "{:?}",
        start.elapsed()
    );
    let hello = one_hello("allowed.org");
    assert_eq!(strict.say(&hello).await, hello);
    for task in slow {
        task.await.unwrap();
    }
}

#[tokio::test]
async fn idle_connections_and_those_a_new_policy_forbids_are_cut() {
    let limits = ProxyLimits {
        idle: Duration::from_millis(800),
        ..ProxyLimits::default()
    };
    let mut strict = Strict::new(Host::Echoes, limits).await;
    let hello = one_hello("allowed.org");
    let mut busy = strict.connect().await;
    let mut idle = strict.connect().await;
    for stream in [&mut busy, &mut idle] {
        stream.write_all(&hello).await.unwrap();
        stream.read_exact(&mut vec![0; hello.len()]).await.unwrap();
    }
    for _ in 0..8 {
        tokio::time::sleep(Duration::from_millis(200)).await;
        busy.write_all(b"x").await.unwrap();
        busy.read_exact(&mut [0]).await.unwrap();
    }
    all(&mut idle).await;
    assert!(strict.event().await.failure.unwrap().contains("no byte"));
    let stricter = dns::policy(Preset::Offline, &[], &[]);
    strict.rig.policy.send(Arc::new(stricter)).unwrap();
    all(&mut busy).await;
    assert_eq!(refused(&strict.event().await), Code::HostNotAllowed);
}

#[tokio::test]
async fn a_host_that_does_not_read_is_not_read_for() {
    let strict = Strict::new(Host::Sleeps, ProxyLimits::default()).await;
    let mut stream = strict.connect().await;
    stream.write_all(&one_hello("allowed.org")).await.unwrap();
    let block = vec![0; 1 << 20];
    let mut sent = 0;
    // The kernel's buffers on both sides take some; the proxy hardly any.
    while let Ok(result) =
        tokio::time::timeout(Duration::from_millis(700), stream.write(&block)).await
    {
        sent += result.unwrap();
        assert!(sent < 64 << 20, "{sent} bytes were taken in");
    }
}

#[tokio::test]
async fn ten_thousand_connections_are_bounded() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most.min(30_000), most).unwrap();
    if most < 12_000 {
        println!("skipped: ten_thousand_connections_are_bounded: {most} descriptors are allowed");
        return;
    }
    let limits = ProxyLimits {
        connections: 200,
        // However long the others take.
        head: Duration::from_secs(600),
        ..ProxyLimits::default()
    };
    let mut strict = Strict::new(Host::Echoes, limits).await;
    let before = descriptors();
    let mut all_of_them = Vec::new();
    for _ in 0..10_000 {
        all_of_them.push(strict.connect().await);
    }
    // Ours are 10,000; the proxy keeps 200 at most, and the rest is closed.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let kept = descriptors() - before - 10_000;
    assert!(kept <= 210, "{kept} are kept");
    let mut turned_away = 0;
    while let Ok(event) = strict.events.try_recv() {
        match event.what {
            What::Proxied(event) if refused(&event) == Code::TooManyConnections => turned_away += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(turned_away, 9_800);
    drop(all_of_them);
    tokio::time::sleep(Duration::from_millis(500)).await;
    let hello = one_hello("allowed.org");
    assert_eq!(strict.say(&hello).await, hello, "it lives on");
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[tokio::test]
async fn what_is_open_at_the_end_is_noted_too() {
    let mut strict = Strict::echo().await;
    let hello = one_hello("allowed.org");
    let mut stream = strict.connect().await;
    stream.write_all(&hello).await.unwrap();
    stream.read_exact(&mut vec![0; hello.len()]).await.unwrap();
    drop(strict.serving.take());
    let event = strict.event().await;
    assert_eq!(event.sent, hello.len() as u64);
    assert!(event.failure.unwrap().contains("ended"));
}
