//! How a pool is.

use serde::Serialize;

use crate::error::Report;

/// How a pool is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Status {
    /// Clones that are ready.
    pub idle: usize,
    /// Clones that are being started.
    pub starting: usize,
    /// Clones that callers have.
    pub lent: usize,
    /// Clones that are being ended.
    pub ending: usize,
    /// Callers who wait.
    pub waiting: usize,
    /// It is being drained, or was.
    pub closed: bool,
    /// Why the last clone did not start, where none has started since.
    pub last_failure: Option<Report>,
    /// What could not be released of clones that ended; see `bulkhead gc`.
    pub left_behind: usize,
}

impl Status {
    /// All clones, whatever they do.
    pub fn alive(&self) -> usize {
        self.idle + self.starting + self.lent + self.ending
    }
}
