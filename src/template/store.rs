//! Where templates are kept: one directory each, named by its key.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use rustix::fs::{RenameFlags, renameat_with};
use serde::Serialize;

use super::digest;
use super::error::TemplateError;
use super::key::{ID, Key};
use super::manifest::{DISK, Described, MANIFEST, Manifest, Piece, RAM, SCHEMA, STATE, manifest};
use super::whole::{self, Look};
use crate::host::fault;
use crate::host::lease::write_durably;
use crate::image::staging::Staging;

/// A template, its files open: what becomes of their names does not matter.
#[derive(Debug)]
pub struct Template {
    /// Its id, which its key gives.
    pub id: String,
    /// What is in it.
    pub manifest: Manifest,
    pub(crate) ram: File,
    /// Device and inode of that.
    pub(crate) inode: (u64, u64),
    pub(crate) state: File,
    pub(crate) disk: File,
}

/// A template as it is listed; of its files, only the sizes are checked.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Summary {
    /// Its id.
    pub id: String,
    /// Bytes that its files take of the disk.
    pub allocated: u64,
    /// What is in it.
    pub manifest: Manifest,
}

/// What becomes of a template of the same key that is whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Older {
    /// The new one takes its place.
    Replaced,
    /// It stays, and the new one is refused.
    Kept,
}

/// The templates of one state directory.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
}

/// A store that one holder has for itself.
#[derive(Debug)]
pub(crate) struct Held<'a> {
    store: &'a Store,
    _guard: Flock<File>,
}

impl Held<'_> {
    /// Removes the template of this id.
    pub(crate) fn remove(&self, id: &str) -> Result<(), TemplateError> {
        let path = self.store.dir.join(id);
        let doomed = Staging::doomed(&self.store.dir, id);
        // Renamed first: one that is half removed must not be found.
        fault::at("remove template")
            .and_then(|()| fs::rename(&path, &doomed))
            .and_then(|()| fs::remove_dir_all(&doomed))
            .map_err(TemplateError::io("remove", path))
    }
}

/// A directory in which a template is made; gone when dropped.
#[derive(Debug)]
pub(crate) struct Staged(Staging);

impl Staged {
    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Store {
    /// Those below a state directory; nothing is made yet.
    pub fn new(state_dir: &Path) -> Self {
        Self {
            dir: state_dir.join("templates"),
        }
    }

    /// Whether there may be any.
    pub fn is_empty(&self) -> bool {
        self.ids().map_or(true, |ids| ids.is_empty())
    }

    /// File with the memory of a template.
    pub(crate) fn ram(&self, id: &str) -> PathBuf {
        self.dir.join(id).join(RAM)
    }

    /// The template with this key; none where there is none.
    ///
    /// # Errors
    /// Its files are damaged or cannot be read.
    pub fn find(&self, key: &Key) -> Result<Option<Template>, TemplateError> {
        match self.open(&key.id()) {
            Err(TemplateError::NotFound { .. }) => Ok(None),
            other => other.map(Some),
        }
    }

    /// The template with this id, or whose id begins so; every file is checked.
    ///
    /// # Errors
    /// There is none, or it is damaged.
    pub fn get(&self, id: &str) -> Result<Template, TemplateError> {
        self.open(&self.resolve(id)?)
    }

    /// What is known of one.
    ///
    /// # Errors
    /// There is none, its manifest cannot be read, or a file is missing or cut.
    pub fn summary(&self, id: &str) -> Result<Summary, TemplateError> {
        let id = self.resolve(id)?;
        let dir = self.open_dir(&id)?;
        let manifest = manifest(&dir, &id)?;
        whole::open(&dir, &self.dir.join(&id), &id, &manifest, Look::Size)?;
        Ok(Summary {
            allocated: self.allocated(&id),
            id,
            manifest,
        })
    }

    /// Bytes that the files of one take of the disk.
    pub(crate) fn allocated(&self, id: &str) -> u64 {
        let entries = fs::read_dir(self.dir.join(id));
        let files = entries.into_iter().flatten().flatten();
        let blocks = files.map(|file| file.metadata().map_or(0, |meta| meta.blocks()));
        512 * blocks.sum::<u64>()
    }

    /// All of them, oldest first, and what cannot be read.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn list(&self) -> Result<(Vec<Summary>, Vec<TemplateError>), TemplateError> {
        let (mut all, mut errors) = (Vec::new(), Vec::new());
        for id in self.ids()? {
            // What was replaced while it was looked at is looked at again.
            match self.summary(&id).or_else(|_| self.summary(&id)) {
                Ok(one) => all.push(one),
                // Removed meanwhile.
                Err(TemplateError::NotFound { .. }) => {}
                Err(error) => errors.push(error),
            }
        }
        all.sort_by_key(|one| one.manifest.created_ms);
        Ok((all, errors))
    }

