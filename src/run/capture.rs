//! Collects output: the beginning in memory, all of it in a file once it is long.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::outcome::Captured;

/// Output being collected.
#[derive(Debug)]
pub(super) struct Capture {
    path: PathBuf,
    head: Vec<u8>,
    bytes: u64,
    file: Option<File>,
}

impl Capture {
    /// Collects; what is too long for memory goes to the file `path`.
    pub(super) fn new(path: PathBuf) -> Self {
        Self {
            path,
            head: Vec::new(),
            bytes: 0,
            file: None,
        }
    }

    /// Where long output goes.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Takes in more output.
    pub(super) fn push(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.file.is_none() && self.head.len() + bytes.len() > Captured::INLINE {
            if let Some(dir) = self.path.parent() {
                fs::create_dir_all(dir)?;
            }
            let mut file = File::create(&self.path)?;
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
    pub(super) fn finish(self) -> Captured {
        let spilled = self.file.is_some();
        let (text, exact) = match String::from_utf8(self.head) {
            Ok(text) => (text, true),
            Err(error) => (
                String::from_utf8_lossy(error.as_bytes()).into_owned(),
                false,
            ),
        };
        let file = spilled.then_some(self.path);
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
        let mut capture = Capture::new(dir.path().join("out/stdout"));
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
        let mut capture = Capture::new("/nowhere/stdout".into());
        capture.push(b"hi\n").unwrap();
        let captured = capture.finish();
        assert_eq!((captured.text.as_str(), captured.complete), ("hi\n", true));
        assert_eq!(captured.file, None);
        let mut capture = Capture::new("/nowhere/stdout".into());
        capture.push(b"\xff").unwrap();
        assert!(!capture.finish().complete);
    }
}
