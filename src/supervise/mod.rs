//! Machines that outlive the command that made them.
//!
//! Each is watched by a process of its own, its supervisor: [`supervise`] is
//! all that process does. [`Machines`] makes, finds and removes machines on
//! disk; a [`Client`] reaches the supervisor of one over its control socket.
//! There is no central daemon: what is on disk and what lives is compared at
//! each look.

mod client;
mod copy;
mod end;
mod error;
mod execs;
mod exports;
mod health;
mod idle;
mod launch;
mod log;
mod machines;
mod relay;
mod reset;
mod server;
mod snapshots;
mod supervisor;
mod tune;
mod view;
mod waiting;
mod watch;
mod wire;

pub use client::Client;
pub use error::SuperviseError;
pub use launch::Launcher;
pub use log::{Entry, ExecLog, LogError};
pub use machines::Machines;
pub use supervisor::{Start, supervise};
pub use view::{Filter, Kind, Live, View};
pub use wire::{ExecEnd, ExecId, ExecInfo, ExecRequest, Limit, Settings};
