//! The network of a machine, the same inside for every machine.
//!
//! tap <-> router in the machine's namespace <-> veth <-> masquerade on the
//! host. A clone needs no new address: what differs is outside.

use std::net::{Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use crate::spec::{Bridge, NetworkMode, NetworkPolicy};

/// The guest's hardware address.
pub const GUEST_MAC: [u8; 6] = [0x02, 0x62, 0x68, 0, 0, 0x02];
/// The gateway's, on the guest's side.
pub const GATEWAY_MAC: [u8; 6] = [0x02, 0x62, 0x68, 0, 0, 0x01];
/// The guest's address. 198.18.0.0/15 is for benchmarks (RFC 2544): no LAN has
/// it, and so no LAN is hidden from a guest that may reach it.
pub const GUEST4: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 2);
/// The gateway's address: it routes, and name resolution is there.
pub const GATEWAY4: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);
/// Length of their prefix.
pub const PREFIX4: u8 = 30;
/// The guest's address with IPv6 (a unique local one, RFC 4193).
pub const GUEST6: Ipv6Addr = Ipv6Addr::new(0xfd62, 0x756c, 0x6b68, 0, 0, 0, 0, 2);
/// The gateway's.
pub const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd62, 0x756c, 0x6b68, 0, 0, 0, 0, 1);
/// Length of their prefix: nobody else is on their link.
pub const PREFIX6: u8 = 126;
/// What the guest's hardware address gives (RFC 4291, appendix A).
pub const LINK_LOCAL6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0x62, 0x68ff, 0xfe00, 2);
/// The same of the gateway's.
pub const GATEWAY_LINK_LOCAL6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0x62, 0x68ff, 0xfe00, 1);
/// The device towards the guest, in the machine's namespace.
pub const TAP: &str = "tap";
/// The device towards the host.
pub const OUT: &str = "out";
/// What joins both where the machine is on a bridge of the host's.
pub const SWITCH: &str = "switch";
/// Where the proxy of strict mode listens, at the gateway.
pub const PROXY: u16 = 8443;
/// Group of the host's ends of all machines' links (ip-link(8)): "bh".
pub const GROUP: u32 = 0x6268;
/// Group of those whose machine has ended, until the kernel has taken them away.
pub const RETIRED: u32 = 0x6269;

/// The network of a planned machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// What it may reach and use.
    pub policy: NetworkPolicy,
}

impl Network {
    /// That of a policy; none where it is isolated.
    pub(super) fn of(policy: &NetworkPolicy) -> Option<Self> {
        (policy.mode != NetworkMode::Isolated).then(|| Self {
            policy: policy.clone(),
        })
    }

    /// The guest's hardware address.
    pub(super) fn mac(&self) -> [u8; 6] {
        self.policy.bridge.as_ref().map_or(GUEST_MAC, Bridge::mac)
    }

    /// What the guest agent is told of it, on the kernel's command line.
    pub(super) fn options(&self) -> Vec<String> {
        if let Some(bridge) = &self.policy.bridge {
            let Bridge {
                address,
                prefix,
                gateway,
                ..
            } = bridge;
            return vec![format!("bulkhead.ip={address}/{prefix}@{gateway}")];
        }
        let mut options = vec![format!("bulkhead.ip={GUEST4}/{PREFIX4}@{GATEWAY4}")];
        if self.policy.ipv6 {
            options.push(format!("bulkhead.ip6={GUEST6}/{PREFIX6}@{GATEWAY6}"));
        }
        options
    }
}

/// A hardware address as text.
pub fn mac(address: [u8; 6]) -> String {
    address.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_link_local_address_follows_from_the_hardware_address() {
        for (mac, address) in [(GUEST_MAC, LINK_LOCAL6), (GATEWAY_MAC, GATEWAY_LINK_LOCAL6)] {
            let [a, b, c, d, e, f] = mac;
            let interface = [a ^ 2, b, c, 0xff, 0xfe, d, e, f];
            assert_eq!(address.octets()[8..], interface);
        }
    }
}
