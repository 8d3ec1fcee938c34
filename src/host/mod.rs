//! What this host can do, and the resources taken from it.

pub mod cgroup;
pub mod closure;
pub mod fault;
pub mod kmsg;
pub mod lease;
pub mod lsm;
pub mod netns;
pub mod network;
pub mod nft;
pub mod probe;
pub mod process;
pub(crate) mod stamp;
pub(crate) mod sys;
pub mod uid;

/// Whether an error says that a disk or a quota is full.
pub(crate) fn is_full(error: &std::io::Error) -> bool {
    use std::io::ErrorKind;
    matches!(
        error.kind(),
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded
    )
}
