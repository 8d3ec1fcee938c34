//! A machine's network on a bridge of the host's.
//!
//! tap <-> a bridge in the machine's namespace <-> veth <-> the host's bridge.
//! What the guest sends is looked at at the tap; nothing has an address.

use std::io;
use std::os::fd::OwnedFd;

use super::error::NetworkError;
use super::route::{self, talk};
use super::{Wires, inside, sysctl};
use crate::host::netns::Netns;
use crate::host::{fault, nft, sys};
use crate::plan::firewall;
use crate::plan::network::{OUT, SWITCH, TAP};
use crate::spec::{Bridge, NetworkPolicy};

/// Group of links of which the host's rules know nothing.
const NO_GROUP: u32 = 0;

/// What a machine is put on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Device {
    Bridge,
    Tap,
}

/// Finds the device on the host.
pub(super) fn find(uplink: &Netns, bridge: &Bridge) -> Result<Device, NetworkError> {
    let found = inside(uplink, "find the bridge", || {
        talk(async |handle| route::find(handle, &bridge.device).await)
    })?;
    found
        .and_then(|link| link.device)
        .ok_or_else(|| NetworkError::NoBridge {
            device: bridge.device.clone(),
        })
}

impl Wires {
    /// Fills the machine's namespace, and joins it to the bridge.
    pub(super) fn make_bridged(
        &self,
        uplink: &Netns,
        netns: &Netns,
        policy: &NetworkPolicy,
        bridge: &Bridge,
    ) -> Result<OwnedFd, NetworkError> {
        let at = |point| fault::at(point).map_err(super::kernel("make", "a network"));
        at("fill netns")?;
        let tap = inside(netns, "make the tap", || fill(bridge))?;
        at("join uplink")?;
        inside(uplink, "join to the bridge", || {
            talk(async |handle| {
                let index = self.link(handle, netns, NO_GROUP).await?;
                let bridge = route::index(handle, &bridge.device).await?;
                route::join_bridge(handle, index, bridge).await
            })
        })?;
        at("route netns")?;
        inside(netns, "join to the tap", || {
            talk(async |handle| {
                let switch = route::index(handle, SWITCH).await?;
                for (name, rate) in [(TAP, policy.limits.download), (OUT, policy.limits.upload)] {
                    let index = route::index(handle, name).await?;
                    route::join_bridge(handle, index, switch).await?;
                    if let Some(rate) = rate {
                        route::shape(handle, index, Some(rate.0)).await?;
                    }
                }
                Ok(())
            })
        })?;
        Ok(tap)
    }
}

/// In the machine's namespace: rules first, as always.
fn fill(bridge: &Bridge) -> io::Result<OwnedFd> {
    sysctl::switch()?;
    let tap = sys::open_tap(TAP)?;
    nft::apply(&firewall::bridged(bridge))?;
    talk(async |handle| {
        let lo = route::index(handle, "lo").await?;
        route::up(handle, lo).await?;
        route::add_bridge(handle, SWITCH).await
    })?;
    Ok(tap)
}
