//! The VMM process.

mod jail;
mod kernel;
mod process;
pub mod seccomp;
mod sequence;
mod share;
mod spawn;

pub use jail::{Jail, Needs};
pub use process::{ExitStatus, VmmProcess};
pub use sequence::SpawnStep;
pub use share::{Detached, User, detach};
pub use spawn::{Spawn, SpawnError};
