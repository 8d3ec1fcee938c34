//! The host's side of the channel, plainly: one thread, blocking, every rule checked.
#![allow(unreachable_pub, dead_code)] // shared by several test programs

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::time::Duration;

use bulkhead_agent::*;

/// A stream opened when nothing may be served.
pub const UNSERVED: u32 = 4_000_000_000;

/// Everything a stream has brought so far.
#[derive(Debug, Default)]
pub struct Seen {
    pub reply: Option<Reply>,
    pub out: Vec<u8>,
    pub err: Vec<u8>,
    pub exit: Option<Exit>,
    pub credit: u64,
    /// Bytes received that were not given back.
    pub held: u32,
    pub out_total: u64,
}

/// A running agent and our end of its channel.
pub struct Agent {
    pub child: Child,
    pub channel: UnixStream,
    pub streams: HashMap<u32, Seen>,
    /// Give back what is received.
    pub crediting: bool,
    /// Keep output, rather than only count it.
    pub keeping: bool,
    next: u32,
}

impl Agent {
    /// Starts the agent; both `Hello`s are exchanged.
    pub fn start() -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_bulkhead-agent"));
        let fd = theirs.as_raw_fd();
        command.args(["service", "--fd", "9"]);
        // SAFETY: dup2 and fcntl are async-signal-safe.
        unsafe {
            command.pre_exec(move || {
                match fd {
                    // Where it is already, dup2 would leave it to be closed by exec.
                    9 => nix::libc::fcntl(fd, nix::libc::F_SETFD, 0),
                    _ => nix::libc::dup2(fd, 9),
                };
                Ok(())
            })
        };
        let child = command.spawn().unwrap();
        drop(theirs);
        let mut agent = Self {
            child,
            channel: ours,
            streams: HashMap::new(),
            crediting: true,
            keeping: true,
            next: 1,
        };
        agent.expect_hello();
        agent.hello();
        agent
    }

    pub fn hello(&mut self) {
        let hello = Hello {
            version: VERSION,
            program: "test".into(),
            boot_id: String::new(),
        };
        self.send(0, Kind::Hello, &serde_json::to_vec(&hello).unwrap());
    }

    /// Skips to the agent's `Hello`.
    pub fn expect_hello(&mut self) -> Hello {
        loop {
            let (header, payload) = self.frame();
            assert!(header.stream != UNSERVED, "served without a Hello");
            if header.kind == Kind::Hello {
                return serde_json::from_slice(&payload).unwrap();
            }
        }
    }

    pub fn send(&mut self, stream: u32, kind: Kind, payload: &[u8]) {
        let header = Header {
            len: payload.len() as u32,
            stream,
            kind,
        };
        let frame = [&header.encode()[..], payload].concat();
        self.channel.write_all(&frame).unwrap();
    }

    fn frame(&mut self) -> (Header, Vec<u8>) {
        let mut header = [0; HEADER_LEN];
        self.channel.read_exact(&mut header).unwrap();
        let header = Header::decode(header).unwrap();
        let mut payload = vec![0; header.len as usize];
        self.channel.read_exact(&mut payload).unwrap();
        (header, payload)
    }

    pub fn open(&mut self, request: &Request) -> u32 {
        let id = self.next;
        self.next += 1;
        self.open_as(id, request);
        id
    }

    pub fn open_as(&mut self, id: u32, request: &Request) {
        self.streams.insert(id, Seen::default());
        self.send(id, Kind::Open, &serde_json::to_vec(request).unwrap());
    }

    pub fn control(&mut self, stream: u32, control: &Control) {
        self.send(stream, Kind::Control, &serde_json::to_vec(control).unwrap());
    }

    /// Takes one frame; returns its stream.
    pub fn step(&mut self) -> u32 {
        let (header, payload) = self.frame();
        let id = header.stream;
        let seen = self.streams.get_mut(&id).expect("a stream of ours");
        assert!(seen.exit.is_none(), "{:?} after Exit", header.kind);
        match header.kind {
            Kind::Reply => {
                assert!(seen.reply.is_none() && seen.out_total == 0);
                seen.reply = Some(serde_json::from_slice(&payload).unwrap());
            }
            Kind::Out | Kind::Err => {
                assert!(seen.reply.is_some(), "output before Reply");
                seen.held += header.len;
                seen.out_total += u64::from(header.len);
                assert!(seen.held <= WINDOW, "the window was exceeded");
                if self.keeping {
                    let all = if header.kind == Kind::Out {
                        &mut seen.out
                    } else {
                        &mut seen.err
                    };
                    all.extend(payload);
                }
                if self.crediting {
                    seen.held -= header.len;
                    self.send(id, Kind::Credit, &header.len.to_le_bytes());
                }
            }
            Kind::Credit => {
                seen.credit += u64::from(u32::from_le_bytes(payload[..].try_into().unwrap()));
            }
            Kind::Exit => seen.exit = Some(serde_json::from_slice(&payload).unwrap()),
            other => panic!("{other:?} frame from the guest"),
        }
        id
    }

    pub fn until(&mut self, stream: u32, done: impl Fn(&Seen) -> bool) {
        while !done(&self.streams[&stream]) {
            self.step();
        }
    }

    /// Waits for the end of a stream.
    pub fn finish(&mut self, stream: u32) -> Seen {
        self.until(stream, |seen| seen.exit.is_some());
        self.streams.remove(&stream).unwrap()
    }

    /// Sends input within the window, then `End`.
    pub fn feed(&mut self, stream: u32, bytes: &[u8]) {
        let mut sent = 0_u64;
        for chunk in bytes.chunks(MAX_PAYLOAD) {
            while sent + chunk.len() as u64 - self.streams[&stream].credit > u64::from(WINDOW) {
                if self.streams[&stream].exit.is_some() {
                    return;
                }
                self.step();
            }
            self.send(stream, Kind::In, chunk);
            sent += chunk.len() as u64;
        }
        self.send(stream, Kind::End, &[]);
    }

    pub fn run(&mut self, exec: Exec) -> Seen {
        let stream = self.open(&Request::Exec(exec));
        self.finish(stream)
    }

    /// Runs a shell script as root.
    pub fn sh(&mut self, script: &str) -> Seen {
        self.run(sh(script))
    }

    /// Resident memory of the agent, in KiB.
    pub fn rss_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status
            .lines()
            .find(|line| line.starts_with("VmRSS:"))
            .unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn sh(script: &str) -> Exec {
    command(&["sh", "-c", script])
}

pub fn command(argv: &[&str]) -> Exec {
    Exec {
        argv: argv.iter().map(|arg| (*arg).to_owned()).collect(),
        user: Some("0".into()),
        ..Exec::default()
    }
}
