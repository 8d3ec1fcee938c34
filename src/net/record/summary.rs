//! What a machine's network came to, in a few lines.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::net::event::{Endpoint, Event, QueryResult, What};
use crate::net::refusal::{Code, Refusal};
use crate::plan::firewall::ALLOW_CIDR;

/// Most hosts, and most refusals, that are told one by one.
const MOST: usize = 1000;

/// What a machine's network came to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Summary {
    /// Hosts that were connected to, by name, or by address where they have none.
    pub hosts: BTreeMap<String, Reached>,
    /// What was refused, by name or address.
    pub refused: BTreeMap<String, Refused>,
    /// Exceptions from what no machine may reach that were made, by address and
    /// port, and how they were used; also those that were not.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub exceptions: BTreeMap<String, Used>,
    /// Hosts and refusals beyond those told one by one.
    pub more: u64,
    /// Questions to the resolver.
    pub queries: u64,
    /// Bytes from the guest.
    pub sent: u64,
    /// Bytes to the guest.
    pub received: u64,
    /// Events that are missing in the record.
    pub lost: u64,
}

/// A host that was connected to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Reached {
    /// How often.
    pub connections: u64,
}

/// An exception that was made.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Used {
    /// How many connections it let through.
    pub connections: u64,
}

/// Something that was refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Refused {
    /// Why, the first time.
    pub code: Code,
    /// By which rule, the first time.
    pub rule: String,
    /// How often.
    pub count: u64,
}

impl Summary {
    /// Takes in one event.
    pub fn take(&mut self, event: &Event) {
        match &event.what {
            What::Query(query) => {
                self.queries += 1;
                match &query.refusal {
                    Some(refusal) if query.result == QueryResult::Refused => {
                        self.refuse(query.name.clone(), refusal);
                    }
                    _ => {}
                }
            }
            What::Packet(packet) => {
                let to = target(packet.name.as_deref(), packet.destination, &packet.protocol);
                match &packet.refusal {
                    Some(refusal) => self.refuse(to, refusal),
                    // It is the proxy that reaches somebody, or not.
                    None if packet.is_built_in() => {}
                    None => self.reach(to),
                }
                let rule = packet.rule.as_deref();
                if let Some(exception) = rule.and_then(|rule| rule.strip_prefix(ALLOW_CIDR)) {
                    self.exception(exception).connections += 1;
                }
            }
            What::Flow(flow) => {
                self.sent += flow.sent;
                self.received += flow.received;
            }
            What::Proxied(proxied) => {
                let port = Some(proxied.destination.port());
                let address = proxied.destination.ip();
                let to = target(
                    proxied.name.as_deref(),
                    Some(Endpoint { address, port }),
                    "tcp",
                );
                // Even one that is cut off later has reached somebody.
                if proxied.connected.is_some() {
                    self.reach(to.clone());
                }
                if let Some(refusal) = &proxied.refusal {
                    self.refuse(to, refusal);
                }
            }
            What::Exception(one) if one.allowed => {
                self.exception(&one.exception.to_string());
            }
            What::Exception(_) => {}
            What::Lost { count } => self.lost += count,
        }
    }

    /// In a few words: `12 hosts, 3 refused`.
    pub fn line(&self) -> String {
        let hosts = match self.hosts.len() {
            1 => "1 host".to_owned(),
            count => format!("{count} hosts"),
        };
        let mut line = format!("{hosts}, {} refused", self.refused.len());
        let used = self
            .exceptions
            .iter()
            .filter(|(_, used)| used.connections > 0);
        for (exception, used) in used {
            line.push_str(&format!(
                ", exception {exception} used {} times",
                used.connections
            ));
        }
        if self.more > 0 {
            line.push_str(&format!(", {} more", self.more));
        }
        if self.lost > 0 {
            line.push_str(&format!(", {} not recorded", self.lost));
        }
        line
    }

    /// Whether an exception let something through.
    pub fn excepted(&self) -> bool {
        self.exceptions.values().any(|used| used.connections > 0)
    }

    /// Exceptions are the user's: there are only so many.
    fn exception(&mut self, exception: &str) -> &mut Used {
        self.exceptions.entry(exception.to_owned()).or_default()
    }

    fn reach(&mut self, to: String) {
        if self.hosts.len() < MOST || self.hosts.contains_key(&to) {
            self.hosts.entry(to).or_default().connections += 1;
        } else {
            self.more += 1;
        }
    }

