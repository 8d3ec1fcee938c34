//! Which rule let a connection through, by the mark that it left on it.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::net::event::{Endpoint, Flow, Packet};
use crate::net::names::Names;
use crate::net::policy::Policy;
use crate::plan::firewall::Through;
use crate::spec::{Exception, Protocol};

/// Most connections under way whose beginning is remembered; as many as a machine
/// has at a time unless it is given more.
const MOST: usize = 8192;

/// What lets a machine's connections through, in the user's words. Cheap to clone;
/// all clones are one.
#[derive(Debug, Clone)]
pub struct Rules {
    names: Names,
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    policy: Arc<Policy>,
    /// By mark; also those that are no more, for connections that end later.
    exceptions: HashMap<u32, BTreeSet<Exception>>,
    /// What was said of connections when they began.
    begun: HashMap<Ends, Told>,
}

/// What tells connections apart: protocol, and who began it with whom.
type Ends = (String, Endpoint, Endpoint);

/// What is said of a connection.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Told {
    name: Option<String>,
    rule: Option<String>,
}

impl Rules {
    /// Those of a policy.
    pub fn new(names: Names, policy: Arc<Policy>) -> Self {
        let state = State {
            policy: Arc::clone(&policy),
            exceptions: HashMap::new(),
            begun: HashMap::new(),
        };
        let rules = Self {
            names,
            state: Arc::new(Mutex::new(state)),
        };
        rules.follow(policy);
        rules
    }

