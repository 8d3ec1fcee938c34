//! Which names a machine may look up and connect to. Pure.

mod pattern;
mod preset;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::domain::Domain;
use super::refusal::{Code, Refusal};

use pattern::Hosts;
pub use pattern::{BadPattern, HostPattern};
pub use preset::{Preset, PresetData, presets};

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

/// What a user asks for.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct PolicyRequest {
    /// What it starts from.
    pub preset: Preset,
    /// Hosts allowed besides.
    pub allow_hosts: Vec<HostPattern>,
    /// Hosts denied, whatever else allows them.
    pub deny_hosts: Vec<HostPattern>,
    /// TCP ports at which allowed hosts may be reached besides the preset's.
    pub allow_ports: Vec<u16>,
}

/// TCP ports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ports {
    /// Every one.
    All,
    /// These.
    Some(BTreeSet<u16>),
}

impl Ports {
    /// Whether the port is one of them.
    pub fn contains(&self, port: u16) -> bool {
        match self {
            Self::All => true,
            Self::Some(ports) => ports.contains(&port),
        }
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
    ports: Ports,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Allow {
    pattern: HostPattern,
    /// Whether the user wrote it, and not we.
    own: bool,
}

impl Policy {
    /// Makes a policy of a wish.
    ///
    /// # Errors
    /// A rule that denies has a port.
    pub fn new(request: &PolicyRequest) -> Result<Self, BadPattern> {
        if let Some(wrong) = request.deny_hosts.iter().find(|one| one.port.is_some()) {
            return Err(BadPattern::DeniedPort(wrong.clone()));
        }
        let data = request.preset.data();
        let rule = |own| {
            move |pattern: &HostPattern| {
                let pattern = pattern.clone();
                Allow { pattern, own }
            }
        };
        let own = request.allow_hosts.iter().map(rule(true));
        let preset = data.hosts.iter().map(rule(false));
        let ports = match &data.ports {
            None => Ports::All,
            Some(ports) => Ports::Some(ports.iter().chain(&request.allow_ports).copied().collect()),
        };
        Ok(Self {
            preset: request.preset,
            allow: own.chain(preset).collect(),
            deny: request.deny_hosts.clone(),
            ports,
        })
    }

    /// Whether only listed hosts may be reached, so that an address has to be
    /// known by one of their names.
    pub fn is_closed(&self) -> bool {
        !self
            .allow
            .iter()
            .any(|rule| rule.pattern.hosts == Hosts::Any)
    }

    /// The ports of hosts whose rule names none.
    pub fn ports(&self) -> &Ports {
        &self.ports
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
        let mut ports = BTreeSet::new();
        let mut all = false;
        for rule in &matching {
            match (rule.pattern.port, &self.ports) {
                (Some(port), _) => {
                    ports.insert(port);
                }
                (None, Ports::All) => all = true,
                (None, Ports::Some(general)) => ports.extend(general),
            }
        }
        Ok(Allowed {
            rule: match closest.own {
                true => format!("allow-host:{}", closest.pattern),
                false => format!("preset:{}:{}", self.preset, closest.pattern),
            },
            ports: if all { Ports::All } else { Ports::Some(ports) },
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
