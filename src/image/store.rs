//! Where images are kept: one directory per image, names as symbolic links.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::error::{Error, Result};
use super::staging::Staging;
use super::{Image, Manifest, digest, manifest};

const NAMES: &str = "names";
pub(super) const MANIFEST: &str = "manifest.json";
const VERIFIED: &str = "verified.json";
const INPUTS: &str = "inputs";
/// The only format of `manifest.json` there is so far.
pub(super) const SCHEMA: u32 = 1;

/// The images of one state directory.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
}

/// An image as [`Store::list`] shows it; its files are not checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Summary {
    /// `sha256-` and the digest of the manifest.
    pub id: String,
    /// Names that point to it, sorted.
    pub names: Vec<String>,
    /// Release of its kernel.
    pub kernel: String,
    /// Size of its files in bytes.
    pub size: u64,
    /// Number of packages in its root file system.
    pub packages: usize,
}

/// Keeps an image from being removed while it lives.
#[derive(Debug)]
pub struct Lock {
    _dir: Flock<fs::File>,
}

impl Image {
    /// Takes the shared lock that every run holds on its image.
    ///
    /// # Errors
    /// [`Error::NotFound`] when the image was removed meanwhile.
    pub fn lock(&self) -> Result<Lock> {
        let gone = || Error::NotFound {
            name: self.id.clone(),
            store: self.dir.parent().unwrap_or(&self.dir).to_owned(),
        };
        let dir = fs::File::open(&self.dir).map_err(|_| gone())?;
        let lock = Flock::lock(dir, FlockArg::LockSharedNonblock).map_err(|_| gone())?;
        // `rm` renames the directory before it lets go of its own lock.
        let held = lock.metadata().map_err(|_| gone())?;
        let there = fs::metadata(&self.dir).map_err(|_| gone())?;
        if (held.dev(), held.ino()) != (there.dev(), there.ino()) {
            return Err(gone());
        }
        Ok(Lock { _dir: lock })
    }

    /// The file whose existence keeps the image from being removed, for a user
    /// that outlives its process. `user` tells it from others; the caller makes
    /// it while it holds a [`Lock`], and removes it when the use is over.
    pub fn use_file(&self, user: &str) -> PathBuf {
        self.dir.join(USED_BY).join(user)
    }
}

/// Whether a user that outlives its process is left. The file says where it
/// is; what was removed by hand uses nothing.
fn is_used(dir: &Path) -> Result<bool> {
    let mut used = false;
    for user in entries(dir)? {
        let place = fs::read_to_string(&user).unwrap_or_default();
        match !place.is_empty() && !Path::new(&place).exists() {
            true => drop(fs::remove_file(&user)),
            false => used = true,
        }
    }
    Ok(used)
}

/// Directory of an image with a file per user that outlives its process.
const USED_BY: &str = "used-by";

impl Store {
    /// The store below a state directory; nothing is made yet.
    pub fn new(state_dir: PathBuf) -> Self {
        Self {
            dir: state_dir.join("images"),
        }
    }

    /// Directory with the images.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The image with this name or id, every file checked against its digest.
    ///
    /// A file that is unchanged since its last successful check is not read
    /// again.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Corrupt`], and what reading can give.
    pub fn get(&self, name_or_id: &str) -> Result<Image> {
        let image = self.inspect(name_or_id)?;
        verify(&image, name_or_id)?;
        Ok(image)
    }

