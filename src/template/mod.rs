//! Booted machines on disk, from which others start: what they are keyed by,
//! and how they are kept. What makes and clones them is in [`crate::run`].

mod digest;
mod error;
mod here;
mod key;
mod manifest;
mod store;
mod whole;

pub use error::TemplateError;
pub use key::{Difference, Key};
pub use manifest::{Manifest, Piece};
pub use store::{Store, Summary, Template};

pub(crate) use digest::{BLOCK, MOST, SparseHash, cached, each_extent, each_run, of_sparse};
pub(crate) use here::Here;
pub(crate) use manifest::{DISK, Described, LONGEST, RAM, SCHEMA, STATE};
pub(crate) use store::{Older, Staged};
