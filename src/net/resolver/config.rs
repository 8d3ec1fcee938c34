//! What a resolver is to do, and how much of it.

use std::net::SocketAddr;
use std::time::Duration;

use crate::net::outgoing::Outgoing;

/// What a resolver is to do.
#[derive(Debug, Clone)]
pub struct ResolverConfig {
    /// Whom it asks, in this order.
    pub upstreams: Vec<SocketAddr>,
    /// From where.
    pub from: Outgoing,
    /// Whether names are checked again at the connection: then nothing may be
    /// told that would hide them there.
    pub strict: bool,
    /// How much it does.
    pub limits: ResolverLimits,
}

/// How much a resolver does for its machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolverLimits {
    /// Questions at once, after a while without any.
    pub burst: u32,
    /// Questions per second.
    pub per_second: u32,
    /// Characters left of the last two labels in different names that no rule
    /// has in full, at once.
    pub name_burst: u32,
    /// Such characters per second.
    pub name_per_second: u32,
    /// Bytes of answers that are not addresses, at once.
    pub data_burst: u32,
    /// Such bytes per second.
    pub data_per_second: u32,
    /// Bytes of one answer's records.
    pub answer_bytes: usize,
    /// Questions on their way to an upstream.
    pub at_a_time: usize,
    /// Of these, below one domain.
    pub at_a_time_below_one: usize,
    /// How long one is waited for.
    pub deadline: Duration,
    /// Connections over TCP.
    pub connections: usize,
    /// How long one of these may be idle.
    pub idle: Duration,
}

impl Default for ResolverLimits {
    fn default() -> Self {
        Self {
            burst: 400,
            per_second: 50,
            name_burst: 8 * 1024,
            name_per_second: 16,
            data_burst: 64 * 1024,
            data_per_second: 256,
            answer_bytes: 4096,
            at_a_time: 128,
            at_a_time_below_one: 24,
            deadline: Duration::from_millis(4500),
            connections: 32,
            idle: Duration::from_secs(10),
        }
    }
}
