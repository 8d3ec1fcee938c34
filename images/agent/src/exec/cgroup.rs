//! A control group per command, so that all it started can be ended.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use nix::libc::{O_DIRECTORY, O_PATH};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

const MOUNT: &str = "/sys/fs/cgroup";
/// Groups with survivors looked at again after each command.
const RETRIES: usize = 8;

/// Where the groups are, on a system with cgroup v2.
#[derive(Debug)]
pub(crate) struct Cgroups {
    parent: Option<PathBuf>,
    /// Groups whose command is over but something in the background is not.
    survivors: Mutex<Vec<PathBuf>>,
}

/// One group.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
    /// For placing a child in it.
    pub(super) dir: File,
}

impl Cgroups {
    /// Finds out whether groups can be made here.
    pub(crate) fn detect() -> Self {
        let parent = Path::new(MOUNT).join("bulkhead");
        let is_v2 = statfs(MOUNT).is_ok_and(|stat| stat.filesystem_type() == CGROUP2_SUPER_MAGIC);
        let usable = is_v2 && (parent.is_dir() || fs::create_dir(&parent).is_ok());
        Self {
            parent: usable.then_some(parent),
            survivors: Mutex::default(),
        }
    }

    /// Makes the group of a stream; `None` where there are none.
    pub(super) fn make(&self, stream: u32) -> io::Result<Option<Cgroup>> {
        let Some(parent) = &self.parent else {
            return Ok(None);
        };
        // The number may belong to survivors of an earlier stream.
        let names = std::iter::once(stream.to_string())
            .chain((1..).map(|again: u32| format!("{stream}.{again}")));
        for name in names {
            let path = parent.join(name);
            match fs::create_dir(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                made => made?,
            }
            let dir = File::options()
                .read(true)
                .custom_flags(O_DIRECTORY | O_PATH)
                .open(&path)?;
            return Ok(Some(Cgroup { path, dir }));
        }
        unreachable!("names do not end")
    }

    /// Removes a group whose command is over, once nothing is left in it.
    pub(super) fn dispose(&self, group: &Cgroup) {
        let mut survivors = self
            .survivors
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        survivors.push(group.path.clone());
        let old = survivors.len().saturating_sub(RETRIES);
        let recent = survivors.split_off(old);
        let left = recent
            .into_iter()
            .filter(|path| fs::remove_dir(path).is_err());
        let mut left: Vec<_> = left.collect();
        // Those at the front get their turn next time.
        left.append(&mut survivors);
        *survivors = left;
    }
}

impl Cgroup {
    /// Kills every process in it.
    pub(super) fn kill(&self) -> io::Result<()> {
        fs::write(self.path.join("cgroup.kill"), "1")
    }
}
