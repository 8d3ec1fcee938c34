//! The VMM process.

mod process;
mod spawn;

pub use process::{ExitStatus, VmmProcess};
pub use spawn::{Spawn, SpawnError, SpawnStep};
