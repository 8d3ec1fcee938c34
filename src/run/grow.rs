//! Making the disk of a machine larger, running or stopped.
//!
//! The host only makes the file longer; what is in it is the guest's, whose
//! agent grows the file system: at once, or at its next boot.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use bulkhead_agent::{FailureKind, Request, UNKNOWN_REQUEST};
use qapi::qmp::block_resize;
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde::Serialize;

use super::disk::space;
use super::machine::Machine;
use super::{MachineError, stats};
use crate::guest::GuestError;
use crate::plan::SCRATCH_NODE;
use crate::plan::jail::longest;
use crate::qmp::QmpError;
use crate::spec::Bytes;

/// How long the guest may take to grow a file system.
const PATIENCE: Duration = Duration::from_secs(60);
/// Disks are whole blocks of the file system.
const BLOCK: u64 = 4096;
/// The largest disk that can be asked for.
const LARGEST: u64 = 16 << 40;

/// What came of growing a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Grown {
    /// Its size before.
    pub before: Bytes,
    /// Its size now: as asked, in whole blocks of 4 KiB.
    pub after: Bytes,
    /// What the user should know besides.
    pub warning: Option<String>,
}

impl Grown {
    /// Checks the wish. `allocated` is what the disk takes of `dir` already.
    fn check(before: u64, size: Bytes, allocated: u64, dir: &Path) -> Result<Self, MachineError> {
        let after = size.0.next_multiple_of(BLOCK);
        let refuse = |why: String| MachineError::Value {
            what: "the size of the disk",
            value: size.to_string(),
            why,
        };
        if after < before {
            let before = Bytes(before);
            return Err(refuse(format!("it has {before}, and a disk cannot shrink")));
        }
        if after > LARGEST {
            return Err(refuse(format!("{} are possible", Bytes(LARGEST))));
        }
        let free = space(dir).map_err(|source| MachineError::Io {
            action: "see what is free in",
            path: dir.to_owned(),
            source,
        })?;
        // Only what is written takes space: more than there is may be promised.
        let promised = after.saturating_sub(allocated);
        let warning = (promised > free.free).then(|| {
            format!(
                "the disk may come to need {promised} bytes more in {}, where {} are free; \
                 when they are used up the machine stops until there is space",
                dir.display(),
                free.free
            )
        });
        Ok(Self {
            before: Bytes(before),
            after: Bytes(after),
            warning,
        })
    }

    /// Makes the disk of a stopped machine, of which nothing was used since, as
    /// long as it was.
    ///
    /// # Errors
    /// The host's file system refuses.
    pub(crate) fn take_back(&self, disk: &Path) -> std::io::Result<()> {
        let file = File::options().write(true).open(disk)?;
        file.set_len(self.before.0)?;
        file.sync_all()
    }
}

impl Machine {
    /// Makes the disk of the running machine larger, and its file system.
    ///
    /// # Errors
    /// A smaller size, an agent that cannot do it, or QEMU's refusal: nothing
    /// has changed then. Where the guest fails ([`MachineError::NotFilled`]) the
    /// disk is larger, and its file system grows at its next boot.
    pub async fn grow_disk(&self, size: Bytes) -> Result<Grown, MachineError> {
        let disk = stats::scratch(self.monitor()).await?;
        let grown = Grown::check(disk.size, size, disk.allocated, self.dir())?;
        // Asked for what is there already, an agent that does not know the
        // request refuses before anything has changed.
        self.fill_disk(disk.size).await?;
        if grown.after > grown.before {
            self.allow_file(grown.after)?;
            let command = block_resize {
                device: None,
                node_name: Some(SCRATCH_NODE.to_owned()),
                // At most 2^44, as checked.
                size: i64::try_from(grown.after.0).unwrap_or(i64::MAX),
            };
            if let Err(error) = self.monitor().execute(command).await {
                // One that did not answer may do it yet, and would die of the limit.
                if matches!(error, QmpError::Refused { .. })
                    && let Err(error) = self.allow_file(grown.before)
                {
                    tracing::warn!("QEMU may write more than its disk is large: {error}");
                }
                return Err(error.into());
            }
            let filled = self.fill_disk(grown.after.0).await;
            filled.map_err(|source| MachineError::NotFilled {
                size: grown.after,
                source: source.into(),
            })?;
        }
        Ok(grown)
    }

