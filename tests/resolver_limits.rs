//! What the resolver does not let itself be made to do: floods, tunnels, slow and
//! dead name servers, too many connections.

#[path = "support/dns.rs"]
mod dns;

use std::net::IpAddr;
use std::time::{Duration, Instant};

use bulkhead::net::{Code, ResolverLimits};
use bulkhead::spec::Preset;
use dns::{PUBLIC, Rig, Says, Upstream, Wish, a, addresses, one_for_all, refused, told_why, txt};
use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::RecordType;

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
