//! Monitor and guest agent connections against peers no QEMU would be, and
//! against a real qemu-guest-agent.

use std::time::Duration;

use bulkhead::qmp::{ConnectionEnd, GuestAgent, Monitor, QmpError};
use qapi::qmp;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    process::Command,
};

/// Ample; nothing waits for it in vain.
const DEADLINE: Duration = Duration::from_secs(60);
/// Waited for in vain.
const SHORT: Duration = Duration::from_millis(20);

/// A monitor whose peer is the test; the next command has id 1.
async fn scripted() -> (Monitor, UnixStream) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let version = json!({ "qemu": { "major": 99, "minor": 0, "micro": 0 }, "package": "" });
    let greeting = json!({ "QMP": { "version": version, "capabilities": [] } });
    let ready = json!({ "return": {}, "id": 0 });
    // The reply must not be there before its command.
    let hello = async {
        let line = format!("{greeting}\r\n");
        theirs.write_all(line.as_bytes()).await.unwrap();
        let mut command = [0; 512];
        assert!(theirs.read(&mut command).await.unwrap() > 0);
        let line = format!("{ready}\r\n");
        theirs.write_all(line.as_bytes()).await.unwrap();
    };
    let (monitor, ()) = tokio::join!(Monitor::connect(ours, DEADLINE), hello);
    (monitor.unwrap(), theirs)
}

/// The end of a connection whose peer answers a command with `words`.
async fn end_after(words: &[u8]) -> ConnectionEnd {
    let (monitor, mut theirs) = scripted().await;
    let speak = async {
        let mut command = [0; 512];
        assert!(theirs.read(&mut command).await.unwrap() > 0);
        // Fails where the other side has heard enough.
        _ = theirs.write_all(words).await;
        _ = theirs.shutdown().await;
    };
    let (result, ()) = tokio::join!(monitor.execute(qmp::stop {}), speak);
    match result.unwrap_err() {
        QmpError::Closed { source, .. } => source,
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn nonsense_ends_the_connection_with_its_reason() {
    let end = end_after(b"\x1b[2Jnonsense\n").await;
    assert_eq!(
        end.to_string(),
        "it sent something that is not a message: `\\u{1b}[2Jnonsense`"
    );
    let end = end_after(b"{\"return\": ").await;
    assert!(matches!(end, ConnectionEnd::Truncated), "{end}");
    let end = end_after(&vec![b'x'; 5 << 20]).await;
    assert!(matches!(end, ConnectionEnd::TooLong(_)), "{end}");
    let mut deep = vec![b'['; 1 << 20];
    deep.push(b'\n');
    let end = end_after(&deep).await;
    assert!(matches!(end, ConnectionEnd::Garbage(_)), "{end}");
    let end = end_after(b"").await;
    assert!(matches!(end, ConnectionEnd::Closed), "{end}");
}

#[tokio::test]
async fn unknown_messages_are_passed_over() {
    let (monitor, mut theirs) = scripted().await;
    let mut events = monitor.events();
    let speak = async {
        let mut command = [0; 512];
        assert!(theirs.read(&mut command).await.unwrap() > 0);
        let words = br#"
{"return": {}, "id": 12345}
{"return": {}, "id": "text"}
{"return": {}}
{"error": {"class": "GenericError", "desc": "for nobody"}}
{"news": [1, 2]}
{"event": "NEVER_SEEN", "data": {"mood": "sunny"}}
{"error": {"class": "BrandNewClass", "desc": "no"}, "id": 1}
"#;
        theirs.write_all(words).await.unwrap();
    };
    let (result, ()) = tokio::join!(monitor.execute(qmp::stop {}), speak);
    assert_eq!(
        result.unwrap_err().to_string(),
        "QEMU's monitor refused `stop`: no (BrandNewClass)"
    );
    let event = events.next().await.unwrap();
    assert_eq!((event.name.as_str(), event.timestamp), ("NEVER_SEEN", None));
    assert_eq!(event.data["mood"], "sunny");
}

#[tokio::test]
async fn a_flood_of_events_is_bounded_and_told() {
    let (monitor, mut theirs) = scripted().await;
    let mut events = monitor.events();
    let speak = async {
        let mut command = [0; 512];
        assert!(theirs.read(&mut command).await.unwrap() > 0);
        for n in 0..5000 {
            let line = format!("{{\"event\": \"FLOOD\", \"data\": {n}}}\n");
            theirs.write_all(line.as_bytes()).await.unwrap();
        }
        let reply = b"{\"return\": {}, \"id\": 1}\n";
        theirs.write_all(reply).await.unwrap();
    };
    let (result, ()) = tokio::join!(monitor.execute(qmp::stop {}), speak);
    result.unwrap();
    let lost = match events.next().await {
        Err(QmpError::EventsLost { count, .. }) => count,
        other => panic!("{other:?}"),
    };
    // The next one is the one behind the gap.
    assert_eq!(events.next().await.unwrap().data, json!(lost));
}

#[tokio::test]
async fn only_a_monitor_is_taken_for_one() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let error = Monitor::connect(ours, SHORT).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "QEMU's monitor did not greet within 20ms"
    );
    drop(theirs);
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let words = b"220 mail.example ESMTP\r\n";
    theirs.write_all(words).await.unwrap();
    let error = Monitor::connect(ours, DEADLINE).await.unwrap_err();
    assert!(matches!(error, QmpError::Stranger { .. }), "{error}");
}

