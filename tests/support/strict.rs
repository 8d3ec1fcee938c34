//! A guest, a machine's router and an internet, each in a network namespace of
//! its own, with resolver, proxy and record between them.

use std::io::Write as _;
use std::net::{TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::dns::{self, Says, Upstream, a};
use bulkhead::net::{
    Event, Feed, Journal, Names, Outgoing, Policy, Proxy, ProxyLimits, Redirect, Resolver,
    ResolverConfig, ResolverLimits, Rules, Serving, Sockets, Taps, What, record,
};
use bulkhead::spec::Preset;
use hickory_proto::rr::RecordType;
use nix::sched::{CloneFlags, setns};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{mpsc, watch};

pub(crate) const GATEWAY: &str = "198.18.0.1";
pub(crate) const GUEST: &str = "198.18.0.2";
/// An allowed host, and one that is not.
pub(crate) const GOOD: &str = "93.184.215.14";
pub(crate) const EVIL: &str = "93.184.215.15";
/// Of the rules' log.
pub(crate) const GROUP: u16 = 1;

/// A network namespace with a name of its own, gone when dropped.
pub(crate) struct Netns(pub(crate) String);

impl Netns {
    pub(crate) fn new(what: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::SeqCst);
        let name = format!("bhd-{}-{number}-{what}", std::process::id());
        ip(&["netns", "add", &name]);
        let made = Self(name);
        made.ip(&["link", "set", "lo", "up"]);
        made
    }

    pub(crate) fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.0)
    }

    pub(crate) fn ip(&self, words: &[&str]) {
        ip(&[&["-n", &self.0], words].concat());
    }

    pub(crate) fn open(&self) -> OwnedFd {
        std::fs::File::open(self.path()).unwrap().into()
    }

    /// Does something in a thread that is in it.
    pub(crate) fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let namespace = self.open();
        let enter = move || {
            setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
            work()
        };
        std::thread::scope(|scope| scope.spawn(enter).join().unwrap())
    }

    pub(crate) fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.0]).args(words);
        command
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

pub(crate) fn ip(words: &[&str]) {
    let output = Command::new("ip").args(words).output().unwrap();
    assert!(output.status.success(), "{words:?}: {output:?}");
}

/// What these tests need and not every machine has.
pub(crate) fn missing() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("not root".into());
    }
    ["ip", "nft", "curl", "dig", "openssl", "nsenter"]
        .iter()
        .find(|tool| {
            let mut command = Command::new("sh");
            let found = command
                .args(["-c", &format!("command -v {tool}")])
                .stdout(Stdio::null());
            !found.status().is_ok_and(|status| status.success())
        })
        .map(|tool| format!("there is no {tool}"))
}

/// A process that ends with the test.
pub(crate) struct Server(pub(crate) Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) type Got = Arc<Mutex<Vec<Vec<u8>>>>;

pub(crate) struct World {
    pub(crate) guest: Netns,
    pub(crate) router: Arc<Netns>,
    pub(crate) internet: Netns,
    pub(crate) dir: tempfile::TempDir,
    pub(crate) events: mpsc::Receiver<Event>,
    /// What came to the good host's port 80, to its port 8443, and to the evil host.
    pub(crate) web: Got,
    pub(crate) raw: Got,
    pub(crate) evil: Got,
    pub(crate) policy: watch::Sender<Arc<Policy>>,
    pub(crate) names: Names,
    _servings: Vec<Serving>,
    _tls: Server,
}

/// As the machine's own rules have it, as far as these tests go.
pub(crate) const RULES: &str = "
table inet bulkhead {
  set allowed4 { type ipv4_addr . inet_service; flags timeout; }
  chain pre { type nat hook prerouting priority dstnat;
    iifname \"g1\" ip daddr != 198.18.0.1 tcp dport { 80, 443 } redirect to :PORT
  }
  chain post { type nat hook postrouting priority srcnat; oifname \"o1\" masquerade
  }
  chain forward { type filter hook forward priority 0; policy drop;
    ct state established,related accept
    ip daddr 10.0.0.0/8 log prefix \"refused:private\" group 1 reject
    ip daddr . tcp dport @allowed4 meta mark set 5 ct mark set 5 log prefix \"new:\" group 1 accept
    log prefix \"refused:name\" group 1 reject with tcp reset
  }
}";

