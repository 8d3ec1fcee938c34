//! A directory in which an image is made, and which leaves nothing behind.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};

use super::error::{Error, Result};

/// A locked directory beside the images; removed on drop.
#[derive(Debug)]
pub(crate) struct Staging {
    path: PathBuf,
    /// Tells a later build that this one is alive. Children do not inherit it.
    _lock: Flock<fs::File>,
}

impl Staging {
    /// How the names of such directories begin.
    pub(crate) const PREFIX: &'static str = ".staging-";

    /// Makes a directory in `parent`. The caller holds the store's guard.
    pub(crate) fn new(parent: &Path) -> Result<Self> {
        let fail = |source| Error::io("create a directory in", parent, source);
        let path = tempfile::Builder::new()
            .prefix(Self::PREFIX)
            // mmdebstrap's helpers run under other users and must pass through.
            .permissions(fs::Permissions::from_mode(0o755))
            .tempdir_in(parent)
            .map_err(fail)?
            .keep();
        let dir = fs::File::open(&path).map_err(fail)?;
        let lock = Flock::lock(dir, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, errno)| Error::io("lock", &path, errno.into()))?;
        Ok(Self { path, _lock: lock })
    }

    /// Removes what interrupted builds left in `parent`. The caller holds the
    /// store's guard, so no build is between making its directory and locking.
    pub(crate) fn sweep(parent: &Path) -> Result<()> {
        let fail = |source| Error::io("list", parent, source);
        for entry in fs::read_dir(parent).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            if !entry
                .file_name()
                .to_string_lossy()
                .starts_with(Self::PREFIX)
            {
                continue;
            }
            let path = entry.path();
            let Ok(dir) = fs::File::open(&path) else {
                continue;
            };
            if Flock::lock(dir, FlockArg::LockExclusiveNonblock).is_ok() {
                remove(&path).map_err(|source| Error::io("remove", &path, source))?;
            }
        }
        Ok(())
    }

    /// A name that the next sweep removes should the removal be interrupted.
    pub(crate) fn doomed(parent: &Path, id: &str) -> PathBuf {
        parent.join(format!("{}rm-{}-{id}", Self::PREFIX, std::process::id()))
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Moves the directory to its final place.
    pub(crate) fn publish(self, to: &Path) -> Result<()> {
        fs::rename(&self.path, to).map_err(|source| Error::io("create", to, source))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // After `publish` there is nothing at the path any more.
        if let Err(error) = remove(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove a directory");
        }
    }
}

/// Removes a tree. A tool that was told to end may still be clearing its part.
fn remove(path: &Path) -> io::Result<()> {
    let mut tries = 0;
    loop {
        match fs::remove_dir_all(path) {
            Ok(()) => return Ok(()),
            Err(_) if !path.exists() => return Ok(()),
            Err(_) if tries < 300 => {
                tries += 1;
                std::thread::sleep(Duration::from_millis(100));
            }
            Err(error) => return Err(error),
        }
    }
}