    /// Lets the VMM write a disk of that size, as it was let at its start.
    fn allow_file(&self, size: Bytes) -> Result<(), MachineError> {
        let most = match self.plan().jail.file_size {
            Some(most) => Some(most.max(longest(size)).0),
            None => return Ok(()),
        };
        let limit = Rlimit {
            current: most,
            maximum: most,
        };
        let set = prlimit(Pid::from_raw(self.process().pid()), Resource::Fsize, limit);
        set.map(drop).map_err(|errno| MachineError::Io {
            action: "allow longer files to",
            path: self.plan().qemu.clone(),
            source: errno.into(),
        })
    }

    async fn fill_disk(&self, bytes: u64) -> Result<(), MachineError> {
        let what = "grow its file system";
        let request = Request::Grow { bytes };
        match self.channel().ask(what, &request, PATIENCE).await {
            Ok(_) => Ok(()),
            Err(GuestError::Refused { failure, .. })
                if failure.kind == FailureKind::Invalid
                    && failure.message.contains(UNKNOWN_REQUEST) =>
            {
                Err(MachineError::OldAgent { what })
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// Makes the kept disk of a stopped machine larger; its file system grows at
/// the next boot.
///
/// # Errors
/// A smaller size, or the host's file system refuses.
pub fn lengthen(disk: &Path, size: Bytes) -> Result<Grown, MachineError> {
    let io_error = |action| {
        move |source| MachineError::Io {
            action,
            path: disk.to_owned(),
            source,
        }
    };
    let file = File::options()
        .write(true)
        .open(disk)
        .map_err(io_error("open"))?;
    let meta = file.metadata().map_err(io_error("read"))?;
    let dir = disk.parent().unwrap_or(Path::new("/"));
    let grown = Grown::check(meta.len(), size, meta.blocks() * 512, dir)?;
    file.set_len(grown.after.0)
        .and_then(|()| file.sync_all())
        .map_err(io_error("lengthen"))?;
    Ok(grown)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Explain;

    #[test]
    fn a_file_gets_longer_and_never_shorter() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        std::fs::write(&path, vec![7; 8192]).unwrap();
        let grown = lengthen(&path, Bytes(1 << 20 | 1)).unwrap();
        assert_eq!((grown.before, grown.after), (Bytes(8192), Bytes(1052672)));
        assert_eq!(grown.warning, None);
        let data = std::fs::read(&path).unwrap();
        assert_eq!(data.len(), 1052672);
        assert!(data[..8192].iter().all(|byte| *byte == 7));
        grown.take_back(&path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), data[..8192]);
        lengthen(&path, grown.after).unwrap();
        let error = lengthen(&path, Bytes(8192)).unwrap_err();
        assert_eq!(error.code(), "value-invalid");
        assert!(error.to_string().contains("cannot shrink"), "{error}");
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 1052672);
    }

    #[test]
    fn more_than_the_host_has_is_warned_about() {
        let dir = tempfile::tempdir().unwrap();
        let free = space(dir.path()).unwrap().free;
        let ask = |more: u64| Grown::check(0, Bytes(free + more), 1 << 30, dir.path());
        assert_eq!(ask(0).unwrap().warning, None, "a GiB is allocated already");
        let warning = ask(8 << 30).unwrap().warning.unwrap();
        assert!(warning.contains("stops until there is space"), "{warning}");
        let error = Grown::check(0, Bytes(LARGEST + 1), 0, dir.path()).unwrap_err();
        assert!(error.to_string().contains("16T"), "{error}");
    }
}
