//! Resolver, proxy and record with a real kernel and real clients: a guest, a
//! machine's router and an internet, each in a network namespace of its own.

#[path = "support/dns.rs"]
mod dns;
#[path = "support/strict.rs"]
mod strict;
#[path = "support/tls.rs"]
mod tls;

use std::sync::Arc;
use std::time::Duration;

use bulkhead::net::{Code, Event, Feed, Learned, Outgoing, Policy, QueryResult, Summary, What};
use bulkhead::spec::Preset;
use dns::{Says, Upstream, a};
use strict::{EVIL, GATEWAY, GOOD, GROUP, GUEST, Netns, World, missing};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn real_clients_reach_what_is_allowed_and_nothing_else() {
    if let Some(why) = missing() {
        println!("skipped: real_clients_reach_what_is_allowed_and_nothing_else: {why}");
        return;
    }
    let allow = ["good.org", "good.org:8443", "rebind.org"];
    let mut world = World::new(Preset::Offline, &allow, &[]).await;

    // HTTPS and HTTP, by name.
    let (code, text) = world.curl(&["https://good.org/"]).await;
    assert!(code == 0 && text.contains("s_server"), "{code} {text}");
    let (code, text) = world
        .curl(&["http://good.org/", "http://good.org/again"])
        .await;
    assert_eq!((code, text.as_str()), (0, "hello\nhello\n"));
    // A port without the proxy, through the set that the resolver feeds.
    let (code, text) = world.curl(&["http://good.org:8443/"]).await;
    assert_eq!((code, text.as_str()), (0, "hello\n"));

    // A name that is not allowed has no address.
    let (code, text) = world.curl(&["https://evil.org/"]).await;
    assert!(code == 6, "{code} {text}");
    let dig = world
        .run(&["dig", "+time=15", "+tries=1", "evil.org"])
        .await;
    let dig = String::from_utf8_lossy(&dig.stdout).into_owned();
    assert!(
        dig.contains("REFUSED") && dig.contains("host-not-allowed"),
        "{dig}"
    );
    let dig = world.run(&["dig", "+short", "+tcp", "good.org"]).await;
    assert_eq!(String::from_utf8_lossy(&dig.stdout).trim(), GOOD);
    let dig = world
        .run(&["dig", "+time=15", "+tries=1", "rebind.org"])
        .await;
    let dig = String::from_utf8_lossy(&dig.stdout).into_owned();
    assert!(
        dig.contains("REFUSED") && dig.contains("answer-private"),
        "{dig}"
    );

    // Its address known from elsewhere: no name of ours in it.
    let (code, text) = world
        .curl(&[
            "--resolve",
            &format!("evil.org:443:{EVIL}"),
            "https://evil.org/",
        ])
        .await;
    assert!(code == 35 && text.contains("alert"), "{code} {text}");
    let (code, text) = world
        .curl(&[
            "--resolve",
            &format!("evil.org:80:{EVIL}"),
            "http://evil.org/",
        ])
        .await;
    assert!(
        code == 0 && text.contains("host-not-allowed"),
        "{code} {text}"
    );
    // No name at all, and the address of the allowed host with another name.
    let (code, text) = world.curl(&[&format!("https://{GOOD}/")]).await;
    assert!(code == 35 && text.contains("alert"), "{code} {text}");
    let (code, _) = world
        .curl(&[
            "--resolve",
            &format!("evil.org:443:{GOOD}"),
            "https://evil.org/",
        ])
        .await;
    assert_eq!(code, 35, "a shared address does not open a forbidden name");
    let host = ["-H", "Host: evil.org"];
    let (_, text) = world
        .curl(&[&host[..], &["http://good.org/"]].concat())
        .await;
    assert!(text.contains("host-not-allowed"), "{text}");
    // A relay, and a port that nobody allowed.
    let (code, text) = world
        .curl(&["-p", "-x", "http://good.org:80", "https://evil.org/"])
        .await;
    assert!(code != 0 && !text.contains("s_server"), "{code} {text}");
    let (code, _) = world.curl(&[&format!("http://{EVIL}:8443/")]).await;
    assert_eq!(code, 7);
    let (code, _) = world.curl(&["http://10.200.0.2:8080/"]).await;
    assert_eq!(code, 7);
    // The proxy's own port is nobody's.
    assert!(
        world.evil.lock().unwrap().is_empty(),
        "{:?}",
        world.evil.lock().unwrap()
    );
    assert_eq!(world.web.lock().unwrap().len(), 2);

    // The allowed name with another address goes to the name's own.
    let (code, text) = world
        .curl(&[
            "--resolve",
            &format!("good.org:443:{EVIL}"),
            "https://good.org/",
        ])
        .await;
    assert!(code == 0 && text.contains("s_server"), "{code} {text}");
    assert!(world.evil.lock().unwrap().is_empty());
    assert_eq!(world.raw.lock().unwrap().len(), 1);

    // What is denied now is over now.
    let stricter = dns::policy(Preset::Offline, &allow, &["good.org"]);
    let left = world.names.follow(&stricter);
    assert!(left.iter().all(|grant| grant.name.as_str() != "good.org"));
    world.policy.send(Arc::new(stricter)).unwrap();
    let (code, _) = world
        .curl(&[
            "--resolve",
            &format!("good.org:443:{GOOD}"),
            "https://good.org/",
        ])
        .await;
    assert_eq!(code, 35);
    check_record(&mut world).await;
    drop(world.internet);
}

