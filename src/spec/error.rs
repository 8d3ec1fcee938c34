//! What cannot be asked for.

use std::path::PathBuf;

use super::origin::Origin;
use crate::error::Explain;

/// Asked for something that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The file could not be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is not what it should be; the source names line and key.
    #[error("cannot use {path}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// The file has a key it cannot have.
    #[error("cannot use {path}: line {line}: {key} {why}")]
    Key {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// The key.
        key: String,
        /// What is wrong with it.
        why: String,
    },
    /// The file chooses what runs as root, and others than root can change it.
    #[error("cannot trust {path}: {why}")]
    Untrusted {
        /// The file.
        path: PathBuf,
        /// Who can change it.
        why: &'static str,
    },
    /// An environment variable is not what it should be.
    #[error("cannot use {name}: {why}")]
    Variable {
        /// Its name.
        name: String,
        /// Why.
        why: String,
    },
    /// What one of the configuration's layers says cannot be.
    #[error("cannot use {origin}")]
    At {
        /// Where it is said.
        origin: Origin,
        /// What is wrong with it.
        #[source]
        source: Box<SpecError>,
    },
    /// A profile or network nobody defined.
    #[error("there is no {kind} `{name}`, only {}", .known.join(", "))]
    Unknown {
        /// `profile` or `network`.
        kind: &'static str,
        /// Its name.
        name: String,
        /// Those there are.
        known: Vec<String>,
    },
    /// A profile or network that would hide a built-in one.
    #[error("the {kind} `{name}` is built in")]
    Taken {
        /// `profile` or `network`.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// There is no place for state.
    #[error("neither HOME nor XDG_STATE_HOME says where to keep images and machines")]
    NoPlace,
    /// A value that cannot be.
    #[error("{what} cannot be {value}: {why}")]
    Value {
        /// Which value.
        what: &'static str,
        /// What was asked for.
        value: String,
        /// The rule it breaks.
        why: &'static str,
    },
    /// A script that cannot be run.
    #[error("cannot run the script {name}: {why}")]
    Script {
        /// Its name.
        name: String,
        /// Why.
        why: String,
    },
    /// Two wishes that exclude each other.
    #[error("{first} does not go with {second}")]
    Clash {
        /// One.
        first: &'static str,
        /// The other.
        second: &'static str,
    },
    /// Nothing to run.
    #[error("no command was given")]
    NoCommand,
}

impl Explain for SpecError {
    fn code(&self) -> &'static str {
        match self {
            Self::Read { .. } => "config-unreadable",
            Self::Parse { .. } | Self::Key { .. } => "config-invalid",
            Self::Untrusted { .. } => "config-untrusted",
            Self::Variable { .. } => "variable-invalid",
            Self::At { source, .. } => source.code(),
            Self::Unknown {
                kind: "profile", ..
            } => "profile-unknown",
            Self::Unknown { .. } => "network-unknown",
            Self::Taken { .. } => "name-taken",
            Self::NoPlace => "no-state-dir",
            Self::Value { .. } => "value-invalid",
            Self::Script { .. } => "script-invalid",
            Self::Clash { .. } => "flags-clash",
            Self::NoCommand => "no-command",
        }
    }

    fn remedy(&self) -> String {
        match self {
            Self::Read { path, .. } => {
                format!("Check that {} exists and can be read.", path.display())
            }
            Self::Parse { path, .. } | Self::Key { path, .. } => {
                format!("Correct {} at the line shown.", path.display())
            }
            Self::Untrusted { path, .. } => format!(
                "`chown root {path} && chmod go-w {path}` after a look at it, or leave it out with --config none.",
                path = path.display()
            ),
            Self::Variable { name, .. } => format!("Correct or unset {name}."),
            Self::At { origin, .. } => format!("Correct {origin}."),
            Self::Unknown { kind, .. } => {
                format!("Take one of these, or define it as [{kind}.NAME] in a configuration file.")
            }
            Self::Taken { kind, .. } => format!("Give the {kind} another name."),
            Self::NoPlace => "Set HOME, or give --state-dir.".into(),
            Self::Value { what, .. } => format!("Give another value for {what}."),
            Self::Script { .. } => {
                "Start it with a `#!` line, or name it .py, .js, .sh, .bash or .pl.".into()
            }
            Self::Clash { first, second } => format!("Leave out {first} or {second}."),
            Self::NoCommand => "Put it after `--`: bulkhead run -- python3 -V".into(),
        }
    }
}
