//! A hostile QEMU, or a hostile qemu-guest-agent, at the other end of a monitor.
#![no_main]

use std::time::Duration;

use bulkhead::qmp::{Event, GuestAgent, Monitor, QmpError};
use bulkhead_fuzz::{block_on, check_error, check_text, let_run};
use qapi::qmp;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

/// As QEMU greets, and as it answers `qmp_capabilities`.
const GREETING: &str = "{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 2, \"minor\": 0, \"major\": 10}, \
     \"package\": \"fuzz\"}, \"capabilities\": [\"oob\"]}}\n{\"return\": {}, \"id\": 0}\n";
/// What does not answer within this, does not.
const LIMIT: Duration = Duration::from_secs(5);

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    match data {
        [0, raw @ ..] => block_on(greeted_by(raw)),
        [1, said @ ..] => block_on(guest_agent(said)),
        [_, said @ ..] => block_on(monitor(said)),
        [] => {}
    }
});

/// Nothing it says first is right but by chance.
async fn greeted_by(raw: &[u8]) {
    let (ours, mut theirs) = UnixStream::pair().expect("sockets can be made");
    theirs.write_all(raw).await.expect("it fits");
    theirs.shutdown().await.expect("it is open");
    match Monitor::connect(ours, LIMIT).await {
        Ok(monitor) => check_text(&monitor.version().package),
        Err(error) => check_error(&error),
    }
}

/// Right in the beginning, then anything.
async fn monitor(said: &[u8]) {
    let (ours, mut theirs) = UnixStream::pair().expect("sockets can be made");
    theirs
        .write_all(GREETING.as_bytes())
        .await
        .expect("it fits");
    let monitor = Monitor::connect(ours, LIMIT).await.expect("it was greeted");
    let monitor = monitor.with_timeout(LIMIT);
    let mut events = monitor.events();
    let talk = async {
        tokio::join!(
            monitor.execute(qmp::query_status {}),
            monitor.execute_raw("query-kvm", Value::Null),
            monitor.schema(),
            monitor.execute_into::<Vec<qmp::BlockInfo>>(qmp::query_block {}),
        )
    };
    let peer = async {
        let_run().await;
        // Its reader may be gone after the first wrong line.
        let _ = theirs.write_all(said).await;
        let _ = theirs.shutdown().await;
    };
    let ((status, kvm, schema, blocks), ()) = tokio::join!(talk, peer);
    let _ = (check(status), check(kvm), check(blocks));
    if let Ok(schema) = check(schema) {
        for command in schema.commands() {
            assert!(schema.offers_command(command));
            schema.offers_argument(command, "a.b");
            schema.argument_has_feature(command, "id", "unstable");
        }
    }
    loop {
        match tokio::time::timeout(LIMIT, events.next()).await {
            Ok(Ok(Event { name, data, .. })) => {
                assert!(name.len() + data.to_string().len() <= 64 * 1024);
            }
            Ok(Err(error @ QmpError::EventsLost { .. })) => check_error(&error),
            Ok(Err(error)) => break check_error(&error),
            Err(_) => panic!("the end was not told"),
        }
    }
}

/// What qemu-guest-agent says, around and after an answer to the handshake.
async fn guest_agent(said: &[u8]) {
    let (ours, theirs) = UnixStream::pair().expect("sockets can be made");
    let (reader, mut writer) = theirs.into_split();
    let (before, after) = said.split_at(said.len() / 2);
    let peer = async {
        let mut line = Vec::new();
        let mut reader = BufReader::new(reader);
        let _ = reader.read_until(b'\n', &mut line).await;
        let request: Value = serde_json::from_slice(&line[1..]).expect("it is a request");
        let answer = serde_json::json!({ "return": request["arguments"]["id"] });
        let answer = format!("{answer}\n").into_bytes();
        for part in [before, &[0xff], &answer, after] {
            let _ = writer.write_all(part).await;
        }
        let _ = reader.read_until(b'\n', &mut line).await;
        let _ = writer.shutdown().await;
    };
    let talk = async {
        match GuestAgent::connect(ours, LIMIT).await {
            Ok(agent) => {
                let _ = check(agent.info().await);
                let _ = check(agent.interfaces().await);
            }
            Err(error) => check_error(&error),
        }
    };
    tokio::join!(peer, talk);
}

fn check<T>(result: Result<T, QmpError>) -> Result<T, ()> {
    result.map_err(|error| check_error(&error))
}