    /// The image with this name or id; only its manifest is checked.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Corrupt`] for the manifest, and what
    /// reading can give.
    pub fn inspect(&self, name_or_id: &str) -> Result<Image> {
        let id = self.resolve(name_or_id)?;
        let dir = self.dir.join(&id);
        let path = dir.join(MANIFEST);
        let bytes = match fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(self.not_found(name_or_id));
            }
            other => other.map_err(|source| Error::io("read", &path, source))?,
        };
        let found = digest::of_bytes(&bytes);
        let expected = id.trim_start_matches("sha256-");
        if found != expected {
            return Err(Error::Corrupt {
                image: name_or_id.to_owned(),
                file: path,
                expected: expected.to_owned(),
                found,
            });
        }
        let manifest: Manifest =
            serde_json::from_slice(&bytes).map_err(|source| Error::Manifest {
                path: path.clone(),
                source,
            })?;
        check(&manifest).map_err(|reason| Error::Unsupported { path, reason })?;
        Ok(Image { id, dir, manifest })
    }

    /// Every image, named ones first, by name.
    ///
    /// # Errors
    /// What reading the store or a manifest can give.
    pub fn list(&self) -> Result<Vec<Summary>> {
        let names = self.names()?;
        let mut all = Vec::new();
        for id in self.ids()? {
            let image = self.inspect(&id)?;
            let names: Vec<String> = names
                .iter()
                .filter(|(_, target)| *target == id)
                .map(|(name, _)| name.clone())
                .collect();
            all.push(Summary {
                names,
                kernel: image.manifest.kernel.release.clone(),
                size: image.manifest.size(),
                packages: image.manifest.packages.len(),
                id,
            });
        }
        all.sort_by(|a, b| {
            (a.names.is_empty(), &a.names, &a.id).cmp(&(b.names.is_empty(), &b.names, &b.id))
        });
        Ok(all)
    }

    /// Removes a name, its image when it was the last name, or an image by its
    /// id with all its names; and images without a name that nothing uses.
    /// Gives back the ids removed.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::InUse`], and what removing can give.
    pub fn rm(&self, name_or_id: &str) -> Result<Vec<String>> {
        // A corrupt image can be removed too, so nothing is read here.
        let id = self.resolve(name_or_id)?;
        let _guard = self.guard()?;
        let names: Vec<String> = self
            .names()?
            .into_iter()
            .filter(|(_, target)| *target == id)
            .map(|(name, _)| name)
            .collect();
        let by_name = name_or_id != id;
        let mut removed = Vec::new();
        if by_name && names.len() > 1 {
            self.unname(name_or_id)?;
        } else {
            let lock = self.lock_for_removal(&id, name_or_id)?;
            for name in &names {
                self.unname(name)?;
            }
            if let Some(lock) = lock {
                self.discard(&id, lock)?;
            }
            removed.push(id);
        }
        removed.extend(self.prune()?);
        Ok(removed)
    }

    /// Key of the inputs a named image was built from, as given to
    /// [`Store::set_inputs`].
    pub fn inputs(&self, name: &str) -> Option<String> {
        let id = self.resolve(name).ok()?;
        fs::read_to_string(self.dir.join(id).join(INPUTS)).ok()
    }

    /// Remembers what an image was built from, so that a later build with the
    /// same inputs can be left out. Not part of the image's id.
    ///
    /// # Errors
    /// What writing can give.
    pub fn set_inputs(&self, image: &Image, key: &str) -> Result<()> {
        write_atomic(&image.dir, INPUTS, key.as_bytes())
    }

    /// A directory to make an image in; directories left by interrupted builds
    /// are removed.
    pub(super) fn stage(&self) -> Result<Staging> {
        self.make_dirs()?;
        let _guard = self.guard()?;
        Staging::sweep(&self.dir)?;
        Staging::new(&self.dir)
    }

    /// Writes the manifest, moves the staged files into place and names them.
    pub(super) fn commit(&self, staging: Staging, manifest: Manifest, name: &str) -> Result<Image> {
        check_name(name)?;
        let dir = staging.path();
        let mut bytes = serde_json::to_vec_pretty(&manifest).map_err(|source| Error::Manifest {
            path: dir.join(MANIFEST),
            source,
        })?;
        bytes.push(b'\n');
        let id = format!("sha256-{}", digest::of_bytes(&bytes));
        write_atomic(dir, MANIFEST, &bytes)?;
        for file in manifest.files() {
            sync(&dir.join(&file.file))?;
        }
        sync(dir)?;
        let image = Image {
            dir: self.dir.join(&id),
            id,
            manifest,
        };
        // Freshly hashed: the first run need not do it again.
        remember(dir, &image.manifest);
        let _guard = self.guard()?;
        // An image of the same id is the same image, but perhaps a damaged one.
        if image.dir.exists()
            && verify(&image, name).is_err()
            && let Some(lock) = self.lock_for_removal(&image.id, name)?
        {
            self.discard(&image.id, lock)?;
        }
        if !image.dir.exists() {
            staging.publish(&image.dir)?;
            sync(&self.dir)?;
        }
        self.point(name, &image.id)?;
        Ok(image)
    }

    fn make_dirs(&self) -> Result<()> {
        let names = self.dir.join(NAMES);
        fs::create_dir_all(&names).map_err(|source| Error::io("create", &names, source))
    }

    /// Serializes short changes of the store: names, staging, removal.
    fn guard(&self) -> Result<Flock<fs::File>> {
        let path = self.dir.join(".lock");
        let file = fs::File::options()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(|source| Error::io("create", &path, source))?;
        Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, errno)| Error::io("lock", &path, errno.into()))
    }

    fn not_found(&self, name: &str) -> Error {
        Error::NotFound {
            name: name.to_owned(),
            store: self.dir.clone(),
        }
    }

    fn resolve(&self, name_or_id: &str) -> Result<String> {
        if is_id(name_or_id) {
            return match self.dir.join(name_or_id).is_dir() {
                true => Ok(name_or_id.to_owned()),
                false => Err(self.not_found(name_or_id)),
            };
        }
        check_name(name_or_id)?;
        let link = self.dir.join(NAMES).join(name_or_id);
        self.target(&link).ok_or_else(|| self.not_found(name_or_id))
    }

    fn target(&self, link: &Path) -> Option<String> {
        let target = fs::read_link(link).ok()?;
        let id = target.file_name()?.to_str()?.to_owned();
        is_id(&id).then_some(id)
    }

    /// Whether a name stands for the image of this id.
    pub(crate) fn is_named(&self, id: &str) -> Result<bool> {
        Ok(self.names()?.iter().any(|(_, target)| target == id))
    }

    /// Names and the ids they point to, by name.
    fn names(&self) -> Result<Vec<(String, String)>> {
        let mut names = Vec::new();
        for path in entries(&self.dir.join(NAMES))? {
            let name = path.file_name().and_then(|name| name.to_str());
            if let (Some(name), Some(id)) = (name, self.target(&path))
                && check_name(name).is_ok()
            {
                names.push((name.to_owned(), id));
            }
        }
        names.sort();
        Ok(names)
    }

    fn ids(&self) -> Result<Vec<String>> {
        let mut ids: Vec<String> = entries(&self.dir)?
            .iter()
            .filter_map(|path| path.file_name()?.to_str().map(str::to_owned))
            .filter(|name| is_id(name))
            .collect();
        ids.sort();
        Ok(ids)
    }

    fn point(&self, name: &str, id: &str) -> Result<()> {
        let dir = self.dir.join(NAMES);
        // A leading dot cannot be a name; the guard makes it ours alone.
        let fresh = dir.join(".new");
        let fail = |source| Error::io("name", &dir.join(name), source);
        match fs::remove_file(&fresh) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(fail(error)),
            _ => {}
        }
        symlink(Path::new("..").join(id), &fresh).map_err(fail)?;
        fs::rename(&fresh, dir.join(name)).map_err(fail)?;
        sync(&dir)
    }

    fn unname(&self, name: &str) -> Result<()> {
        let link = self.dir.join(NAMES).join(name);
        fs::remove_file(&link).map_err(|source| Error::io("remove", &link, source))
    }

    /// The exclusive lock no run may hold a part of; none if the image is gone.
    fn lock_for_removal(&self, id: &str, shown: &str) -> Result<Option<Flock<fs::File>>> {
        let path = self.dir.join(id);
        let dir = match fs::File::open(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(|source| Error::io("open", &path, source))?,
        };
        let in_use = || Error::InUse {
            image: shown.to_owned(),
        };
        match Flock::lock(dir, FlockArg::LockExclusiveNonblock) {
            Ok(_) if is_used(&path.join(USED_BY))? => Err(in_use()),
            Ok(lock) => Ok(Some(lock)),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => Err(in_use()),
            Err((_, errno)) => Err(Error::io("lock", &path, errno.into())),
        }
    }

    /// Renamed first: a half-removed image must not be found under its id.
    fn discard(&self, id: &str, lock: Flock<fs::File>) -> Result<()> {
        let path = self.dir.join(id);
        let doomed = Staging::doomed(&self.dir, id);
        fs::rename(&path, &doomed).map_err(|source| Error::io("remove", &path, source))?;
        drop(lock);
        fs::remove_dir_all(&doomed).map_err(|source| Error::io("remove", &doomed, source))
    }

    fn prune(&self) -> Result<Vec<String>> {
        let named = self.names()?;
        let mut removed = Vec::new();
        for id in self.ids()? {
            if named.iter().any(|(_, target)| *target == id) {
                continue;
            }
            match self.lock_for_removal(&id, &id) {
                Ok(Some(lock)) => self.discard(&id, lock)?,
                Ok(None) | Err(Error::InUse { .. }) => continue,
                Err(error) => return Err(error),
            }
            removed.push(id);
        }
        Ok(removed)
    }
}

