//! Why a machine's network could not be made.

use std::io;

use crate::error::Explain;
use crate::spec::Cidr;

/// A network could not be made, changed or read.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The kernel refused something.
    #[error("cannot {action} {what}")]
    Kernel {
        /// What was tried.
        action: &'static str,
        /// On what.
        what: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Networks are root's to make.
    #[error("a network of mode nat-filtered is root's to make")]
    NotRoot,
    /// The addresses for machines are in use on this host.
    #[error("the addresses for machines, {pool}, clash with the host's route to {route}")]
    Clash {
        /// The pool.
        pool: Cidr,
        /// The route.
        route: Cidr,
    },
    /// Every address is taken.
    #[error("all addresses for machines in {pool} are taken")]
    Full {
        /// The pool.
        pool: Cidr,
    },
    /// No bridge has the name.
    #[error("this host has no bridge {device}")]
    NoBridge {
        /// The name.
        device: String,
    },
    /// The host does not forward IPv6.
    #[error("this host does not forward IPv6")]
    NoForwarding6,
}

impl Explain for NetworkError {
    fn code(&self) -> &'static str {
        match self {
            Self::Kernel { .. } => "network-refused",
            Self::NotRoot => "network-not-root",
            Self::Clash { .. } => "network-clash",
            Self::Full { .. } => "network-full",
            Self::NoBridge { .. } => "network-no-bridge",
            Self::NoForwarding6 => "network-no-ipv6",
        }
    }

    fn remedy(&self) -> String {
        match self {
            Self::Kernel { .. } => {
                "Run as root on a kernel with nftables, veth and tun (`bulkhead doctor` looks), or take --network isolated.".into()
            }
            Self::NotRoot => "Run as root, or take --network isolated.".into(),
            Self::Clash { .. } => "Give machines other addresses with `network_pool`.".into(),
            Self::Full { .. } => "Stop a machine, or give a larger `network_pool`.".into(),
            Self::NoBridge { .. } => "`ip link show type bridge` lists bridges.".into(),
            Self::NoForwarding6 => {
                "Set net.ipv6.conf.all.forwarding=1, and accept_ra=2 on links that get their addresses by router advertisement; or leave --ipv6 out.".into()
            }
        }
    }
}

/// Makes an error of an action on something.
pub(super) fn kernel(
    action: &'static str,
    what: impl Into<String>,
) -> impl FnOnce(io::Error) -> NetworkError {
    let what = what.into();
    move |source| NetworkError::Kernel {
        action,
        what,
        source,
    }
}
