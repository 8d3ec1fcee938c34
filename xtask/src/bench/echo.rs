//! The program in the guest that moves bytes over a port of the same machine
//! with nothing around it (`xtask/examples/bench_guest.rs`).

use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use bulkhead::guest::Stream;
use bulkhead::run::Machine;
use bulkhead_agent::{Exec, QGA_PORT, Request};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;

use super::config::explain;
use super::ours;
use crate::setup;

/// Where it is in the guest.
const PLACE: &str = "/usr/local/bin/bench-guest";

/// Requests to make.
#[derive(Debug, Clone, Copy)]
pub(super) struct Web {
    /// Of whom.
    pub(super) server: Ipv4Addr,
    /// Who is asked for a new name before each; nobody where unspecified.
    pub(super) dns: Ipv4Addr,
    /// How many.
    pub(super) count: u64,
    /// Bytes each brings.
    pub(super) up: u64,
    /// Bytes each asks for.
    pub(super) down: u64,
}

/// A machine of ours in which the program runs beside the agent.
pub(super) struct Echo {
    port: UnixStream,
    /// Dropping it ends the program.
    _program: Stream,
}

/// Compiles the program: by itself, for it must run in any guest.
fn program() -> Result<Vec<u8>> {
    let source = setup::root()?.join("xtask/examples/bench_guest.rs");
    let dir = setup::target()?.join("bench");
    std::fs::create_dir_all(&dir)?;
    let built = dir.join("bench-guest");
    let mut rustc = Command::new(std::env::var_os("RUSTC").unwrap_or("rustc".into()));
    rustc.args(["--edition", "2024", "-O", "-Ctarget-feature=+crt-static"]);
    rustc.args(["--crate-type", "bin", "-o"]);
    setup::call(rustc.arg(&built).arg(&source))?;
    std::fs::read(&built).context("cannot read the guest's program")
}

impl Echo {
    /// Takes the port of qemu-guest-agent, which no image here uses, and starts
    /// the program on its other end.
    pub(super) async fn start(machine: &mut Machine) -> Result<Self> {
        let port = machine.take_qga().context("the port is taken")?;
        let install = format!("cat > {PLACE} && chmod 755 {PLACE}");
        let channel = machine.channel();
        ours::run(channel, &["sh", "-c", &install], program()?).await?;
        let exec = Exec {
            argv: vec![PLACE.into(), QGA_PORT.into()],
            user: Some("root".into()),
            ..Exec::default()
        };
        let open = channel.open(&Request::Exec(exec)).await;
        let mut stream = open.map_err(explain)?;
        stream
            .started("run the bench's program")
            .await
            .map_err(explain)?;
        let mut echo = Self {
            port,
            _program: stream,
        };
        echo.echo(16).await?;
        Ok(echo)
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(self.port.write_all(bytes).await?)
    }

    async fn done(&mut self) -> Result<()> {
        let mut answer = [0];
        self.port.read_exact(&mut answer).await?;
        ensure!(answer == *b".", "the guest's program answered {answer:?}");
        Ok(())
    }

    /// `len` bytes there and back.
    pub(super) async fn echo(&mut self, len: usize) -> Result<()> {
        let mut message = vec![b'e'];
        message.extend(number(len));
        message.resize(message.len() + len, 7);
        self.send(&message).await?;
        let mut back = vec![0; len];
        self.port.read_exact(&mut back).await?;
        ensure!(
            back.iter().all(|byte| *byte == 7),
            "other bytes came back than went in"
        );
        Ok(())
    }

    /// Runs `/bin/true`.
    pub(super) async fn run_true(&mut self) -> Result<()> {
        self.send(b"x").await?;
        self.done().await
    }

    /// `bytes` in, to nowhere.
    pub(super) async fn sink(&mut self, bytes: &[u8]) -> Result<()> {
        self.send(&[&b"i"[..], &number(bytes.len())].concat())
            .await?;
        self.send(bytes).await?;
        self.done().await
    }

    /// `len` bytes out, from nowhere.
    pub(super) async fn source(&mut self, len: usize) -> Result<()> {
        self.send(&[&b"o"[..], &number(len)].concat()).await?;
        let mut left = len;
        let mut buffer = vec![0; 128 * 1024];
        while left > 0 {
            let want = left.min(buffer.len());
            let count = self.port.read(&mut buffer[..want]).await?;
            ensure!(count > 0, "the guest's program is gone");
            left -= count;
        }
        Ok(())
    }

    /// Requests, each over a connection of its own; gives how long half of them
    /// took at most, in milliseconds.
    pub(super) async fn web(&mut self, web: Web) -> Result<f64> {
        let addresses = [web.server.octets(), web.dns.octets()].concat();
        let numbers = [web.count, web.up, web.down].map(u64::to_le_bytes);
        self.send(&[b"w", &addresses[..], &numbers.concat()].concat())
            .await?;
        let median = self.port.read_u64_le().await?;
        ensure!(median > 0, "a request failed in the guest");
        Ok(median as f64 / 1e6)
    }

    /// Writes files in the guest.
    pub(super) async fn put(&mut self, files: &[(String, Vec<u8>)]) -> Result<()> {
        let mut message = vec![b'p'];
        message.extend(number(files.len()));
        for (path, content) in files {
            message.extend(number(path.len()));
            message.extend(path.as_bytes());
            message.extend(number(content.len()));
            message.extend(content);
        }
        self.send(&message).await?;
        self.done().await
    }

    /// Reads a file of the guest.
    pub(super) async fn get(&mut self, path: &str) -> Result<Vec<u8>> {
        let message = [&b"g"[..], &number(path.len()), path.as_bytes()].concat();
        self.send(&message).await?;
        let mut len = [0; 8];
        self.port.read_exact(&mut len).await?;
        let mut content = vec![0; usize::try_from(u64::from_le_bytes(len))?];
        self.port.read_exact(&mut content).await?;
        Ok(content)
    }

    /// Reads all files two levels below a directory; gives how many.
    pub(super) async fn tree(&mut self, path: &str, into: &Path) -> Result<usize> {
        let message = [&b"d"[..], &number(path.len()), path.as_bytes()].concat();
        self.send(&message).await?;
        let mut reader = BufReader::with_capacity(128 * 1024, &mut self.port);
        let mut next = async || -> Result<Vec<u8>> {
            let mut bytes = vec![0; usize::try_from(reader.read_u64_le().await?)?];
            reader.read_exact(&mut bytes).await?;
            Ok(bytes)
        };
        let mut count = 0;
        loop {
            let name = String::from_utf8(next().await?)?;
            if name.is_empty() {
                return Ok(count);
            }
            let content = next().await?;
            let to = into.join(name.trim_start_matches('/'));
            std::fs::create_dir_all(to.parent().unwrap_or(into))?;
            std::fs::write(to, content)?;
            count += 1;
        }
    }
}

fn number(value: usize) -> [u8; 8] {
    (value as u64).to_le_bytes()
}
