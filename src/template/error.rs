//! Why a template cannot be kept or used.

use std::fmt::Write as _;
use std::io;
use std::path::PathBuf;

use super::key::Difference;
use crate::error::Explain;
use crate::spec::ProfileName;

/// A template cannot be kept or used.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
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
    /// It could not be put together beside the others.
    #[error(transparent)]
    Staging(#[from] crate::image::Error),
    /// There is none of this id.
    #[error("there is no template {id}")]
    NotFound {
        /// As it was asked for.
        id: String,
    },
    /// There is one of that key, and it stays.
    #[error("there is a template {id} already")]
    Exists {
        /// Its id.
        id: String,
    },
    /// None fits what is asked for.
    #[error("no template fits machines of image {image} and profile {profile}")]
    NoneFits {
        /// The image.
        image: String,
        /// The profile.
        profile: ProfileName,
    },
    /// Several begin with these digits.
    #[error("{id} stands for several templates")]
    Ambiguous {
        /// As it was asked for.
        id: String,
    },
    /// It is not what was saved.
    #[error("the template {id} is damaged: {what}")]
    Corrupt {
        /// The template.
        id: String,
        /// What is wrong.
        what: String,
    },
    /// It is another machine's.
    #[error("the template {id} does not fit: {}", list(.differences))]
    Mismatch {
        /// The template.
        id: String,
        /// What differs.
        differences: Vec<Difference>,
    },
}

fn list(differences: &[Difference]) -> String {
    let mut text = String::new();
    for one in differences {
        let comma = if text.is_empty() { "" } else { "; " };
        // Writing to a String cannot fail.
        let _ = write!(text, "{comma}{one}");
    }
    text
}

impl TemplateError {
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

impl Explain for TemplateError {
    fn code(&self) -> &'static str {
        match self {
            Self::Io { source, .. } if crate::host::is_full(source) => "no-space",
            Self::Io { .. } => "template-unusable",
            Self::Staging(error) => error.code(),
            Self::NotFound { .. } | Self::NoneFits { .. } | Self::Ambiguous { .. } => {
                "template-not-found"
            }
            Self::Exists { .. } => "template-exists",
            Self::Corrupt { .. } => "template-corrupt",
            Self::Mismatch { .. } => "template-mismatch",
        }
    }

    fn remedy(&self) -> String {
        match self {
            Self::Io { path, .. } => format!(
                "Check the permissions of, and the space for, {}.",
                path.display()
            ),
            Self::Staging(error) => error.remedy(),
            Self::NotFound { .. } => "See `bulkhead template ls`.".into(),
            Self::NoneFits { .. } => {
                "Build one with `bulkhead template build` and the same options.".into()
            }
            Self::Ambiguous { .. } => "Give more digits.".into(),
            Self::Exists { id } => {
                format!("Use it, or remove it first: bulkhead template rm {id}")
            }
            Self::Corrupt { id, .. } => format!(
                "Remove it with `bulkhead template rm {id}` and build it again, or boot with --cold."
            ),
            Self::Mismatch { .. } => {
                "Build one for this machine with `bulkhead template build` and the same options, \
                 or leave --template out."
                    .into()
            }
        }
    }
}