impl World {
    pub(crate) async fn new(preset: Preset, allow: &[&str], deny: &[&str]) -> Self {
        let (guest, router, internet) = (Netns::new("g"), Netns::new("r"), Netns::new("i"));
        guest.ip(&[
            "link", "add", "g0", "type", "veth", "peer", "name", "g1", "netns", &router.0,
        ]);
        router.ip(&[
            "link",
            "add",
            "o1",
            "type",
            "veth",
            "peer",
            "name",
            "o0",
            "netns",
            &internet.0,
        ]);
        for (netns, device, address) in [
            (&guest, "g0", "198.18.0.2/30"),
            (&router, "g1", "198.18.0.1/30"),
            (&router, "o1", "10.200.0.1/30"),
            (&internet, "o0", "10.200.0.2/30"),
        ] {
            netns.ip(&["addr", "add", address, "dev", device]);
            netns.ip(&["link", "set", device, "up"]);
        }
        guest.ip(&["route", "add", "default", "via", GATEWAY]);
        router.ip(&["route", "add", "default", "via", "10.200.0.2"]);
        for address in [GOOD, EVIL] {
            internet.ip(&["addr", "add", &format!("{address}/32"), "dev", "lo"]);
        }
        router.inside(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap());

        let dir = tempfile::tempdir().unwrap();
        let tls = be_tls_host(&internet, dir.path());
        let (web, raw, evil) = (Got::default(), Got::default(), Got::default());
        for (got, address) in [
            (&web, format!("{GOOD}:80")),
            (&raw, format!("{GOOD}:8443")),
            (&evil, format!("{EVIL}:443")),
            (&evil, format!("{EVIL}:80")),
            (&evil, format!("{EVIL}:8443")),
        ] {
            let listener = internet.inside(|| TcpListener::bind(address).unwrap());
            be_host(listener, Arc::clone(got));
        }
        let upstream = Upstream::new(|name, kind, _| match (name, kind) {
            ("good.org", RecordType::A) => Says::Records(vec![a(name, GOOD, 60)]),
            ("evil.org", RecordType::A) => Says::Records(vec![a(name, EVIL, 60)]),
            ("rebind.org", RecordType::A) => Says::Records(vec![a(name, "169.254.169.254", 0)]),
            _ => Says::Records(vec![]),
        })
        .await;

        let (journal, events) = Journal::new("test", 10_000);
        let held = Arc::new(dns::policy(preset, allow, deny));
        let (policy, watched) = watch::channel(Arc::clone(&held));
        let (feed, fed) = mpsc::channel(8);
        let router = Arc::new(router);
        tokio::spawn(let_through(fed, Arc::clone(&router)));
        let names = Names::default();
        let config = ResolverConfig {
            upstreams: vec![upstream.address],
            from: Outgoing::here(),
            strict: true,
            limits: ResolverLimits::default(),
        };
        let resolver = Resolver::new(config, watched, names.clone(), feed, journal.clone());
        let (sockets, listener, taps) = router.inside(|| {
            let sockets = Sockets {
                udp: vec![UdpSocket::bind((GATEWAY, 53)).unwrap()],
                tcp: vec![TcpListener::bind((GATEWAY, 53)).unwrap()],
            };
            let listener = TcpListener::bind((GATEWAY, 0)).unwrap();
            (sockets, listener, Taps::open(GROUP).unwrap())
        });
        let port = listener.local_addr().unwrap().port();
        nft(&router, &RULES.replace("PORT", &port.to_string()));
        let outgoing = Outgoing::within(router.open()).unwrap();
        let proxy = Proxy::new(
            resolver.clone(),
            outgoing,
            journal.clone(),
            ProxyLimits::default(),
        );
        let guests = vec![GUEST.parse().unwrap()];
        let servings = vec![
            resolver.serve(sockets).unwrap(),
            proxy.serve(vec![listener], Redirect::Nat).unwrap(),
            record::record(
                taps,
                guests,
                Rules::new(names.clone(), held),
                journal,
                watch::channel(false).1,
            )
            .unwrap(),
        ];
        std::fs::write(
            dir.path().join("resolv.conf"),
            format!("nameserver {GATEWAY}\n"),
        )
        .unwrap();
        Self {
            guest,
            router,
            internet,
            dir,
            events,
            web,
            raw,
            evil,
            policy,
            names,
            _servings: servings,
            _tls: tls,
        }
    }

