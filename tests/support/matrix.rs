//! Tries in a guest, against what comes of them, and who answers them outside.
#![allow(dead_code)] // each test file uses a part of it

use std::collections::BTreeMap;
use std::io::Write;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::sync::{Arc, Mutex};
use std::thread;

use bulkhead::guest::{Input, Output, Stream};
use bulkhead::host::netns::Netns;
use bulkhead::host::nft;
use bulkhead::plan::firewall::Family;
use bulkhead::run::Machine;
use bulkhead_agent::{Exec, Request};

use super::support::live::sh;
use super::support::net::note;

/// Who came, to which address.
pub(crate) type Seen = Arc<Mutex<Vec<(SocketAddr, SocketAddr)>>>;

/// Answers every TCP connection in a namespace with who it is from.
pub(crate) fn greet(netns: &Netns, address: &str, seen: &Seen) {
    let listener = netns
        .run_in(|| TcpListener::bind(address))
        .unwrap()
        .unwrap();
    let seen = seen.clone();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { continue };
            let (Ok(peer), Ok(own)) = (stream.peer_addr(), stream.local_addr()) else {
                continue;
            };
            seen.lock().unwrap().push((peer, own));
            // In one piece, as it is read.
            let _ = stream.write_all(format!("{}\n", peer.ip()).as_bytes());
        }
    });
}

/// Sends every datagram in a namespace back.
pub(crate) fn echo(netns: &Netns, address: &str, seen: &Seen) {
    let socket = netns.run_in(|| UdpSocket::bind(address)).unwrap().unwrap();
    let seen = seen.clone();
    thread::spawn(move || {
        let mut buffer = [0; 2000];
        while let Ok((length, peer)) = socket.recv_from(&mut buffer) {
            seen.lock()
                .unwrap()
                .push((peer, socket.local_addr().unwrap()));
            let _ = socket.send_to(&buffer[..length], peer);
        }
    });
}

/// Tries in a guest, one a line.
pub(crate) async fn tries(machine: &Machine, lines: &[&str]) -> Vec<String> {
    let script = include_str!("try.pl");
    let lines = lines.join("\n");
    let output = sh(
        machine,
        &format!(
            "ulimit -n 20000; cat > /tmp/try.pl <<'PERL'\n{script}\nPERL\nperl /tmp/try.pl <<'TRIES'\n{lines}\nTRIES"
        ),
    )
    .await;
    output.lines().map(str::to_owned).collect()
}

/// Somebody in a guest who tries what he is told, one line after another.
pub(crate) struct Hand {
    stream: Stream,
    input: Input,
    said: Vec<u8>,
}

impl Hand {
    pub(crate) async fn new(machine: &Machine) -> Self {
        let script = include_str!("try.pl");
        sh(
            machine,
            &format!("cat > /tmp/try.pl <<'PERL'\n{script}\nPERL"),
        )
        .await;
        let exec = Exec {
            argv: ["perl", "/tmp/try.pl"].map(str::to_owned).into(),
            user: Some("root".into()),
            stdin: true,
            ..Exec::default()
        };
        let mut stream = machine.channel().open(&Request::Exec(exec)).await.unwrap();
        stream.started("try").await.unwrap();
        Self {
            input: stream.input(),
            stream,
            said: Vec::new(),
        }
    }

    pub(crate) async fn tries(&mut self, line: &str) -> String {
        assert!(
            self.input
                .send(format!("{line}\n").as_bytes())
                .await
                .unwrap()
        );
        loop {
            if let Some(end) = self.said.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.said.drain(..=end).collect();
                return String::from_utf8_lossy(&line).trim_end().to_owned();
            }
            match self.stream.next().await.unwrap() {
                Output::Out(bytes) | Output::Err(bytes) => self.said.extend(bytes),
                Output::Exit(exit) => panic!("{exit:?}: {:?}", self.said),
            }
        }
    }

    /// Sends frames as they are.
    pub(crate) async fn sends(&mut self, frames: &[Vec<u8>]) {
        assert_eq!(self.tries(&format!("raw {}", hex(frames))).await, "sent");
    }
}

/// Frames as digits, with commas between them.
pub(crate) fn hex(frames: &[Vec<u8>]) -> String {
    let digits = |frame: &Vec<u8>| frame.iter().map(|byte| format!("{byte:02x}")).collect();
    frames.iter().map(digits).collect::<Vec<String>>().join(",")
}

/// Rows: what is tried, what must come of it. All that differ are shown.
pub(crate) async fn matrix(machine: &Machine, rows: &[(&str, &str)]) {
    let lines: Vec<_> = rows.iter().map(|(line, _)| *line).collect();
    let seen = tries(machine, &lines).await;
    assert_eq!(seen.len(), rows.len(), "{seen:?}");
    for ((line, expected), seen) in rows.iter().zip(&seen) {
        note(line, expected, seen);
    }
    let wrong: Vec<_> = rows
        .iter()
        .zip(&seen)
        .filter(|((_, expected), seen)| expected != seen)
        .map(|((line, expected), seen)| format!("{line}: expected {expected}, seen {seen}"))
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

pub(crate) fn counted(machine: &Machine, family: Family) -> BTreeMap<String, u64> {
    let netns = machine.netns().unwrap();
    let counters = netns.run_in(|| nft::counters(family)).unwrap().unwrap();
    counters
        .into_iter()
        .map(|(name, counted)| (name, counted.packets))
        .collect()
}
