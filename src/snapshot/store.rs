//! Where the snapshots of one machine are kept: one directory each.

mod forks;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use bulkhead_agent::Life;
use nix::fcntl::{Flock, FlockArg};
use nix::libc::O_NOFOLLOW;
use serde::{Deserialize, Serialize};

use super::{SnapshotError, SnapshotName};
use crate::host::fault;
use crate::host::lease::write_durably;
use crate::image::staging::Staging;
use crate::qmp::Version;
use crate::spec::VmId;
use crate::template::{Key, LONGEST, Piece, of_sparse};

/// Memory and devices, as QEMU writes them.
pub(crate) const STATE: &str = "state";
/// The writable disk.
pub(crate) const DISK: &str = "disk";
const MANIFEST: &str = "snapshot.json";
/// Format of the manifest.
pub(crate) const SCHEMA: u32 = 1;

/// What a snapshot is to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wish {
    /// Its name.
    pub name: SnapshotName,
    /// What it is for, in the user's words.
    pub description: Option<String>,
    /// The user's tags.
    pub tags: BTreeMap<String, String>,
    /// Without memory and devices.
    pub disk_only: bool,
    /// A fork makes it for itself, and removes it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub transient: bool,
}

/// Memory and devices of a machine that ran.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Saved {
    /// What a machine must have in common with it.
    pub key: Key,
    /// What the guest was then.
    pub life: Life,
    /// Its memory was a file's: it came from a template.
    pub backed: bool,
    /// Version of its QEMU.
    pub qemu: Version,
    /// How long the machine stood still for it, in milliseconds.
    pub paused_ms: u64,
    /// The file.
    pub state: Piece,
}

/// `snapshot.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this format: 1.
    pub schema: u32,
    /// Its name.
    pub name: SnapshotName,
    /// What it is for, in the user's words.
    pub description: Option<String>,
    /// The user's tags.
    pub tags: BTreeMap<String, String>,
    /// The snapshot that the machine was at.
    pub parent: Option<SnapshotName>,
    /// A fork made it for itself: without one under way it is removed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub transient: bool,
    /// When it was made, in milliseconds since 1970.
    pub created_ms: u64,
    /// Id of the image that the disk belongs to.
    pub image: String,
    /// Memory and devices; absent for the disk alone.
    pub saved: Option<Saved>,
    /// The writable disk.
    pub disk: Piece,
}

/// A snapshot, its files checked and open.
#[derive(Debug)]
pub struct Snapshot {
    /// What is in it.
    pub manifest: Manifest,
    /// Memory and devices, where they were saved.
    pub(crate) state: Option<File>,
    /// Where the disk is.
    pub(crate) disk: PathBuf,
}

/// A snapshot as it is listed; its files are not checked.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Summary {
    /// Bytes that its files take of the disk.
    pub allocated: u64,
    /// What is in it.
    pub manifest: Manifest,
}

/// The snapshots of one machine.
#[derive(Debug, Clone)]
pub struct Store {
    vm: VmId,
    dir: PathBuf,
}

/// A directory in which a snapshot is made; gone when dropped.
#[derive(Debug)]
pub(crate) struct Staged(Staging);

