//! A host, and an internet behind it, in network namespaces of the bench's own.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use bulkhead::host::netns::{self, Netns};
use bulkhead::host::network::Site;

/// The web server of that internet, by every name.
pub(crate) const SERVER: Ipv4Addr = Ipv4Addr::new(93, 184, 215, 14);
/// Its name server.
pub(crate) const DNS: Ipv4Addr = Ipv4Addr::new(8, 8, 8, 8);

/// A web server that no machine may reach: its address is private.
pub(crate) const LAN: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 9);

/// They are gone with it.
pub(crate) struct World {
    dir: PathBuf,
    pub(crate) host: Netns,
    _internet: Netns,
}

/// Runs a shell script in a namespace; it must succeed.
pub(crate) fn sh(netns: &Netns, script: &str) -> Result<String> {
    let run = || Command::new("sh").args(["-ec", script]).output();
    let output = netns.run_in(run)?.context("cannot run sh")?;
    ensure!(
        output.status.success(),
        "this needs iproute2 and nftables: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

impl World {
    pub(crate) fn new(dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        Self::beyond(Netns::make(&dir.join("host"))?, dir)
    }

    /// An internet behind a host that is there.
    pub(crate) fn beyond(host: Netns, dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let world = Self {
            _internet: Netns::make(&dir.join("internet"))?,
            host,
            dir: dir.to_owned(),
        };
        let there = dir.join("internet");
        sh(
            &world.host,
            &format!(
                "ip link set lo up
                 ip link add up0 type veth peer name down0 netns {}
                 ip addr add 192.0.2.1/24 dev up0; ip link set up0 up
                 nft add table ip bare
                 nft add chain ip bare post '{{ type nat hook postrouting priority 100; }}'
                 nft add rule ip bare post oifname up0 masquerade",
                there.display()
            ),
        )?;
        sh(
            &world._internet,
            &format!(
                "ip link set lo up; ip addr add 192.0.2.254/24 dev down0; ip link set down0 up
                 for a in {SERVER} {LAN} {DNS}; do ip addr add $a/32 dev lo; done"
            ),
        )?;
        sh(&world.host, "ip route add default via 192.0.2.254")?;
        for address in [SERVER, LAN] {
            let bind = || TcpListener::bind((address, 80));
            let web = world._internet.run_in(bind)??;
            std::thread::spawn(move || serve(&web));
        }
        let dns = world._internet.run_in(|| UdpSocket::bind((DNS, 53)))??;
        std::thread::spawn(move || resolve(&dns));
        Ok(world)
    }

    /// The host's side is where this process is.
    pub(crate) fn site(&self) -> Site {
        Site {
            resolvers: vec![(DNS, 53).into()],
            ..Site::default()
        }
    }

    /// A path for a network namespace.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for name in ["host", "internet"] {
            let _ = netns::release(&self.dir.join(name));
        }
    }
}

/// Answers `GET /N` with N bytes, and takes as many as a request brings.
fn serve(listener: &TcpListener) {
    for stream in listener.incoming().flatten() {
        std::thread::spawn(move || answer(stream));
    }
}

fn answer(stream: TcpStream) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let (mut wanted, mut brought) = (0, 0);
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let mut words = line.split_whitespace();
        match (words.next(), words.next()) {
            (None, _) => break,
            (Some("GET" | "POST"), Some(path)) => wanted = path.get(1..)?.parse().ok()?,
            (Some("Content-Length:"), Some(count)) => brought = count.parse().ok()?,
            _ => {}
        }
    }
    std::io::copy(&mut reader.take(brought), &mut std::io::sink()).ok()?;
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {wanted}\r\nConnection: close\r\n\r\n");
    (&stream).write_all(head.as_bytes()).ok()?;
    let chunk = vec![7; 64 << 10];
    let mut left: usize = wanted;
    while left > 0 {
        let count = left.min(chunk.len());
        (&stream).write_all(&chunk[..count]).ok()?;
        left -= count;
    }
    Some(())
}

/// Tells every question that the answer is [`SERVER`] (RFC 1035, section 4).
fn resolve(socket: &UdpSocket) {
    let mut buffer = [0; 512];
    while let Ok((length, peer)) = socket.recv_from(&mut buffer) {
        let question = &buffer[..length];
        let name = question.get(12..).unwrap_or_default();
        let Some(end) = name.iter().position(|byte| *byte == 0) else {
            continue;
        };
        let Some(asked) = question.get(12..12 + end + 5) else {
            continue;
        };
        // The same number; an answer, one question, one record by its name.
        let head = [question[0], question[1], 0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0];
        let record = [0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4];
        let answer = [&head[..], asked, &record, &SERVER.octets()].concat();
        let _ = socket.send_to(&answer, peer);
    }
}
