//! Host resources that are written down before they are made and can be
//! released any number of times.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{cgroup, fault, network, process, uid};
use crate::error::Explain;

/// One host resource.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Lease {
    /// A process, told from a later one with the same id by its start time.
    Process {
        /// Process id.
        pid: i32,
        /// Field 22 of /proc/PID/stat, in clock ticks since boot.
        start_time: u64,
        /// The host's boot id: after a reboot the process is gone.
        boot_id: String,
    },
    /// A file.
    File {
        /// Its path.
        path: PathBuf,
    },
    /// A directory of ours with all that is in it.
    Dir {
        /// Its path.
        path: PathBuf,
    },
    /// A user id of the range for machines.
    Uid {
        /// The id.
        uid: u32,
        /// The link that takes it.
        path: PathBuf,
        /// Where the link leads while it is this lease's.
        token: String,
    },
    /// A network namespace kept under a path, with everything in it.
    Netns {
        /// The path.
        path: PathBuf,
    },
    /// A machine's link to the host, its connections, and its place in the
    /// host's rules.
    Uplink {
        /// The namespace of the host's side; the process's own when absent.
        netns: Option<PathBuf>,
        /// Tells the machine from every other.
        token: String,
        /// The bridge or tap it is on, where it is on one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        device: Option<String>,
    },
    /// A control group, with every process in it.
    Cgroup {
        /// Its directory.
        path: PathBuf,
    },
}

/// A lease that could not be written down or released.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// The journal could not be written.
    #[error("cannot write the lease journal {path}")]
    Journal {
        /// The journal.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The journal could not be read back.
    #[error("cannot read the lease journal {path}")]
    Read {
        /// The journal.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The resource is still there.
    #[error("cannot release {what}")]
    Release {
        /// The resource.
        what: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Explain for LeaseError {
    fn code(&self) -> &'static str {
        match self {
            Self::Journal { source, .. } if crate::host::is_full(source) => "no-space",
            Self::Journal { .. } => "journal-unwritable",
            Self::Read { .. } => "journal-unreadable",
            Self::Release { .. } => "lease-not-released",
        }
    }

    fn remedy(&self) -> String {
        match self {
            Self::Journal { path, .. } => {
                format!(
                    "Free space on, or get write access to, the file system of {}.",
                    path.display()
                )
            }
            Self::Read { path, .. } => {
                format!(
                    "Look at {}; remove its directory if no machine of it runs.",
                    path.display()
                )
            }
            Self::Release { .. } => {
                "Run `bulkhead gc` again, as the user who started the run.".into()
            }
        }
    }
}

impl Lease {
    /// What kind of resource it is, in one word.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Process { .. } => "process",
            Self::File { .. } => "file",
            Self::Dir { .. } => "dir",
            Self::Netns { .. } => "netns",
            Self::Uplink { .. } => "uplink",
            Self::Cgroup { .. } => "cgroup",
            Self::Uid { .. } => "uid",
        }
    }

    /// Whether it is a process that lives.
    pub fn is_live_process(&self) -> bool {
        match self {
            Self::Process {
                pid,
                start_time,
                boot_id,
            } => *boot_id == process::boot_id() && process::is_same(*pid, *start_time),
            _ => false,
        }
    }

    /// Releases the resource; succeeds when it is gone already.
    ///
    /// # Errors
    /// The resource is still there.
    pub fn release(&self) -> Result<(), LeaseError> {
        match self {
            Self::Process {
                pid,
                start_time,
                boot_id,
            } => {
                if *boot_id != process::boot_id() {
                    return Ok(());
                }
                process::kill_if_same(*pid, *start_time).map_err(|source| LeaseError::Release {
                    what: format!("process {pid}"),
                    source,
                })
            }
            Self::File { path } => gone(path, fs::remove_file(path)),
            Self::Dir { path } => gone(path, fs::remove_dir_all(path)),
            Self::Uid { uid, path, token } => {
                uid::release(path, token).map_err(|source| LeaseError::Release {
                    what: format!("the user id {uid}"),
                    source,
                })
            }
            Self::Netns { path } => {
                network::release_netns(path).map_err(|source| LeaseError::Release {
                    what: format!("the network namespace {}", path.display()),
                    source,
                })
            }
            Self::Uplink {
                netns,
                token,
                device,
            } => network::release_uplink(netns.as_deref(), token, device.is_some()).map_err(
                |source| LeaseError::Release {
                    what: format!("the link bh{token}"),
                    source,
                },
            ),
            Self::Cgroup { path } => cgroup::release(path).map_err(|source| LeaseError::Release {
                what: format!("the control group {}", path.display()),
                source,
            }),
        }
    }
}

