//! Rules against snapshots.

use super::*;
use crate::spec::{NetworkMode, NetworkPolicy};

fn policy() -> NetworkPolicy {
    NetworkPolicy::of_mode(NetworkMode::NatFiltered)
}

#[test]
fn a_machine_as_usual() {
    insta::assert_snapshot!(machine(
        &policy(),
        Names::Any,
        &["192.0.2.1".parse().unwrap()]
    ));
}

#[test]
fn a_machine_with_everything() {
    let mut policy = policy();
    policy.ipv6 = true;
    let ports = ["80", "81-90", "443/udp"].map(|port| port.parse().unwrap());
    policy.ports = Some(ports.into());
    policy.exceptions = ["10.1.2.3/32:5432", "[fd00::]/8:443/udp", "192.168.1.0/24"]
        .map(|exception| exception.parse().unwrap())
        .into();
    policy.limits.total = Some(crate::spec::Bytes::gib(1));
    insta::assert_snapshot!(machine(&policy, Names::Any, &[]));
}

#[test]
fn what_names_change() {
    let mut policy = policy();
    policy.exceptions = ["10.1.2.3:443"].map(|one| one.parse().unwrap()).into();
    let text = |names| {
        let table = machine(&policy, names, &[]).tables.pop().unwrap();
        let named = [
            "prerouting",
            "strict",
            "not-strict",
            "service",
            "exceptions",
            "allowed",
        ];
        let chains = table
            .chains
            .iter()
            .filter(|chain| named.contains(&chain.name.as_str()));
        chains.map(ToString::to_string).collect::<String>()
    };
    insta::assert_snapshot!(text(Names::Fed) + "strict:\n" + &text(Names::Strict(8443)));
}

#[test]
fn a_machine_on_a_bridge() {
    insta::assert_snapshot!(bridged(&bridge()));
}

fn bridge() -> crate::spec::Bridge {
    "br0:10.99.0.50/24@10.99.0.1".parse().unwrap()
}

#[test]
fn the_hosts_end() {
    insta::assert_snapshot!(gate());
}

/// What is jumped to is there, and before nothing leads nowhere.
#[test]
fn every_jump_has_an_end() {
    let mut policy = policy();
    policy.ipv6 = true;
    policy.limits.total = Some(crate::spec::Bytes::gib(1));
    let mut tables = machine(&policy, Names::Any, &[]).tables;
    tables.extend(machine(&policy, Names::Strict(1), &[]).tables);
    tables.extend(bridged(&bridge()).tables);
    tables.extend(guard(&bridge(), "token").tables);
    tables.push(gate());
    for table in tables {
        let named = |name: &str| table.chains.iter().any(|chain| chain.name == name);
        let rules = || table.chains.iter().flat_map(|chain| &chain.rules).flatten();
        for expr in rules() {
            match expr {
                Expr::Jump(chain) | Expr::Goto(chain) => assert!(named(chain), "{chain}"),
                Expr::Counter(name) => assert!(table.counters.contains(name), "{name}"),
                Expr::InSet(_, set)
                | Expr::Map(_, set)
                | Expr::DestInSet(_, set)
                | Expr::DestAnyPort(_, set) => {
                    assert!(table.sets.iter().any(|one| one.name == *set), "{set}");
                }
                _ => {}
            }
        }
        for counter in &table.counters {
            let used = rules().any(|expr| matches!(expr, Expr::Counter(name) if name == counter));
            assert!(used, "{counter}");
        }
        for set in &table.sets {
            if let Elements::Chains { ranges, .. } = &set.elements {
                assert!(ranges.iter().all(|(_, chain)| named(chain)));
            }
        }
    }
}
