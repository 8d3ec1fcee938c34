//! `bulkhead logs --console`: what the guest wrote to its serial console.

use std::fs::File;
use std::io::{self, ErrorKind, IsTerminal, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::logs::LOOK;
use super::message::{Failure, visible};
use crate::run::{RecordError, StateFile};
use crate::supervise::{Kind, Machines, View};

/// Prints the console of the machine that `began` shows; with `follow` also what
/// comes, until the machine ends.
pub(super) async fn run(machines: &Machines, began: &View, follow: bool) -> Result<i32, Failure> {
    let path = machines.console_log(&began.id);
    let mut screen = Screen::new(io::stdout().is_terminal());
    let mut tail = Tail::new(path);
    let mut print = |bytes: &[u8]| {
        let mut stdout = io::stdout().lock();
        let bytes = screen.show(bytes);
        // A reader that went away, as in `| head`, is no failure.
        stdout
            .write_all(&bytes)
            .and_then(|()| stdout.flush())
            .is_ok()
    };
    loop {
        // Looked at first: what it says in the meantime is printed then.
        let more = follow && goes_on(machines, began).await?;
        if !tail.read(&mut print)? || !more {
            return Ok(0);
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Whether the machine still is in the life that `began` shows.
async fn goes_on(machines: &Machines, began: &View) -> Result<bool, Failure> {
    match machines.look(&began.id).await {
        // A run has one life only.
        Ok(now) => Ok(now.state.is_live()
            && now.kind == began.kind
            && (now.kind == Kind::Run || now.started_ms == began.started_ms)),
        // A run's record is gone with it.
        Err(_) if began.kind == Kind::Run => Ok(false),
        // It is removed, or being removed: this file goes first.
        Err(_) if !has_state(&machines.console_log(&began.id)) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Whether the state of the machine whose console this is is there.
fn has_state(console: &Path) -> bool {
    console.parent().is_some_and(StateFile::is_in)
}

/// A file that grows, and gives way to another at a start of its machine.
struct Tail {
    path: PathBuf,
    file: Option<File>,
}

impl Tail {
    fn new(path: PathBuf) -> Self {
        Self { path, file: None }
    }

    /// Gives what is new to `print`, until that says that nobody reads it. Gives
    /// whether somebody does.
    fn read(&mut self, print: &mut impl FnMut(&[u8]) -> bool) -> Result<bool, Failure> {
        let unreadable = |path: &Path, source| RecordError::Io {
            action: "read",
            path: path.to_owned(),
            source,
        };
        loop {
            if let Some(file) = &mut self.file {
                let mut buffer = [0; 16 * 1024];
                loop {
                    let count = match file.read(&mut buffer) {
                        Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                        count => count.map_err(|source| unreadable(&self.path, source))?,
                    };
                    if count == 0 {
                        break;
                    }
                    if !print(&buffer[..count]) {
                        return Ok(false);
                    }
                }
            }
            let found = match File::open(&self.path) {
                // It never ran, or it is removed: nothing more is said.
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(true),
                found => found.map_err(|source| unreadable(&self.path, source))?,
            };
            let inode = |file: &File| file.metadata().map(|meta| meta.ino()).ok();
            let open = self.file.as_ref().and_then(inode);
            if open.is_some() && open == inode(&found) {
                return Ok(true);
            }
            self.file = Some(found);
        }
    }
}

/// Where it is printed: the guest wrote it, and nothing of it may steer a terminal.
struct Screen {
    is_terminal: bool,
    /// The beginning of a character whose end has not come yet.
    half: Vec<u8>,
}

impl Screen {
    fn new(is_terminal: bool) -> Self {
        Self {
            is_terminal,
            half: Vec::new(),
        }
    }

    /// The next bytes as they are printed.
    fn show(&mut self, bytes: &[u8]) -> Vec<u8> {
        if !self.is_terminal {
            return bytes.to_owned();
        }
        let mut text = std::mem::take(&mut self.half);
        text.extend_from_slice(bytes);
        let half = text
            .utf8_chunks()
            .last()
            .map_or(0, |chunk| chunk.invalid().len());
        self.half = text.split_off(text.len() - half);
        visible(&String::from_utf8_lossy(&text).replace('\r', "")).into_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_is_followed_over_a_start() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let mut tail = Tail::new(path.clone());
        let mut seen = Vec::new();
        let mut read = |tail: &mut Tail| {
            seen.clear();
            let mut print = |bytes: &[u8]| {
                seen.extend_from_slice(bytes);
                true
            };
            assert!(tail.read(&mut print).unwrap());
            String::from_utf8(seen.clone()).unwrap()
        };
        assert_eq!(read(&mut tail), "");
        std::fs::write(&path, "one\n").unwrap();
        assert_eq!(read(&mut tail), "one\n");
        assert_eq!(read(&mut tail), "");
        let mut file = File::options().append(true).open(&path).unwrap();
        file.write_all(b"two\n").unwrap();
        assert_eq!(read(&mut tail), "two\n");
        // Another start: what came last into the old one is not lost.
        file.write_all(b"three\n").unwrap();
        std::fs::rename(&path, dir.path().join("console.log.old")).unwrap();
        std::fs::write(&path, "four\n").unwrap();
        assert_eq!(read(&mut tail), "three\nfour\n");
        // What is removed was read to its end.
        std::fs::remove_file(&path).unwrap();
        assert_eq!(read(&mut tail), "");
        // Nobody reads it.
        std::fs::write(&path, "five\n").unwrap();
        assert!(!tail.read(&mut |_| false).unwrap());
    }

    #[test]
    fn a_terminal_sees_whole_characters_and_nothing_that_steers_it() {
        let mut screen = Screen::new(true);
        let shown =
            |screen: &mut Screen, bytes: &[u8]| String::from_utf8(screen.show(bytes)).unwrap();
        assert_eq!(shown(&mut screen, b"a\x1b[2J\r\n\xc3"), "a\\u{1b}[2J\n");
        assert_eq!(shown(&mut screen, b"\xa4\xff"), "ä");
        assert_eq!(shown(&mut screen, b"b"), "\u{fffd}b");
        let mut pipe = Screen::new(false);
        assert_eq!(pipe.show(b"a\x1b\xff\r\n"), b"a\x1b\xff\r\n");
    }
}
