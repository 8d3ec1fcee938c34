//! What the kernel says of a machine's network: the rules that hold it.

use std::io;
use std::path::Path;

use super::{Finding, Subject, Verdict, expect, finding};
use crate::host::lease::Lease;
use crate::host::netns::Netns;
use crate::host::nft::{self, Shape};
use crate::plan::firewall::{self, Family, Names};
use crate::spec::NetworkPolicy;

const LAYER: &str = "network";

/// Compares the rules, chain by chain, with those that were planned; nothing
/// where the machine has no network.
pub(super) fn look(subject: &Subject) -> io::Result<Vec<Finding>> {
    let Some(network) = &subject.plan.network else {
        return Ok(Vec::new());
    };
    let own = subject.leases.iter().find_map(|lease| match lease {
        Lease::Netns { path } => Some(path.as_path()),
        _ => None,
    });
    let Some(own) = own else {
        let none = "the machine has no network namespace";
        return Ok(vec![finding(LAYER, "filter", Verdict::Fail, none)]);
    };
    let mut findings = vec![filter(&network.policy, own)?];
    if network.policy.bridge.is_none() {
        findings.push(gate(subject)?);
    }
    Ok(findings)
}

/// The rules in the machine's own namespace, but for those that change while it
/// runs.
fn filter(policy: &NetworkPolicy, path: &Path) -> io::Result<Finding> {
    let names = Names::of(policy);
    let changing = firewall::changes(policy, names, 0).chains;
    let fixed = |mut shape: Shape| {
        shape.retain(|chain, _| !changing.iter().any(|one| one.name == *chain));
        shape
    };
    let (mut seen, mut planned) = (Vec::new(), Vec::new());
    let netns = Netns::open(path)?;
    // Addresses of the host are in sets, not in rules.
    for table in firewall::machine(policy, names, &[]).tables {
        planned.push((table.family, fixed(nft::planned(&table))));
        let rules = netns.run_in(|| nft::rules(table.family))??;
        seen.push((table.family, fixed(rules)));
    }
    Ok(compared("filter", &seen, &planned))
}

/// The host's rules for all machines.
fn gate(subject: &Subject) -> io::Result<Finding> {
    let uplink = subject.leases.iter().find_map(|lease| match lease {
        Lease::Uplink { netns, .. } => netns.as_deref(),
        _ => None,
    });
    let netns = match uplink {
        Some(path) => Netns::open(path)?,
        None => Netns::own()?,
    };
    let seen = netns.run_in(|| nft::rules(Family::Inet))??;
    let planned = nft::planned(&firewall::gate());
    let of = |shape| [(Family::Inet, shape)];
    Ok(compared("host's gate", &of(seen), &of(planned)))
}

fn compared(what: &str, seen: &[(Family, Shape)], planned: &[(Family, Shape)]) -> Finding {
    expect(LAYER, what, &said(seen, planned), &said(planned, planned))
}

/// How many rules there are, and which chains are not as planned.
fn said(shapes: &[(Family, Shape)], planned: &[(Family, Shape)]) -> String {
    let chains = || shapes.iter().flat_map(|(_, shape)| shape);
    let (count, rules) = (chains().count(), chains().map(|(_, rules)| rules.len()));
    let mut text = format!("{} rules in {count} chains", rules.sum::<usize>());
    for ((_, shape), (_, planned)) in shapes.iter().zip(planned) {
        let all = shape.keys().chain(planned.keys());
        let mut other: Vec<&str> = all
            .filter(|chain| shape.get(*chain) != planned.get(*chain))
            .map(String::as_str)
            .collect();
        other.dedup();
        if !other.is_empty() {
            other.sort_unstable();
            other.dedup();
            text += &format!(", other than planned in {}", other.join(", "));
        }
    }
    text
}
