//! Exceptions from what no machine may reach: written down where it outlives their
//! machines, before they hold.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::audit;
use super::state::now_ms;
use crate::host::{fault, nft};
use crate::plan::firewall::Through;
use crate::spec::{Exception, VmId};

/// What became of an exception.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Excepted {
    /// When, in milliseconds since 1970-01-01 UTC.
    pub at_ms: u64,
    /// The machine.
    pub machine: VmId,
    /// The exception, such as `10.1.2.3/32:5432`.
    pub exception: Exception,
    /// What became of it.
    pub event: ExceptedEvent,
    /// Packets that it has let through and that began a connection, so far, where
    /// it held; one that is not answered may come several times.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connections: Option<u64>,
}

/// What can become of an exception.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum ExceptedEvent {
    /// It holds from now on: the machine starts, or somebody allowed it.
    Allowed,
    /// It holds no more: somebody denied it, or the change that made it failed.
    Denied,
    /// Its machine has ended.
    Ended,
}

/// Where what becomes of the exceptions of one machine is written down.
#[derive(Debug)]
pub(super) struct Exceptions {
    file: PathBuf,
    machine: VmId,
}

/// What has been counted in a machine's namespace, by rule.
pub(super) type Counted = BTreeMap<String, nft::Counted>;

impl Exceptions {
    pub(super) fn new(file: PathBuf, machine: VmId) -> Self {
        Self { file, machine }
    }

    pub(super) fn file(&self) -> &Path {
        &self.file
    }

    /// Writes down what becomes of some; with what was `counted`, how they were used.
    pub(super) fn note<'e>(
        &self,
        exceptions: impl IntoIterator<Item = &'e Exception>,
        event: ExceptedEvent,
        counted: Option<&Counted>,
    ) -> io::Result<()> {
        for exception in exceptions {
            let rule = Through::Exception(*exception).to_string();
            let count = |counted: &Counted| counted.get(&rule).map_or(0, |one| one.packets);
            let excepted = Excepted {
                at_ms: now_ms(),
                machine: self.machine.clone(),
                exception: *exception,
                event,
                connections: counted.map(count),
            };
            tracing::info!(id = %self.machine, %exception, ?event, "exception");
            fault::at("write exception")?;
            audit::append(&self.file, &excepted)?;
        }
        Ok(())
    }

    /// As [`Exceptions::note`], of what has happened already.
    pub(super) fn note_after<'e>(
        &self,
        exceptions: impl IntoIterator<Item = &'e Exception>,
        event: ExceptedEvent,
        counted: Option<&Counted>,
    ) {
        if let Err(error) = self.note(exceptions, event, counted) {
            tracing::error!("cannot write to {}: {error}", self.file.display());
        }
    }
}

/// What is written down in `file` (see [`super::Dirs::exceptions`]), oldest first;
/// lines that cannot be read are left out.
pub fn exceptions(file: &Path) -> Vec<Excepted> {
    audit::lines(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_becomes_of_an_exception_is_written_down_with_its_use() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("exceptions.jsonl");
        let notes = Exceptions::new(file.clone(), "m".parse().unwrap());
        let one: Exception = "10.1.2.3:5432".parse().unwrap();
        let other: Exception = "10.0.0.0/24".parse().unwrap();
        let used = nft::Counted {
            packets: 3,
            bytes: 180,
        };
        let counted = Counted::from([("allow-cidr:10.1.2.3/32:5432".to_owned(), used)]);
        notes
            .note([&one, &other], ExceptedEvent::Allowed, None)
            .unwrap();
        notes.note_after([&one, &other], ExceptedEvent::Ended, Some(&counted));
        let found: Vec<_> = exceptions(&file)
            .into_iter()
            .map(|one| (one.exception.to_string(), one.event, one.connections))
            .collect();
        let [one, other] = [one, other].map(|one| one.to_string());
        assert_eq!(
            found,
            [
                (one.clone(), ExceptedEvent::Allowed, None),
                (other.clone(), ExceptedEvent::Allowed, None),
                (one, ExceptedEvent::Ended, Some(3)),
                (other, ExceptedEvent::Ended, Some(0)),
            ]
        );
        // Where it cannot be written, that is said.
        let nowhere = Exceptions::new(dir.path().join("no/such"), "m".parse().unwrap());
        let all = ["10.1.2.3".parse().unwrap()];
        assert!(nowhere.note(&all, ExceptedEvent::Allowed, None).is_err());
    }
}
