//! The resolver, over real sockets, against name servers that mean no good.

#[path = "support/dns.rs"]
mod dns;

use std::net::IpAddr;
use std::time::{Duration, Instant};

use bulkhead::net::{Code, QueryResult, ResolverLimits, What};
use bulkhead::spec::Preset;
use dns::{PUBLIC, Rig, Says, Upstream, Wish, a, addresses, cname, told_why, txt};
use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::RecordType;
use hickory_proto::rr::rdata::svcb::{EchConfigList, IpHint, SvcParamKey, SvcParamValue};
use hickory_proto::rr::rdata::{A, HTTPS, SVCB};
use hickory_proto::rr::{RData, Record};

/// A name server that knows one address for everything.
async fn one_for_all() -> Upstream {
    Upstream::new(|name, kind, _| match kind {
        RecordType::A => Says::Records(vec![a(name, &PUBLIC.to_string(), 300)]),
        _ => Says::Records(vec![]),
    })
    .await
}

fn refused(event: &What) -> Option<Code> {
    match event {
        What::Query(query) if query.result == QueryResult::Refused => {
            Some(query.refusal.as_ref().expect("a refusal says why").code)
        }
        _ => None,
    }
}

#[tokio::test]
async fn an_allowed_name_is_let_through_before_it_is_answered() {
    let upstream = one_for_all().await;
    let mut rig = Rig::new(vec![upstream.address], Wish::default());
    let answer = rig.ask("WWW.Example.org", RecordType::A).await;
    assert_eq!(addresses(&answer), [IpAddr::V4(PUBLIC)]);
    assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
    // The name is as the guest wrote it, and went on without its case.
    assert_eq!(answer.answers[0].name.to_ascii(), "WWW.Example.org.");
    assert_eq!(upstream.asked_names(), ["www.example.org"]);
    let grant = rig.grants.lock().unwrap()[0].clone();
    assert_eq!(
        (grant.name.as_str(), grant.address),
        ("www.example.org", IpAddr::V4(PUBLIC))
    );
    // A little longer than the guest is told.
    assert_eq!(grant.lifetime, Duration::from_secs(310));
    assert!(grant.ports.contains(443) && !grant.ports.contains(25));
    assert!(rig.resolver.names().is_current(&grant.name, grant.address));
    let over_tcp = rig.ask_tcp("www.example.org", RecordType::A).await;
    assert_eq!(addresses(&over_tcp), [IpAddr::V4(PUBLIC)]);
    match &rig.told()[..] {
        [What::Query(one), What::Query(_)] => {
            assert_eq!(
                (one.name.as_str(), one.kind.as_str()),
                ("www.example.org", "A")
            );
            assert_eq!(one.rule.as_deref(), Some("preset:dev:*"));
            assert_eq!(one.addresses, [IpAddr::V4(PUBLIC)]);
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn without_a_way_through_there_is_no_answer() {
    let upstream = one_for_all().await;
    let mut rig = Rig::new(vec![upstream.address], Wish::default());
    // Nobody takes what has to be let through.
    let (feed, nobody) = tokio::sync::mpsc::channel(1);
    drop(nobody);
    let config = bulkhead::net::ResolverConfig {
        upstreams: vec![upstream.address],
        from: bulkhead::net::Outgoing::here(),
        strict: false,
        reach: bulkhead::net::Reach::default(),
        limits: ResolverLimits::default(),
    };
    let names = bulkhead::net::Names::default();
    let resolver = bulkhead::net::Resolver::new(
        config,
        rig.policy.subscribe(),
        names.clone(),
        feed,
        rig.journal.clone(),
    );
    let (sockets, address) = dns::sockets("127.0.0.1:0");
    rig.serving = resolver.serve(sockets).unwrap();
    rig.address = address;
    let answer = rig.ask("example.org", RecordType::A).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    let name = bulkhead::spec::Domain::parse("example.org").unwrap();
    assert!(!names.is_current(&name, IpAddr::V4(PUBLIC)));
}

#[tokio::test]
async fn a_refused_name_is_not_asked_for_and_says_why() {
    let upstream = one_for_all().await;
    let wish = Wish {
        preset: Preset::Packages,
        deny: &["evil.pypi.org"],
        ..Wish::default()
    };
    let mut rig = Rig::new(vec![upstream.address], wish);
    for (host, code) in [
        ("example.org", Code::HostNotAllowed),
        ("evil.pypi.org", Code::HostDenied),
        ("pypi.org.example.org", Code::HostNotAllowed),
    ] {
        let answer = rig.ask(host, RecordType::A).await;
        assert_eq!(
            answer.metadata.response_code,
            ResponseCode::Refused,
            "{host}"
        );
        let why = told_why(&answer);
        assert!(why.contains(host) && why.contains(code.as_str()), "{why}");
        assert_eq!(refused(&rig.told()[0]), Some(code));
    }
    assert_eq!(rig.ask("pypi.org", RecordType::A).await.answers.len(), 1);
    assert_eq!(upstream.asked_names(), ["pypi.org"]);
}

#[tokio::test]
async fn rebinding_with_ttl_0_reaches_nothing_private() {
    // First a public address that nobody may remember, then a private one.
    let turn = std::sync::atomic::AtomicU32::new(0);
    let private = [
        "169.254.169.254",
        "10.0.0.1",
        "127.0.0.1",
        "192.168.1.1",
        "100.64.0.1",
        "0.0.0.0",
    ];
    let upstream = Upstream::new(move |name, _, _| {
        let turn = turn.fetch_add(1, std::sync::atomic::Ordering::SeqCst) as usize;
        Says::Records(match turn {
            0 => vec![a(name, &PUBLIC.to_string(), 0)],
            // Mixed with a public one at last.
            7 => vec![a(name, "10.0.0.1", 0), a(name, &PUBLIC.to_string(), 0)],
            turn => vec![a(name, private[turn - 1], 0)],
        })
    })
    .await;
    let mut rig = Rig::new(vec![upstream.address], Wish::default());
    assert_eq!(
        addresses(&rig.ask("rebind.org", RecordType::A).await).len(),
        1
    );
    rig.told();
    for address in private {
        let answer = rig.ask("rebind.org", RecordType::A).await;
        assert_eq!(
            answer.metadata.response_code,
            ResponseCode::Refused,
            "{address}"
        );
        assert!(answer.answers.is_empty());
        assert_eq!(refused(&rig.told()[0]), Some(Code::AnswerPrivate));
    }
    let answer = rig.ask("rebind.org", RecordType::A).await;
    assert_eq!(addresses(&answer), [IpAddr::V4(PUBLIC)]);
    assert!(matches!(&rig.told()[0], What::Query(query) if query.refusal.is_some()));
    // What was let through stays so for a minute, and is public.
    let grants = rig.grants.lock().unwrap();
    assert!(
        grants
            .iter()
            .all(|grant| grant.address == IpAddr::V4(PUBLIC))
    );
    assert!(
        grants
            .iter()
            .all(|grant| grant.lifetime == Duration::from_secs(70))
    );
}

#[tokio::test]
async fn private_addresses_in_ipv6_clothes_are_stripped() {
    let dressed = [
        "::ffff:10.0.0.1",
        "64:ff9b::169.254.169.254",
        "fd00:ec2::254",
        "fe80::1",
        "::1",
        "2002:a00:1::1",
        "64:ff9b:1::a00:1",
        "2606:2800:220:1::1",
    ];
    let upstream = Upstream::new(move |name, _, _| {
        Says::Records(dressed.iter().map(|address| a(name, address, 60)).collect())
    })
    .await;
    let rig = Rig::new(
        vec![upstream.address],
        Wish {
            ipv6: true,
            ..Wish::default()
        },
    );
    let answer = rig.ask("example.org", RecordType::AAAA).await;
    let public: IpAddr = "2606:2800:220:1::1".parse().unwrap();
    assert_eq!(addresses(&answer), [public]);
    assert_eq!(rig.granted(), [public]);
    let off = Rig::new(vec![upstream.address], Wish::default());
    let answer = off.ask("example.org", RecordType::AAAA).await;
    assert_eq!(
        (answer.metadata.response_code, answer.answers.len()),
        (ResponseCode::NoError, 0)
    );
    assert_eq!(
        upstream.asked.lock().unwrap().len(),
        1,
        "without IPv6 nobody is asked"
    );
}

#[tokio::test]
async fn a_named_exception_is_answered() {
    let upstream = Upstream::new(|name, _, _| Says::Records(vec![a(name, "10.1.2.3", 60)])).await;
    let wish = Wish {
        allow: &["db.internal"],
        cidrs: &["10.1.2.3/32"],
        ..Wish::default()
    };
    let rig = Rig::new(vec![upstream.address], wish);
    let answer = rig.ask("db.internal", RecordType::A).await;
    assert_eq!(addresses(&answer), ["10.1.2.3".parse::<IpAddr>().unwrap()]);
    // Without a rule of its own, it is a name of somebody's own network.
    let answer = rig.ask("other.internal", RecordType::A).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::Refused);
}

#[tokio::test]
async fn aliases_are_followed_but_not_to_a_forbidden_name() {
    let upstream = Upstream::new(|name, _, _| {
        let address = PUBLIC.to_string();
        Says::Records(match name {
            "good.org" => vec![
                // Out of order, and with something that does not belong.
                a("edge.cdn.net", &address, 60),
                cname("good.org", "alias.cdn.net"),
                cname("alias.cdn.net", "edge.cdn.net"),
                a("unasked.org", "8.8.8.8", 60),
            ],
            "bad.org" => vec![
                cname("bad.org", "x.forbidden.org"),
                a("x.forbidden.org", &address, 60),
            ],
            "inside.org" => vec![cname("inside.org", "nas.lan"), a("nas.lan", &address, 60)],
            "loop.org" => vec![cname("loop.org", "pool.org"), cname("pool.org", "loop.org")],
            "private.org" => vec![
                cname("private.org", "p.cdn.net"),
                a("p.cdn.net", "10.0.0.1", 60),
            ],
            _ => vec![a(name, &address, 60)],
        })
    })
    .await;
    let wish = Wish {
        preset: Preset::Offline,
        allow: &[
            "good.org",
            "bad.org",
            "inside.org",
            "loop.org",
            "private.org",
        ],
        deny: &["*.forbidden.org"],
        ..Wish::default()
    };
    let mut rig = Rig::new(vec![upstream.address], wish);
    let answer = rig.ask("good.org", RecordType::A).await;
    assert_eq!(addresses(&answer), [IpAddr::V4(PUBLIC)]);
    assert_eq!(answer.answers.len(), 3);
    assert_eq!(rig.grants.lock().unwrap()[0].name.as_str(), "good.org");
    rig.told();
    for (host, code) in [
        ("bad.org", Code::HostDenied),
        ("inside.org", Code::NameSpecial),
        ("private.org", Code::AnswerPrivate),
    ] {
        let answer = rig.ask(host, RecordType::A).await;
        assert_eq!(
            answer.metadata.response_code,
            ResponseCode::Refused,
            "{host}"
        );
        assert_eq!(refused(&rig.told()[0]), Some(code));
    }
    assert!(addresses(&rig.ask("loop.org", RecordType::A).await).is_empty());
    assert_eq!(rig.granted().len(), 1);
}

#[tokio::test]
async fn questions_that_make_no_sense_are_refused() {
    let upstream = one_for_all().await;
    let rig = Rig::new(vec![upstream.address], Wish::default());
    for kind in [
        RecordType::ANY,
        RecordType::AXFR,
        RecordType::IXFR,
        RecordType::NULL,
        RecordType::OPT,
        RecordType::TSIG,
        RecordType::KEY,
        RecordType::ZERO,
        RecordType::Unknown(4711),
    ] {
        let answer = rig.ask_tcp("example.org", kind).await;
        assert_eq!(
            answer.metadata.response_code,
            ResponseCode::Refused,
            "{kind}"
        );
    }
    for host in [
        "localhost",
        "1.0.0.10.in-addr.arpa",
        "254.169.254.169.in-addr.arpa",
        "10.in-addr.arpa",
    ] {
        let answer = rig.ask(host, RecordType::PTR).await;
        assert_eq!(
            answer.metadata.response_code,
            ResponseCode::Refused,
            "{host}"
        );
    }
    assert_eq!(upstream.asked.lock().unwrap().len(), 0);
    let answer = rig.ask("8.8.8.8.in-addr.arpa", RecordType::PTR).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
    // Not a question, not one question, cut off, of another kind.
    assert!(rig.ask_raw(b"short").await.is_none());
    let mut reply = dns::question("example.org", RecordType::A);
    reply[2] |= 0x80;
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.send_to(&reply, rig.address).await.unwrap();
    let mut cut = dns::question("example.org", RecordType::A);
    cut.truncate(20);
    let answer = rig.ask_raw(&cut).await.unwrap();
    assert_eq!(answer.metadata.response_code, ResponseCode::FormErr);
    let mut update = dns::question("example.org", RecordType::A);
    update[2] = 5 << 3;
    let answer = rig.ask_raw(&update).await.unwrap();
    assert_ne!(answer.metadata.response_code, ResponseCode::NoError);
    assert_eq!(
        rig.ask("example.org", RecordType::A).await.answers.len(),
        1,
        "it lives on"
    );
    assert_eq!(upstream.asked.lock().unwrap().len(), 2);
}

fn https(owner: &str) -> Record {
    let params = vec![
        (SvcParamKey::Port, SvcParamValue::Port(443)),
        (
            SvcParamKey::Ipv4Hint,
            SvcParamValue::Ipv4Hint(IpHint(vec![A(PUBLIC)])),
        ),
        (
            SvcParamKey::EchConfigList,
            SvcParamValue::EchConfigList(EchConfigList(vec![1; 40])),
        ),
    ];
    let data = HTTPS(SVCB::new(1, dns::name("."), params));
    Record::from_rdata(dns::name(owner), 60, RData::HTTPS(data))
}

#[tokio::test]
async fn https_records_neither_hide_names_nor_bring_addresses() {
    let upstream = Upstream::new(|name, _, _| Says::Records(vec![https(name)])).await;
    let rig = Rig::new(vec![upstream.address], Wish::default());
    let answer = rig.ask("example.org", RecordType::HTTPS).await;
    let RData::HTTPS(https) = &answer.answers[0].data else {
        panic!("{answer}")
    };
    let keys: Vec<_> = https.svc_params.iter().map(|(key, _)| *key).collect();
    assert_eq!(keys, [SvcParamKey::Port]);
    let strict = Rig::new(
        vec![upstream.address],
        Wish {
            strict: true,
            ..Wish::default()
        },
    );
    let answer = strict.ask("example.org", RecordType::HTTPS).await;
    assert_eq!(
        (answer.metadata.response_code, answer.answers.len()),
        (ResponseCode::NoError, 0)
    );
    assert_eq!(upstream.asked.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn a_cut_answer_is_asked_for_again_over_tcp() {
    let upstream = Upstream::new(|name, _, tcp| match tcp {
        false => Says::Cut,
        true => Says::Records(
            (1..=30)
                .map(|last| a(name, &format!("93.184.1.{last}"), 60))
                .collect(),
        ),
    })
    .await;
    let rig = Rig::new(vec![upstream.address], Wish::default());
    let answer = rig.ask_tcp("example.org", RecordType::A).await;
    assert_eq!(addresses(&answer).len(), 30);
    let tcp: Vec<bool> = upstream
        .asked
        .lock()
        .unwrap()
        .iter()
        .map(|(.., tcp)| *tcp)
        .collect();
    assert_eq!(tcp, [false, true]);
}

#[tokio::test]
async fn what_does_not_fit_a_packet_is_cut_and_too_much_is_refused() {
    let upstream = Upstream::new(|name, _, tcp| match (name, tcp) {
        (_, false) => Says::Cut,
        ("big.org", true) => Says::Records(vec![txt(name, 2000)]),
        (_, true) => Says::Records(vec![txt(name, 20_000)]),
    })
    .await;
    let mut rig = Rig::new(vec![upstream.address], Wish::default());
    let answer = rig.ask("big.org", RecordType::TXT).await;
    assert!(answer.metadata.truncation && answer.answers.is_empty());
    assert_eq!(
        rig.ask_tcp("big.org", RecordType::TXT).await.answers.len(),
        1
    );
    rig.told();
    let answer = rig.ask_tcp("huge.org", RecordType::TXT).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::Refused);
    assert_eq!(refused(&rig.told()[0]), Some(Code::AnswerSize));
}

#[tokio::test]
async fn a_tunnel_of_dense_names_carries_next_to_nothing() {
    let upstream = one_for_all().await;
    let mut rig = Rig::new(vec![upstream.address], Wish::default());
    let mut state = 1_u64;
    let mut label = |length: usize| -> String {
        let letter = |_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            char::from(b"abcdefghijklmnopqrstuvwxyz234567"[(state >> 59) as usize])
        };
        (0..length).map(letter).collect()
    };
    // As the usual tunnels have them: names full to the brim.
    let full = format!("{}.{}.{}.evil.com", label(60), label(60), label(60));
    let answer = rig.ask(&full, RecordType::TXT).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::Refused);
    assert!(told_why(&answer).contains("query-tunnel"));
    // And smaller ones.
    for _ in 0..150 {
        rig.ask(&format!("{}.evil.com", label(48)), RecordType::A)
            .await;
    }
    let carried: usize = upstream.asked_names().iter().map(String::len).sum();
    assert!(carried < 4096, "{carried} bytes went out");
    assert!(
        rig.told()
            .iter()
            .filter(|event| refused(event) == Some(Code::QueryTunnel))
            .count()
            > 50
    );
    // Other names are still looked up when the tunnel has used up all but a little.
    assert_eq!(rig.ask("example.org", RecordType::A).await.answers.len(), 1);
}

#[tokio::test]
async fn a_tunnel_through_answers_runs_dry() {
    let upstream = Upstream::new(|name, _, tcp| match tcp {
        false => Says::Cut,
        true => Says::Records(vec![txt(name, 3000)]),
    })
    .await;
    let mut rig = Rig::new(vec![upstream.address], Wish::default());
    let mut bytes = 0;
    for number in 0..60 {
        let answer = rig
            .ask_tcp(&format!("a{number}.evil.com"), RecordType::TXT)
            .await;
        bytes += 3000 * answer.answers.len();
    }
    assert!(bytes <= 66_000, "{bytes} bytes came in");
    assert!(
        rig.told()
            .iter()
            .any(|event| refused(event) == Some(Code::QueryTunnel))
    );
}

#[tokio::test]
async fn a_flood_of_questions_is_held_to_its_rate() {
    let upstream = one_for_all().await;
    let limits = ResolverLimits {
        burst: 50,
        per_second: 5,
        ..ResolverLimits::default()
    };
    let rig = Rig::new(
        vec![upstream.address],
        Wish {
            limits,
            ..Wish::default()
        },
    );
    let start = Instant::now();
    let mut answered = 0;
    for _ in 0..150 {
        let answer = rig.ask("example.org", RecordType::A).await;
        answered += u64::from(answer.metadata.response_code == ResponseCode::NoError);
    }
    let most = 50 + 5 * (start.elapsed().as_secs() + 1);
    assert!(
        answered >= 50 && answered <= most,
        "{answered} of at most {most}"
    );
}

#[tokio::test]
async fn a_slow_domain_holds_nobody_else_up() {
    let upstream = Upstream::new(|name, _, _| match name.ends_with("slow.org") {
        true => Says::Nothing,
        false => Says::Records(vec![a(name, &PUBLIC.to_string(), 60)]),
    })
    .await;
    let mut rig = Rig::new(vec![upstream.address], Wish::default());
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    for number in 0..200 {
        let bytes = dns::question(&format!("a{number}.slow.org"), RecordType::A);
        socket.send_to(&bytes, rig.address).await.unwrap();
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    let start = Instant::now();
    assert_eq!(rig.ask("fast.org", RecordType::A).await.answers.len(), 1);
    assert!(
        start.elapsed() < Duration::from_secs(2),
        "{:?}",
        start.elapsed()
    );
    // In the end every one of them has an answer, and an event.
    let mut buffer = [0; 2048];
    let deadline = ResolverLimits::default().deadline * 3;
    for _ in 0..200 {
        let length = tokio::time::timeout(deadline, socket.recv(&mut buffer))
            .await
            .unwrap()
            .unwrap();
        let answer = Message::from_vec(&buffer[..length]).unwrap();
        assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    }
    assert_eq!(rig.told().len(), 201);
}

#[tokio::test]
async fn a_dead_upstream_is_passed_over_and_a_forged_answer_ignored() {
    let dead = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let failing = Upstream::new(|_, _, _| Says::Code(ResponseCode::ServFail)).await;
    let upstream = one_for_all().await;
    let upstreams = vec![
        dead.local_addr().unwrap(),
        failing.address,
        upstream.address,
    ];
    let rig = Rig::new(upstreams, Wish::default());
    assert_eq!(rig.ask("example.org", RecordType::A).await.answers.len(), 1);
    // It is remembered who answers.
    let start = Instant::now();
    assert_eq!(rig.ask("example.net", RecordType::A).await.answers.len(), 1);
    assert!(start.elapsed() < Duration::from_secs(1));
    // A name server that answers with another id, then another question, then rightly.
    let forger = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let rig = Rig::new(vec![forger.local_addr().unwrap()], Wish::default());
    let forge = async {
        let mut buffer = [0; 2048];
        let (length, peer) = forger.recv_from(&mut buffer).await.unwrap();
        let request = Message::from_vec(&buffer[..length]).unwrap();
        let id = request.metadata.id;
        for (id, host, address) in [
            (id ^ 1, "example.org", "6.6.6.6"),
            (id, "example.net", "6.6.6.7"),
            (id, "example.org", "93.184.215.14"),
        ] {
            let mut reply = Message::response(id, request.metadata.op_code);
            reply.add_query(hickory_proto::op::Query::query(
                dns::name(host),
                RecordType::A,
            ));
            reply.add_answer(a(host, address, 60));
            forger
                .send_to(&reply.to_vec().unwrap(), peer)
                .await
                .unwrap();
        }
    };
    let (answer, ()) = tokio::join!(rig.ask("example.org", RecordType::A), forge);
    assert_eq!(addresses(&answer), [IpAddr::V4(PUBLIC)]);
}

#[tokio::test]
async fn a_new_policy_counts_from_the_next_question_on() {
    let upstream = one_for_all().await;
    let rig = Rig::new(vec![upstream.address], Wish::default());
    assert_eq!(rig.ask("example.org", RecordType::A).await.answers.len(), 1);
    let stricter = dns::policy(Preset::Dev, &[], &["example.org"]);
    let narrower = dns::policy(Preset::Offline, &["example.org:22"], &[]);
    let left = rig.resolver.names().follow(&narrower);
    assert!(left.len() == 1 && left[0].ports.contains(22) && !left[0].ports.contains(443));
    assert!(rig.resolver.names().follow(&stricter).is_empty());
    rig.policy.send(std::sync::Arc::new(stricter)).unwrap();
    let answer = rig.ask("example.org", RecordType::A).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::Refused);
}

#[tokio::test]
async fn idle_and_too_many_connections_are_closed() {
    use tokio::io::AsyncReadExt as _;
    let upstream = one_for_all().await;
    let limits = ResolverLimits {
        connections: 4,
        idle: Duration::from_millis(500),
        ..ResolverLimits::default()
    };
    let rig = Rig::new(
        vec![upstream.address],
        Wish {
            limits,
            ..Wish::default()
        },
    );
    let mut all = Vec::new();
    for _ in 0..12 {
        all.push(tokio::net::TcpStream::connect(rig.address).await.unwrap());
    }
    for mut one in all {
        let end = tokio::time::timeout(Duration::from_secs(5), one.read(&mut [0; 8]))
            .await
            .unwrap();
        assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
    }
    assert_eq!(
        rig.ask_tcp("example.org", RecordType::A)
            .await
            .answers
            .len(),
        1
    );
}

#[tokio::test]
async fn names_in_handshakes_are_no_way_around_the_limits() {
    let upstream = one_for_all().await;
    let mut rig = Rig::new(vec![upstream.address], Wish::default());
    for number in 0..2000_u32 {
        let name = format!("a-name-of-some-length-{number}.evil.com");
        let name = bulkhead::spec::Domain::parse(&name).unwrap();
        // What the proxy does for a name in a handshake.
        let _ = rig.resolver.lookup(&name, false).await;
    }
    let carried: usize = upstream.asked_names().iter().map(String::len).sum();
    assert!(carried < 16_384, "{carried} bytes went out");
    assert_eq!(rig.told().len(), 2000);
}

#[tokio::test]
async fn nonsense_beyond_the_rate_has_no_answer() {
    let upstream = one_for_all().await;
    let limits = ResolverLimits {
        burst: 20,
        per_second: 1,
        ..ResolverLimits::default()
    };
    let mut rig = Rig::new(
        vec![upstream.address],
        Wish {
            limits,
            ..Wish::default()
        },
    );
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let any = dns::question("example.org", RecordType::ANY);
    for _ in 0..500 {
        socket.send_to(&any, rig.address).await.unwrap();
        tokio::task::yield_now().await;
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    let told = rig.told().len();
    assert!((1..=25).contains(&told), "{told}");
}

/// Found by the fuzzer.
#[tokio::test]
async fn a_name_that_begins_with_a_hyphen_is_looked_up() {
    let upstream = one_for_all().await;
    let rig = Rig::new(vec![upstream.address], Wish::default());
    let mut asked = dns::question("xodd.example.org", RecordType::A);
    asked[13] = b'-';
    let answer = rig.ask_raw(&asked).await.unwrap();
    assert_eq!(addresses(&answer), [IpAddr::V4(PUBLIC)]);
    assert_eq!(upstream.asked_names(), ["-odd.example.org"]);
}