    /// Removes one; gives its id. Machines cloned from it are not affected.
    ///
    /// # Errors
    /// There is none, or it cannot be removed.
    pub fn rm(&self, id: &str) -> Result<String, TemplateError> {
        let id = self.resolve(id)?;
        self.hold()?.remove(&id)?;
        Ok(id)
    }

    /// Has the store for itself: nobody else removes a template, or puts one in
    /// its place.
    pub(crate) fn hold(&self) -> Result<Held<'_>, TemplateError> {
        let _guard = self.guard()?;
        Ok(Held {
            store: self,
            _guard,
        })
    }

    /// A directory to make one in; what interrupted makers left is removed.
    pub(crate) fn stage(&self) -> Result<Staged, TemplateError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir)
            .map_err(TemplateError::io("make", &self.dir))?;
        let _guard = self.guard()?;
        Staging::sweep(&self.dir)?;
        fault::at("make template").map_err(TemplateError::io("make", &self.dir))?;
        Ok(Staged(Staging::new(&self.dir)?))
    }

    /// Removes what interrupted makers left.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn sweep(&self) -> Result<(), TemplateError> {
        if !self.dir.exists() {
            return Ok(());
        }
        let _guard = self.guard()?;
        Ok(Staging::sweep(&self.dir)?)
    }

    /// Measures a file in `staged` and makes it nobody's to write.
    pub(crate) fn piece(staged: &Path, name: &str) -> Result<Piece, TemplateError> {
        let path = staged.join(name);
        let make = || {
            fault::at(&format!("keep template {name}"))?;
            let file = File::open(&path)?;
            // Whoever can write to it now is root.
            file.set_permissions(fs::Permissions::from_mode(0o400))?;
            file.sync_all()?;
            Ok(Piece {
                size: file.metadata()?.len(),
                sha256: digest::of_sparse(&file)?,
            })
        };
        make().map_err(TemplateError::io("read", &path))
    }

    /// Keeps a template whose files are in `staged`.
    pub(crate) fn commit(&self, staged: Staged, of: Described) -> Result<Template, TemplateError> {
        let piece = |name: &str| Self::piece(staged.path(), name);
        let manifest = Manifest {
            schema: SCHEMA,
            key: of.key,
            life: of.life,
            ram: piece(RAM)?,
            state: piece(STATE)?,
            disk: piece(DISK)?,
            created_ms: of.created_ms,
            image: of.image,
            profile: of.profile,
            warm: of.warm,
            behind: of.behind,
            qemu: of.qemu,
            kernel: of.kernel,
        };
        self.publish(staged, &manifest, Older::Replaced)
    }

    /// Refuses a key of which there is a template that is whole.
    pub(crate) fn vacant(&self, key: &Key) -> Result<(), TemplateError> {
        match self.find(key) {
            Ok(Some(Template { id, .. })) => Err(TemplateError::Exists { id }),
            // A damaged one is replaced.
            Ok(None) | Err(TemplateError::Corrupt { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Puts a template whose files are in `staged`, and as `manifest` says, in
    /// its place: a crash leaves an older one with the same key, or the new.
    pub(crate) fn publish(
        &self,
        staged: Staged,
        manifest: &Manifest,
        older: Older,
    ) -> Result<Template, TemplateError> {
        let dir = staged.path();
        let path = dir.join(MANIFEST);
        serde_json::to_vec_pretty(manifest)
            .map_err(io::Error::from)
            .and_then(|text| write_durably(&path, &text))
            .map_err(TemplateError::io("write", path))?;
        whole::remember(dir);
        let id = manifest.key.id();
        let place = self.dir.join(&id);
        let _guard = self.guard()?;
        if older == Older::Kept {
            self.vacant(&manifest.key)?;
        }
        let swapped = || match place.exists() {
            // The old one goes with what was staged.
            true => {
                let cwd = rustix::fs::CWD;
                renameat_with(cwd, dir, cwd, &place, RenameFlags::EXCHANGE)?;
                Ok(())
            }
            false => fs::rename(dir, &place),
        };
        fault::at("publish template")
            .and_then(|()| swapped())
            .and_then(|()| File::open(&self.dir)?.sync_all())
            .map_err(TemplateError::io("make", &place))?;
        self.open(&id)
    }

    fn guard(&self) -> Result<Flock<File>, TemplateError> {
        let path = self.dir.join(".lock");
        let file = File::create(&path).map_err(TemplateError::io("open", &path))?;
        Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, errno)| TemplateError::io("lock", &path)(errno.into()))
    }

    /// Ids of all of them.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn ids(&self) -> Result<Vec<String>, TemplateError> {
        let fail = |error| TemplateError::io("list", &self.dir)(error);
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(fail)?,
        };
        let names = entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok());
        let mut ids: Vec<String> = names
            .filter(|name| name.len() == ID && is_hex(name))
            .collect();
        ids.sort();
        Ok(ids)
    }

    fn resolve(&self, id: &str) -> Result<String, TemplateError> {
        let mut found = self.ids()?;
        found.retain(|one| !id.is_empty() && one.starts_with(id));
        let id = id.to_owned();
        match found.len() {
            0 => Err(TemplateError::NotFound { id }),
            1 => Ok(found.remove(0)),
            _ => Err(TemplateError::Ambiguous { id }),
        }
    }

    fn open_dir(&self, id: &str) -> Result<File, TemplateError> {
        let path = self.dir.join(id);
        File::open(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => TemplateError::NotFound { id: id.to_owned() },
            _ => TemplateError::io("open", path)(error),
        })
    }

    fn open(&self, id: &str) -> Result<Template, TemplateError> {
        // All by the directory: its name may be another's in the next moment.
        let dir = self.open_dir(id)?;
        let manifest = manifest(&dir, id)?;
        let place = self.dir.join(id);
        let [ram, state, disk] = whole::open(&dir, &place, id, &manifest, Look::Content)?;
        let meta = ram.metadata().map_err(TemplateError::io("read", place))?;
        Ok(Template {
            id: id.to_owned(),
            manifest,
            inode: (meta.dev(), meta.ino()),
            ram,
            state,
            disk,
        })
    }
}

