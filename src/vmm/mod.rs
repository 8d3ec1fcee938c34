//! The VMM process.

mod jail;
mod kernel;
mod process;
mod ram;
pub mod seccomp;
mod sequence;
mod share;
mod spawn;

pub use jail::{Jail, Needs};
pub use process::{ExitStatus, VmmProcess};
pub use sequence::SpawnStep;
/// The AppArmor profile for QEMU as it is started here, named as in
/// [`crate::plan::jail::PROFILE`].
pub const APPARMOR: &str = include_str!("apparmor.profile");

pub use share::{Detached, User, detach};
pub use spawn::{Spawn, SpawnError};