/// All of that is on record, with names, reasons and bytes.
async fn check_record(world: &mut World) {
    // The kernel tells of packets within 50 ms.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let mut events = Vec::new();
    while let Ok(event) = world.events.try_recv() {
        events.push(event);
    }
    let mut summary = Summary::default();
    let mut learned = Learned::default();
    for event in &events {
        summary.take(event);
        learned.take(event);
    }
    let whats: Vec<&What> = events.iter().map(|event| &event.what).collect();
    let refused = |wanted: Code| {
        whats.iter().any(|what| match what {
            What::Query(query) => query.refusal.as_ref().is_some_and(|one| one.code == wanted),
            What::Packet(packet) => packet
                .refusal
                .as_ref()
                .is_some_and(|one| one.code == wanted),
            What::Proxied(one) => one.refusal.as_ref().is_some_and(|one| one.code == wanted),
            _ => false,
        })
    };
    for code in [
        Code::HostNotAllowed,
        Code::HostDenied,
        Code::SniMissing,
        Code::AnswerPrivate,
        Code::Packet,
    ] {
        assert!(refused(code), "{code:?} is not on record: {whats:#?}");
    }
    assert!(
        whats.iter().any(|what| matches!(what, What::Packet(packet)
        if packet.name.as_deref() == Some("good.org") && packet.refusal.is_none()
            && packet.rule.as_deref().is_some_and(|rule| rule.starts_with("allow-host:good.org"))))
    );
    assert!(whats.iter().any(|what| matches!(what, What::Packet(packet)
        if packet.refusal.as_ref().is_some_and(|refusal| refusal.rule == "packet:private"))));
    assert!(whats.iter().any(|what| matches!(what, What::Proxied(one)
        if one.protocol == "tls" && one.name.as_deref() == Some("good.org") && one.received > 500
            && one.refusal.is_none())));
    // Went elsewhere than the guest wanted.
    assert!(whats.iter().any(|what| matches!(what, What::Proxied(one)
        if one.destination.ip().to_string() == EVIL
            && one.connected.is_some_and(|to| to.ip().to_string() == GOOD))));
    assert!(whats.iter().any(|what| matches!(what, What::Query(query)
        if query.result == QueryResult::Answered && query.name == "good.org")));
    assert_eq!(summary.lost, 0);
    assert_eq!(
        summary.hosts.keys().collect::<Vec<_>>(),
        ["good.org"],
        "{summary:#?}"
    );
    assert!(summary.refused.contains_key("evil.org"));
    assert!(summary.line().starts_with("1 host, "), "{}", summary.line());
    let policy = Policy::new(&learned.policy());
    let name = bulkhead::spec::Domain::parse("good.org").unwrap();
    assert!(policy.connect(&name, 8443).is_ok() && policy.connect(&name, 443).is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ends_of_connections_are_told_with_their_bytes() {
    if let Some(why) = missing() {
        println!("skipped: ends_of_connections_are_told_with_their_bytes: {why}");
        return;
    }
    let mut world = World::new(Preset::Offline, &["good.org:8443"], &[]).await;
    let (code, text) = world.curl(&["http://good.org:8443/"]).await;
    assert_eq!((code, text.as_str()), (0, "hello\n"));
    world.router.inside(forget_all);
    let over =
        |what: &What| matches!(what, What::Flow(flow) if flow.destination.port == Some(8443));
    let last = world.until(over).await.pop();
    let Some(What::Flow(flow)) = last.map(|event| event.what) else {
        panic!("it is no such event")
    };
    assert_eq!(flow.name.as_deref(), Some("good.org"));
    assert_eq!(flow.rule.as_deref(), Some("allow-host:good.org:8443"));
    assert_eq!(flow.source.address.to_string(), GUEST);
    assert!(
        flow.counted && flow.sent > 200 && flow.received > 200,
        "{flow:?}"
    );
}

/// Has conntrack forget everything, in the namespace of the calling thread
/// (IPCTNL_MSG_CT_DELETE without a connection): connections that are over are
/// kept for two minutes.
fn forget_all() {
    use nix::sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, sendto, socket,
    };
    use std::os::fd::AsRawFd as _;
    let protocol = SockProtocol::NetlinkNetFilter;
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        protocol,
    )
    .unwrap();
    let mut message = Vec::new();
    message.extend(20_u32.to_ne_bytes());
    message.extend((1_u16 << 8 | 2).to_ne_bytes());
    message.extend(1_u16.to_ne_bytes());
    message.extend([0; 8]);
    // Of IPv4.
    message.extend([2, 0, 0, 0]);
    let to = NetlinkAddr::new(0, 0);
    sendto(socket.as_raw_fd(), &message, &to, MsgFlags::empty()).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_segmented_hello_and_one_sent_to_another_address() {
    if let Some(why) = missing() {
        println!("skipped: a_segmented_hello_and_one_sent_to_another_address: {why}");
        return;
    }
    let mut world = World::new(Preset::Offline, &["good.org"], &[]).await;
    for (sni, to, reaches) in [
        ("good.org", GOOD, true),
        ("good.org", EVIL, true),
        ("evil.org", EVIL, false),
        ("evil.org", GOOD, false),
    ] {
        let guest = &world.guest;
        let stream = guest.inside(move || std::net::TcpStream::connect((to, 443)).unwrap());
        stream.set_nonblocking(true).unwrap();
        let mut stream = tokio::net::TcpStream::from_std(stream).unwrap();
        stream.set_nodelay(true).unwrap();
        let bytes = tls::records(&tls::hello(Some(sni), &[]), 20);
        for part in bytes.chunks(11) {
            if stream.write_all(part).await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let mut answer = vec![0; 7];
        let read = tokio::time::timeout(Duration::from_secs(10), stream.read(&mut answer)).await;
        let length = read.expect("somebody answers").unwrap_or(0);
        // Ours denies access (49); the host dislikes what is made by hand.
        let denied = answer[..length] == [21, 3, 3, 0, 2, 2, 49];
        assert_eq!(denied, !reaches, "{sni} at {to}: {:?}", &answer[..length]);
        drop(stream);
        let last = world
            .until(|what| matches!(what, What::Proxied(_)))
            .await
            .pop();
        let Some(What::Proxied(event)) = last.map(|event| event.what) else {
            panic!("it is no such event")
        };
        assert_eq!(event.destination.ip().to_string(), to);
        assert_eq!(event.connected.is_some(), reaches, "{event:?}");
        assert!(event.connected.is_none_or(|to| to.ip().to_string() == GOOD));
    }
    assert!(world.evil.lock().unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_parts_together_write_a_record_and_sum_it_up() {
    use bulkhead::net::{Filter, FilterConfig, Inside};
    if let Some(why) = missing() {
        println!("skipped: all_parts_together_write_a_record_and_sum_it_up: {why}");
        return;
    }
    let router = Netns::new("r");
    router.ip(&["addr", "add", "198.18.0.1/32", "dev", "lo"]);
    let upstream = Upstream::new(|name, _, _| Says::Records(vec![a(name, GOOD, 60)])).await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("network.jsonl");
    let gateway = [GATEWAY.parse().unwrap()];
    let inside = router.inside(|| Inside::open(&gateway, Some(3129), GROUP).unwrap());
    let config = FilterConfig {
        machine: "m1".into(),
        policy: dns::policy(Preset::Offline, &["good.org"], &[]),
        upstreams: vec![upstream.address],
        from: Outgoing::here(),
        guests: vec![GUEST.parse().unwrap()],
        record: path.clone(),
    };
    let (filter, mut fed) = Filter::start(inside, config).unwrap();
    let granted = tokio::spawn(async move {
        let mut all = Vec::new();
        while let Some(Feed { grants, done }) = fed.recv().await {
            all.extend(grants.into_iter().map(|grant| grant.address.to_string()));
            let _ = done.send(Ok(()));
        }
        all
    });
    let dig = async |name: &str| {
        let words = ["dig", "+time=15", "+tries=1", "@198.18.0.1", name];
        let output = tokio::process::Command::from(router.command(&words))
            .output()
            .await;
        String::from_utf8(output.unwrap().stdout).unwrap()
    };
    assert!(dig("good.org").await.contains(GOOD));
    assert!(dig("evil.org").await.contains("REFUSED"));
    let same = filter.policies().set(Arc::new(dns::policy(
        Preset::Offline,
        &["*.org"],
        &["evil.org"],
    )));
    assert!(
        same.len() == 1
            && same[0].address.to_string() == GOOD
            && same[0].rule == "allow-host:*.org"
    );
    assert!(
        filter
            .policies()
            .set(Arc::new(dns::policy(Preset::Offline, &[], &[])))
            .is_empty()
    );
    assert!(dig("good.org").await.contains("REFUSED"));
    let traffic = filter.traffic().clone();
    assert_eq!(traffic.summary().queries, 3);
    filter.end().await;
    assert_eq!(granted.await.unwrap(), [GOOD]);
    assert_eq!(traffic.summary().line(), "0 hosts, 2 refused");
    assert_eq!(traffic.learned().policy().allow_hosts.len(), 2);
    let text = std::fs::read_to_string(path).unwrap();
    let events: Vec<Event> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert!(events.len() == 3 && events.iter().all(|event| event.machine == "m1"));
}
