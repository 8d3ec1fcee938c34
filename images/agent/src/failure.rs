//! The agent's one error type: what the host is told, in words.

use std::io;

use bulkhead_agent::{Failure, FailureKind};

pub(crate) type Result<T, E = Failure> = std::result::Result<T, E>;

/// A failure of the given kind.
pub(crate) fn failure(kind: FailureKind, message: impl Into<String>) -> Failure {
    Failure {
        kind,
        message: message.into(),
    }
}

/// A request that makes no sense as it stands.
pub(crate) fn invalid(message: impl Into<String>) -> Failure {
    failure(FailureKind::Invalid, message)
}

/// Turns a system error into a [`Failure`] that says what was being done.
pub(crate) trait Context<T> {
    /// `what` is a phrase like `cannot open /dev/x`; the error is appended.
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| {
            let error = error.into();
            let kind = match error.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => FailureKind::NoSpace,
                _ => FailureKind::System,
            };
            failure(kind, format!("{}: {error}", what()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_has_its_own_kind() {
        let full = Err::<(), _>(nix::errno::Errno::ENOSPC).context(|| "cannot write a".into());
        assert_eq!(full.unwrap_err().kind, FailureKind::NoSpace);
    }
}
