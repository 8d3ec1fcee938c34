use proptest::prelude::*;

use super::*;

fn name(text: &str) -> Domain {
    Domain::parse(text).unwrap()
}

fn patterns(texts: &[&str]) -> BTreeSet<HostPattern> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn policy(preset: Preset, allow: &[&str], deny: &[&str]) -> Policy {
    Policy::new(&NetworkPolicy {
        allow_hosts: patterns(allow),
        deny_hosts: patterns(deny),
        ..NetworkPolicy::of_preset(preset)
    })
}

#[test]
fn dev_allows_public_names_at_its_ports() {
    let policy = policy(Preset::Dev, &[], &[]);
    let allowed = policy.connect(&name("example.org"), 443).unwrap();
    assert_eq!(allowed.rule, "preset:dev:*");
    assert!(!allowed.exact && !policy.is_closed());
    let refusal = policy.connect(&name("example.org"), 25).unwrap_err();
    assert_eq!(refusal.code, Code::PortNotAllowed);
    for special in [
        "localhost",
        "nas",
        "nas.lan",
        "a.b.internal",
        "printer.local",
        "x.home.arpa",
    ] {
        let refusal = policy.name(&name(special)).unwrap_err();
        assert_eq!(refusal.code, Code::NameSpecial, "{special}");
    }
}

#[test]
fn a_special_name_is_allowed_by_its_own_rule_only() {
    let policy = policy(Preset::Dev, &["git.internal", "*.lab.lan"], &[]);
    assert!(policy.name(&name("git.internal")).is_ok());
    assert!(policy.name(&name("a.lab.lan")).is_ok());
    assert!(policy.name(&name("db.internal")).is_err());
    assert!(policy.alias(&name("git.internal")).is_ok());
    assert_eq!(
        policy.alias(&name("db.internal")).unwrap_err().code,
        Code::NameSpecial
    );
}

#[test]
fn packages_allows_registries_and_what_is_added() {
    let policy = policy(Preset::Packages, &["example.org:8443"], &[]);
    assert!(policy.is_closed());
    let allowed = policy.connect(&name("PyPI.org."), 443).unwrap();
    assert_eq!(
        (allowed.rule.as_str(), allowed.exact),
        ("preset:packages:pypi.org", true)
    );
    let refusal = policy.name(&name("evil.example")).unwrap_err();
    assert_eq!(
        (refusal.code, refusal.rule.as_str()),
        (Code::HostNotAllowed, "default:packages")
    );
    assert!(refusal.remedy.contains("--allow-host evil.example"));
    assert!(policy.connect(&name("example.org"), 8443).is_ok());
    assert!(policy.connect(&name("example.org"), 443).is_err());
}

#[test]
fn offline_allows_what_is_named() {
    let none = policy(Preset::Offline, &[], &[]);
    assert!(none.is_closed() && none.name(&name("example.org")).is_err());
    let one = policy(Preset::Offline, &["*.example.org"], &[]);
    assert!(one.connect(&name("a.example.org"), 443).is_ok());
    assert!(one.name(&name("example.org")).is_err());
}

#[test]
fn open_means_every_port() {
    let policy = policy(Preset::Open, &[], &[]);
    assert!(policy.connect(&name("example.org"), 6667).is_ok());
    assert!(policy.name(&name("localhost")).is_err());
}

#[test]
fn a_port_is_the_policys_or_a_rules_own() {
    let policy = policy(Preset::Offline, &["*.org", "a.org:22", "b.net:8443"], &[]);
    let ports = |text| policy.name(&name(text)).unwrap().ports;
    let (both, own) = (ports("a.org"), ports("b.net"));
    assert!(both.general() && both.contains(443) && both.contains(22) && !both.contains(8443));
    assert!(!own.general() && own.contains(8443) && !own.contains(443));
    assert_eq!(own.own(), &[8443].into());
}

#[test]
fn deny_wins_and_says_so() {
    let policy = policy(
        Preset::Packages,
        &["example.org", "*.example.org"],
        &["*.example.org", "pypi.org", "secret.example.org"],
    );
    assert!(policy.name(&name("example.org")).is_ok());
    let refusal = policy.name(&name("secret.example.org")).unwrap_err();
    assert_eq!(
        (refusal.code, refusal.rule.as_str()),
        (Code::HostDenied, "deny-host:secret.example.org")
    );
    assert!(policy.name(&name("pypi.org")).is_err());
    assert!(policy.alias(&name("a.b.example.org")).is_err());
    assert!(policy.alias(&name("some.cdn.net")).is_ok());
}