/// On a crowded host it may take as long as its caller gives it.
#[tokio::test(start_paused = true)]
async fn a_monitor_that_answers_late_is_waited_for() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let version = json!({ "qemu": { "major": 99, "minor": 0, "micro": 0 }, "package": "" });
    let greeting = json!({ "QMP": { "version": version, "capabilities": [] } });
    let late = async {
        let line = format!("{greeting}\r\n");
        theirs.write_all(line.as_bytes()).await.unwrap();
        let mut command = [0; 512];
        assert!(theirs.read(&mut command).await.unwrap() > 0);
        tokio::time::sleep(Duration::from_secs(100)).await;
        let line = "{\"return\": {}, \"id\": 0}\r\n";
        theirs.write_all(line.as_bytes()).await.unwrap();
    };
    let deadline = Duration::from_secs(200);
    let (monitor, ()) = tokio::join!(Monitor::connect(ours, deadline), late);
    // What it is asked for later may take no longer than usual.
    let begin = tokio::time::Instant::now();
    let error = monitor.unwrap().execute(qmp::stop {}).await.unwrap_err();
    assert!(matches!(error, QmpError::Timeout { .. }), "{error}");
    assert_eq!(begin.elapsed().as_secs(), 30);
}

#[tokio::test]
async fn dropping_the_last_handle_ends_the_connection() {
    let (monitor, mut theirs) = scripted().await;
    let mut events = monitor.events();
    let clone = monitor.clone();
    drop(monitor);
    let waited = tokio::time::timeout(SHORT, events.next()).await;
    assert!(waited.is_err(), "a clone keeps it");
    drop(clone);
    let end = events.next().await.unwrap_err();
    assert!(end.is_closed(), "{end}");
    let mut rest = Vec::new();
    let read = tokio::time::timeout(DEADLINE, theirs.read_to_end(&mut rest)).await;
    assert!(read.is_ok(), "the socket is closed");
}

#[tokio::test]
async fn a_guest_agent_is_found_behind_leftovers() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let guest = async {
        let mut request = vec![0; 4096];
        let length = theirs.read(&mut request).await.unwrap();
        let request: Value = serde_json::from_slice(&request[1..length]).unwrap();
        let token = &request["arguments"]["id"];
        // Half a reply of before, an older handshake, and then ours.
        let mut words = b"rn\": [1]}\n\xff{\"return\": 1}\n\xffnonsense\n\xff".to_vec();
        words.extend(format!("{{\"return\": {token}}}\n").into_bytes());
        theirs.write_all(&words).await.unwrap();
    };
    let (agent, ()) = tokio::join!(GuestAgent::connect(ours, DEADLINE), guest);
    let agent = agent.unwrap().with_timeout(SHORT);
    let error = agent.info().await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "qemu-guest-agent did not answer `guest-info` within 20ms"
    );
}

#[tokio::test]
async fn a_silent_guest_agent_is_given_up() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    // A hostile guest may babble for ever.
    let babble = async {
        loop {
            theirs.write_all(&[b'x'; 4096]).await.unwrap();
        }
    };
    tokio::select! {
        result = GuestAgent::connect(ours, SHORT) => {
            let error = result.unwrap_err();
            assert!(matches!(error, QmpError::Greeting { .. }), "{error}");
        }
        () = babble => unreachable!(),
    }
}

#[tokio::test]
async fn a_real_guest_agent_answers() {
    let binary = std::env::var_os("BULKHEAD_QEMU_GA").unwrap_or_else(|| "qemu-ga".into());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qga.sock");
    let started = Command::new(&binary)
        .args(["-m", "unix-listen", "-p"])
        .arg(&path)
        .arg("-t")
        .arg(dir.path())
        .kill_on_drop(true)
        .spawn();
    let Ok(mut child) = started else {
        eprintln!(
            "skipped: a_real_guest_agent_answers: no qemu-ga on this host \
            (BULKHEAD_QEMU_GA can name one)"
        );
        return;
    };
    let connected = async {
        loop {
            match UnixStream::connect(&path).await {
                Ok(stream) => return stream,
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    };
    let stream = tokio::time::timeout(DEADLINE, connected).await.unwrap();
    let agent = GuestAgent::connect(stream, DEADLINE).await.unwrap();
    let info = agent.info().await.unwrap();
    let mut offered = info.supported_commands.iter();
    assert!(offered.any(|command| command.name == "guest-info"));
    assert!(agent.os().await.unwrap().kernel_release.is_some());
    let interfaces = agent.interfaces().await.unwrap();
    assert!(interfaces.iter().any(|interface| interface.name == "lo"));
    child.kill().await.unwrap();
}
