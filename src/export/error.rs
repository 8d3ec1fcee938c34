//! Why an export cannot be written or taken in.

use std::io;
use std::path::PathBuf;

use crate::error::Explain;
use crate::snapshot::SnapshotError;
use crate::template::{Difference, TemplateError};

/// What is wrong with an export.
#[derive(Debug, thiserror::Error)]
pub enum Flaw {
    /// It does not begin as one does.
    #[error("it is no export of Bulkhead")]
    NoExport,
    /// Another version of Bulkhead made it.
    #[error("it has format {found}, and {known} is known")]
    Format {
        /// Its own.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// It has something else in it.
    #[error("it is a {found}, not a {wanted}")]
    Kind {
        /// What is in it.
        found: &'static str,
        /// What was asked for.
        wanted: &'static str,
    },
    /// It is not what was written.
    #[error("it is damaged: {0}")]
    Corrupt(String),
    /// Its end is missing.
    #[error("its end is missing")]
    Truncated,
    /// Something follows its end.
    #[error("something follows its end")]
    Trailing,
    /// It claims more than there may be.
    #[error("it is too large: {0}")]
    TooLarge(String),
    /// It could not be read.
    #[error("it cannot be read: {0}")]
    Unreadable(io::Error),
}

impl Flaw {
    /// What came out of a reader of ours as an error of reading.
    pub(super) fn of(error: io::Error) -> Self {
        match error.downcast::<Self>() {
            Ok(flaw) => flaw,
            // The decompressor's own words.
            Err(error) => Self::Corrupt(error.to_string()),
        }
    }
}

/// An export cannot be written or taken in.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The file system refused.
    #[error("cannot {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// There is a file of that name.
    #[error("there is a file {path} already")]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// Nobody can read it there.
    #[error("an export is not written to a terminal")]
    Terminal,
    /// It is not what can be taken in.
    #[error("cannot take in {of}: {flaw}")]
    Refused {
        /// The export.
        of: String,
        /// What is wrong with it.
        flaw: Flaw,
    },
    /// The host has no room for it.
    #[error("{of} needs {needed} bytes, and {usable} may be used in {path}")]
    NoRoom {
        /// The export.
        of: String,
        /// What it has in it.
        needed: u64,
        /// What it may use of what is free: the rest is for machines that run.
        usable: u64,
        /// Where.
        path: PathBuf,
    },
    /// It was made where something else is.
    #[error("{of} does not fit this host: {}", Difference::told(.differences))]
    Elsewhere {
        /// The export.
        of: String,
        /// What differs.
        differences: Vec<Difference>,
        /// What to do about it.
        cure: &'static str,
    },
    /// What is exported changed meanwhile, or is damaged.
    #[error("{file} of what is exported is not what was saved")]
    Source {
        /// Which file.
        file: &'static str,
    },
    /// The template cannot be used or kept.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The snapshot cannot be used or kept.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
}

impl ExportError {
    pub(super) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }
}

impl Explain for ExportError {
    fn code(&self) -> &'static str {
        match self {
            Self::Io { source, .. } if crate::host::is_full(source) => "no-space",
            Self::Io { .. } => "export-unusable",
            Self::Exists { .. } => "export-exists",
            Self::Terminal => "export-to-terminal",
            Self::Refused { flaw, .. } => match flaw {
                Flaw::NoExport => "export-unknown",
                Flaw::Format { .. } => "export-format",
                Flaw::Kind { .. } => "export-kind",
                Flaw::Corrupt(_) => "export-corrupt",
                Flaw::Truncated => "export-truncated",
                Flaw::Trailing => "export-trailing",
                Flaw::TooLarge(_) => "export-too-large",
                Flaw::Unreadable(_) => "export-unreadable",
            },
            Self::NoRoom { .. } => "no-space",
            Self::Elsewhere { .. } => "export-mismatch",
            Self::Source { .. } => "export-source-corrupt",
            Self::Template(error) => error.code(),
            Self::Snapshot(error) => error.code(),
        }
    }

    fn remedy(&self) -> String {
        match self {
            Self::Io { path, .. } => format!(
                "Check the permissions of, and the space for, {}.",
                path.display()
            ),
            Self::Exists { .. } => "Name another, or remove it.".into(),
            Self::Terminal => "Name a file, or lead stdout into one.".into(),
            Self::Refused { flaw, .. } => match flaw {
                Flaw::NoExport => {
                    "Give a file that `snapshot export` or `template export` wrote.".into()
                }
                Flaw::Format { .. } => {
                    "Import it with the version of Bulkhead that exported it.".into()
                }
                Flaw::Kind { found, .. } => format!("Use `bulkhead {found} import`."),
                Flaw::Unreadable(_) => "Act on the reason, and try again.".into(),
                _ => "Nothing was taken in. Copy the file again, or export it again.".into(),
            },
            Self::NoRoom { path, .. } => {
                format!("Free space on the file system of {}.", path.display())
            }
            Self::Elsewhere { cure, .. } => (*cure).to_owned(),
            Self::Source { .. } => "Save it again, and export that.".into(),
            Self::Template(error) => error.remedy(),
            Self::Snapshot(error) => error.remedy(),
        }
    }
}