fn any_pattern() -> impl Strategy<Value = HostPattern> {
    "(\\*|(\\*\\.)?[ab](\\.[ab]){0,3}\\.org)(:(80|443|22))?"
        .prop_map(|text| text.parse().expect("it is one"))
}

/// The same hosts, at any port.
fn at_all_ports(pattern: &HostPattern) -> HostPattern {
    let text = pattern.to_string();
    text.split(':').next().unwrap().parse().unwrap()
}

fn any_name() -> impl Strategy<Value = Domain> {
    "[ab](\\.[ab]){0,4}\\.org".prop_map(|text| name(&text))
}

fn any_preset() -> impl Strategy<Value = Preset> {
    proptest::sample::select(&Preset::ALL[..])
}

proptest! {
    #[test]
    fn what_is_denied_is_never_allowed(
        preset in any_preset(),
        allow in proptest::collection::vec(any_pattern(), 0..5),
        deny in proptest::collection::vec(any_pattern(), 0..4),
        name in any_name(),
        port: u16,
    ) {
        let deny: BTreeSet<_> = deny.iter().map(at_all_ports).collect();
        let network = NetworkPolicy {
            allow_hosts: allow.iter().cloned().collect(),
            deny_hosts: deny.clone(),
            ..NetworkPolicy::of_preset(preset)
        };
        let policy = Policy::new(&network);
        let general = network.ports();
        let general = |port| general.iter().any(|one| {
            one.protocol == Protocol::Tcp && (one.first..=one.last).contains(&port)
        });
        let denied = deny.iter().any(|one| one.matches(&name));
        let connect = policy.connect(&name, port);
        if denied {
            prop_assert_eq!(connect.unwrap_err().code, Code::HostDenied);
            prop_assert!(policy.alias(&name).is_err());
            return Ok(());
        }
        let listed = allow.iter().chain(&preset.data().hosts).any(|one| one.matches(&name));
        prop_assert_eq!(policy.name(&name).is_ok(), listed);
        // A connection is allowed exactly when one rule alone would allow it.
        let at_port = |one: &HostPattern| one.matches(&name) && match one.port() {
            Some(own) => own == port,
            None => general(port),
        };
        let expected = allow.iter().chain(&preset.data().hosts).any(at_port);
        prop_assert_eq!(connect.is_ok(), expected);
    }

    /// More rules that allow never take anything away, more that deny never add.
    #[test]
    fn rules_only_go_their_own_way(
        preset in any_preset(),
        allow in proptest::collection::vec(any_pattern(), 0..4),
        more in any_pattern(),
        name in any_name(),
        port in proptest::sample::select(&[22, 80, 443, 9999][..]),
    ) {
        let network = NetworkPolicy {
            allow_hosts: allow.into_iter().collect(),
            ..NetworkPolicy::of_preset(preset)
        };
        let before = Policy::new(&network).connect(&name, port).is_ok();
        let mut wider = network.clone();
        wider.allow_hosts.insert(more.clone());
        prop_assert!(!before || Policy::new(&wider).connect(&name, port).is_ok());
        let mut narrower = network;
        narrower.deny_hosts.insert(at_all_ports(&more));
        prop_assert!(before || Policy::new(&narrower).connect(&name, port).is_err());
    }

    /// However a name is written, the answer is the same.
    #[test]
    fn writing_a_name_otherwise_changes_nothing(
        allow in any_pattern(), name in any_name(), shout: bool, dot: bool,
    ) {
        let policy = Policy::new(&NetworkPolicy {
            allow_hosts: [allow].into(),
            ..NetworkPolicy::of_preset(Preset::Offline)
        });
        let mut text = name.to_string();
        if shout { text = text.to_uppercase(); }
        if dot { text.push('.'); }
        let other = Domain::parse(&text).unwrap();
        prop_assert_eq!(policy.name(&name), policy.name(&other));
    }
}
