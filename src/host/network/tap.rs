//! A machine's network on a tap of the host's, which its owner has joined to what
//! the guest is to reach.
//!
//! What the guest sends is looked at at that tap, by a table of the machine's own
//! in the tap's namespace.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use super::bridge::Device;
use super::error::{NetworkError, kernel};
use super::route::{self, talk};
use super::{Wires, inside};
use crate::host::lease::Lease;
use crate::host::netns::Netns;
use crate::host::{fault, nft, sys};
use crate::plan::firewall;
use crate::spec::{Bridge, NetworkPolicy};

impl Wires {
    /// Puts the rules at the tap and gives its other end: the one that is given,
    /// or else by its name.
    pub(super) fn take_tap(
        &self,
        uplink: &Netns,
        policy: &NetworkPolicy,
        bridge: &Bridge,
        given: Option<BorrowedFd<'_>>,
    ) -> Result<OwnedFd, NetworkError> {
        let device = || bridge.device.clone();
        let limits = &policy.limits;
        if limits.upload.is_some() || limits.download.is_some() {
            return Err(NetworkError::NoLimits { device: device() });
        }
        let opened = match given {
            Some(end) => {
                is_of(end, uplink, bridge)?;
                end.try_clone_to_owned()
            }
            None => uplink
                .run_in(|| sys::attach_tap(&bridge.device))
                .and_then(|opened| opened),
        };
        let tap = opened.map_err(kernel("open the tap", device()))?;
        fault::at("guard tap").map_err(kernel("make", "a network"))?;
        // Nobody sends anything yet: QEMU has it from the caller.
        inside(uplink, "put rules at the tap", || {
            nft::apply(&firewall::guard(bridge, &self.token()))
        })?;
        // Whatever was renamed meanwhile.
        is_of(tap.as_fd(), uplink, bridge)?;
        Ok(tap)
    }
}

/// The namespace of the tap of the host's that a machine of these leases is on, and
/// what its table there is told by; none where it is on no tap.
///
/// # Errors
/// The namespace is gone, or the kernel does not answer.
pub fn guarded(leases: &[Lease]) -> io::Result<Option<(Netns, String)>> {
    let found = leases.iter().find_map(|lease| match lease {
        Lease::Uplink {
            netns,
            token,
            device: Some(device),
        } => Some((netns.as_deref(), token, device)),
        _ => None,
    });
    let Some((netns, token, device)) = found else {
        return Ok(None);
    };
    let netns = match netns {
        Some(path) => Netns::open(path)?,
        None => Netns::own()?,
    };
    let link = netns.run_in(|| talk(async |handle| route::find(handle, device).await))??;
    let tap = link.and_then(|link| link.device) == Some(Device::Tap);
    Ok(tap.then(|| (netns, token.clone())))
}

/// Says whether this is an end of that tap: the rules would be at another one.
fn is_of(end: BorrowedFd<'_>, uplink: &Netns, bridge: &Bridge) -> Result<(), NetworkError> {
    let looked_at = || -> io::Result<bool> {
        let (name, netns) = sys::tap_of(end)?;
        Ok(name.as_ref() == Some(&bridge.device) && Netns::from(netns).is(uplink)?)
    };
    match looked_at().map_err(kernel("look at the descriptor of", &bridge.device))? {
        true => Ok(()),
        false => Err(NetworkError::NotThatTap),
    }
}
