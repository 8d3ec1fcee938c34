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
//! | `d` | path's length, path | each file two levels below: as `p` gets it; 0 |

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::PathBuf;
use std::process::Command;

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