    fn refuse(&mut self, to: String, refusal: &Refusal) {
        if self.refused.len() < MOST || self.refused.contains_key(&to) {
            let entry = self.refused.entry(to).or_insert_with(|| Refused {
                code: refusal.code,
                rule: refusal.rule.clone(),
                count: 0,
            });
            entry.count += 1;
        } else {
            self.more += 1;
        }
    }
}

fn target(name: Option<&str>, to: Option<Endpoint>, protocol: &str) -> String {
    match (name, to) {
        (Some(name), _) => name.to_owned(),
        (
            None,
            Some(Endpoint {
                address,
                port: Some(port),
            }),
        ) => {
            format!("{} ({protocol} {port})", address)
        }
        (
            None,
            Some(Endpoint {
                address,
                port: None,
            }),
        ) => format!("{address} ({protocol})"),
        (None, None) => format!("({protocol})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::event::{Excepted, Packet, Query};

    fn event(what: What) -> Event {
        Event {
            at_ms: 0,
            machine: "m".into(),
            what,
        }
    }

    #[test]
    fn hosts_and_refusals_are_counted_once_each() {
        let mut summary = Summary::default();
        let refusal = Refusal::built_in(Code::QueryKind, "no", "Do not.");
        let query = |name: &str, refused: bool| {
            event(What::Query(Query {
                name: name.into(),
                kind: "A".into(),
                result: if refused {
                    QueryResult::Refused
                } else {
                    QueryResult::Answered
                },
                addresses: vec![],
                rule: None,
                refusal: refused.then(|| refusal.clone()),
                failure: None,
                us: 1,
            }))
        };
        let packet = |last: u8, name: Option<&str>| {
            event(What::Packet(Packet {
                protocol: "tcp".into(),
                source: None,
                destination: Some(Endpoint {
                    address: [1, 1, 1, last].into(),
                    port: Some(443),
                }),
                name: name.map(Into::into),
                rule: None,
                refusal: None,
            }))
        };
        for event in [
            query("a.org", false),
            query("b.org", true),
            query("b.org", true),
            packet(1, Some("a.org")),
            packet(2, Some("a.org")),
            packet(3, None),
            event(What::Lost { count: 2 }),
        ] {
            summary.take(&event);
        }
        assert_eq!(summary.line(), "2 hosts, 1 refused, 2 not recorded");
        assert_eq!(summary.hosts["a.org"].connections, 2);
        assert!(summary.hosts.contains_key("1.1.1.3 (tcp 443)"));
        assert_eq!(summary.refused["b.org"].count, 2);
        for last in 0..3000_u32 {
            summary.take(&query(&format!("n{last}.org"), true));
        }
        assert_eq!((summary.refused.len(), summary.more), (MOST, 2001));
    }

    #[test]
    fn exceptions_are_named_with_their_use() {
        let mut summary = Summary::default();
        let [one, other] = ["10.1.2.3/32:5432", "10.0.0.0/24"];
        for exception in [one, other] {
            summary.take(&event(What::Exception(Excepted {
                exception: exception.parse().unwrap(),
                allowed: true,
            })));
        }
        assert_eq!(summary.line(), "0 hosts, 0 refused");
        assert!(!summary.excepted());
        let packet = |rule: &str, port| {
            event(What::Packet(Packet {
                protocol: "tcp".into(),
                source: None,
                destination: Some(Endpoint {
                    address: [10, 1, 2, 3].into(),
                    port: Some(port),
                }),
                name: None,
                rule: Some(rule.into()),
                refusal: None,
            }))
        };
        for event in [
            packet("allow-cidr:10.1.2.3/32:5432", 5432),
            packet("allow-cidr:10.1.2.3/32:5432", 5432),
            packet("built-in:proxy", 8443),
            // Made no more: what it let through stays.
            event(What::Exception(Excepted {
                exception: one.parse().unwrap(),
                allowed: false,
            })),
        ] {
            summary.take(&event);
        }
        assert!(summary.excepted());
        assert_eq!(summary.exceptions[one].connections, 2);
        assert_eq!(summary.exceptions[other].connections, 0);
        assert_eq!(summary.hosts.len(), 1, "{summary:?}");
        assert_eq!(
            summary.line(),
            "1 host, 0 refused, exception 10.1.2.3/32:5432 used 2 times"
        );
    }
}
