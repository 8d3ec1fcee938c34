//! A guest agent that does not play by the rules: what the host keeps, and how
//! long it waits, is bounded.

use std::time::Duration;

use bulkhead::error::Explain as _;
use bulkhead::guest::{Channel, GuestError, Output};
use bulkhead_agent::{
    Control, Exec, Failure, FailureKind, HEADER_LEN, Header, Hello, Kind, MAX_PAYLOAD, Reply,
    Request, VERSION, WINDOW,
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

async fn connect() -> (Channel, Guest) {
    let (host, guest) = tokio::io::duplex(64 * 1024);
    let mut guest = Guest(guest);
    let hello = Hello {
        version: VERSION,
        program: "hostile".into(),
        boot_id: String::new(),
    };
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