impl Staged {
    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Store {
    /// Those of the machine `vm` with this record; nothing is made yet.
    pub fn new(record: &Path, vm: &VmId) -> Self {
        Self {
            vm: vm.clone(),
            dir: record.join("snapshots"),
        }
    }

    /// The snapshot of this name, its files checked.
    ///
    /// # Errors
    /// There is none, or it is damaged.
    pub fn get(&self, name: &SnapshotName) -> Result<Snapshot, SnapshotError> {
        let manifest = self.manifest(name)?;
        let piece = |file: &str, piece: &Piece| {
            let path = self.dir.join(name.as_str()).join(file);
            let corrupt = |what: String| self.corrupt(name, format!("{file} {what}"));
            let opened = open(&path).map_err(|error| corrupt(error.to_string()))?;
            let found = opened.metadata().map(|meta| meta.len());
            let found = found.map_err(SnapshotError::io("read", &path))?;
            if found != piece.size {
                return Err(corrupt(format!("has {found} bytes, not {}", piece.size)));
            }
            match of_sparse(&opened).map_err(SnapshotError::io("read", &path))? {
                sha256 if sha256 == piece.sha256 => Ok(opened),
                _ => Err(corrupt("is not what was saved".into())),
            }
        };
        piece(DISK, &manifest.disk)?;
        let saved = manifest.saved.as_ref();
        Ok(Snapshot {
            state: saved.map(|saved| piece(STATE, &saved.state)).transpose()?,
            disk: self.dir.join(name.as_str()).join(DISK),
            manifest,
        })
    }

    /// What is known of one.
    ///
    /// # Errors
    /// There is none, or its manifest cannot be read.
    pub fn summary(&self, name: &SnapshotName) -> Result<Summary, SnapshotError> {
        let manifest = self.manifest(name)?;
        let blocks = |file: &&str| {
            let meta = fs::metadata(self.dir.join(name.as_str()).join(file));
            meta.map_or(0, |meta| meta.blocks())
        };
        Ok(Summary {
            allocated: 512 * [STATE, DISK].iter().map(blocks).sum::<u64>(),
            manifest,
        })
    }

    /// All of them, oldest first, and what cannot be read.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn list(&self) -> Result<(Vec<Summary>, Vec<SnapshotError>), SnapshotError> {
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Default::default()),
            other => other.map_err(SnapshotError::io("list", &self.dir))?,
        };
        let (mut all, mut errors) = (Vec::new(), Vec::new());
        let names = entries.flatten().filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            name.parse::<SnapshotName>().ok()
        });
        for name in names {
            match self.summary(&name) {
                Ok(one) => all.push(one),
                // Removed meanwhile.
                Err(SnapshotError::NotFound { .. }) => {}
                Err(error) => errors.push(error),
            }
        }
        all.sort_by_key(|one| one.manifest.created_ms);
        Ok((all, errors))
    }

    /// Removes one.
    ///
    /// # Errors
    /// There is none, or it cannot be removed.
    pub fn rm(&self, name: &SnapshotName) -> Result<(), SnapshotError> {
        let path = self.dir.join(name.as_str());
        if !path.exists() {
            return Err(self.missing(name));
        }
        let _guard = self.guard()?;
        let doomed = Staging::doomed(&self.dir, name.as_str());
        // Renamed first: one that is half removed must not be found.
        fault::at("remove snapshot")
            .and_then(|()| fs::rename(&path, &doomed))
            .and_then(|()| fault::at("removed snapshot"))
            .and_then(|()| fs::remove_dir_all(&doomed))
            .map_err(SnapshotError::io("remove", path))
    }

    /// Whether the name is free.
    ///
    /// # Errors
    /// It is not.
    pub(crate) fn free(&self, name: &SnapshotName) -> Result<(), SnapshotError> {
        match self.dir.join(name.as_str()).exists() {
            false => Ok(()),
            true => Err(SnapshotError::Exists {
                vm: self.vm.clone(),
                name: name.clone(),
            }),
        }
    }

    /// A directory to make one in; what interrupted makers left is removed.
    pub(crate) fn stage(&self) -> Result<Staged, SnapshotError> {
        self.make()?;
        self.sweep_forks()?;
        let _guard = self.guard()?;
        Staging::sweep(&self.dir)?;
        fault::at("make snapshot").map_err(SnapshotError::io("make", &self.dir))?;
        Ok(Staged(Staging::new(&self.dir)?))
    }

    /// Removes what interrupted makers left.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn sweep(&self) -> Result<(), SnapshotError> {
        if !self.dir.exists() {
            return Ok(());
        }
        self.sweep_forks()?;
        let _guard = self.guard()?;
        Ok(Staging::sweep(&self.dir)?)
    }

    /// Measures a file in `staged` and makes it nobody's to write.
    pub(crate) fn piece(staged: &Path, name: &str) -> Result<Piece, SnapshotError> {
        let path = staged.join(name);
        let make = || {
            fault::at(&format!("keep snapshot {name}"))?;
            let file = File::open(&path)?;
            file.set_permissions(fs::Permissions::from_mode(0o400))?;
            file.sync_all()?;
            let size = file.metadata()?.len();
            let sha256 = of_sparse(&file)?;
            Ok(Piece { size, sha256 })
        };
        make().map_err(SnapshotError::io("read", &path))
    }

    /// Puts a snapshot whose files are in `staged` in its place: a crash leaves
    /// it there as a whole, or not at all.
    pub(crate) fn commit(&self, staged: Staged, manifest: &Manifest) -> Result<(), SnapshotError> {
        Self::seal(&staged, manifest)?;
        self.publish(staged, &manifest.name)
    }

    /// Writes down what is in `staged`, which can be published then.
    pub(crate) fn seal(staged: &Staged, manifest: &Manifest) -> Result<(), SnapshotError> {
        let path = staged.path().join(MANIFEST);
        serde_json::to_vec_pretty(manifest)
            .map_err(io::Error::from)
            .and_then(|text| write_durably(&path, &text))
            .and_then(|()| File::open(staged.path())?.sync_all())
            .map_err(SnapshotError::io("write", &path))
    }

    /// Puts what was sealed in its place.
    pub(crate) fn publish(&self, staged: Staged, name: &SnapshotName) -> Result<(), SnapshotError> {
        let place = self.dir.join(name.as_str());
        let _guard = self.guard()?;
        self.free(name)?;
        fault::at("publish snapshot")
            .and_then(|()| fs::rename(staged.path(), &place))
            .and_then(|()| File::open(&self.dir)?.sync_all())
            .map_err(SnapshotError::io("make", &place))
    }

    /// Takes a snapshot of another machine over, by links to its files.
    pub(crate) fn adopt(&self, from: &Self, name: &SnapshotName) -> Result<(), SnapshotError> {
        let manifest = Manifest {
            parent: None,
            transient: false,
            ..from.manifest(name)?
        };
        let staged = self.stage()?;
        for file in [STATE, DISK] {
            let source = from.dir.join(name.as_str()).join(file);
            if file == DISK || manifest.saved.is_some() {
                fs::hard_link(&source, staged.path().join(file))
                    .map_err(SnapshotError::io("link", source))?;
            }
        }
        self.commit(staged, &manifest)
    }

    fn make(&self) -> Result<(), SnapshotError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir)
            .map_err(SnapshotError::io("make", &self.dir))
    }

    fn guard(&self) -> Result<Flock<File>, SnapshotError> {
        let path = self.dir.join(".lock");
        let file = File::create(&path).map_err(SnapshotError::io("open", &path))?;
        Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, errno)| SnapshotError::io("lock", &path)(errno.into()))
    }

    fn missing(&self, name: &SnapshotName) -> SnapshotError {
        SnapshotError::NotFound {
            vm: self.vm.clone(),
            name: name.clone(),
        }
    }

    fn corrupt(&self, name: &SnapshotName, what: String) -> SnapshotError {
        SnapshotError::Corrupt {
            vm: self.vm.clone(),
            name: name.clone(),
            what,
        }
    }

    fn manifest(&self, name: &SnapshotName) -> Result<Manifest, SnapshotError> {
        let dir = self.dir.join(name.as_str());
        if !dir.exists() {
            return Err(self.missing(name));
        }
        let corrupt = |what: String| self.corrupt(name, format!("{MANIFEST}: {what}"));
        let mut bytes = Vec::new();
        open(&dir.join(MANIFEST))
            .and_then(|file| file.take(LONGEST).read_to_end(&mut bytes))
            .map_err(|error| corrupt(error.to_string()))?;
        let manifest: Manifest =
            serde_json::from_slice(&bytes).map_err(|error| corrupt(error.to_string()))?;
        match (manifest.schema, &manifest.name) {
            (SCHEMA, found) if found == name => Ok(manifest),
            (SCHEMA, found) => Err(corrupt(format!("it is that of {found}"))),
            (other, _) => Err(corrupt(format!("format {other}, and {SCHEMA} is known"))),
        }
    }
}