/// Whether a removal left nothing.
fn gone(path: &Path, removed: io::Result<()>) -> Result<(), LeaseError> {
    match removed {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(LeaseError::Release {
            what: path.display().to_string(),
            source,
        }),
        _ => Ok(()),
    }
}

/// The leases of one run. Each change is in the file before `add` returns: only
/// then is the resource made.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    leases: Vec<Lease>,
    /// Some of them outlive the host's end: each change is on the disk.
    lasts: bool,
}

impl Journal {
    /// Starts an empty journal of what ends with the host: whoever ends us, the
    /// file has every change; the host's own end may damage it (decision 0015).
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn create(path: PathBuf) -> Result<Self, LeaseError> {
        Self::begin(path, false)
    }

    /// Starts an empty journal of what outlives the host's end.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn create_lasting(path: PathBuf) -> Result<Self, LeaseError> {
        Self::begin(path, true)
    }

    fn begin(path: PathBuf, lasts: bool) -> Result<Self, LeaseError> {
        let journal = Self {
            path,
            leases: Vec::new(),
            lasts,
        };
        journal.write()?;
        Ok(journal)
    }

    /// Reads a journal of [`Journal::create`] that another process left. A missing
    /// one is empty: its owner died before the first lease. So is one that a
    /// power cut left without a byte in it, or zeroes alone: no process writes
    /// that, and what it had is gone with the host.
    ///
    /// # Errors
    /// Unreadable or not a journal.
    pub fn open(path: PathBuf) -> Result<Self, LeaseError> {
        Self::read(path, false)
    }

    /// Reads a journal of [`Journal::create_lasting`].
    ///
    /// # Errors
    /// Unreadable or not a journal.
    pub fn open_lasting(path: PathBuf) -> Result<Self, LeaseError> {
        Self::read(path, true)
    }

    fn read(path: PathBuf, lasts: bool) -> Result<Self, LeaseError> {
        let leases = match fs::read(&path) {
            Ok(bytes) if !lasts && bytes.iter().all(|byte| *byte == 0) => {
                tracing::warn!("{} was lost when the host ended", path.display());
                Vec::new()
            }
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|source| LeaseError::Read {
                path: path.clone(),
                source: source.into(),
            })?,
            Err(source) if source.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(source) => return Err(LeaseError::Read { path, source }),
        };
        Ok(Self {
            path,
            leases,
            lasts,
        })
    }

    /// Writes a lease down. The caller makes the resource afterwards.
    ///
    /// # Errors
    /// The file cannot be written; the resource must not be made.
    pub fn add(&mut self, lease: Lease) -> Result<(), LeaseError> {
        self.add_all([lease])
    }

    /// Writes several leases down at once.
    ///
    /// # Errors
    /// The file cannot be written; none of the resources must be made.
    pub fn add_all(&mut self, leases: impl IntoIterator<Item = Lease>) -> Result<(), LeaseError> {
        let before = self.leases.len();
        self.leases.extend(leases);
        if self.leases.len() == before {
            return Ok(());
        }
        self.write()?;
        for lease in &self.leases[before..] {
            // Where the kernel would refuse the resource, were it out of them.
            fault::at(&format!("lease {}", lease.kind())).map_err(|source| {
                LeaseError::Journal {
                    path: self.path.clone(),
                    source,
                }
            })?;
        }
        Ok(())
    }

    /// What is leased, in the order of acquisition.
    pub fn leases(&self) -> &[Lease] {
        &self.leases
    }

    /// Releases everything, last acquired first, going on after failures.
    pub fn release_all(&mut self) -> Vec<LeaseError> {
        let mut errors = Vec::new();
        let mut kept = Vec::new();
        for lease in self.leases.drain(..).rev() {
            let released = fault::at(&format!("release {}", lease.kind()))
                .map_err(|source| LeaseError::Release {
                    what: lease.kind().to_owned(),
                    source,
                })
                .and_then(|()| lease.release());
            if let Err(error) = released {
                errors.push(error);
                kept.push(lease);
            }
        }
        kept.reverse();
        self.leases = kept;
        errors
    }

    /// Writes down what is still leased after [`Journal::release_all`]. On a
    /// full disk the older, longer list stays: what is on it besides is released
    /// once more, which does no harm.
    ///
    /// # Errors
    /// The file cannot be written for another reason.
    pub fn save(&self) -> Result<(), LeaseError> {
        match self.write() {
            Err(LeaseError::Journal { source, path }) if crate::host::is_full(&source) => {
                tracing::warn!("cannot write {}: {source}", path.display());
                Ok(())
            }
            written => written,
        }
    }

    fn write(&self) -> Result<(), LeaseError> {
        let bytes = serde_json::to_vec(&self.leases).map_err(io::Error::from);
        bytes
            .and_then(|bytes| replace(&self.path, &bytes, self.lasts))
            .map_err(|source| LeaseError::Journal {
                path: self.path.clone(),
                source,
            })
    }
}

