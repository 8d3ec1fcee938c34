//! Files of what is to outlive the machines it is about: one JSON object a line,
//! none longer than it may get.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// How long a file gets before it is put aside for a fresh one.
const LONGEST: u64 = 1 << 20;

/// Where an older part goes.
fn older(file: &Path) -> PathBuf {
    file.with_extension("old.jsonl")
}

/// Whether its last line has no end.
fn is_cut_off(file: &File) -> io::Result<bool> {
    let Some(last) = file.metadata()?.len().checked_sub(1) else {
        return Ok(false);
    };
    let mut byte = [0];
    file.read_exact_at(&mut byte, last)?;
    Ok(byte != *b"\n")
}

/// Writes a line down, for good.
pub(super) fn append(file: &Path, value: &impl Serialize) -> io::Result<()> {
    if fs::metadata(file).is_ok_and(|meta| meta.len() > LONGEST) {
        fs::rename(file, older(file))?;
    }
    let mut options = File::options();
    let options = options.read(true).append(true).create(true);
    let mut file = options.mode(0o600).open(file)?;
    // What a full disk has cut off spoils no other line.
    let mut line = match is_cut_off(&file)? {
        true => vec![b'\n'],
        false => Vec::new(),
    };
    serde_json::to_writer(&mut line, value)?;
    line.push(b'\n');
    // In one piece: others write to it too.
    file.write_all(&line)?;
    file.sync_data()
}

/// What is written down in a file, oldest first; lines that cannot be read are left
/// out.
pub(super) fn lines<T: DeserializeOwned>(file: &Path) -> Vec<T> {
    let read = |file: &Path| fs::read_to_string(file).unwrap_or_default();
    let text = read(&older(file)) + &read(file);
    let lines = text.lines();
    lines
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_was_cut_off_spoils_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("audit.jsonl");
        append(&file, &1).unwrap();
        let mut cut = File::options().append(true).open(&file).unwrap();
        cut.write_all(b"{\"half\":").unwrap();
        append(&file, &2).unwrap();
        append(&file, &3).unwrap();
        assert_eq!(lines::<u32>(&file), [1, 2, 3]);
        let text = fs::read_to_string(&file).unwrap();
        assert_eq!(text, "1\n{\"half\":\n2\n3\n");
    }
}