fn is_hex(text: &str) -> bool {
    text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use bulkhead_agent::Life;

    use super::*;
    use crate::spec::ProfileName;

    fn described(key: &str, warm: &str) -> Described {
        Described {
            key: serde_json::from_str(&format!("{{\"image\": \"{key}\"}}")).unwrap(),
            life: Life::default(),
            created_ms: 1,
            image: "base".into(),
            profile: ProfileName::default(),
            warm: Some(warm.into()),
            behind: true,
            qemu: serde_json::from_str(r#"{"major":7,"minor":2,"micro":0,"package":""}"#).unwrap(),
            kernel: None,
        }
    }

    fn keep(store: &Store, key: &str, warm: &str) -> Template {
        let staged = store.stage().unwrap();
        for (name, text) in [(RAM, "memory"), (STATE, "devices"), (DISK, "files")] {
            fs::write(staged.path().join(name), text).unwrap();
        }
        store.commit(staged, described(key, warm)).unwrap()
    }

    fn entries(store: &Store) -> usize {
        let entries = fs::read_dir(&store.dir).unwrap().flatten();
        entries.filter(|entry| entry.file_name() != ".lock").count()
    }

    #[test]
    fn a_template_is_found_by_its_key_and_replaced_as_a_whole() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        assert!(store.is_empty());
        let first = keep(&store, "a", "one");
        keep(&store, "b", "two");
        let found = store.find(&first.manifest.key).unwrap().unwrap();
        assert_eq!(
            (found.id, found.manifest.warm),
            (first.id.clone(), Some("one".into()))
        );
        let again = keep(&store, "a", "three");
        assert_eq!(again.id, first.id);
        assert_eq!(entries(&store), 2, "the old one is gone");
        assert_eq!(
            store.get(&first.id[..10]).unwrap().manifest.warm.unwrap(),
            "three"
        );
        assert!(matches!(store.get(""), Err(TemplateError::NotFound { .. })));
        store.rm(&first.id).unwrap();
        assert!(store.find(&again.manifest.key).unwrap().is_none());
        assert_eq!(entries(&store), 1);
    }

    #[test]
    fn what_changed_is_read_again_and_damage_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        let id = keep(&store, "a", "one").id;
        let ram = store.ram(&id);
        let write = |text: &str| {
            fs::set_permissions(&ram, fs::Permissions::from_mode(0o600)).unwrap();
            fs::write(&ram, text).unwrap();
        };
        write("memory");
        store.get(&id).unwrap();
        let corrupt = |error| matches!(error, TemplateError::Corrupt { .. });
        // Without reading it, another size is seen.
        for (damage, listed) in [("MEMORY", 1), ("memory and more", 0)] {
            write(damage);
            assert!(corrupt(store.get(&id).unwrap_err()));
            let (all, errors) = store.list().unwrap();
            assert_eq!((all.len(), errors.len()), (listed, 1 - listed));
        }
        fs::remove_file(&ram).unwrap();
        assert!(corrupt(store.get(&id).unwrap_err()));
        assert!(corrupt(store.summary(&id).unwrap_err()));
    }

    #[test]
    fn what_was_not_finished_is_swept() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        let staged = store.stage().unwrap();
        store.sweep().unwrap();
        assert!(staged.path().exists(), "its maker lives");
        let left = store.dir.join(".staging-dead");
        fs::create_dir(&left).unwrap();
        store.sweep().unwrap();
        assert!(!left.exists());
    }
}