/// What was checked, and how the file looked then.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Seen {
    sha256: String,
    size: u64,
    mtime_ns: i128,
    ctime_ns: i128,
    inode: u64,
}

impl Seen {
    fn now(path: &Path, sha256: &str) -> std::io::Result<Self> {
        let data = fs::metadata(path)?;
        Ok(Self {
            sha256: sha256.to_owned(),
            size: data.size(),
            mtime_ns: i128::from(data.mtime()) * 1_000_000_000 + i128::from(data.mtime_nsec()),
            ctime_ns: i128::from(data.ctime()) * 1_000_000_000 + i128::from(data.ctime_nsec()),
            inode: data.ino(),
        })
    }
}

type Verified = std::collections::BTreeMap<String, Seen>;

fn verify(image: &Image, shown: &str) -> Result<()> {
    let known: Verified = fs::read(image.dir.join(VERIFIED))
        .ok()
        .and_then(|bytes| serde_json::from_slice(&bytes).ok())
        .unwrap_or_default();
    let mut changed = false;
    for file in image.manifest.files() {
        let path = image.dir.join(&file.file);
        let corrupt = |found: String| Error::Corrupt {
            image: shown.to_owned(),
            file: path.clone(),
            expected: file.sha256.clone(),
            found,
        };
        let before = match Seen::now(&path, &file.sha256) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(corrupt("none (the file is missing)".into()));
            }
            other => other.map_err(|source| Error::io("read", &path, source))?,
        };
        if known.get(&file.file) == Some(&before) {
            continue;
        }
        let (found, _) = digest::of_file(&path)?;
        if found != file.sha256 {
            return Err(corrupt(found));
        }
        changed = true;
    }
    if changed {
        remember(&image.dir, &image.manifest);
    }
    Ok(())
}

