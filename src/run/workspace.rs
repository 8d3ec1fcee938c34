//! What a machine changed in a workspace: staged, shown, and brought back.
//!
//! [`crate::guest::archive::pack`] sends a directory in and gives a
//! [`Manifest`] of it. The guest's answer is [staged](Changes::stage) in a
//! private directory, where the rules of [`mod@crate::guest::archive`] and those
//! for repositories (below) hold. Then it is shown with [`diff`] or brought
//! back with [`apply`]; until that, nothing in the workspace has changed.
//!
//! # Repositories
//! Git runs what its configuration and hooks say, so what comes back into any
//! `.git`, or into any directory that git would take for a repository, is held
//! to a list of what git keeps there as data: objects, refs, logs, the index,
//! `HEAD` and its like. Hooks, alternates, attributes, other worktrees, half
//! finished rebases (their to-do lists run commands) and symlinks stay out.
//! `config` keeps the host's text; new keys are added only if harmless, and the
//! host's value wins where both have one. Files in the working tree which the
//! host's `config` names as hooks, attributes or more configuration stay out as
//! well. What was left out is in the warnings.

mod apply;
mod conflict;
mod diff;
mod error;
mod git;
mod git_config;
mod unified;

use std::collections::BTreeSet;
use std::io::{BufReader, ErrorKind, Read};
use std::path::{Path, PathBuf};

pub use apply::{Applied, ApplyOptions, apply};
pub use diff::{DiffOptions, diff};
pub use error::Error;

use crate::guest::archive::{
    self, Beneath, HostDir, Limits, Manifest, Modes, Name, Options, Unpacked, Warnings,
};

/// Changes of a guest, staged on the host and cleaned of what may not come back.
///
/// Dropping it removes the staging directory.
#[derive(Debug)]
pub struct Changes {
    /// New and changed entries; their content is in the staging directory.
    staged: Unpacked,
    /// Names that are gone.
    removed: BTreeSet<Name>,
    /// The roots of repositories among the names, as the diff groups them.
    repositories: BTreeSet<Name>,
    /// What was left out, or deserves a look.
    pub warnings: Warnings,
    staging: tempfile::TempDir,
}

impl Changes {
    /// Reads the guest's answer for the workspace `dir` into a new directory
    /// below `staging`: a tar of new and changed entries from `archive`, and
    /// NUL-terminated names of removed ones from `removed`. The two are read at
    /// the same time, in whatever order they come.
    ///
    /// # Errors
    /// [`Error::Archive`] for whatever is wrong with the answer; the staging
    /// directory is removed again.
    pub fn stage(
        archive: impl Read,
        removed: impl Read + Send,
        staging: &Path,
        dir: &HostDir,
        limits: &Limits,
    ) -> Result<Self, Error> {
        let staging = tempfile::Builder::new()
            .prefix("changes-")
            .tempdir_in(staging)
            .map_err(|source| Error::host("make a staging directory in", staging, source))?;
        let options = Options {
            limits: *limits,
            owner: None,
            modes: Modes::Private,
        };
        let (staged, removed) = std::thread::scope(|scope| {
            let removed = scope.spawn(|| read_removed(removed, limits));
            let staged = archive::unpack(archive, staging.path(), &options);
            let removed = removed.join().unwrap_or(Err(archive::Error::Truncated));
            Ok::<_, Error>((staged?, removed?))
        })?;
        // No honest agent says so; what judges names sees each of them once.
        if let Some(both) = removed
            .iter()
            .find(|name| staged.entries.contains_key(*name))
        {
            return Err(archive::Error::hostile(both, "is sent and removed at once").into());
        }
        let warnings = staged.warnings.clone();
        let mut changes = Self {
            staged,
            removed,
            repositories: BTreeSet::new(),
            warnings,
            staging,
        };
        git::sanitise(&mut changes, dir)?;
        Ok(changes)
    }

    /// Whether there is nothing to bring back.
    pub fn is_empty(&self) -> bool {
        self.staged.entries.is_empty() && self.removed.is_empty()
    }

    /// Names of new and changed entries.
    pub fn changed(&self) -> impl Iterator<Item = &Name> {
        self.staged.entries.keys()
    }

    /// Names of removed entries.
    pub fn removed(&self) -> impl Iterator<Item = &Name> {
        self.removed.iter()
    }

    /// Moves what was staged to `to`, or where something is kept there already,
    /// to `to` with a number; gives the place. Parents are made. It is private,
    /// and as the guest sent it, before any rule for repositories.
    ///
    /// # Errors
    /// It cannot be moved there.
    pub fn keep(self, to: &Path) -> std::io::Result<PathBuf> {
        if let Some(parent) = to.parent() {
            crate::run::dirs::make_private(parent)?;
        }
        let mut place = to.to_owned();
        for number in 2.. {
            // Fails for a directory with something in it; an empty one is replaced.
            match std::fs::rename(self.staging.path(), &place) {
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists
                    ) => {}
                moved => return moved.map(|()| place),
            }
            place = to.with_extension(number.to_string());
        }
        unreachable!("numbers do not end")
    }

    /// The staged content.
    fn files(&self) -> Result<Beneath, Error> {
        let path = self.staging.path();
        Beneath::open(path).map_err(|errno| Error::host("open the staging directory", path, errno))
    }
}

/// Brings the archive of the guest's output directory into `dir`. Files of the
/// same name are replaced; others stay.
///
/// # Errors
/// As [`Changes::stage`] and [`apply`].
pub fn artifacts(
    archive: impl Read,
    staging: &Path,
    dir: &HostDir,
    limits: &Limits,
) -> Result<Applied, Error> {
    let changes = Changes::stage(archive, std::io::empty(), staging, dir, limits)?;
    let mut applied = apply(
        dir,
        &changes,
        &Manifest::default(),
        &ApplyOptions { force: true },
    )?;
    let mut warnings = changes.warnings.clone();
    warnings.append(std::mem::take(&mut applied.warnings));
    applied.warnings = warnings;
    Ok(applied)
}

/// Reads NUL-terminated names. The limits are on what is read, repeated or not,
/// and on the directories above it, which are looked at later.
fn read_removed(reader: impl Read, limits: &Limits) -> Result<BTreeSet<Name>, archive::Error> {
    let (mut names, mut above) = (BTreeSet::new(), BTreeSet::new());
    let (mut count, mut bytes) = (0, 0);
    let mut name = Vec::new();
    for byte in BufReader::new(reader).bytes() {
        match byte.map_err(archive::Error::Receive)? {
            0 => {
                count += 1;
                bytes += name.len() as u64;
                let parsed = Name::parse(&name, limits)?;
                for dir in parsed.ancestors().skip(1) {
                    let len = dir.as_bytes().len() as u64;
                    if !above.insert(dir) {
                        break;
                    }
                    bytes += len;
                }
                if !parsed.is_top() {
                    names.insert(parsed);
                }
                name.clear();
            }
            byte => name.push(byte),
        }
        if name.len() > limits.path_len {
            return Err(archive::Error::too_large(
                &name[..100.min(name.len())],
                limits.path_len as u64,
                "bytes in a name",
            ));
        }
        if count > limits.entries {
            return Err(archive::Error::too_large(
                b"(removed)",
                limits.entries,
                "entries",
            ));
        }
        if bytes > limits.name_bytes {
            return Err(archive::Error::too_large(
                b"(removed)",
                limits.name_bytes,
                "bytes of names",
            ));
        }
    }
    match name.is_empty() {
        true => Ok(names),
        false => Err(archive::Error::Truncated),
    }
}
