//! A template or a snapshot as one file: compressed (zstd), without what is
//! zero, and refused with the reason when it is not what was written.
//!
//! The file is a chain whose every link has the digest of all before it
//! (`seal`). In it is one zstd frame: a header as JSON that says what follows
//! (`header`), then the files of the template or the snapshot, each as runs of
//! blocks with their places. Names of files are never in it. What decides
//! whether it fits a host, and makes a machine of it, is in [`crate::run`] and
//! [`crate::supervise`].

mod error;
mod file;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod header;
mod pack;
mod seal;
mod unpack;

pub use error::{ExportError, Flaw};
pub use file::Fresh;
pub use header::{Content, Header, Machine};
pub use pack::{snapshot, template};
pub use unpack::Import;

#[cfg(test)]
mod tests;