/// What the name of a file begins with that is not whole yet.
const HALF_MADE: &str = ".half-made-";

/// A file beside `path`, to become it when it is whole. What a crash leaves of
/// it is removed by [`sweep`].
pub fn half_made(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{HALF_MADE}{name}"))
}

/// Removes what a dead owner had not finished in its directory. The caller
/// holds its lock.
///
/// # Errors
/// The directory cannot be read, or one of them stays.
pub fn sweep(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(HALF_MADE) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Replaces a file as a whole: a crash leaves the old content or the new, and
/// at most something for [`sweep`].
///
/// # Errors
/// As the file system says.
pub fn write_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    replace(path, bytes, true)
}

/// Replaces a file as a whole; `lasting` also where the host ends.
fn replace(path: &Path, bytes: &[u8], lasting: bool) -> io::Result<()> {
    use std::io::Write;
    let dir = path.parent().unwrap_or(Path::new("."));
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    fault::at(&format!("write {name}"))?;
    let mut file = tempfile::Builder::new()
        .prefix(HALF_MADE)
        .tempfile_in(dir)?;
    file.write_all(bytes)?;
    if lasting {
        file.as_file().sync_all()?;
    }
    fault::at(&format!("rename {name}"))?;
    file.persist(path)?;
    match lasting {
        true => fs::File::open(dir)?.sync_all(),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_down_is_read_back_and_released_twice() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("resource");
        let mut journal = Journal::create(dir.path().join("leases.json")).unwrap();
        journal.add(Lease::File { path: file.clone() }).unwrap();
        fs::write(&file, b"x").unwrap();

        let mut found = Journal::open(dir.path().join("leases.json")).unwrap();
        assert_eq!(found.leases(), journal.leases());
        assert!(found.release_all().is_empty());
        assert!(!file.exists());
        assert!(
            journal.release_all().is_empty(),
            "releasing again is not an error"
        );
    }

    #[test]
    fn what_a_power_cut_leaves_is_empty_and_other_damage_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("leases.json");
        for lost in [&b""[..], &[0; 100]] {
            fs::write(&path, lost).unwrap();
            assert!(Journal::open(path.clone()).unwrap().leases().is_empty());
            assert!(Journal::open_lasting(path.clone()).is_err());
        }
        for damaged in [&b"[{\"kind\""[..], b"[]\0", b"[{\"kind\":\"new\"}]"] {
            fs::write(&path, damaged).unwrap();
            assert!(Journal::open(path.clone()).is_err());
        }
    }

    #[test]
    fn what_a_crash_left_half_made_is_swept_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        write_durably(&path, b"old").unwrap();
        let half = tempfile::Builder::new()
            .prefix(HALF_MADE)
            .tempfile_in(dir.path());
        half.unwrap().keep().unwrap();
        fs::write(half_made(&dir.path().join("disk.img")), b"half").unwrap();
        sweep(dir.path()).unwrap();
        let left: Vec<_> = fs::read_dir(dir.path()).unwrap().collect();
        assert_eq!(left.len(), 1);
        assert_eq!(fs::read(&path).unwrap(), b"old");
    }

    #[test]
    fn a_lease_that_stays_is_reported_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::create(dir.path().join("leases.json")).unwrap();
        // A directory is not a file: removal fails.
        journal
            .add(Lease::File {
                path: dir.path().to_owned(),
            })
            .unwrap();
        assert_eq!(journal.release_all().len(), 1);
        assert_eq!(journal.leases().len(), 1);
    }

    #[test]
    fn only_the_very_process_is_killed() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let start_time = process::start_time(pid).unwrap();
        let lease = |start_time| Lease::Process {
            pid,
            start_time,
            boot_id: process::boot_id(),
        };
        lease(start_time + 1).release().unwrap();
        assert!(
            child.try_wait().unwrap().is_none(),
            "another start time is another process"
        );
        lease(start_time).release().unwrap();
        let status = child.wait().unwrap();
        assert!(!status.success());
        lease(start_time).release().unwrap();
    }
}
