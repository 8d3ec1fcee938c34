//! Files of what is to outlive the machines it is about: one JSON object a line,
//! none longer than it may get.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// How long a file gets before it is put aside for a fresh one.
const LONGEST: u64 = 1 << 20;

/// Where an older part goes.
fn older(file: &Path) -> PathBuf {
    file.with_extension("old.jsonl")
}

/// Writes a line down, for good.
pub(super) fn append(file: &Path, line: &impl Serialize) -> io::Result<()> {
    if fs::metadata(file).is_ok_and(|meta| meta.len() > LONGEST) {
        fs::rename(file, older(file))?;
    }
    let mut line = serde_json::to_vec(line)?;
    line.push(b'\n');
    let mut options = File::options();
    let mut file = options.append(true).create(true).mode(0o600).open(file)?;
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