impl Manifest {
    /// Of the disk alone, and of the rest where `saved` says so.
    pub(crate) fn new(
        wish: &Wish,
        parent: Option<SnapshotName>,
        image: String,
        saved: Option<Saved>,
        disk: Piece,
        created_ms: u64,
    ) -> Self {
        Self {
            schema: SCHEMA,
            name: wish.name.clone(),
            description: wish.description.clone(),
            tags: wish.tags.clone(),
            transient: wish.transient,
            parent,
            created_ms,
            image,
            saved,
            disk,
        }
    }
}

fn open(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).custom_flags(O_NOFOLLOW).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keep(store: &Store, name: &str) -> Result<(), SnapshotError> {
        let staged = store.stage()?;
        fs::write(staged.path().join(DISK), b"files").unwrap();
        let wish = Wish {
            name: name.parse().unwrap(),
            description: Some("why".into()),
            tags: BTreeMap::new(),
            disk_only: true,
            transient: false,
        };
        let disk = Store::piece(staged.path(), DISK)?;
        store.commit(
            staged,
            &Manifest::new(&wish, None, "image".into(), None, disk, 1),
        )
    }

    #[test]
    fn a_snapshot_is_there_as_a_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path(), &"vm".parse().unwrap());
        let name: SnapshotName = "one".parse().unwrap();
        assert!(store.list().unwrap().0.is_empty());
        keep(&store, "one").unwrap();
        store.get(&name).unwrap();
        assert!(matches!(
            keep(&store, "one"),
            Err(SnapshotError::Exists { .. })
        ));
        // What a dead maker left is no snapshot, and goes.
        let left = store.dir.join(".staging-dead");
        fs::create_dir(&left).unwrap();
        assert_eq!(store.list().unwrap().0.len(), 1);
        store.sweep().unwrap();
        assert!(!left.exists());
        let disk = store.dir.join("one").join(DISK);
        fs::remove_file(&disk).unwrap();
        for damage in [&b"filed"[..], b"files and more"] {
            fs::write(&disk, damage).unwrap();
            assert!(matches!(
                store.get(&name),
                Err(SnapshotError::Corrupt { .. })
            ));
        }
        store.rm(&name).unwrap();
        assert!(matches!(
            store.rm(&name),
            Err(SnapshotError::NotFound { .. })
        ));
        assert_eq!(store.list().unwrap().0.len(), 0);
    }
}
