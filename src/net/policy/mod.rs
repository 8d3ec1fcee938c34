//! Which names a machine may look up and connect to. Pure.

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use super::address;
use super::refusal::{Code, Refusal};
use crate::spec::{Domain, Exception, HostPattern, Hosts, NetworkPolicy, Port, Preset, Protocol};

/// Top-level names, and some below `arpa`, that mean something only inside
/// somebody's own network (RFC 6761, RFC 6762 appendix G, RFC 8375, RFC 9476,
/// ICANN's `internal`). The public internet answers them with nothing; the
/// host's resolver may tell about the host's network.
const SPECIAL: &[&str] = &[
    "alt",
    "corp",
    "domain",
    "home",
    "home.arpa",
    "host",
    "internal",
    "intranet",
    "invalid",
    "lan",
    "local",
    "localdomain",
    "localhost",
    "mail",
    "onion",
    "private",
    "test",
    "workgroup",
];

/// TCP ports at which a host may be reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ports {
    /// Ranges of the policy, for a host whose rule names no port.
    general: Option<Arc<[(u16, u16)]>>,
    /// Ports that rules name with the host.
    own: BTreeSet<u16>,
}

impl Ports {
    /// Whether the port is one of them.
    pub fn contains(&self, port: u16) -> bool {
        let within = |&(first, last): &(u16, u16)| (first..=last).contains(&port);
        let general = self.general.as_ref();
        self.own.contains(&port) || general.is_some_and(|ranges| ranges.iter().any(within))
    }

    /// Whether the policy's ports are among them.
    pub fn general(&self) -> bool {
        self.general.is_some()
    }

    /// Those that rules name with the host.
    pub fn own(&self) -> &BTreeSet<u16> {
        &self.own
    }
}

/// A name that may be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allowed {
    /// The rule that allows it, the closest where there are several:
    /// `allow-host:*.example.org`, `preset:packages:pypi.org`.
    pub rule: String,
    /// At which ports.
    pub ports: Ports,
    /// Whether a rule has exactly this name: looking it up tells nobody anything.
    pub exact: bool,
}

/// What a machine's names are held to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    preset: Preset,
    allow: Vec<Allow>,
    deny: Vec<HostPattern>,
    ports: Arc<[(u16, u16)]>,
    /// The same as they were written, with those of UDP.
    written: BTreeSet<Port>,
    exceptions: BTreeSet<Exception>,
    ipv6: bool,
    closed: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Allow {
    pattern: HostPattern,
    /// Whether the user wrote it, and not we.
    own: bool,
}

impl Policy {
    /// What a network's policy says of names.
    pub fn new(network: &NetworkPolicy) -> Self {
        let rule = |own| {
            move |pattern: &HostPattern| {
                let pattern = pattern.clone();
                Allow { pattern, own }
            }
        };
        let own = network.allow_hosts.iter().map(rule(true));
        let preset = network.preset.data().hosts.iter().map(rule(false));
        let ports = network.ports();
        let tcp = ports.iter().filter(|port| port.protocol == Protocol::Tcp);
        Self {
            preset: network.preset,
            allow: own.chain(preset).collect(),
            deny: network.deny_hosts.iter().cloned().collect(),
            ports: tcp.map(|port| (port.first, port.last)).collect(),
            exceptions: network.exceptions.clone(),
            ipv6: network.ipv6,
            closed: network.is_closed(),
            written: ports,
        }
    }

    /// The rule that allows a port to any host, the narrowest where there are
    /// several: `preset:dev:443`, `allow-port:8000-8100`.
    pub fn port(&self, protocol: Protocol, port: u16) -> Option<String> {
        let has = |one: &&Port| one.protocol == protocol && (one.first..=one.last).contains(&port);
        let width = |one: &&Port| one.last - one.first;
        let found = self.written.iter().filter(has).min_by_key(width)?;
        Some(match self.preset.ports().contains(found) {
            true => format!("preset:{}:{found}", self.preset),
            false => format!("allow-port:{found}"),
        })
    }

    /// Exceptions from what no machine may reach.
    pub fn exceptions(&self) -> &BTreeSet<Exception> {
        &self.exceptions
    }

    /// Whether the machine has IPv6.
    pub fn ipv6(&self) -> bool {
        self.ipv6
    }

