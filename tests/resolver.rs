//! The resolver, over real sockets, against name servers that mean no good.

#[path = "support/dns.rs"]
mod dns;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bulkhead::net::{Code, ResolverLimits, What};
use bulkhead::spec::Preset;
use dns::{
    PUBLIC, Rig, Says, Upstream, Wish, a, addresses, cname, one_for_all, refused, told_why, txt,
};
use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;
use hickory_proto::rr::rdata::svcb::{EchConfigList, IpHint, SvcParamKey, SvcParamValue};
use hickory_proto::rr::rdata::{A, HTTPS, SVCB};
use hickory_proto::rr::{RData, Record};

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
        exceptions: &["10.1.2.3/32"],
        ..Wish::default()
    };
    let rig = Rig::new(vec![upstream.address], wish);
    let answer = rig.ask("db.internal", RecordType::A).await;
    assert_eq!(addresses(&answer), ["10.1.2.3".parse::<IpAddr>().unwrap()]);
    // It comes and goes while the machine runs.
    let mut wish = Wish {
        allow: &["db.internal"],
        ..Wish::default()
    };
    rig.policy.send_replace(Arc::new(wish.policy()));
    let answer = rig.ask("db.internal", RecordType::A).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::Refused);
    wish.exceptions = &["10.1.2.0/24:5432"];
    rig.policy.send_replace(Arc::new(wish.policy()));
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
