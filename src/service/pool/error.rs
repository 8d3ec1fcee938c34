//! Why a pool gives no clone.

use std::time::Duration;

use crate::error::{Explain, Report};
use crate::run::RunError;
use crate::spec::{Bytes, Timeout};

/// A pool cannot be made, or gives no clone.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// Its numbers contradict each other.
    #[error("a pool cannot be like that: {why}")]
    Settings {
        /// The rule they break.
        why: &'static str,
    },
    /// What was asked for cannot be kept ready.
    #[error("machines with {what} cannot be kept ready")]
    Spec {
        /// What.
        what: &'static str,
    },
    /// No template, or not a usable one.
    #[error(transparent)]
    Template(#[from] Box<RunError>),
    /// The host cannot be asked what it has.
    #[error("cannot read {path}")]
    Host {
        /// The file.
        path: std::path::PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// Its threads could not be started.
    #[error("cannot start the threads of the pool")]
    Threads(#[source] std::io::Error),
    /// There was none in time.
    #[error("no clone was ready within {}: {why}", Timeout(*.within))]
    Late {
        /// How long the caller would wait.
        within: Duration,
        /// What stood in the way.
        why: Why,
    },
    /// Too many wait already.
    #[error("{waiting} callers wait for a clone already")]
    Crowded {
        /// So many.
        waiting: usize,
    },
    /// The pool is being drained, or gone.
    #[error("the pool is closed")]
    Closed,
    /// Not everything was returned in time.
    #[error("{lent} clones are still lent out after {}", Timeout(*.within))]
    Lent {
        /// So many.
        lent: usize,
        /// How long it waited.
        within: Duration,
    },
}

/// What stood in the way of a clone.
#[derive(Debug, Clone, PartialEq)]
pub enum Why {
    /// All that there may be are lent out.
    Full {
        /// So many there may be.
        max: usize,
        /// So many callers wait.
        waiting: usize,
    },
    /// The host has too little memory.
    Memory {
        /// What it has for this pool now.
        spare: Bytes,
        /// What one more would need.
        need: Bytes,
        /// What stays untouched.
        reserve: Bytes,
    },
    /// Clones do not start.
    Failing {
        /// Why the last one did not.
        last: Box<Report>,
    },
    /// They are being started, or woken, and it takes longer than that.
    Slow {
        /// So many callers wait.
        waiting: usize,
    },
}

impl std::fmt::Display for Why {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Full { max, waiting } => {
                write!(f, "all of {max} are lent out, and {waiting} callers wait")
            }
            Self::Memory {
                spare,
                need,
                reserve,
            } => write!(
                f,
                "the host has {spare} of memory to spare beyond its reserve of {reserve}, and one \
                 needs {need}"
            ),
            Self::Failing { last } => write!(f, "clones do not start: {}", last.what),
            Self::Slow { waiting } => {
                write!(f, "clones are being started, and {waiting} callers wait")
            }
        }
    }
}

impl Explain for PoolError {
    fn code(&self) -> &'static str {
        match self {
            Self::Settings { .. } => "pool-settings",
            Self::Spec { .. } => "pool-spec",
            Self::Template(error) => error.code(),
            Self::Host { .. } | Self::Threads(_) => "host-refused",
            Self::Late { why, .. } => match why {
                Why::Full { .. } => "pool-exhausted",
                Why::Memory { .. } => "host-memory-short",
                Why::Failing { .. } => "pool-failing",
                Why::Slow { .. } => "pool-slow",
            },
            Self::Crowded { .. } => "pool-crowded",
            Self::Closed => "pool-closed",
            Self::Lent { .. } => "pool-lent",
        }
    }

    fn remedy(&self) -> String {
        match self {
            Self::Settings { .. } => "Give other numbers.".into(),
            Self::Spec { what } => {
                format!("Leave {what} out, and start such machines one by one.")
            }
            Self::Template(error) => error.remedy(),
            Self::Host { .. } => "Mount /proc, or name another place for it.".into(),
            Self::Threads(_) => "Raise the limit of threads, or start fewer at a time.".into(),
            Self::Late { why, .. } => match why {
                Why::Full { .. } => {
                    "Release clones sooner, wait longer, or let the pool have more (max).".into()
                }
                Why::Memory { .. } => {
                    "Release clones, end other programs, or give the pool smaller machines; \
                     reserve, idle_cost and lent_cost say what it counts with."
                        .into()
                }
                Why::Failing { last } => last.remedy.clone(),
                Why::Slow { .. } => {
                    "Wait longer, or keep more clones ready (idle, min, parallel).".into()
                }
            },
            Self::Crowded { .. } => {
                "Try again later; queue says how many may wait, max how many are served.".into()
            }
            Self::Closed => "Open another pool.".into(),
            Self::Lent { .. } => "Release them; whoever has them can, at any time.".into(),
        }
    }
}