    /// What the address is, where it may not be told.
    pub fn forbids(&self, address: IpAddr) -> Option<&'static str> {
        let holds = |exception: &Exception| exception.cidr.contains(address);
        if self.exceptions.iter().any(holds) {
            return None;
        }
        match address {
            IpAddr::V6(_) if !self.ipv6 => Some("IPv6, which is off"),
            address => address::special(address),
        }
    }

    /// Whether only listed hosts may be reached, so that an address has to be
    /// known by one of their names.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Whether the name may be looked up.
    ///
    /// # Errors
    /// It may not; the refusal names the rule.
    pub fn name(&self, name: &Domain) -> Result<Allowed, Refusal> {
        self.denied(name)?;
        let mut matching: Vec<&Allow> = self
            .allow
            .iter()
            .filter(|rule| rule.pattern.matches(name))
            .collect();
        // Stable: of equally close rules the user's own comes first.
        matching.sort_by_key(|rule| std::cmp::Reverse(rule.pattern.closeness()));
        let Some(closest) = matching.first() else {
            return Err(Refusal {
                code: Code::HostNotAllowed,
                cause: format!("{name} is not among the hosts that this machine may reach"),
                remedy: format!("Allow it with `--allow-host {name}`, if it should be reached."),
                rule: format!("default:{}", self.preset),
            });
        };
        if closest.pattern.hosts == Hosts::Any
            && let Some(special) = special(name)
        {
            return Err(Refusal {
                code: Code::NameSpecial,
                cause: format!("{name} is a name of somebody's own network, not of the internet"),
                remedy: format!("Allow it with `--allow-host {name}`, if it should be looked up."),
                rule: format!("built-in:special-name:{special}"),
            });
        }
        let general = matching.iter().any(|rule| rule.pattern.port().is_none());
        let ports = Ports {
            general: general.then(|| Arc::clone(&self.ports)),
            own: matching
                .iter()
                .filter_map(|rule| rule.pattern.port())
                .collect(),
        };
        Ok(Allowed {
            rule: match closest.own {
                true => format!("allow-host:{}", closest.pattern),
                false => format!("preset:{}:{}", self.preset, closest.pattern),
            },
            ports,
            exact: matches!(closest.pattern.hosts, Hosts::Exact(_)),
        })
    }

    /// Whether the name may be connected to at a TCP port.
    ///
    /// # Errors
    /// It may not; the refusal names the rule.
    pub fn connect(&self, name: &Domain, port: u16) -> Result<Allowed, Refusal> {
        let allowed = self.name(name)?;
        if allowed.ports.contains(port) {
            return Ok(allowed);
        }
        Err(Refusal {
            code: Code::PortNotAllowed,
            cause: format!("{name} may be reached, but not at port {port}"),
            remedy: format!("Allow it with `--allow-host {name}:{port}`."),
            rule: allowed.rule,
        })
    }

    /// Whether an allowed name may be an alias (CNAME) of this one. It need not
    /// be allowed itself: content networks have names of their own.
    ///
    /// # Errors
    /// A rule denies it, or it is of somebody's own network.
    pub fn alias(&self, name: &Domain) -> Result<(), Refusal> {
        self.denied(name)?;
        let own = |rule: &&Allow| rule.pattern.hosts != Hosts::Any && rule.pattern.matches(name);
        match special(name) {
            Some(special) if !self.allow.iter().any(|rule| own(&rule)) => Err(Refusal {
                code: Code::NameSpecial,
                cause: format!("{name} is a name of somebody's own network, not of the internet"),
                remedy: format!("Allow it with `--allow-host {name}`, if it should be looked up."),
                rule: format!("built-in:special-name:{special}"),
            }),
            _ => Ok(()),
        }
    }

    fn denied(&self, name: &Domain) -> Result<(), Refusal> {
        let mut denying: Vec<_> = self.deny.iter().filter(|rule| rule.matches(name)).collect();
        denying.sort_by_key(|rule| std::cmp::Reverse(rule.closeness()));
        match denying.first() {
            None => Ok(()),
            Some(rule) => Err(Refusal {
                code: Code::HostDenied,
                cause: format!("{name} is denied"),
                remedy: format!("Leave out `--deny-host {rule}`, if it should be reached."),
                rule: format!("deny-host:{rule}"),
            }),
        }
    }
}

/// The part of a name that makes it one of somebody's own network.
fn special(name: &Domain) -> Option<&str> {
    if let Some(special) = SPECIAL.iter().find(|special| name.is_within(special)) {
        return Some(special);
    }
    // A single label: whatever the host's search list makes of it.
    (!name.as_str().contains('.')).then(|| name.as_str())
}
