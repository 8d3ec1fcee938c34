//! What was there after a `Put`, to tell later what changed.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use nix::libc;
use nix::sys::stat::FileStat;

use super::dirs::{self, walk};
use crate::failure::{Result, invalid};

/// By relative path.
pub(super) type Marks = BTreeMap<Vec<u8>, Mark>;

/// What identifies a state of an entry. The kernel sets the change time, so no
/// program can undo a change unseen; a symbolic link cannot even change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mark {
    mode: u32,
    owner: (u32, u32),
    /// Inode, size, modification and change time; none for directories, whose
    /// entries are compared instead.
    content: Option<(u64, i64, [i64; 4])>,
}

impl Mark {
    pub(super) fn new(stat: &FileStat) -> Self {
        let times = [
            stat.st_mtime,
            stat.st_mtime_nsec,
            stat.st_ctime,
            stat.st_ctime_nsec,
        ];
        let is_dir = dirs::kind(stat) == libc::S_IFDIR;
        Self {
            mode: stat.st_mode,
            owner: (stat.st_uid, stat.st_gid),
            content: (!is_dir).then_some((stat.st_ino, stat.st_size, times)),
        }
    }
}

/// The tracked directories of the machine.
#[derive(Debug, Default)]
pub(crate) struct Tracked(Mutex<HashMap<String, Arc<Marks>>>);

impl Tracked {
    /// Remembers everything below `base`, under its name `path`.
    pub(super) fn remember(&self, path: &str, base: &OwnedFd) -> Result<()> {
        let mut marks = Marks::new();
        walk(base, |met| {
            marks.insert(met.path.to_vec(), Mark::new(met.stat));
            Ok(())
        })?;
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert(path.to_owned(), Arc::new(marks));
        Ok(())
    }

    /// What was remembered.
    pub(super) fn marks(&self, path: &str) -> Result<Arc<Marks>> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let marks = all.get(path).cloned();
        marks.ok_or_else(|| invalid(format!("{path} is not tracked: no Put asked for it")))
    }
}
