//! The monitor of a QEMU process: commands, events, and what this QEMU offers.
//!
//! [`Monitor`] speaks QMP over a Unix socket whose other end QEMU was given as
//! a chardev; [`GuestAgent`] speaks the same kind of lines to
//! qemu-guest-agent. Command types come from the `qapi` crate; its own
//! asynchronous transport is not used (`docs/decisions/0002-qmp-transport.md`).
//! [`Schema`] answers what one QEMU offers, so that nothing is decided by a
//! version number.

mod error;
mod event;
mod message;
mod monitor;
mod needs;
mod probe;
mod qga;
mod schema;
mod transport;

pub use error::{ConnectionEnd, Peer, QmpError};
pub use event::{Event, Events};
pub use monitor::{Monitor, Version};
pub use needs::{Missing, Need, Needs, NeedsError};
pub use probe::{Offer, ProbeError};
pub use qga::GuestAgent;
pub use schema::{Schema, SchemaError};
