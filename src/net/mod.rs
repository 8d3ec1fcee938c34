//! The user-space side of a machine's network: which names it may use, the
//! resolver and the proxy that hold it to that, and the record of what it did.
//!
//! Sockets are handed in: whoever makes the network namespace opens them there.
//! Nothing here changes the kernel's rules; what has to be
//! let through is told over a channel.

pub mod address;
mod bucket;
mod event;
mod filter;
mod forward;
mod names;
mod outgoing;
mod policy;
mod proxy;
pub mod record;
mod refusal;
mod resolver;

pub use event::{
    Endpoint, Event, Excepted, Flow, Journal, Packet, Proxied, Query, QueryResult, What,
};
pub use filter::{Filter, FilterConfig, Inside, Policies, Traffic};
pub use forward::{Connections, forward};
pub use names::{Feed, Grant, Names};
pub use outgoing::Outgoing;
pub use policy::{Allowed, Policy, Ports};
pub use proxy::{Proxy, ProxyLimits, Redirect};
pub use record::{Learned, Reached, Refused, Rules, Summary, Taps, Used};
pub use refusal::{Code, Refusal};
pub use resolver::{
    LookupError, Resolver, ResolverConfig, ResolverLimits, Serving, Sockets, host_upstreams,
};

/// Doors for the fuzzer.
#[cfg(fuzzing)]
pub mod fuzz {
    pub use super::proxy::fuzz::{chunks, http, tls};
    pub use super::record::take_bytes as netlink;
    pub use super::resolver::fuzz::{answer, question};
}
