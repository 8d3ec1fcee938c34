//! What can go wrong with images.

use std::io;
use std::path::{Path, PathBuf};

use crate::error::Explain;

/// Result of an image operation.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an image operation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No image has this name or id.
    #[error("no image is called \"{name}\" in {}", .store.display())]
    NotFound {
        /// What was asked for.
        name: String,
        /// Directory that was searched.
        store: PathBuf,
    },
    /// A file differs from what the manifest says.
    #[error(
        "image {image} is corrupt: {} has digest {found}, expected {expected}", .file.display()
    )]
    Corrupt {
        /// Name or id of the image.
        image: String,
        /// The file that differs.
        file: PathBuf,
        /// Digest in the manifest, or in the id for the manifest itself.
        expected: String,
        /// Digest found, or "none" when the file is missing.
        found: String,
    },
    /// `manifest.json` cannot be understood.
    #[error("cannot read the manifest {}", .path.display())]
    Manifest {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// `manifest.json` has a value this version does not accept.
    #[error("cannot use the manifest {}: {reason}", .path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A run holds the image.
    #[error("image {image} is in use by a run or a machine")]
    InUse {
        /// Name or id of the image.
        image: String,
    },
    /// A name that cannot be used for an image.
    #[error("\"{name}\" cannot be the name of an image: {reason}")]
    Name {
        /// The name.
        name: String,
        /// Why not.
        reason: &'static str,
    },
    /// A recipe cannot be understood.
    #[error("cannot read the recipe {}", .path.display())]
    Recipe {
        /// The file, or the name of a built-in recipe.
        path: PathBuf,
        /// What is wrong with it, with the line.
        source: Box<toml::de::Error>,
    },
    /// A recipe has a value that cannot be used.
    #[error("cannot use the recipe {}: {reason}", .path.display())]
    RecipeValue {
        /// The file, or the name of a built-in recipe.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The guest agent's binary is missing.
    #[error("cannot find the guest agent at {}", .path.display())]
    AgentMissing {
        /// Where it was expected.
        path: PathBuf,
    },
    /// The guest agent's binary cannot run in a guest.
    #[error("cannot use the guest agent {}: {reason}", .path.display())]
    AgentUnfit {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: &'static str,
    },
    /// A kernel cannot be used.
    #[error("cannot use the kernel {}: {reason}", .path.display())]
    Kernel {
        /// The file or package.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// A tool of the host is missing.
    #[error("cannot run {tool}")]
    ToolMissing {
        /// The program.
        tool: &'static str,
        /// The package that has it on Debian.
        package: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// A tool of the host failed.
    #[error("{tool} failed with {status}: {stderr}")]
    Tool {
        /// The program.
        tool: &'static str,
        /// How it ended.
        status: String,
        /// Its own last lines.
        stderr: String,
    },
    /// The host's apt has no source for a suite.
    #[error("this host's apt sources have no suite \"{suite}\"")]
    Suite {
        /// The suite asked for.
        suite: String,
    },
    /// An archive that cannot become a root file system.
    #[error("cannot use {archive}: {reason}")]
    Archive {
        /// Where the archive comes from.
        archive: String,
        /// What is wrong with it.
        reason: String,
    },
    /// An OCI layout that breaks its own rules.
    #[error("cannot import the OCI layout {}: {reason}", .path.display())]
    Oci {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The disk is full.
    #[error("no space left on the disk of {}", .path.display())]
    NoSpace {
        /// The file being written, or its directory.
        path: PathBuf,
    },
    /// The system refused a file operation.
    #[error("cannot {action} {}", .path.display())]
    Io {
        /// What was tried: "read", "create".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl Error {
    /// An [`Error::Io`], or [`Error::NoSpace`] where that is the reason.
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace { path },
            _ => Self::Io {
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
            Self::NotFound { .. } => "image-not-found",
            Self::Corrupt { .. } | Self::Manifest { .. } => "image-corrupt",
            Self::Unsupported { .. } => "image-unsupported",
            Self::InUse { .. } => "image-in-use",
            Self::Name { .. } => "image-name-invalid",
            Self::Recipe { .. } | Self::RecipeValue { .. } => "image-recipe-invalid",
            Self::AgentMissing { .. } | Self::AgentUnfit { .. } => "agent-missing",
            Self::Kernel { .. } => "kernel-unusable",
            Self::ToolMissing { .. } => "tool-missing",
            Self::Tool { .. } | Self::Suite { .. } => "image-build-failed",
            Self::Archive { .. } | Self::Oci { .. } => "image-import-failed",
            Self::NoSpace { .. } => "no-space",
            Self::Io { .. } => "image-io",
        }
    }

    fn remedy(&self) -> String {
        match self {
            Self::NotFound { name, .. } if name == "default" || name == "base" => {
                format!("build it with `bulkhead image build {name}`")
            }
            Self::NotFound { .. } => "see what there is with `bulkhead image ls`, \
                 or build one with `bulkhead image build`"
                .into(),
            Self::Corrupt { image, .. } => {
                format!("remove it with `bulkhead image rm {image}` and build or import it again")
            }
            Self::Manifest { path, .. } | Self::Unsupported { path, .. } => format!(
                "remove {} and build or import the image again",
                path.parent().unwrap_or(path).display()
            ),
            Self::InUse { .. } => "wait for the run to end, or remove the machine (see `bulkhead ls --filter image=NAME`)".into(),
            Self::Name { .. } => "choose lower-case letters, digits, '.', '_' and '-', \
                 at most 64 of them"
                .into(),
            Self::Recipe { .. } | Self::RecipeValue { .. } => {
                "correct the recipe; images/default/image.toml is an example".into()
            }
            Self::AgentMissing { .. } | Self::AgentUnfit { .. } => {
                "build it with `cargo xtask setup`, or name one with `--agent FILE`".into()
            }
            Self::Kernel { .. } => {
                "name a bzImage or vmlinux with `--kernel FILE`, or leave the flag out".into()
            }
            Self::ToolMissing { package, .. } => {
                format!("install it with `apt-get install --no-install-recommends {package}`")
            }
            Self::Tool { .. } => "check the network and `apt-get update`, then build again".into(),
            Self::Suite { .. } => {
                "add the suite to this host's apt sources and run `apt-get update`".into()
            }
            Self::Archive { .. } => {
                "give a root file system as a plain, gzip, xz or zstd tar archive".into()
            }
            Self::Oci { .. } => "write the layout anew, for linux/amd64".into(),
            Self::NoSpace { .. } => {
                "free some space, for example with `bulkhead image rm`, or use another \
                 `--state-dir`"
                    .into()
            }
            Self::Io { .. } => "check that the file exists and who may use it".into(),
        }
    }
}
