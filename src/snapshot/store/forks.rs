//! Snapshots that a fork makes for itself: they go with it, however it ends.

use std::fs::File;

use nix::fcntl::{Flock, FlockArg};

use super::Store;
use crate::snapshot::SnapshotError;

/// Held by each fork that is under way.
const FORKS: &str = ".forks";

/// A fork is under way for as long as this is there.
#[derive(Debug)]
pub(crate) struct Forking(#[allow(dead_code, reason = "it is held")] Flock<File>);

impl Store {
    /// Begins a fork, after removing what interrupted ones left.
    pub(crate) fn forking(&self) -> Result<Forking, SnapshotError> {
        self.make()?;
        self.sweep_forks()?;
        let path = self.dir.join(FORKS);
        let file = File::create(&path).map_err(SnapshotError::io("open", &path))?;
        // Alone only while somebody sweeps.
        Flock::lock(file, FlockArg::LockShared)
            .map(Forking)
            .map_err(|(_, errno)| SnapshotError::io("lock", &path)(errno.into()))
    }

    /// Removes what forks made for themselves and did not live to remove. Does
    /// nothing while one is under way. The caller does not hold the guard.
    pub(crate) fn sweep_forks(&self) -> Result<(), SnapshotError> {
        let Ok(file) = File::open(self.dir.join(FORKS)) else {
            return Ok(());
        };
        let Ok(_alone) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else {
            return Ok(());
        };
        let left = self.list()?.0.into_iter().map(|one| one.manifest);
        for one in left.filter(|one| one.transient) {
            match self.rm(&one.name) {
                // Somebody else was quicker.
                Err(SnapshotError::NotFound { .. }) => {}
                removed => removed?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;

    use super::super::{DISK, Manifest, Wish};
    use super::*;

    fn keep(store: &Store, name: &str, transient: bool) {
        let staged = store.stage().unwrap();
        fs::write(staged.path().join(DISK), b"disk").unwrap();
        let wish = Wish {
            name: name.parse().unwrap(),
            description: None,
            tags: BTreeMap::new(),
            disk_only: true,
            transient,
        };
        let disk = Store::piece(staged.path(), DISK).unwrap();
        let manifest = Manifest::new(&wish, None, "image".into(), None, disk, 1);
        store.commit(staged, &manifest).unwrap();
    }

    fn names(store: &Store) -> Vec<String> {
        let all = store.list().unwrap().0.into_iter();
        all.map(|one| one.manifest.name.to_string()).collect()
    }

    #[test]
    fn what_a_fork_made_lives_as_long_as_the_fork() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path(), &"vm".parse().unwrap());
        let forking = store.forking().unwrap();
        keep(&store, "fork-1", true);
        keep(&store, "kept", false);
        let other = store.forking().unwrap();
        drop(forking);
        // The other one may need it.
        store.sweep().unwrap();
        assert_eq!(names(&store).len(), 2);
        drop(other);
        store.sweep().unwrap();
        assert_eq!(names(&store), ["kept"]);
        keep(&store, "fork-2", true);
        // Whoever saves next clears it away, too.
        keep(&store, "next", false);
        let mut left = names(&store);
        left.sort();
        assert_eq!(left, ["kept", "next"]);
    }
}
