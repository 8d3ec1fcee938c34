//! A file that is there as a whole, or not at all.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use rustix::fs::{AtFlags, CWD, OFlags, linkat};
use tempfile::NamedTempFile;

use super::error::ExportError;
use crate::host::fault;

/// How a file begins that has a name while it is written.
const HALF_MADE: &str = ".bulkhead-export-";

/// A file in the making. Until it is published it has no name: whoever dies
/// leaves nothing. Where the file system cannot do that, it has one of its own.
#[derive(Debug)]
pub struct Fresh {
    path: PathBuf,
    made: Made,
}

#[derive(Debug)]
enum Made {
    Nameless(File),
    Named(NamedTempFile),
}

impl Fresh {
    /// Begins a file that is to have this path; only its owner can read it.
    ///
    /// # Errors
    /// There is one already, or none can be made there.
    pub fn create(path: &Path) -> Result<Self, ExportError> {
        if path.symlink_metadata().is_ok() {
            return Err(ExportError::Exists { path: path.into() });
        }
        let make = || {
            fault::at("make export")?;
            match nameless(dir(path)) {
                Ok(file) => Ok(Made::Nameless(file)),
                Err(error) if cannot(&error) => {
                    let mut builder = tempfile::Builder::new();
                    let made = builder.prefix(HALF_MADE).tempfile_in(dir(path));
                    Ok(Made::Named(made?))
                }
                Err(error) => Err(error),
            }
        };
        let made = make().map_err(ExportError::io("create", path))?;
        let path = path.to_owned();
        Ok(Self { path, made })
    }

    /// To be written to.
    pub fn file(&self) -> &File {
        match &self.made {
            Made::Nameless(file) => file,
            Made::Named(file) => file.as_file(),
        }
    }

    /// Gives the file its name, once what is in it is on the disk.
    ///
    /// # Errors
    /// There is a file of that name by now, or the disk refuses.
    pub fn publish(self) -> Result<(), ExportError> {
        let path = self.path.clone();
        let publish = || {
            fault::at("sync export")?;
            let dir = File::open(dir(&path))?;
            self.file().sync_all()?;
            fault::at("publish export")?;
            match self.made {
                Made::Nameless(file) => name(&file, &path)?,
                Made::Named(file) => drop(file.persist_noclobber(&path)?),
            }
            dir.sync_all()
        };
        publish().map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => ExportError::Exists { path: path.clone() },
            _ => ExportError::io("create", &path)(error),
        })
    }
}

fn dir(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

fn nameless(dir: &Path) -> io::Result<File> {
    let flags = OFlags::TMPFILE.bits().cast_signed();
    let mut options = fs::OpenOptions::new();
    let options = options.read(true).write(true).mode(0o600);
    options.custom_flags(flags).open(dir)
}

/// Whether a file system has no nameless files (open(2), O_TMPFILE).
fn cannot(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EOPNOTSUPP | Errno::EISDIR))
}

/// Needs no capability so (open(2)).
fn name(file: &File, path: &Path) -> io::Result<()> {
    let open = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(linkat(CWD, open, CWD, path, AtFlags::SYMLINK_FOLLOW)?)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn entries(dir: &Path) -> usize {
        fs::read_dir(dir).unwrap().count()
    }

    #[test]
    fn it_is_there_once_it_is_published_and_replaces_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.export");
        let fresh = Fresh::create(&path).unwrap();
        fresh.file().write_all(b"whole").unwrap();
        let late = Fresh::create(&path).unwrap();
        assert_eq!(entries(dir.path()), 0);
        fresh.publish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"whole");
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let told = [late.publish(), Fresh::create(&path).map(drop)];
        for told in told {
            assert!(matches!(told, Err(ExportError::Exists { .. })), "{told:?}");
        }
        assert_eq!(fs::read(&path).unwrap(), b"whole");
        assert_eq!(entries(dir.path()), 1);
    }

    #[test]
    fn a_file_with_a_name_while_it_is_made_is_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.export");
        let named = || Fresh {
            path: path.clone(),
            made: Made::Named(NamedTempFile::new_in(dir.path()).unwrap()),
        };
        drop(named());
        assert_eq!(entries(dir.path()), 0);
        named().publish().unwrap();
        assert!(matches!(named().publish(), Err(ExportError::Exists { .. })));
        assert_eq!(entries(dir.path()), 1);
    }

    #[test]
    fn a_directory_that_is_not_there_is_named() {
        let path = Path::new("/nowhere/at/all/x");
        let told = crate::error::Report::of(&Fresh::create(path).unwrap_err());
        assert_eq!(told.code, "export-unusable");
        assert!(told.what.contains("/nowhere/at/all/x"), "{told:?}");
    }
}
