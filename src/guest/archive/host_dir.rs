//! A directory of the host, opened once for everything that is done in it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::sys::stat::fstat;

use super::Beneath;

/// A directory of the host, held open.
///
/// Its owner may be less privileged than the caller and may replace it by a
/// symlink at any time; so its path is resolved once, in [`HostDir::open`], and
/// whatever is read or written goes through the descriptor. Clones share it.
#[derive(Debug, Clone)]
pub struct HostDir {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    beneath: Beneath,
    path: PathBuf,
    owner: (u32, u32),
    id: (u64, u64),
}

impl HostDir {
    /// Opens `path`. Symlinks in it are followed, here and never again.
    ///
    /// # Errors
    /// It is not a directory, or this user may not read it.
    pub fn open(path: &Path) -> io::Result<Self> {
        let beneath = Beneath::open(path)?;
        let stat = fstat(beneath.as_fd())?;
        Ok(Self {
            shared: Arc::new(Shared {
                beneath,
                path: path.to_owned(),
                owner: (stat.st_uid, stat.st_gid),
                id: (stat.st_dev, stat.st_ino),
            }),
        })
    }

    /// The path it was opened by, for messages only.
    pub fn path(&self) -> &Path {
        &self.shared.path
    }

    /// User and group that owned it when it was opened.
    pub fn owner(&self) -> (u32, u32) {
        self.shared.owner
    }

    /// Device and inode number: the same for two paths to one directory.
    pub fn id(&self) -> (u64, u64) {
        self.shared.id
    }

    pub(crate) fn beneath(&self) -> &Beneath {
        &self.shared.beneath
    }
}

impl AsFd for HostDir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.beneath.as_fd()
    }
}
