//! What can go wrong between a workspace and a guest's changes to it.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::error::Explain;
use crate::guest::archive::{self, printable};

/// Why changes were not shown or brought back. Names are safe to print.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The guest's answer is unusable.
    #[error(transparent)]
    Archive(#[from] archive::Error),
    /// Both the host and the guest changed these. Nothing was applied.
    #[error("the workspace changed on the host while the guest worked on it: {}", few(.paths))]
    Conflict {
        /// All of them.
        paths: Vec<String>,
    },
    /// Some changes are in the workspace and some are not.
    #[error("only a part of the changes was applied; not applied: {}{}", few(.failed), rest(.kept))]
    Partial {
        /// What is in the workspace now.
        applied: Vec<String>,
        /// What is not, each with the reason.
        failed: Vec<String>,
        /// The hidden directory, at the top of the workspace, with files and
        /// symlinks that could not be put into place.
        kept: Option<String>,
    },
    /// The file system of the workspace is full. Nothing was applied.
    #[error("no space left for `{path}` in the workspace; nothing was applied")]
    NoSpace {
        /// The entry.
        path: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The host refuses something. Nothing was applied.
    #[error("cannot {action} `{path}`")]
    Host {
        /// What was tried.
        action: &'static str,
        /// On which path.
        path: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The diff cannot be written.
    #[error("cannot write the diff")]
    Show(#[source] io::Error),
}

impl Error {
    /// A refusal of the host, told apart by cause.
    pub(super) fn host(
        action: &'static str,
        path: impl AsRef<Path>,
        source: impl Into<io::Error>,
    ) -> Self {
        let path = printable(path.as_ref().as_os_str().as_bytes());
        let source = source.into();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::NoSpace { path, source }
            }
            _ => Self::Host {
                action,
                path,
                source,
            },
        }
    }
}

impl Explain for Error {
    fn code(&self) -> &'static str {
        match self {
            Self::Archive(error) => error.code(),
            Self::Conflict { .. } => "workspace-conflict",
            Self::Partial { .. } => "workspace-partly-applied",
            Self::NoSpace { .. } => "no-space",
            Self::Host { .. } => "workspace-write",
            Self::Show(_) => "diff-write",
        }
    }

    fn remedy(&self) -> String {
        match self {
            Self::Archive(error) => error.remedy(),
            Self::Conflict { .. } => {
                "Look at the changes with --diff; bring them back over the host's own with --force.".into()
            }
            Self::Partial { .. } => {
                "Cure the reason given for each name, then bring the changes back again with --force.".into()
            }
            Self::NoSpace { .. } => "Free space (or quota) on that file system and try again.".into(),
            Self::Host { path, .. } => format!("Check that `{path}` exists and that this user may write there."),
            Self::Show(_) => "Check where the output goes.".into(),
        }
    }
}

/// Where the rest is.
fn rest(hidden: &Option<String>) -> String {
    match hidden {
        Some(hidden) => format!("; what could not be put into place is in `{hidden}`"),
        None => String::new(),
    }
}

/// The first names of a list, and how many more there are.
fn few(names: &[String]) -> String {
    const SHOWN: usize = 10;
    let mut text = names
        .iter()
        .take(SHOWN)
        .cloned()
        .collect::<Vec<_>>()
        .join(", ");
    if names.len() > SHOWN {
        text.push_str(&format!(" and {} more", names.len() - SHOWN));
    }
    text
}
