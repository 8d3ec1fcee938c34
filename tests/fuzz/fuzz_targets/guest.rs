//! A hostile guest agent at the other end of the channel.
//!
//! The input is a script: frames of any kind for any stream, bytes that are no
//! frames, and in between what the host does with its streams.
#![no_main]

use std::collections::HashMap;
use std::time::Duration;

use bulkhead::guest::{Channel, GuestError, Output, Stream};
use bulkhead_agent::{
    Control, Exec, HEADER_LEN, Header, Hello, Kind, MAX_PAYLOAD, Reply, Request, VERSION, WINDOW,
};
use bulkhead_fuzz::{block_on, check_error, check_text, let_run};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Some(bytes) = data.first_chunk()
        && let Ok(header) = Header::decode(*bytes)
    {
        assert_eq!(header.encode(), *bytes);
        assert!(header.len as usize <= MAX_PAYLOAD);
    }
    match data {
        [0, raw @ ..] => block_on(rave(raw)),
        [_, script @ ..] => block_on(play(script)),
        [] => {}
    }
});

/// Most streams the host opens.
const STREAMS: usize = 8;

/// A guest that only sends bytes, from the first on.
async fn rave(bytes: &[u8]) {
    let (host, guest) = tokio::io::duplex(1 << 20);
    let (listener, mut writer) = tokio::io::split(guest);
    tokio::spawn(listen(listener));
    let send = async {
        let _ = writer.write_all(bytes).await;
        let _ = writer.shutdown().await;
    };
    match tokio::join!(Channel::connect(host), send).0 {
        Ok((channel, hello)) => {
            check_text(&hello.program);
            check_text(&hello.boot_id);
            assert_eq!(hello.version, VERSION);
            ended(&channel).await;
        }
        Err(error) => check_error(&error),
    }
}

/// A guest that greets properly and then does as the script says.
async fn play(script: &[u8]) {
    let (host, guest) = tokio::io::duplex(1 << 20);
    let (listener, writer) = tokio::io::split(guest);
    tokio::spawn(listen(listener));
    let mut play = Play {
        writer,
        streams: HashMap::new(),
        sent: HashMap::new(),
        exact: true,
    };
    let hello = Hello {
        version: VERSION,
        program: "fuzz".into(),
        boot_id: String::new(),
    };
    let hello = serde_json::to_vec(&hello).expect("it can be encoded");
    play.frame(0, Kind::Hello, &hello).await;
    let (channel, _) = Channel::connect(host).await.expect("the Hello is right");
    for _ in 0..3 {
        play.open(&channel).await;
    }
    let mut rest = script;
    while let [what, len, after @ ..] = rest {
        rest = play.step(*what, *len, after, &channel).await;
        let_run().await;
    }
    let _ = play.writer.shutdown().await;
    ended(&channel).await;
    for stream in std::mem::take(&mut play.streams).into_values() {
        play.drain(stream).await;
    }
}

struct Play {
    writer: WriteHalf<DuplexStream>,
    /// The host's, by number.
    streams: HashMap<u32, Stream>,
    /// What the guest sent and the host has not read: stdout, stderr.
    sent: HashMap<u32, [Vec<u8>; 2]>,
    /// Whether `sent` is all there is: not when bytes go out that may be frames.
    exact: bool,
}

impl Play {
    async fn frame(&mut self, stream: u32, kind: Kind, payload: &[u8]) {
        let len = payload.len() as u32;
        let header = Header { len, stream, kind }.encode();
        // The host may have hung up.
        let _ = self.writer.write_all(&header).await;
        let _ = self.writer.write_all(payload).await;
        let side = match kind {
            Kind::Out => 0,
            Kind::Err => 1,
            _ => return,
        };
        self.sent.entry(stream).or_default()[side].extend_from_slice(payload);
    }

    async fn open(&mut self, channel: &Channel) {
        let exec = Request::Exec(Exec {
            argv: vec!["true".into()],
            ..Exec::default()
        });
        let number = 1 + self.streams.len() as u32;
        match channel.open(&exec).await {
            Ok(stream) if self.streams.len() < STREAMS => {
                self.streams.insert(number, stream);
            }
            Ok(_) => {}
            Err(error) => check_error(&error),
        }
    }