    /// Goes by another policy: before its rules are made.
    pub(crate) fn follow(&self, policy: Arc<Policy>) {
        let mut state = self.lock();
        for exception in policy.exceptions() {
            let mark = Through::Exception(*exception).mark();
            state.exceptions.entry(mark).or_default().insert(*exception);
        }
        state.policy = policy;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says of a packet for which name it is, and of one that begins a connection
    /// which rule let it through. That is remembered where a guest began it.
    pub(super) fn tell_packet(&self, packet: &mut Packet, mark: u32, guests: &[IpAddr]) {
        let Some(to) = packet.destination else {
            return;
        };
        if packet.refusal.is_some() {
            packet.name = self.name_of(to.address);
            return;
        }
        let told = self.told(mark, &packet.protocol, to);
        Told {
            name: packet.name,
            rule: packet.rule,
        } = told.clone();
        // One to the proxy has another destination by then than when it ends.
        if let Some(source) = packet.source
            && guests.contains(&source.address)
            && Through::of_mark(mark) != Some(Through::Proxy)
        {
            let begun = &mut self.lock().begun;
            // Their ends were never told: what the marks say has to do.
            if begun.len() >= MOST {
                begun.clear();
            }
            begun.insert((packet.protocol.clone(), source, to), told);
        }
    }

    /// Says of a connection that is over the same as when it began; where that is
    /// not known, what its mark says.
    pub(super) fn tell_flow(&self, flow: &mut Flow, mark: u32) {
        let ends = (flow.protocol.clone(), flow.source, flow.destination);
        let begun = self.lock().begun.remove(&ends);
        Told {
            name: flow.name,
            rule: flow.rule,
        } = begun.unwrap_or_else(|| self.told(mark, &flow.protocol, flow.destination));
    }

    fn told(&self, mark: u32, protocol: &str, to: Endpoint) -> Told {
        let state = self.lock();
        let rule = match Through::of_mark(mark) {
            Some(Through::Host) => {
                let found = self
                    .names
                    .names_of(to.address)
                    .into_iter()
                    .find_map(|name| {
                        let allowed = state.policy.name(&name).ok()?;
                        let at_port = match (protocol, to.port) {
                            ("tcp", Some(port)) => allowed.ports.contains(port),
                            _ => allowed.ports.general(),
                        };
                        at_port.then_some((name, allowed.rule))
                    });
                if let Some((name, rule)) = found {
                    let (name, rule) = (Some(name.into()), Some(rule));
                    return Told { name, rule };
                }
                Some(Through::Host.to_string())
            }
            Some(Through::Port) => {
                let rule = protocol_of(protocol)
                    .zip(to.port)
                    .and_then(|(protocol, port)| state.policy.port(protocol, port));
                Some(rule.unwrap_or_else(|| Through::Port.to_string()))
            }
            Some(other) => Some(other.to_string()),
            None if Through::is_exception(mark) => {
                let all = state.exceptions.get(&mark).into_iter().flatten();
                let all: Vec<_> = all
                    .map(|exception| Through::Exception(*exception).to_string())
                    .collect();
                // Two of one mark are told both: none is told in the other's place.
                Some(match all.is_empty() {
                    true => crate::plan::firewall::ALLOW_CIDR
                        .trim_end_matches(':')
                        .to_owned(),
                    false => all.join(" or "),
                })
            }
            None => None,
        };
        drop(state);
        let name = self.name_of(to.address);
        Told { name, rule }
    }

    fn name_of(&self, address: IpAddr) -> Option<String> {
        self.names.name_of(address).map(String::from)
    }
}

fn protocol_of(name: &str) -> Option<Protocol> {
    [Protocol::Tcp, Protocol::Udp]
        .into_iter()
        .find(|protocol| protocol.as_str() == name)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::spec::{Domain, NetworkPolicy, Preset};

    const GUEST: Endpoint = Endpoint {
        address: IpAddr::V4(std::net::Ipv4Addr::new(198, 18, 0, 2)),
        port: Some(40_000),
    };

    fn to(address: &str, port: u16) -> Endpoint {
        Endpoint {
            address: address.parse().unwrap(),
            port: Some(port),
        }
    }

    fn rules(policy: &NetworkPolicy) -> Rules {
        Rules::new(Names::default(), Arc::new(Policy::new(policy)))
    }

    fn packet(protocol: &str, to: Endpoint) -> Packet {
        Packet {
            protocol: protocol.into(),
            source: Some(GUEST),
            destination: Some(to),
            name: None,
            rule: None,
            refusal: None,
        }
    }

    /// What is said when a connection begins, and when it is over.
    fn both(rules: &Rules, mark: u32, protocol: &str, to: Endpoint) -> [Told; 2] {
        let mut packet = packet(protocol, to);
        rules.tell_packet(&mut packet, mark, &[GUEST.address]);
        let began = Told {
            name: packet.name,
            rule: packet.rule,
        };
        [began, over(rules, mark, protocol, to)]
    }

    fn over(rules: &Rules, mark: u32, protocol: &str, to: Endpoint) -> Told {
        let mut flow = Flow {
            protocol: protocol.into(),
            source: GUEST,
            destination: to,
            name: None,
            rule: None,
            sent: 0,
            received: 0,
            counted: false,
        };
        rules.tell_flow(&mut flow, mark);
        Told {
            name: flow.name,
            rule: flow.rule,
        }
    }

    fn rule(told: &Told) -> Option<&str> {
        told.rule.as_deref()
    }

    #[test]
    fn each_kind_of_rule_is_named() {
        let policy = NetworkPolicy {
            ports: Some(
                ["443", "8000-8100", "123/udp"]
                    .map(|port| port.parse().unwrap())
                    .into(),
            ),
            exceptions: ["10.1.2.3/32:5432".parse().unwrap()].into(),
            ..NetworkPolicy::of_preset(Preset::Dev)
        };
        let rules = rules(&policy);
        let exception = Through::Exception("10.1.2.3/32:5432".parse().unwrap()).mark();
        let other = Through::Exception("10.9.9.9/32".parse().unwrap()).mark();
        let public = |port| to("93.184.215.14", port);
        for (mark, protocol, to, expected) in [
            (1, "udp", to("198.18.0.1", 53), Some("built-in:resolver")),
            (2, "icmp", to("198.18.0.1", 0), Some("built-in:ping")),
            (3, "tcp", public(443), Some("built-in:proxy")),
            (4, "tcp", public(443), Some("preset:dev:443")),
            (4, "tcp", public(8042), Some("allow-port:8000-8100")),
            (4, "udp", public(123), Some("allow-port:123/udp")),
            // It was allowed then.
            (4, "tcp", public(9), Some("allow-port")),
            (5, "tcp", public(443), Some("allow-host")),
            (
                exception,
                "tcp",
                to("10.1.2.3", 5432),
                Some("allow-cidr:10.1.2.3/32:5432"),
            ),
            (other, "tcp", to("10.9.9.9", 1), Some("allow-cidr")),
            // Of somebody else's rule.
            (0, "tcp", public(443), None),
            (77, "tcp", public(443), None),
        ] {
            for told in both(&rules, mark, protocol, to) {
                assert_eq!(rule(&told), expected, "{mark:#x} {protocol} {to:?}");
            }
        }
    }

    #[tokio::test]
    async fn the_host_whose_rule_has_the_port_is_named() {
        let policy = NetworkPolicy {
            allow_hosts: ["web.org", "git.org:22"]
                .map(|host| host.parse().unwrap())
                .into(),
            ..NetworkPolicy::of_preset(Preset::Offline)
        };
        let rules = rules(&policy);
        let address = "93.184.215.14".parse().unwrap();
        for name in ["web.org", "git.org"] {
            let name = Domain::parse(name).unwrap();
            rules
                .names
                .give_out(&name, address, Duration::from_secs(60));
        }
        let mark = Through::Host.mark();
        for (port, name) in [(22, "git.org"), (443, "web.org")] {
            for told in both(&rules, mark, "tcp", to("93.184.215.14", port)) {
                assert_eq!(told.name.as_deref(), Some(name));
                let rule = rule(&told).unwrap();
                assert!(rule.starts_with(&format!("allow-host:{name}")), "{rule}");
            }
        }
    }

    /// What is over is said to have been let through by what let it through.
    #[tokio::test]
    async fn a_connection_outlives_its_rule() {
        let mut policy = NetworkPolicy {
            allow_hosts: ["web.org".parse().unwrap()].into(),
            exceptions: ["10.1.2.3/32:5432".parse().unwrap()].into(),
            ..NetworkPolicy::of_preset(Preset::Offline)
        };
        let rules = rules(&policy);
        let name = Domain::parse("web.org").unwrap();
        let web = to("93.184.215.14", 443);
        rules
            .names
            .give_out(&name, web.address, Duration::from_secs(60));
        let exception = Through::Exception("10.1.2.3/32:5432".parse().unwrap()).mark();
        let mut begun = packet("tcp", web);
        rules.tell_packet(&mut begun, Through::Host.mark(), &[GUEST.address]);
        policy.exceptions.clear();
        policy.allow_hosts.clear();
        let policy = Arc::new(Policy::new(&policy));
        rules.follow(Arc::clone(&policy));
        rules.names.follow(&policy);
        let told = over(&rules, Through::Host.mark(), "tcp", web);
        assert_eq!(told.name.as_deref(), Some("web.org"));
        assert_eq!(rule(&told), Some("allow-host:web.org"));
        // Of this one the beginning was not seen.
        let told = over(&rules, exception, "tcp", to("10.1.2.3", 5432));
        assert_eq!(rule(&told), Some("allow-cidr:10.1.2.3/32:5432"));
        // Its end is told once, and then it is not remembered.
        let told = over(&rules, Through::Host.mark(), "tcp", web);
        assert_eq!(
            (told.name.as_deref(), rule(&told)),
            (None, Some("allow-host"))
        );
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let rules = rules(&NetworkPolicy::default());
        for number in 0..3 * MOST {
            let address = IpAddr::V4((0x0808_0000 + number as u32).into());
            let port = Some(443);
            let mut packet = packet("tcp", Endpoint { address, port });
            rules.tell_packet(&mut packet, Through::Port.mark(), &[GUEST.address]);
            assert_eq!(packet.rule.as_deref(), Some("preset:dev:443"));
        }
        assert!(rules.lock().begun.len() <= MOST);
        // Those of the proxy have no end that is told.
        let before = rules.lock().begun.len();
        let mut packet = packet("tcp", to("93.184.215.14", 22));
        rules.tell_packet(&mut packet, Through::Port.mark(), &[]);
        assert_eq!(rules.lock().begun.len(), before);
        // Nor has a guest's to the proxy, which has another destination by then.
        rules.tell_packet(&mut packet, Through::Proxy.mark(), &[GUEST.address]);
        assert_eq!(rules.lock().begun.len(), before);
    }
}