/// Best effort: a reader that may not write only loses time.
fn remember(dir: &Path, manifest: &Manifest) {
    let mut seen = Verified::new();
    for file in manifest.files() {
        match Seen::now(&dir.join(&file.file), &file.sha256) {
            Ok(now) => seen.insert(file.file.clone(), now),
            Err(_) => return,
        };
    }
    if let Ok(bytes) = serde_json::to_vec(&seen)
        && let Err(error) = write_atomic(dir, VERIFIED, &bytes)
    {
        tracing::debug!(%error, "digests are not remembered");
    }
}

fn check(manifest: &Manifest) -> std::result::Result<(), String> {
    if manifest.schema != SCHEMA {
        return Err(format!(
            "it has format {}, and this version reads format {SCHEMA}",
            manifest.schema
        ));
    }
    for file in manifest.files() {
        if !manifest::is_plain_name(&file.file) {
            return Err(format!("\"{}\" is not a plain file name", file.file));
        }
    }
    Ok(())
}

fn is_id(text: &str) -> bool {
    text.strip_prefix("sha256-").is_some_and(|hex| {
        hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    })
}

/// Refuses what cannot be the name of an image.
pub(crate) fn check_name(name: &str) -> Result<()> {
    let reason = if name.is_empty() || name.len() > 64 {
        "it must have 1 to 64 characters"
    } else if name.starts_with("sha256-") {
        "names that begin with sha256- are ids"
    } else if !name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit()) {
        "it must begin with a lower-case letter or a digit"
    } else if !name
        .bytes()
        .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-'))
    {
        "it has a character that is not a-z, 0-9, '.', '_' or '-'"
    } else {
        return Ok(());
    };
    Err(Error::Name {
        name: name.to_owned(),
        reason,
    })
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let fail = |source| Error::io("list", dir, source);
    match fs::read_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        other => other
            .map_err(fail)?
            .map(|entry| entry.map(|entry| entry.path()).map_err(fail))
            .collect(),
    }
}

pub(super) fn sync(path: &Path) -> Result<()> {
    fs::File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(|source| Error::io("write", path, source))
}

fn write_atomic(dir: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let path = dir.join(name);
    let fail = |source| Error::io("write", &path, source);
    let mut file = tempfile::NamedTempFile::new_in(dir).map_err(fail)?;
    file.write_all(bytes).map_err(fail)?;
    let readable = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    file.as_file().set_permissions(readable).map_err(fail)?;
    file.as_file().sync_all().map_err(fail)?;
    file.persist(&path).map_err(|error| fail(error.error))?;
    Ok(())
}
