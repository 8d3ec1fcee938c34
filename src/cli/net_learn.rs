//! `bulkhead net learn`.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind};

use serde::Serialize;

use super::Global;
use super::message::{Failure, print_json, print_text};
use crate::net::{Event, Learned};
use crate::run::{Record, RecordError, record_files};
use crate::spec::VmId;

/// A network proposed from a machine's record.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Proposal {
    /// A piece of a configuration file.
    learned: String,
}

/// Proposes a network from what a machine tried up to now, as `run --learn`
/// does at the end of a run.
pub(super) fn run(vm: &VmId, global: &Global) -> Result<i32, Failure> {
    let dirs = global.host()?.dirs;
    // A name nobody has is no empty record.
    Record::spec(&dirs, vm)?;
    let mut learned = Learned::default();
    for path in record_files(&dirs.run(vm)) {
        let unreadable = |source| RecordError::Io {
            action: "read",
            path: path.clone(),
            source,
        };
        let file = match fs::File::open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            opened => opened.map_err(unreadable)?,
        };
        for line in BufReader::new(file).lines() {
            // One that another version wrote, or that is not written yet, is left out.
            if let Ok(event) = serde_json::from_str::<Event>(&line.map_err(unreadable)?) {
                learned.take(&event);
            }
        }
    }
    let learned = learned.to_toml();
    match global.json {
        true => print_json(&Proposal { learned }),
        false => print_text(&learned),
    }
    Ok(0)
}
