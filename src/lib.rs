//! Run a command in a disposable QEMU/KVM microVM.
//!
//! Data flows one way: a [`spec`] becomes a [`plan`], a plan acquires leases on
//! the [`host`], leases and arguments make a process ([`vmm`]), the process
//! gives a monitor ([`qmp`]) and a channel ([`guest`]), its network is watched
//! over ([`net`]), it starts from a [`template`] where one matches or goes on
//! from a [`snapshot`] (either can be one file, an [`export`]), the channel gives
//! an outcome ([`run`]), or a machine that outlives its command ([`supervise`]); a
//! pool (`service`) keeps clones ready. A module imports only from those before it.

#[cfg(feature = "cli")]
pub mod cli;
pub mod error;
pub mod export;
pub mod guest;
pub mod host;
pub mod image;
pub mod net;
pub mod plan;
pub mod qmp;
pub mod run;
#[cfg(feature = "service")]
pub mod service;
pub mod snapshot;
pub mod spec;
pub mod supervise;
pub mod template;
mod text;
pub mod vmm;
