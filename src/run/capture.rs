//! Collects output: the beginning in memory, all of it in a file once it is long.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::dirs::make_private;
use super::outcome::Captured;
use crate::spec::Bytes;

/// Output being collected.
#[derive(Debug)]
pub(super) struct Capture {
    path: PathBuf,
    limit: Bytes,
    head: Vec<u8>,
    bytes: u64,
    file: Option<File>,
    finished: bool,
}

impl Drop for Capture {
    fn drop(&mut self) {
        // Nobody will be told of it.
        if self.file.is_some() && !self.finished {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Capture {
    /// Collects; what is too long for memory goes to the file `path`.
    pub(super) fn new(path: PathBuf, limit: Bytes) -> Self {
        Self {
            path,
            limit,
            head: Vec::new(),
            bytes: 0,
            file: None,
            finished: false,
        }
    }

    /// Where long output goes.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Takes in more output.
    ///
    /// # Errors
    /// The file cannot be written, or it would be more than the limit.
    pub(super) fn push(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.bytes + bytes.len() as u64 > self.limit.0 {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                format!("it is more than {}", self.limit),
            ));
        }
        if self.file.is_none() && self.head.len() + bytes.len() > Captured::INLINE {
            if let Some(dir) = self.path.parent() {
                make_private(dir)?;
            }
            let mut options = File::options();
            // It may hold secrets.
            options.write(true).create(true).truncate(true).mode(0o600);
            let mut file = options.open(&self.path)?;
            file.write_all(&self.head)?;
            self.file = Some(file);
        }
        if let Some(file) = &mut self.file {
            file.write_all(bytes)?;
        }
        let room = Captured::INLINE - self.head.len();
        self.head.extend_from_slice(&bytes[..bytes.len().min(room)]);
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// What was collected.
    pub(super) fn finish(mut self) -> Captured {
        self.finished = true;
        let spilled = self.file.is_some();
        let (text, exact) = match String::from_utf8(std::mem::take(&mut self.head)) {
            Ok(text) => (text, true),
            Err(error) => (
                String::from_utf8_lossy(error.as_bytes()).into_owned(),
                false,
            ),
        };
        let file = spilled.then(|| std::mem::take(&mut self.path));
        Captured {
            bytes: self.bytes,
            text,
            complete: exact && !spilled,
            file,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_output_is_whole_in_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let mut capture = Capture::new(dir.path().join("out/stdout"), Bytes::gib(1));
        let line = vec![b'y'; 1000];
        for _ in 0..2000 {
            capture.push(&line).unwrap();
        }
        let captured = capture.finish();
        assert_eq!(
            (captured.bytes, captured.text.len()),
            (2_000_000, Captured::INLINE)
        );
        assert!(!captured.complete);
        assert_eq!(
            fs::read(captured.file.unwrap()).unwrap(),
            vec![b'y'; 2_000_000]
        );
    }

    #[test]
    fn short_output_needs_no_file() {
        let mut capture = Capture::new("/nowhere/stdout".into(), Bytes(10));
        capture.push(b"hi\n").unwrap();
        let captured = capture.finish();
        assert_eq!((captured.text.as_str(), captured.complete), ("hi\n", true));
        assert_eq!(captured.file, None);
        let mut capture = Capture::new("/nowhere/stdout".into(), Bytes(10));
        capture.push(b"\xff").unwrap();
        assert!(!capture.finish().complete);
    }

    #[test]
    fn more_than_the_limit_is_refused_and_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("stdout");
        let mut capture = Capture::new(path.clone(), Bytes::mib(2));
        capture.push(&vec![0; 2 << 20]).unwrap();
        let error = capture.push(b"x").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
        assert_eq!(error.to_string(), "it is more than 2M");
        drop(capture);
        assert!(!path.exists());
    }
}
