//! User ids for VMMs: two machines never share one.
//!
//! An id is taken by a symbolic link named after it, which appears as a whole
//! or not at all and says whose it is. Whatever uses the range besides, the
//! kernel is asked whether the id has processes.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::libc;

use super::fault;
use super::lease::Lease;
use crate::spec::{UidRange, fill_random};

/// How many ids are tried: with that many taken in a row the range is full.
const TRIES: u32 = 4096;

/// A user id that is to be taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uid {
    uid: u32,
    path: PathBuf,
    token: String,
}

impl Uid {
    /// Decides on a free id of `range`; `dir` says which are taken. Takes
    /// nothing yet.
    ///
    /// # Errors
    /// All are taken.
    pub fn choose(dir: &Path, range: UidRange) -> io::Result<Self> {
        let mut bytes = [0; 12];
        fill_random(&mut bytes);
        let start = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        let token: String = bytes[4..]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        for step in 0..range.count().min(TRIES) {
            let uid = range.first + (start.wrapping_add(step)) % range.count();
            let path = dir.join(uid.to_string());
            if fs::symlink_metadata(&path).is_err() && !has_processes(uid) {
                return Ok(Self { uid, path, token });
            }
        }
        Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            format!("no user id of {range} is free"),
        ))
    }

    /// The id.
    pub fn uid(&self) -> u32 {
        self.uid
    }

    /// What is written down before [`Uid::take`].
    pub fn lease(&self) -> Lease {
        Lease::Uid {
            uid: self.uid,
            path: self.path.clone(),
            token: self.token.clone(),
        }
    }

    /// Takes it.
    ///
    /// # Errors
    /// Somebody else has just taken it (`AlreadyExists`), or the directory
    /// cannot be written.
    pub fn take(&self) -> io::Result<()> {
        fault::at("take uid")?;
        if let Some(dir) = self.path.parent() {
            fs::create_dir_all(dir)?;
        }
        symlink(&self.token, &self.path)
    }
}

/// Gives an id back, if it is still this lease's.
pub(super) fn release(path: &Path, token: &str) -> io::Result<()> {
    match fs::read_link(path) {
        Ok(holder) if holder == Path::new(token) => fs::remove_file(path),
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Whether any process of this host belongs to a user (getpriority(2)).
#[allow(unsafe_code)] // libc has no safe form of it
fn has_processes(uid: u32) -> bool {
    Errno::clear();
    // SAFETY: two integers, no memory.
    let answer = unsafe { libc::getpriority(libc::PRIO_USER, uid) };
    !(answer == -1 && Errno::last() == Errno::ESRCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_takes_what_another_has() {
        let dir = tempfile::tempdir().unwrap();
        let range = UidRange {
            first: 1_900_100_000,
            last: 1_900_100_001,
        };
        let one = Uid::choose(dir.path(), range).unwrap();
        one.take().unwrap();
        assert_eq!(one.take().unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        let two = Uid::choose(dir.path(), range).unwrap();
        assert_ne!(one.uid(), two.uid());
        two.take().unwrap();
        assert!(Uid::choose(dir.path(), range).is_err());
        // A lease releases its own and nobody else's.
        release(&one.path, "another").unwrap();
        assert!(fs::symlink_metadata(&one.path).is_ok());
        one.lease().release().unwrap();
        one.lease().release().unwrap();
        assert_eq!(Uid::choose(dir.path(), range).unwrap().uid(), one.uid());
    }

    #[test]
    fn users_with_processes_are_busy() {
        assert!(has_processes(nix::unistd::getuid().as_raw()));
        assert!(!has_processes(1_900_100_003));
    }
}
