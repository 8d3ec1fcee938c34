//! How a process that is about to be made gets into a control group.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use nix::libc;

use super::{Cgroup, CgroupError, io_error};

/// The way into a control group for a process that is about to be made.
///
/// To move a process, or all threads of one, the kernel waits until each of the
/// host's processors has been elsewhere: 5 to 28 ms here. It need not for who is
/// born there (v2), nor for a thread that moves itself (v1).
#[derive(Debug)]
pub struct Entrance {
    pub(crate) birthplace: Option<OwnedFd>,
    pub(crate) files: Vec<OwnedFd>,
}

impl Entrance {
    /// For CLONE_INTO_CGROUP, where the group is one directory of v2.
    pub fn birthplace(&self) -> Option<RawFd> {
        self.birthplace.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// A process of one thread that writes `0` to each of these is in it.
    pub fn files(&self) -> Vec<RawFd> {
        self.files.iter().map(AsRawFd::as_raw_fd).collect()
    }
}

impl Cgroup {
    /// The way in for a new process.
    ///
    /// # Errors
    /// The kernel refuses, for one because the group is gone.
    pub fn entrance(&self) -> Result<Entrance, CgroupError> {
        let is_v2 = |dir: &PathBuf| dir.join("cgroup.controllers").exists();
        let open = |path: PathBuf, flags| {
            let write = flags & libc::O_PATH == 0;
            let mut options = fs::File::options();
            let file = options.read(!write).write(write).custom_flags(flags);
            let opened = file.open(&path).map(OwnedFd::from);
            opened.map_err(io_error("open", &path))
        };
        let birthplace = match self.dirs.as_slice() {
            [dir] if is_v2(dir) => Some(open(dir.clone(), libc::O_PATH | libc::O_DIRECTORY)?),
            _ => None,
        };
        let file = |dir: &PathBuf| {
            let name = if is_v2(dir) { "cgroup.procs" } else { "tasks" };
            open(dir.join(name), 0)
        };
        let files: Result<_, _> = self.dirs.iter().map(file).collect();
        Ok(Entrance {
            birthplace,
            files: files?,
        })
    }
}