    /// Runs a program as the guest would, with the resolver in its resolv.conf.
    pub(crate) async fn run(&self, words: &[&str]) -> Output {
        let resolv = self.dir.path().join("resolv.conf");
        let script = "mount --bind \"$0\" /etc/resolv.conf && exec \"$@\"";
        let mut command = tokio::process::Command::new("nsenter");
        command.arg(format!("--net={}", self.guest.path().display()));
        command
            .args(["unshare", "-m", "sh", "-c", script])
            .arg(resolv)
            .args(words);
        let output = tokio::time::timeout(Duration::from_secs(60), command.output());
        output.await.expect("it ends").unwrap()
    }

    /// curl's exit code and what it printed.
    pub(crate) async fn curl(&self, words: &[&str]) -> (i32, String) {
        let fixed = ["curl", "-sSk", "--noproxy", "*", "--max-time", "20"];
        let output = self.run(&[&fixed, words].concat()).await;
        let text = [output.stdout, output.stderr].concat();
        (
            output.status.code().unwrap(),
            String::from_utf8_lossy(&text).into_owned(),
        )
    }

    /// All events until one is as wanted.
    pub(crate) async fn until(&mut self, wanted: impl Fn(&What) -> bool) -> Vec<Event> {
        let mut all = Vec::new();
        let end = Instant::now() + Duration::from_secs(60);
        while !all.last().is_some_and(|event: &Event| wanted(&event.what)) {
            let left = end.saturating_duration_since(Instant::now());
            match tokio::time::timeout(left, self.events.recv()).await {
                Ok(event) => all.push(event.unwrap()),
                Err(_) => panic!("it did not come: {all:#?}"),
            }
        }
        all
    }
}

/// The kernel's half: what the resolver allows goes into the set.
pub(crate) async fn let_through(mut fed: mpsc::Receiver<Feed>, router: Arc<Netns>) {
    while let Some(Feed { grants, done }) = fed.recv().await {
        let mut text = String::new();
        for grant in grants {
            for port in [80, 443, 8443]
                .into_iter()
                .filter(|port| grant.ports.contains(*port))
            {
                text.push_str(&format!(
                    "add element inet bulkhead allowed4 {{ {} . {port} timeout {}s }}\n",
                    grant.address,
                    grant.lifetime.as_secs()
                ));
            }
        }
        nft(&router, &text);
        let _ = done.send(Ok(()));
    }
}

pub(crate) fn nft(router: &Netns, rules: &str) {
    let mut command = router.command(&["nft", "-f", "-"]);
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(rules.as_bytes())
        .unwrap();
    assert!(child.wait().unwrap().success(), "{rules}");
}

pub(crate) fn be_tls_host(internet: &Netns, dir: &Path) -> Server {
    let (key, cert) = (dir.join("key"), dir.join("cert"));
    let made = Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=good.org",
        ])
        .arg("-keyout")
        .arg(&key)
        .arg("-out")
        .arg(&cert)
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    let mut command = internet.command(&["openssl", "s_server", "-quiet", "-www"]);
    command
        .args(["-accept", &format!("{GOOD}:443")])
        .arg("-key")
        .arg(key)
        .arg("-cert")
        .arg(cert);
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let server = Server(child.spawn().unwrap());
    let end = Instant::now() + Duration::from_secs(20);
    let connect = || internet.inside(|| std::net::TcpStream::connect((GOOD, 443)));
    while connect().is_err() {
        assert!(Instant::now() < end, "openssl does not listen");
        std::thread::sleep(Duration::from_millis(50));
    }
    server
}

/// Answers everything with a short response, and records it.
pub(crate) fn be_host(listener: TcpListener, got: Got) {
    listener.set_nonblocking(true).unwrap();
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let got = Arc::clone(&got);
            tokio::spawn(async move {
                let mut buffer = vec![0; 65_536];
                while let Ok(length @ 1..) = stream.read(&mut buffer).await {
                    got.lock().unwrap().push(buffer[..length].to_vec());
                    let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nhello\n";
                    if stream.write_all(answer).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
}
