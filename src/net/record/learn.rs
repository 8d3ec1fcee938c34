//! A policy proposed from what a machine tried.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use crate::net::event::{Event, What};
use crate::net::refusal::Code;
use crate::spec::Domain;
use crate::spec::{HostPattern, NetworkPolicy, Port, Preset, Protocol};

/// Most hosts that are learned.
const MOST: usize = 1000;

/// What a machine tried, and how often it was refused.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Learned {
    /// Names, with the ports that were tried; none where it did not get so far.
    hosts: BTreeMap<Domain, BTreeSet<u16>>,
    /// What no rule about names would let through.
    others: BTreeSet<String>,
    /// Whether there were more.
    more: bool,
}

impl Learned {
    /// Takes in one event.
    pub fn take(&mut self, event: &Event) {
        match &event.what {
            What::Query(query) => {
                let code = query.refusal.as_ref().map(|refusal| refusal.code);
                // What is denied by name, or looks like data, stays so.
                if let Some(Code::HostNotAllowed | Code::NameSpecial) = code {
                    self.host(&query.name, None);
                }
            }
            // What the proxy does with it is told by itself.
            What::Packet(packet) if packet.is_built_in() => {}
            What::Packet(packet) => {
                let Some(to) = packet.destination else {
                    return;
                };
                match (&packet.name, to.port) {
                    (Some(name), Some(port)) if packet.protocol == "tcp" => {
                        self.host(name, Some(port));
                    }
                    _ => {
                        let port = to
                            .port
                            .map(|port| format!(" port {port}"))
                            .unwrap_or_default();
                        self.other(format!("{} {}{port}", packet.protocol, to.address));
                    }
                }
            }
            What::Proxied(proxied) => {
                let code = proxied.refusal.as_ref().map(|refusal| refusal.code);
                let learns = matches!(
                    code,
                    None | Some(Code::HostNotAllowed | Code::PortNotAllowed | Code::NameSpecial)
                );
                if learns && let Some(name) = &proxied.name {
                    self.host(name, Some(proxied.destination.port()));
                }
            }
            What::Flow(_) | What::Exception(_) | What::Lost { .. } => {}
        }
    }

    fn host(&mut self, name: &str, port: Option<u16>) {
        let Ok(name) = Domain::parse(name) else {
            return;
        };
        if self.hosts.len() >= MOST && !self.hosts.contains_key(&name) {
            self.more = true;
            return;
        }
        self.hosts.entry(name).or_default().extend(port);
    }

    fn other(&mut self, what: String) {
        if self.others.len() < MOST {
            self.others.insert(what);
        } else {
            self.more = true;
        }
    }

    /// The smallest policy that lets all of these hosts through at the ports
    /// that were tried.
    pub fn policy(&self) -> NetworkPolicy {
        let usual = Preset::Offline.ports();
        let usual = |&port: &u16| {
            usual.contains(&Port {
                protocol: Protocol::Tcp,
                first: port,
                last: port,
            })
        };
        let mut allow_hosts: Vec<HostPattern> = Vec::new();
        for (name, ports) in &self.hosts {
            // Without a port of its own it is at the preset's.
            if ports.iter().all(usual) {
                allow_hosts.extend(name.as_str().parse());
            } else {
                let at = ports.iter().map(|port| format!("{name}:{port}").parse());
                allow_hosts.extend(at.flatten());
            }
        }
        NetworkPolicy {
            allow_hosts: allow_hosts.into_iter().collect(),
            ..NetworkPolicy::of_preset(Preset::Offline)
        }
    }

    /// The same as a piece of a configuration file, with what it leaves out.
    pub fn to_toml(&self) -> String {
        let mut text =
            String::from("# Learned from what a machine tried: look at it before you use it.\n");
        text.push_str(
            "[network.learned]\nmode = \"nat-filtered\"\npreset = \"offline\"\nallow_hosts = [\n",
        );
        for host in self.policy().allow_hosts {
            let _ = writeln!(text, "    \"{host}\",");
        }
        text.push_str("]\n");
        if !self.others.is_empty() {
            text.push_str("# Tried too, not by an allowed host's name, and so not among these:\n");
            for other in &self.others {
                let _ = writeln!(text, "#   {other}");
            }
        }
        if self.more {
            let _ = writeln!(text, "# And more than {MOST} others.");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::event::{Endpoint, Packet, Proxied, Query, QueryResult};
    use crate::net::policy::Policy;
    use crate::net::refusal::Refusal;

    #[test]
    fn the_policy_lets_through_what_was_tried_and_no_more() {
        let refused = |name: &str, code| {
            What::Query(Query {
                name: name.into(),
                kind: "A".into(),
                result: QueryResult::Refused,
                addresses: vec![],
                rule: None,
                refusal: Some(Refusal::built_in(code, "no", "Do not.")),
                failure: None,
                us: 1,
            })
        };
        let packet = |name: Option<&str>, port| {
            What::Packet(Packet {
                protocol: "tcp".into(),
                source: None,
                destination: Some(Endpoint {
                    address: [10, 0, 0, 1].into(),
                    port: Some(port),
                }),
                name: name.map(Into::into),
                rule: None,
                refusal: None,
            })
        };
        let (source, destination) = ("198.18.0.2:1", "1.1.1.1:443");
        let proxied = What::Proxied(Proxied {
            name: Some("web.org".into()),
            ..Proxied::new(source.parse().unwrap(), destination.parse().unwrap())
        });
        let mut learned = Learned::default();
        for what in [
            refused("new.org", Code::HostNotAllowed),
            refused("denied.org", Code::HostDenied),
            refused("data.evil.com", Code::QueryTunnel),
            packet(Some("git.org"), 22),
            packet(Some("git.org"), 443),
            packet(None, 25),
            proxied,
        ] {
            learned.take(&Event {
                at_ms: 0,
                machine: "m".into(),
                what,
            });
        }
        let text = learned.to_toml();
        let table: toml::Table = toml::from_str(&text).unwrap();
        let network = table["network"]["learned"].clone();
        let request: NetworkPolicy = network.try_into().unwrap();
        assert_eq!(request, learned.policy());
        assert!(text.contains("#   tcp 10.0.0.1 port 25"), "{text}");
        let policy = Policy::new(&request);
        for (name, port, allowed) in [
            ("new.org", 443, true),
            ("web.org", 443, true),
            ("git.org", 22, true),
            ("git.org", 443, true),
            ("git.org", 80, false),
            ("denied.org", 443, false),
            ("data.evil.com", 443, false),
            ("www.new.org", 443, false),
        ] {
            let name = Domain::parse(name).unwrap();
            assert_eq!(
                policy.connect(&name, port).is_ok(),
                allowed,
                "{name} {port}"
            );
        }
    }
}