    /// Does one step and gives what follows it in the script.
    async fn step<'a>(
        &mut self,
        what: u8,
        len: u8,
        after: &'a [u8],
        channel: &Channel,
    ) -> &'a [u8] {
        let stream = u32::from(what & 0xf);
        let (payload, rest) = after.split_at(after.len().min(usize::from(len)));
        match what >> 4 {
            10 => {
                self.exact = false;
                let _ = self.writer.write_all(payload).await;
                return rest;
            }
            11 => {
                let started = Reply::Started { pid: 1 };
                let reply = serde_json::to_vec(&started).expect("it can be encoded");
                self.frame(stream, Kind::Reply, &reply).await;
            }
            12 => {
                let exit = format!("{{\"code\":{len}}}");
                self.frame(stream, Kind::Exit, exit.as_bytes()).await;
            }
            13 => {
                let much = vec![len; MAX_PAYLOAD];
                let kind = [Kind::Out, Kind::Err][usize::from(len & 1)];
                self.frame(stream, kind, &much).await;
            }
            14 => self.host(stream, len).await,
            15 => self.open(channel).await,
            kind => {
                let kind = Kind::try_from(kind).expect("0 to 9 are kinds");
                self.frame(stream, kind, payload).await;
                return rest;
            }
        }
        after
    }

    /// What the host does with one of its streams.
    async fn host(&mut self, number: u32, what: u8) {
        let Some(mut stream) = self.streams.remove(&number) else {
            return;
        };
        let a_moment = Duration::from_millis(1);
        match what % 5 {
            0 => {
                let read = tokio::time::timeout(a_moment, stream.next()).await;
                if let Ok(read) = read {
                    self.check(number, read);
                }
            }
            1 => match tokio::time::timeout(a_moment, stream.started("run")).await {
                Ok(Ok(Reply::Info(info))) => {
                    let texts = [&info.os, &info.kernel, &info.hostname];
                    let more = info.processes.iter().map(|process| &process.command);
                    texts
                        .into_iter()
                        .chain(more)
                        .for_each(|text| check_text(text));
                    for interface in &info.interfaces {
                        check_text(&interface.name);
                        check_text(&interface.mac);
                        interface.addresses.iter().for_each(|text| check_text(text));
                    }
                }
                Ok(Err(error)) => check_error(&error),
                _ => {}
            },
            2 => {
                let send = stream.input();
                let sent = tokio::time::timeout(a_moment, send.send(&[b'i'; 70_000])).await;
                if let Ok(Err(error)) = sent {
                    check_error(&error);
                }
            }
            3 => {
                let signal = Control::Signal { signal: 15 };
                let sent = tokio::time::timeout(a_moment, stream.control(&signal)).await;
                if let Ok(Err(error)) = sent {
                    check_error(&error);
                }
            }
            // Dropped.
            _ => return,
        }
        self.streams.insert(number, stream);
    }

    /// What is read must be what was sent, in order, within the window. Gives
    /// whether more can come.
    fn check(&mut self, number: u32, read: Result<Output, GuestError>) -> bool {
        let (side, bytes) = match read {
            Ok(Output::Out(bytes)) => (0, bytes),
            Ok(Output::Err(bytes)) => (1, bytes),
            Ok(Output::Exit(exit)) => {
                if let Some(failure) = exit.failure {
                    check_text(&failure.message);
                }
                return false;
            }
            Err(error) => {
                check_error(&error);
                return false;
            }
        };
        assert!(!bytes.is_empty() && bytes.len() <= WINDOW as usize);
        if self.exact {
            let sent = &mut self.sent.entry(number).or_default()[side];
            assert!(
                sent.starts_with(&bytes),
                "stream {number} was given others' bytes"
            );
            sent.drain(..bytes.len());
        }
        true
    }

    /// Reads the rest, which is at most a window.
    async fn drain(&mut self, mut stream: Stream) {
        let mut left = WINDOW as usize;
        loop {
            // The channel has ended: nothing may wait.
            let read = tokio::time::timeout(Duration::from_secs(1), stream.next()).await;
            match read.expect("an end is told to every stream") {
                Ok(Output::Out(bytes) | Output::Err(bytes)) => {
                    left = left.checked_sub(bytes.len()).expect("more than the window");
                }
                Ok(Output::Exit(_)) => return,
                Err(error) => return check_error(&error),
            }
        }
    }
}

/// The guest has hung up, so the channel must end.
async fn ended(channel: &Channel) {
    let end = async {
        loop {
            match channel.ended() {
                Some(error) => break error,
                None => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        }
    };
    let end = tokio::time::timeout(Duration::from_secs(3600), end).await;
    check_error(&end.expect("the channel does not end"));
}

/// Reads what the host says: frames, whatever it was sent.
async fn listen(mut reader: ReadHalf<DuplexStream>) {
    let mut header = [0; HEADER_LEN];
    while reader.read_exact(&mut header).await.is_ok() {
        let header = Header::decode(header).expect("the host sends frames");
        let mut payload = vec![0; header.len as usize];
        if reader.read_exact(&mut payload).await.is_err() {
            return;
        }
    }
}
