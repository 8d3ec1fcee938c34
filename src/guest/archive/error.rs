//! What can go wrong with an archive.

use std::io;

use crate::error::Explain;

/// Why packing or unpacking stopped. Names in messages are safe to print.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Something on the host cannot be read into an archive.
    #[error("cannot read `{path}` into the archive")]
    Unreadable {
        /// The host path.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The archive cannot be handed on.
    #[error("cannot send the archive (at `{path}`)")]
    Send {
        /// The entry that was being sent.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The archive cannot be received.
    #[error("cannot receive the archive")]
    Receive(#[source] io::Error),
    /// The archive ends before its end marker.
    #[error("the archive from the guest is cut short")]
    Truncated,
    /// The archive breaks the rules.
    #[error("the archive from the guest is refused: entry `{entry}` {why}")]
    Hostile {
        /// The entry's name, escaped.
        entry: String,
        /// Which rule.
        why: String,
    },
    /// More than the limits allow.
    #[error("the archive is too large at `{entry}`: over {limit} {unit}")]
    TooLarge {
        /// The entry that went past the limit.
        entry: String,
        /// The limit.
        limit: u64,
        /// What is counted.
        unit: &'static str,
    },
    /// The host's disk (or quota) is full.
    #[error("no space left while writing `{path}`")]
    NoSpace {
        /// The entry or directory.
        path: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The host refuses to create something.
    #[error("cannot write `{path}`")]
    Write {
        /// The entry or directory.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// A failed write to `path`, told apart by cause.
    pub(crate) fn write(path: impl AsRef<[u8]>, source: impl Into<io::Error>) -> Self {
        let path = super::printable(path.as_ref());
        let source = source.into();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::NoSpace { path, source }
            }
            _ => Self::Write { path, source },
        }
    }

    /// A failed read of the host's `path`.
    pub(crate) fn unreadable(path: impl AsRef<[u8]>, source: impl Into<io::Error>) -> Self {
        Self::Unreadable {
            path: super::printable(path.as_ref()),
            source: source.into(),
        }
    }

    /// An entry that breaks the rules.
    pub(crate) fn hostile(entry: impl AsRef<[u8]>, why: impl Into<String>) -> Self {
        Self::Hostile {
            entry: super::printable(entry.as_ref()),
            why: why.into(),
        }
    }

    /// An entry past a limit.
    pub(crate) fn too_large(entry: impl AsRef<[u8]>, limit: u64, unit: &'static str) -> Self {
        Self::TooLarge {
            entry: super::printable(entry.as_ref()),
            limit,
            unit,
        }
    }
}

impl Explain for Error {
    fn code(&self) -> &'static str {
        match self {
            Self::Unreadable { .. } => "workspace-unreadable",
            Self::Send { .. } | Self::Receive(_) => "archive-transfer",
            Self::Truncated => "archive-truncated",
            Self::Hostile { .. } => "archive-hostile",
            Self::TooLarge { .. } => "archive-too-large",
            Self::NoSpace { .. } => "no-space",
            Self::Write { .. } => "archive-write",
        }
    }

    fn remedy(&self) -> String {
        match self {
            Self::Unreadable { path, .. } => {
                format!(
                    "Make `{path}` readable for the user running bulkhead, or move it out of the workspace."
                )
            }
            Self::Send { .. } | Self::Receive(_) | Self::Truncated => {
                "Look at the machine's console for why the guest went away, and run again.".into()
            }
            Self::Hostile { .. } => {
                "Treat the guest as compromised: nothing of this archive was kept.".into()
            }
            Self::TooLarge { .. } => {
                "Delete what is not needed from the directory, or raise the limit.".into()
            }
            Self::NoSpace { .. } => {
                "Free space (or quota) on that file system and try again.".into()
            }
            Self::Write { path, .. } => {
                format!("Check that the directory of `{path}` exists and is writable.")
            }
        }
    }
}
