//! A guest agent that does not play by the rules: what the host keeps, and how
//! long it waits, is bounded.

use std::time::Duration;

use bulkhead::error::Explain as _;
use bulkhead::guest::{Channel, GuestError, Output, Stream};
use bulkhead_agent::{
    Control, Exec, Exit, Failure, FailureKind, HEADER_LEN, Header, Hello, Info, Interface, Kind,
    MAX_PAYLOAD, Process, Reply, Request, VERSION, WINDOW,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

/// The guest's end of a channel.
struct Guest(DuplexStream);

impl Guest {
    async fn send(&mut self, stream: u32, kind: Kind, payload: &[u8]) {
        let len = payload.len().try_into().unwrap();
        let header = Header { len, stream, kind }.encode();
        // The host may have hung up, which is what some tests want.
        let _ = self.0.write_all(&[&header[..], payload].concat()).await;
    }

    async fn receive(&mut self) -> (Header, Vec<u8>) {
        let mut header = [0; HEADER_LEN];
        self.0.read_exact(&mut header).await.unwrap();
        let header = Header::decode(header).unwrap();
        let mut payload = vec![0; header.len as usize];
        self.0.read_exact(&mut payload).await.unwrap();
        (header, payload)
    }

    async fn reply(&mut self, stream: u32, reply: &Reply) {
        let payload = serde_json::to_vec(reply).unwrap();
        self.send(stream, Kind::Reply, &payload).await;
    }
}

fn hello(program: &str) -> Hello {
    Hello {
        version: VERSION,
        program: program.into(),
        boot_id: String::new(),
    }
}

async fn connect() -> (Channel, Guest) {
    let (host, guest) = tokio::io::duplex(64 * 1024);
    let mut guest = Guest(guest);
    let hello = hello("hostile");
    let greet = async {
        guest
            .send(0, Kind::Hello, &serde_json::to_vec(&hello).unwrap())
            .await;
        assert_eq!(guest.receive().await.0.kind, Kind::Hello);
        guest
    };
    let (channel, guest) = tokio::join!(Channel::connect(host), greet);
    (channel.unwrap().0, guest)
}

/// A channel with one command that was started.
async fn running() -> (Channel, Guest, Stream) {
    let (channel, mut guest) = connect().await;
    let stream = start(&channel, &mut guest).await;
    (channel, guest, stream)
}

async fn start(channel: &Channel, guest: &mut Guest) -> Stream {
    let mut stream = channel.open(&exec()).await.unwrap();
    let (opened, _) = guest.receive().await;
    guest.reply(opened.stream, &Reply::Started { pid: 1 }).await;
    stream.started("run").await.unwrap();
    stream
}

/// Waits until the host has had enough.
async fn cut_off(channel: &Channel) -> GuestError {
    let end = async {
        loop {
            if let Some(error) = channel.ended() {
                return error;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let end = tokio::time::timeout(Duration::from_secs(20), end).await;
    end.expect("the host put up with it")
}

fn exec() -> Request {
    Request::Exec(Exec {
        argv: vec!["true".into()],
        ..Exec::default()
    })
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_reads_nothing_is_not_waited_for_without_end() {
    let (channel, mut guest) = connect().await;
    let mut stream = channel.open(&exec()).await.unwrap();
    let (opened, _) = guest.receive().await;
    guest.reply(opened.stream, &Reply::Started { pid: 1 }).await;
    stream.started("run").await.unwrap();
    let control = stream.input();
    let error = loop {
        // Until the pipe and the queue are full.
        match control.control(&Control::Signal { signal: 10 }).await {
            Ok(()) => {}
            Err(error) => break error,
        }
    };
    assert!(matches!(error, GuestError::Timeout { .. }), "{error}");
    drop(guest);
}

#[tokio::test]
async fn a_broken_rule_wakes_those_who_wait_to_send() {
    let (channel, mut guest) = connect().await;
    let stream = channel.open(&exec()).await.unwrap();
    let (opened, _) = guest.receive().await;
    guest.reply(opened.stream, &Reply::Started { pid: 1 }).await;
    let control = stream.input();
    let sender = tokio::spawn(async move {
        loop {
            if let Err(error) = control.control(&Control::Signal { signal: 10 }).await {
                return error;
            }
        }
    });
    tokio::time::sleep(Duration::from_millis(200)).await;
    guest.send(999, Kind::Out, b"x").await;
    let error = tokio::time::timeout(Duration::from_secs(20), sender).await;
    assert_eq!(error.unwrap().unwrap().code(), "channel-protocol");
}

#[tokio::test]
async fn what_nobody_reads_is_bounded_by_the_window() {
    let (channel, mut guest) = connect().await;
    let stream = channel.open(&exec()).await.unwrap();
    let (opened, _) = guest.receive().await;
    let id = opened.stream;
    guest.reply(id, &Reply::Started { pid: 1 }).await;
    drop(stream);
    let (kill, _) = guest.receive().await;
    assert_eq!((kill.stream, kill.kind), (id, Kind::Control));
    // An honest guest gets its window back, as often as it likes.
    let mut credit = 0;
    let mut sent = 0;
    while sent < 3 * u64::from(WINDOW) {
        guest.send(id, Kind::Out, &vec![0; MAX_PAYLOAD]).await;
        sent += MAX_PAYLOAD as u64;
        while credit < sent {
            let (header, payload) = guest.receive().await;
            assert_eq!(header.kind, Kind::Credit);
            credit += u64::from(u32::from_le_bytes(payload.try_into().unwrap()));
        }
    }
    assert_eq!(channel.ended().map(|error| error.to_string()), None);
    // One that sends on and takes nothing back is cut off.
    for _ in 0..20_000 {
        if channel.ended().is_some() {
            break;
        }
        guest.send(id, Kind::Out, &vec![0; MAX_PAYLOAD]).await;
    }
    let error = channel.ended().expect("nothing ended it");
    assert_eq!(error.code(), "channel-protocol", "{error}");
}

#[tokio::test]
async fn output_beyond_the_window_ends_the_channel() {
    let (channel, mut guest) = connect().await;
    let mut stream = channel.open(&exec()).await.unwrap();
    let (opened, _) = guest.receive().await;
    guest.reply(opened.stream, &Reply::Started { pid: 1 }).await;
    stream.started("run").await.unwrap();
    for _ in 0..=WINDOW as usize / MAX_PAYLOAD {
        guest
            .send(opened.stream, Kind::Out, &vec![0; MAX_PAYLOAD])
            .await;
    }
    while channel.ended().is_none() {
        tokio::task::yield_now().await;
    }
    let error = loop {
        match stream.next().await {
            Ok(Output::Out(bytes)) => assert!(bytes.len() <= WINDOW as usize),
            Ok(other) => panic!("{other:?}"),
            Err(error) => break error,
        }
    };
    assert_eq!(error.code(), "channel-protocol", "{error}");
}

#[tokio::test]
async fn the_guests_explanations_cannot_steer_a_terminal() {
    let (channel, mut guest) = connect().await;
    let mut stream = channel.open(&exec()).await.unwrap();
    let (opened, _) = guest.receive().await;
    let failure = Failure {
        kind: FailureKind::System,
        message: format!("\u{1b}]0;owned\u{7}{}", "x".repeat(30_000)),
    };
    guest.reply(opened.stream, &Reply::Refused(failure)).await;
    let error = stream.started("run").await.unwrap_err().to_string();
    assert!(
        !error.contains('\u{1b}') && error.contains("owned"),
        "{error}"
    );
    assert!(error.len() < 5000, "{}", error.len());
}

/// Text that would take over a terminal, as JSON carries it.
const STEERING: &str = "\u{1b}]0;owned\u{7}\u{9b}2J\u{202e}";

fn assert_harmless(text: &str) {
    let steers = |c: char| c.is_control() || c == '\u{202e}';
    assert!(text.contains("owned") && !text.contains(steers), "{text:?}");
}

#[tokio::test]
async fn no_word_of_the_guest_can_steer_a_terminal() {
    let (host, guest) = tokio::io::duplex(64 * 1024);
    let mut guest = Guest(guest);
    let greeting = Hello {
        boot_id: STEERING.into(),
        ..hello(STEERING)
    };
    let greeting = serde_json::to_vec(&greeting).unwrap();
    let (connected, ()) = tokio::join!(
        Channel::connect(host),
        guest.send(0, Kind::Hello, &greeting)
    );
    let (channel, hello) = connected.unwrap();
    assert_harmless(&hello.program);
    assert_harmless(&hello.boot_id);
    guest.receive().await;

    let mut stream = channel.open(&Request::Info).await.unwrap();
    let (opened, _) = guest.receive().await;
    let word = || STEERING.to_owned();
    let info = Info {
        os: word(),
        kernel: word(),
        hostname: word(),
        interfaces: vec![Interface {
            name: word(),
            mac: word(),
            addresses: vec![word()],
        }],
        processes: vec![Process {
            command: word(),
            ..Process::default()
        }],
        ..Info::default()
    };
    guest.reply(opened.stream, &Reply::Info(info)).await;
    let Reply::Info(info) = stream.started("tell").await.unwrap() else {
        panic!("not what was sent")
    };
    let interface = &info.interfaces[0];
    for text in [
        &info.os,
        &info.kernel,
        &info.hostname,
        &info.processes[0].command,
    ] {
        assert_harmless(text);
    }
    for text in [&interface.name, &interface.mac, &interface.addresses[0]] {
        assert_harmless(text);
    }
    let exit = Exit {
        failure: Some(Failure {
            kind: FailureKind::System,
            message: word(),
        }),
        ..Exit::default()
    };
    let exit = serde_json::to_vec(&exit).unwrap();
    guest.send(opened.stream, Kind::Exit, &exit).await;
    assert_harmless(&stream.finished("tell").await.unwrap_err().to_string());
}

#[tokio::test]
async fn what_is_wrong_with_a_message_is_said_without_its_words() {
    for (kind, payload) in [
        (
            Kind::Reply,
            format!("{{\"reply\":\"{STEERING}{}\"}}", "x".repeat(30_000)),
        ),
        (
            Kind::Exit,
            format!("{{\"failure\":{{\"kind\":\"{STEERING}\"}}}}"),
        ),
        (Kind::Reply, "{\"reply\":\"refused\"".into()),
    ] {
        let (channel, mut guest) = connect().await;
        let mut stream = channel.open(&exec()).await.unwrap();
        let (opened, _) = guest.receive().await;
        // JSON escapes no character above U+007F: these come as they are.
        let payload = payload.replace(['\u{1b}', '\u{7}'], "\u{9b}");
        guest.send(opened.stream, kind, payload.as_bytes()).await;
        let error = stream.started("run").await.unwrap_err();
        assert_eq!(error.code(), "channel-protocol", "{error}");
        let text = error.to_string();
        assert!(
            !text.contains(char::is_control) && text.len() < 8192,
            "{text:?}"
        );
    }
}

#[tokio::test]
async fn bytes_that_are_no_text_end_the_channel_where_text_must_be() {
    for kind in [Kind::Reply, Kind::Exit] {
        let (channel, mut guest) = connect().await;
        let _stream = channel.open(&exec()).await.unwrap();
        let (opened, _) = guest.receive().await;
        let payload = b"{\"reply\":\"refused\",\"failure\":\"\xff\xfe\"}";
        guest.send(opened.stream, kind, payload).await;
        assert_eq!(cut_off(&channel).await.code(), "channel-protocol");
    }
}

#[tokio::test]
async fn every_message_that_has_no_place_ends_the_channel() {
    let reply = serde_json::to_vec(&Reply::Done).unwrap();
    let exit = serde_json::to_vec(&Exit::default()).unwrap();
    let greeting = serde_json::to_vec(&hello("again")).unwrap();
    let credit = |bytes: u32| bytes.to_le_bytes().to_vec();
    let huge = u32::try_from(MAX_PAYLOAD).unwrap() + 1;
    let raw = |len: u32, stream: u32, kind: Kind| {
        let header = Header { len, stream, kind };
        header.encode().to_vec()
    };
    let frame = |stream: u32, kind: Kind, payload: &[u8]| {
        let len = payload.len().try_into().unwrap();
        [raw(len, stream, kind), payload.to_vec()].concat()
    };
    let mut unknown = frame(1, Kind::Out, b"x");
    unknown[8] = 77;
    let mut padded = frame(1, Kind::Out, b"x");
    padded[11] = 1;
    for (what, bytes) in [
        ("a huge frame", raw(huge, 1, Kind::Out)),
        ("the largest length there is", raw(u32::MAX, 1, Kind::Out)),
        ("an unknown kind", unknown),
        ("lost step", padded),
        ("a second Hello", frame(0, Kind::Hello, &greeting)),
        ("a Hello on a stream", raw(0, 1, Kind::Hello)),
        ("output of no stream", raw(0, 0, Kind::Out)),
        ("a second Reply", frame(1, Kind::Reply, &reply)),
        (
            "an answer for another stream",
            frame(2, Kind::Reply, &reply),
        ),
        ("output of another stream", frame(2, Kind::Out, b"x")),
        ("the end of another stream", frame(2, Kind::Exit, &exit)),
        (
            "two ends",
            [frame(1, Kind::Exit, &exit), frame(1, Kind::Exit, &exit)].concat(),
        ),
        (
            "output after the end",
            [frame(1, Kind::Exit, &exit), frame(1, Kind::Out, b"x")].concat(),
        ),
        ("output without a byte", frame(1, Kind::Out, b"")),
        ("errors without a byte", frame(1, Kind::Err, b"")),
        ("credit for nothing", frame(1, Kind::Credit, &credit(1))),
        ("no credit", frame(1, Kind::Credit, &credit(0))),
        ("a short credit", frame(1, Kind::Credit, b"123")),
        ("a request", frame(1, Kind::Open, br#"{"request":"ping"}"#)),
        ("input", frame(1, Kind::In, b"x")),
        ("the end of input", frame(1, Kind::End, b"")),
        (
            "an order",
            frame(1, Kind::Control, br#"{"control":"kill"}"#),
        ),
    ] {
        let (channel, mut guest, mut stream) = running().await;
        guest.0.write_all(&bytes).await.unwrap();
        let error = cut_off(&channel).await;
        assert_eq!(error.code(), "channel-protocol", "{what}: {error}");
        // Those who wait are told, and nothing new is begun.
        let told = tokio::time::timeout(Duration::from_secs(20), stream.next()).await;
        match told.unwrap_or_else(|_| panic!("{what}: nobody was told")) {
            Ok(Output::Exit(_)) => assert!(what.contains("end"), "{what}"),
            Ok(other) => panic!("{what}: {other:?}"),
            Err(error) => assert_eq!(error.code(), "channel-protocol", "{what}"),
        }
        assert!(channel.open(&exec()).await.is_err(), "{what}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_byte_a_second_is_waited_for_by_nobody_but_its_own_request() {
    let (channel, mut guest) = connect().await;
    let asking = tokio::spawn({
        let channel = channel.clone();
        async move {
            let limit = Duration::from_secs(30);
            channel.ask("answer", &Request::Ping, limit).await
        }
    });
    let (opened, _) = guest.receive().await;
    let reply = serde_json::to_vec(&Reply::Done).unwrap();
    let header = Header {
        len: 60_000,
        stream: opened.stream,
        kind: Kind::Reply,
    };
    // A header and a beginning, byte by byte, far beyond the time limit.
    for byte in header.encode().into_iter().chain(reply) {
        guest.0.write_all(&[byte]).await.unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert!(asking.is_finished(), "the time limit does not hold");
    let error = asking.await.unwrap().unwrap_err();
    assert_eq!(error.code(), "agent-silent", "{error}");
    // One frame at most is kept for it: the next request is only slow as well.
    let again = channel.ask("answer", &Request::Ping, Duration::from_secs(30));
    assert_eq!(again.await.unwrap_err().code(), "agent-silent");
    // Giving up ends the connection without help of the guest.
    drop(channel);
    let mut rest = Vec::new();
    let closed = guest.0.read_to_end(&mut rest);
    tokio::time::timeout(Duration::from_secs(5), closed)
        .await
        .expect("the channel is still open")
        .unwrap();
}

#[tokio::test]
async fn a_stream_that_nobody_reads_stops_no_other() {
    let (channel, mut guest, unread) = running().await;
    let mut read = start(&channel, &mut guest).await;
    // A whole window lies there.
    for _ in 0..WINDOW as usize / MAX_PAYLOAD {
        guest.send(1, Kind::Out, &vec![0; MAX_PAYLOAD]).await;
    }
    for round in 0..1000_u32 {
        guest.send(2, Kind::Out, &round.to_le_bytes()).await;
        let next = tokio::time::timeout(Duration::from_secs(20), read.next()).await;
        let Output::Out(bytes) = next.expect("the other stream is in the way").unwrap() else {
            panic!("not output")
        };
        assert_eq!(bytes, round.to_le_bytes());
        assert_eq!(guest.receive().await.0.kind, Kind::Credit);
    }
    assert_eq!(channel.ended().map(|error| error.to_string()), None);
    drop(unread);
}

#[tokio::test]
async fn endless_output_is_taken_at_the_readers_pace() {
    let (_channel, mut guest, mut stream) = running().await;
    // An honest window, a reader that reads: no end, no error, nothing piles up.
    let mut seen = 0_u64;
    while seen < 64 << 20 {
        guest.send(1, Kind::Out, &vec![b'y'; MAX_PAYLOAD]).await;
        let Output::Out(bytes) = stream.next().await.unwrap() else {
            panic!("not output")
        };
        assert!(bytes.len() <= WINDOW as usize);
        seen += bytes.len() as u64;
        let (header, credit) = guest.receive().await;
        assert_eq!(header.kind, Kind::Credit);
        assert_eq!(credit, u32::try_from(bytes.len()).unwrap().to_le_bytes());
    }
}

#[tokio::test]
async fn a_guest_that_ends_nothing_can_be_given_only_so_many_streams() {
    let (channel, mut guest) = connect().await;
    let reading = tokio::spawn(async move {
        // Takes everything, answers nothing.
        let mut sink = vec![0; 64 * 1024];
        while guest.0.read(&mut sink).await.is_ok_and(|count| count > 0) {}
    });
    let mut opened = 0;
    let error = loop {
        match channel.open(&exec()).await {
            // Dropped at once: only the guest could make room again.
            Ok(_) => opened += 1,
            Err(error) => break error,
        }
        assert!(opened <= bulkhead_agent::MAX_STREAMS, "nothing bounds them");
    };
    assert_eq!(opened, bulkhead_agent::MAX_STREAMS);
    assert_eq!(error.code(), "guest-refused", "{error}");
    drop(channel);
    reading.await.unwrap();
}
