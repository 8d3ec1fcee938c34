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
    /// No bridge and no tap has the name.
    #[error("this host has no bridge and no tap {device}")]
    NoBridge {
        /// The name.
        device: String,
    },
    /// The bandwidth of a tap of the host's is its owner's to limit.
    #[error("the bandwidth of the tap {device} is not limited here")]
    NoLimits {
        /// Its name.
        device: String,
    },
    /// The descriptor that was given is not of the tap that the policy names.
    #[error("the tap that was given is not the one that the network names")]
    NotThatTap,
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
            Self::NoLimits { .. } => "network-no-limits",
            Self::NotThatTap => "network-other-tap",
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
            Self::NoBridge { .. } => {
                "`ip link show type bridge` lists bridges, `ip tuntap` lists taps.".into()
            }
            Self::NoLimits { device } => {
                format!("Leave upload and download out, and limit {device} with tc(8).")
            }
            Self::NotThatTap => {
                "Name that tap in the network (`bridge`), and give the network namespace it is in.".into()
            }
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
