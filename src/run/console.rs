//! The guest's serial console, and what QEMU says: the last lines in memory,
//! all of it (within bounds) in a file.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::task::AbortHandle;

/// Bytes of console kept in memory.
const TAIL: usize = 64 * 1024;
/// Bytes of console written to disk; what follows is dropped with a note.
const FILE_LIMIT: usize = 16 << 20;

/// Reads a console for as long as it lives.
#[derive(Debug)]
pub struct ConsoleLog {
    tail: Arc<Mutex<VecDeque<u8>>>,
    task: AbortHandle,
    /// Closed when nothing more can come.
    open: watch::Receiver<()>,
}

impl ConsoleLog {
    /// Starts to read `stream`, keeping a copy in the file `path`. A file that
    /// is there already becomes `path` with `.old`.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn start(stream: UnixStream, path: &Path) -> std::io::Result<Self> {
        if path.exists() {
            std::fs::rename(path, path.with_extension("log.old"))?;
        }
        Ok(Self::read(stream, File::create(path)?, FILE_LIMIT))
    }

    /// Goes on where another owner's reading ended.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn resume(stream: UnixStream, path: &Path) -> std::io::Result<Self> {
        let file = File::options().append(true).create(true).open(path)?;
        let written = usize::try_from(file.metadata()?.len()).unwrap_or(FILE_LIMIT);
        Ok(Self::read(stream, file, FILE_LIMIT.saturating_sub(written)))
    }

    fn read(mut stream: UnixStream, mut file: File, mut room: usize) -> Self {
        let tail = Arc::new(Mutex::new(VecDeque::new()));
        let kept = Arc::clone(&tail);
        let (ending, open) = watch::channel(());
        let task = tokio::spawn(async move {
            let mut buffer = vec![0; 16 * 1024];
            let _ending = ending;
            while let Ok(count @ 1..) = stream.read(&mut buffer).await {
                let bytes = &buffer[..count];
                {
                    let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                    kept.extend(bytes);
                    let excess = kept.len().saturating_sub(TAIL);
                    kept.drain(..excess);
                }
                let written = bytes.len().min(room);
                // A full disk costs the copy, not the machine.
                let _ = file.write_all(&bytes[..written]);
                if room > 0 && written == room {
                    let _ = file.write_all(b"\n[console log is full; the rest is dropped]\n");
                }
                room -= written;
            }
        });
        Self {
            tail,
            task: task.abort_handle(),
            open,
        }
    }

    /// Waits until all of it was read, which is soon after QEMU's end, but no
    /// longer than `limit`.
    pub async fn ended(&self, limit: Duration) {
        let mut open = self.open.clone();
        let _ = tokio::time::timeout(limit, async { while open.changed().await.is_ok() {} }).await;
    }

    /// The last `count` lines, with control characters made visible.
    pub fn last_lines(&self, count: usize) -> String {
        let bytes: Vec<u8> = self
            .tail
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .copied()
            .collect();
        printable(&bytes, count)
    }

    /// Whether the console says `words`, or does within `limit`: they take
    /// another way than what the guest agent says.
    pub async fn says(&self, words: &str, limit: Duration) -> bool {
        let said = async {
            while !self.last_lines(usize::MAX).contains(words) {
                tokio::time::sleep(limit / 10).await;
            }
        };
        tokio::time::timeout(limit, said).await.is_ok()
    }

    /// From the kernel's panic message on, at most `count` lines; `None` when
    /// it has not panicked.
    pub fn panic_lines(&self, count: usize) -> Option<String> {
        let all = self.last_lines(usize::MAX);
        let lines: Vec<&str> = all.lines().collect();
        let first = lines
            .iter()
            .position(|line| line.contains("Kernel panic"))?;
        let end = lines.len().min(first + count);
        Some(lines[first..end].join("\n"))
    }
}

impl Drop for ConsoleLog {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The last `count` lines of hostile text, safe for a terminal.
pub(super) fn printable(bytes: &[u8], count: usize) -> String {
    let text = String::from_utf8_lossy(bytes);
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim_end)
        .filter(|line| !line.is_empty())
        .collect();
    let tail = &lines[lines.len().saturating_sub(count)..];
    let safe = |c: char| {
        if c.is_control() && c != '\n' && c != '\t' {
            '\u{fffd}'
        } else {
            c
        }
    };
    tail.join("\n").chars().map(safe).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_text_cannot_reach_the_terminal() {
        assert_eq!(
            printable(b"a\r\n\x1b[2J\x07b\nc\n", 2),
            "\u{fffd}[2J\u{fffd}b\nc"
        );
        assert_eq!(printable(b"", 5), "");
    }

    #[tokio::test]
    async fn memory_and_file_are_bounded() {
        use tokio::io::AsyncWriteExt;
        let dir = tempfile::tempdir().unwrap();
        let (mut guest, host) = UnixStream::pair().unwrap();
        let path = dir.path().join("console.log");
        let log = ConsoleLog::start(host, &path).unwrap();
        let line = [b'x'; 1023].into_iter().chain([b'\n']).collect::<Vec<u8>>();
        for _ in 0..(17 << 10) {
            guest.write_all(&line).await.unwrap();
        }
        guest
            .write_all(b"Kernel panic - not syncing\n")
            .await
            .unwrap();
        while log.panic_lines(1).is_none() {
            tokio::task::yield_now().await;
        }
        assert!(log.tail.lock().unwrap().len() <= TAIL);
        let size = std::fs::metadata(&path).unwrap().len();
        assert!(
            size > FILE_LIMIT as u64 && size < FILE_LIMIT as u64 + 100,
            "{size}"
        );
    }
}
