//! The floor in the guest: moves bytes over one virtio-serial port with plain
//! system calls, and knows nothing of Bulkhead's protocol.
//!
//! `cargo xtask bench` compiles this file by itself, statically, and runs it in
//! a machine as `bench-guest PORT`; the host opens each exchange with a letter.
//! Numbers are eight bytes, little-endian.
//!
//! | letter | then | answer |
//! | --- | --- | --- |
//! | `e` | n, n bytes | the n bytes |
//! | `x` | | `.` once `/bin/true` has run |
//! | `i` | n, n bytes | `.` |
//! | `o` | n | n bytes |
//! | `p` | count; each: path's length, path, n, n bytes | `.` once all are files |
//! | `g` | path's length, path | n, n bytes |
//! | `w` | server, resolver (IPv4); count, bytes up, bytes down | nanoseconds of the median request; 0 where one failed |
//! | `d` | path's length, path | each file two levels below: as `p` gets it; 0 |

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::net::{Ipv4Addr, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Bytes moved by one system call at most.
const CHUNK: usize = 64 * 1024;

fn main() -> io::Result<()> {
    let name = std::env::args().nth(1).unwrap_or_default();
    let writer = open(&name)?;
    let mut port = Port {
        reader: BufReader::with_capacity(CHUNK, writer.try_clone()?),
        writer,
    };
    loop {
        match port.letter()? {
            b'e' => {
                let bytes = port.bytes()?;
                port.writer.write_all(&bytes)?;
            }
            b'x' => {
                Command::new("/bin/true").status()?;
                port.writer.write_all(b".")?;
            }
            b'i' => {
                let mut left = port.number()? as usize;
                let mut buffer = vec![0; CHUNK];
                while left > 0 {
                    let want = left.min(CHUNK);
                    left -= port.read(&mut buffer[..want])?;
                }
                port.writer.write_all(b".")?;
            }
            b'o' => {
                let mut left = port.number()? as usize;
                let buffer = vec![0; CHUNK];
                while left > 0 {
                    let count = left.min(CHUNK);
                    port.writer.write_all(&buffer[..count])?;
                    left -= count;
                }
            }
            b'p' => {
                for _ in 0..port.number()? {
                    let path = port.path()?;
                    if let Some(parent) = path.parent() {
                        fs::create_dir_all(parent)?;
                    }
                    fs::write(path, port.bytes()?)?;
                }
                port.writer.write_all(b".")?;
            }
            b'g' => {
                let content = fs::read(port.path()?)?;
                port.writer
                    .write_all(&(content.len() as u64).to_le_bytes())?;
                port.writer.write_all(&content)?;
            }
            b'w' => {
                let (server, resolver) = (port.address()?, port.address()?);
                let numbers = [port.number()?, port.number()?, port.number()?];
                let median = requests(server, resolver, numbers).unwrap_or_else(|error| {
                    eprintln!("{error}");
                    0
                });
                port.writer.write_all(&median.to_le_bytes())?;
            }
            b'd' => {
                let top = port.path()?;
                let mut writer = BufWriter::with_capacity(CHUNK, &port.writer);
                for dir in fs::read_dir(&top)? {
                    for file in fs::read_dir(dir?.path())? {
                        let path = file?.path();
                        let name = path.to_string_lossy();
                        let content = fs::read(&path)?;
                        writer.write_all(&(name.len() as u64).to_le_bytes())?;
                        writer.write_all(name.as_bytes())?;
                        writer.write_all(&(content.len() as u64).to_le_bytes())?;
                        writer.write_all(&content)?;
                    }
                }
                writer.write_all(&[0; 8])?;
                writer.flush()?;
            }
            other => return Err(io::Error::other(format!("letter {other}"))),
        }
    }
}

/// Makes HTTP requests; gives the time of the median.
fn requests(server: Ipv4Addr, resolver: Ipv4Addr, [count, up, down]: [u64; 3]) -> io::Result<u64> {
    let mut times = Vec::new();
    for _ in 0..count {
        let begin = Instant::now();
        let (name, server) = match resolver.is_unspecified() {
            true => (name(NAMES.load(Relaxed)), server),
            false => look_up(resolver)?,
        };
        request(&name, server, up, down)?;
        times.push(begin.elapsed().as_nanos() as u64);
    }
    times.sort_unstable();
    Ok(times.get(times.len() / 2).copied().unwrap_or(0))
}

/// How many names were asked for.
static NAMES: AtomicU64 = AtomicU64::new(0);

fn name(number: u64) -> String {
    format!("n{number}.example.net")
}

/// Asks for a new name (RFC 1035); gives it, and its address.
fn look_up(resolver: Ipv4Addr) -> io::Result<(String, Ipv4Addr)> {
    let name = name(NAMES.fetch_add(1, Relaxed) + 1);
    let mut question = vec![0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        question.push(label.len() as u8);
        question.extend(label.as_bytes());
    }
    question.extend([0, 0, 1, 0, 1]);
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.set_read_timeout(Some(Duration::from_secs(10)))?;
    socket.send_to(&question, (resolver, 53))?;
    let mut answer = [0; 512];
    let length = socket.recv(&mut answer)?;
    // One address, at the end of the only record there may be.
    let told = answer[..length].windows(2).rposition(|two| two == [0, 4]);
    let octets = told.and_then(|at| answer.get(at + 2..at + 6)?.try_into().ok());
    let address: [u8; 4] =
        octets.ok_or_else(|| io::Error::other(format!("no address of {name}")))?;
    Ok((name, address.into()))
}

fn request(name: &str, server: Ipv4Addr, up: u64, down: u64) -> io::Result<()> {
    let mut stream = TcpStream::connect((server, 80))?;
    let verb = if up > 0 { "POST" } else { "GET" };
    let head = format!(
        "{verb} /{down} HTTP/1.1\r\nHost: {name}\r\nContent-Length: {up}\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(head.as_bytes())?;
    let mut buffer = vec![0; CHUNK];
    let mut left = up as usize;
    while left > 0 {
        let count = left.min(CHUNK);
        stream.write_all(&buffer[..count])?;
        left -= count;
    }
    let mut all = 0;
    loop {
        match stream.read(&mut buffer)? {
            0 => break,
            count => all += count as u64,
        }
    }
    match all > down {
        true => Ok(()),
        false => Err(io::Error::other(format!("{all} bytes came"))),
    }
}

/// Finds the port by its name, as udev would.
fn open(name: &str) -> io::Result<File> {
    for entry in fs::read_dir("/sys/class/virtio-ports")? {
        let entry = entry?;
        let found = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if found.trim() == name {
            let path = PathBuf::from("/dev").join(entry.file_name());
            return OpenOptions::new().read(true).write(true).open(path);
        }
    }
    Err(io::ErrorKind::NotFound.into())
}

/// The port, which gives nothing for as long as the host is not connected.
struct Port {
    reader: BufReader<File>,
    writer: File,
}

impl Port {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.reader.read(buffer)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            count => Ok(count),
        }
    }

    fn letter(&mut self) -> io::Result<u8> {
        let mut letter = [0];
        self.reader.read_exact(&mut letter)?;
        Ok(letter[0])
    }

    fn number(&mut self) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.reader.read_exact(&mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn address(&mut self) -> io::Result<Ipv4Addr> {
        let mut octets = [0; 4];
        self.reader.read_exact(&mut octets)?;
        Ok(octets.into())
    }

    fn bytes(&mut self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; self.number()? as usize];
        self.reader.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn path(&mut self) -> io::Result<PathBuf> {
        let name = String::from_utf8(self.bytes()?).map_err(io::Error::other)?;
        Ok(name.into())
    }
}
