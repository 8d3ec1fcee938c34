//! The channel to the guest agent.

pub mod channel;
mod error;
mod stream;
mod vsock;
mod words;

pub use channel::Channel;
pub use error::GuestError;
pub use stream::{Input, Output, Stream};
pub(crate) use vsock::connect as connect_vsock;
pub mod archive;
