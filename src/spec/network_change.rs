//! Changes to a machine's network: what more it may reach, what no longer, and
//! its limits.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::address::{Exception, Port};
use super::error::SpecError;
use super::host::HostPattern;
use super::network::{NetworkMode, NetworkPolicy};
use super::units::Bytes;

/// Changes to a network; what is absent stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NetworkChange {
    /// Hosts that may be reached from now on.
    pub allow_hosts: BTreeSet<HostPattern>,
    /// Hosts that may not.
    pub deny_hosts: BTreeSet<HostPattern>,
    /// Ports that may be reached from now on.
    pub allow_ports: BTreeSet<Port>,
    /// Ports that may not.
    pub deny_ports: BTreeSet<Port>,
    /// Exceptions from now on.
    pub allow_cidrs: BTreeSet<Exception>,
    /// Exceptions no more.
    pub deny_cidrs: BTreeSet<Exception>,
    /// Bytes a second from the guest.
    pub upload: Option<Bytes>,
    /// Bytes a second to the guest.
    pub download: Option<Bytes>,
    /// New connections a second.
    pub connection_rate: Option<u32>,
    /// Connections at a time.
    pub connections: Option<u32>,
    /// Bytes in all.
    pub total: Option<Bytes>,
}

impl NetworkChange {
    /// Whether something is denied that was allowed.
    pub fn denies(&self) -> bool {
        !self.deny_hosts.is_empty() || !self.deny_ports.is_empty() || !self.deny_cidrs.is_empty()
    }

    /// Says whether it can be made to `policy`.
    ///
    /// # Errors
    /// There is no network, an exception that is to go is none, or a limit is
    /// out of range.
    pub fn check(&self, policy: &NetworkPolicy) -> Result<(), SpecError> {
        if *self == Self::default() {
            return Ok(());
        }
        let second = match policy.mode {
            NetworkMode::NatFiltered => None,
            NetworkMode::Isolated => Some("a machine without one"),
            NetworkMode::Bridge => Some("a machine on a bridge"),
        };
        if let Some(second) = second {
            return Err(SpecError::Clash {
                first: "a change of the network",
                second,
            });
        }
        if let Some(unknown) = self.deny_cidrs.difference(&policy.exceptions).next() {
            return Err(SpecError::Value {
                what: "deny",
                value: unknown.to_string(),
                why: "it is not among the machine's exceptions (`bulkhead net show`)",
            });
        }
        let mut changed = policy.clone();
        self.apply(&mut changed);
        changed.check()
    }

    /// Makes it.
    pub fn apply(&self, policy: &mut NetworkPolicy) {
        // What was said last counts.
        policy
            .deny_hosts
            .retain(|host| !self.allow_hosts.contains(host));
        policy.allow_hosts.extend(self.allow_hosts.iter().cloned());
        policy
            .allow_hosts
            .retain(|host| !self.deny_hosts.contains(host));
        policy.deny_hosts.extend(self.deny_hosts.iter().cloned());
        if !self.allow_ports.is_empty() || !self.deny_ports.is_empty() {
            let mut ports: BTreeSet<Port> =
                policy.ports().union(&self.allow_ports).copied().collect();
            for port in &self.deny_ports {
                ports = ports.iter().flat_map(|one| without(*one, *port)).collect();
            }
            policy.ports = Some(ports);
        }
        policy.exceptions.extend(&self.allow_cidrs);
        for exception in &self.deny_cidrs {
            policy.exceptions.remove(exception);
        }
        let limits = &mut policy.limits;
        limits.upload = self.upload.or(limits.upload);
        limits.download = self.download.or(limits.download);
        limits.connection_rate = self.connection_rate.unwrap_or(limits.connection_rate);
        limits.connections = self.connections.unwrap_or(limits.connections);
        limits.total = self.total.or(limits.total);
    }
}

/// What is left of a range of ports without another.
fn without(range: Port, taken: Port) -> Vec<Port> {
    if range.protocol != taken.protocol || taken.last < range.first || range.last < taken.first {
        return vec![range];
    }
    let below = (range.first < taken.first).then(|| Port {
        last: taken.first - 1,
        ..range
    });
    let above = (taken.last < range.last).then(|| Port {
        first: taken.last + 1,
        ..range
    });
    below.into_iter().chain(above).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set<T: std::str::FromStr + Ord, const N: usize>(texts: [&str; N]) -> BTreeSet<T> {
        texts.iter().filter_map(|text| text.parse().ok()).collect()
    }

    #[test]
    fn ports_are_cut_out_of_ranges() {
        let mut policy = NetworkPolicy {
            ports: Some(set(["1-100", "443", "443/udp", "8000-8010"])),
            ..NetworkPolicy::default()
        };
        let change = NetworkChange {
            deny_ports: set(["22", "100-443", "7000-8005"]),
            allow_ports: set(["50"]),
            ..NetworkChange::default()
        };
        change.check(&policy).unwrap();
        change.apply(&mut policy);
        let left: Vec<_> = policy.ports().iter().map(Port::to_string).collect();
        assert_eq!(left, ["1-21", "23-99", "50", "8006-8010", "443/udp"]);
    }

    #[test]
    fn what_is_said_last_of_a_host_counts() {
        let mut policy = NetworkPolicy {
            allow_hosts: set(["a.org", "*.b.org"]),
            deny_hosts: set(["c.org", "d.org"]),
            ..NetworkPolicy::default()
        };
        let change = NetworkChange {
            allow_hosts: set(["c.org"]),
            deny_hosts: set(["a.org", "e.org"]),
            ..NetworkChange::default()
        };
        assert!(change.denies());
        change.check(&policy).unwrap();
        change.apply(&mut policy);
        assert_eq!(policy.allow_hosts, set(["*.b.org", "c.org"]));
        assert_eq!(policy.deny_hosts, set(["a.org", "d.org", "e.org"]));
        let at_a_port = NetworkChange {
            deny_hosts: set(["a.org:80"]),
            ..NetworkChange::default()
        };
        assert!(at_a_port.check(&policy).is_err());
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let limits = NetworkChange {
            connections: Some(0),
            ..NetworkChange::default()
        };
        assert!(limits.check(&NetworkPolicy::default()).is_err());
        let unknown = NetworkChange {
            deny_cidrs: set(["10.0.0.1"]),
            ..NetworkChange::default()
        };
        assert!(unknown.check(&NetworkPolicy::default()).is_err());
        let isolated = NetworkPolicy::of_mode(NetworkMode::Isolated);
        let port = NetworkChange {
            allow_ports: set(["80"]),
            ..NetworkChange::default()
        };
        assert!(port.check(&isolated).is_err());
        assert!(NetworkChange::default().check(&isolated).is_ok());
    }
}
