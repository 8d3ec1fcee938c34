//! What the kernel says of a machine's network: the rules that hold it.

use std::io;
use std::net::IpAddr;
use std::sync::PoisonError;

use super::{Finding, Subject, Verdict, expect, finding};
use crate::host::lease::Lease;
use crate::host::netns::Netns;
use crate::host::network::guarded;
use crate::host::nft::{self, ChainShape, Leading, Shape};
use crate::plan::firewall::{self, Elements, Names, Set, Table};

const LAYER: &str = "network";

/// Compares the rules, one by one, with those that are planned; nothing where the
/// machine has no network.
pub(super) fn look(subject: &Subject) -> io::Result<Vec<Finding>> {
    let Some(policy) = &subject.policy else {
        return Ok(Vec::new());
    };
    // It does not change meanwhile.
    let policy = policy.lock().unwrap_or_else(PoisonError::into_inner);
    // Where it leads may be kept under a path, too, and comes before.
    let own = subject.leases.iter().rev().find_map(|lease| match lease {
        Lease::Netns { path } => Some(path.as_path()),
        _ => None,
    });
    let Some(own) = own else {
        let none = "the machine has no network namespace";
        return Ok(vec![finding(LAYER, "filter", Verdict::Fail, none)]);
    };
    let (netns, planned) = match (&policy.bridge, guarded(&subject.leases)?) {
        (Some(bridge), Some((netns, token))) => (netns, firewall::guard(bridge, &token)),
        // Addresses of the host are in maps, not in rules.
        _ => (
            Netns::open(own)?,
            firewall::machine(&policy, Names::of(&policy), &[]),
        ),
    };
    let mut findings = vec![rules("filter", &netns, &planned.tables)?];
    if policy.bridge.is_none() {
        findings.push(sets(&netns, &planned.tables)?);
        findings.push(gate(subject)?);
    }
    Ok(findings)
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
    rules("host's gate", &netns, &[firewall::gate()])
}

/// The rules of some tables in a namespace.
fn rules(what: &str, netns: &Netns, tables: &[Table]) -> io::Result<Finding> {
    let (mut count, mut chains, mut others) = (0, 0, Vec::new());
    let mut expected = (0, 0);
    for table in tables {
        let seen = netns.run_in(|| nft::rules(table.family, &table.name))??;
        let planned = nft::planned(table);
        let rules = |shape: &Shape| shape.values().map(|chain| chain.rules.len()).sum::<usize>();
        (count, chains) = (count + rules(&seen), chains + seen.len());
        expected = (expected.0 + rules(&planned), expected.1 + planned.len());
        others.extend(differences(table, &seen, &planned));
    }
    let text = |(rules, chains)| format!("{rules} rules in {chains} chains");
    let mut measured = text((count, chains));
    if !others.is_empty() {
        measured += &format!(", other than planned in {}", others.join("; "));
    }
    Ok(expect(LAYER, what, &measured, &text(expected)))
}

/// Each chain that is not as planned, and what in it.
fn differences(table: &Table, seen: &Shape, planned: &Shape) -> Vec<String> {
    let all: std::collections::BTreeSet<_> = seen.keys().chain(planned.keys()).collect();
    let none = ChainShape::default();
    let of = |shape: &Shape, chain: &str| shape.get(chain).unwrap_or(&none).clone();
    let differing = all.into_iter().filter_map(|chain| {
        let (seen, planned) = (of(seen, chain), of(planned, chain));
        (seen != planned)
            .then(|| format!("{chain} ({})", difference(table, chain, &seen, &planned)))
    });
    differing.collect()
}

/// What is not as planned in a chain: the first rule that differs, in the words of
/// its plan.
fn difference(table: &Table, chain: &str, seen: &ChainShape, planned: &ChainShape) -> String {
    if let (Some(seen), Some(planned)) = (&seen.base, &planned.base)
        && seen != planned
    {
        return format!("{seen} instead of {planned}");
    }
    let pairs = seen.rules.iter().zip(&planned.rules);
    let first = pairs.take_while(|(seen, planned)| seen == planned).count();
    let words = table.chains.iter().find(|one| one.name == chain);
    let words = words.and_then(|chain| chain.rules.get(first)).map(|rule| {
        let words: Vec<_> = rule.iter().map(ToString::to_string).collect();
        format!("rule {}, {}", first + 1, words.join(" "))
    });
    match (seen.rules.len(), planned.rules.len()) {
        (one, other) if one != other => format!(
            "{one} rules instead of {other}, from {}",
            words.unwrap_or_else(|| "its end".into())
        ),
        _ => words.unwrap_or_else(|| "where packets enter it".into()),
    }
}

/// The maps of what no machine may reach, and the ports that it may. Those of a
/// machine also have what were the host's addresses when it started.
fn sets(netns: &Netns, tables: &[Table]) -> io::Result<Finding> {
    let (mut seen_count, mut count, mut others) = (0, 0, Vec::new());
    for table in tables {
        for set in &table.sets {
            let Some(planned) = leading(set) else {
                continue;
            };
            let read = || nft::ranges(table.family, &table.name, set.name);
            let seen = match netns.run_in(read)? {
                // There is no such map.
                Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
                seen => seen?,
            };
            seen_count += seen.len();
            count += planned.len();
            if matches!(set.elements, Elements::Ports(_)) {
                others.extend((seen != planned).then(|| format!("{}: other ports", set.name)));
                continue;
            }
            let other = other(&seen, &planned);
            others.extend(other.map(|other| format!("{}: {other}", set.name)));
        }
    }
    let measured = format!("{seen_count} ranges");
    match others.is_empty() {
        true => Ok(finding(LAYER, "never reached", Verdict::Pass, measured)),
        false => {
            let measured = format!("{measured}, other than planned in {}", others.join("; "));
            Ok(expect(
                LAYER,
                "never reached",
                &measured,
                &format!("{count} ranges, and the host's addresses"),
            ))
        }
    }
}

/// The ranges of a map as they are planned.
fn leading(set: &Set) -> Option<Vec<Leading>> {
    match &set.elements {
        Elements::Chains { ranges, .. } => {
            let leading = ranges
                .iter()
                .map(|(cidr, chain)| (cidr.first(), cidr.last(), nft::leads_to(chain)));
            Some(leading.collect())
        }
        Elements::Ports(ranges) => {
            // As numbers of addresses; where the last has no end, nor has it.
            let end = |last: u16| last.checked_add(1).map_or(u32::MAX, |_| last.into());
            let address = |number: u32| IpAddr::V4(number.into());
            let mut ports: Vec<_> = ranges
                .iter()
                .map(|(first, last)| (address((*first).into()), address(end(*last))))
                .map(|(first, last)| (first, last, nft::leads_nowhere()))
                .collect();
            ports.sort();
            Some(ports)
        }
        Elements::Timed { .. } => None,
    }
}

/// The first address that does not lead where it is planned to, nor is the host's.
fn other(seen: &[Leading], planned: &[Leading]) -> Option<String> {
    let host = nft::leads_to("refuse-host");
    let at = |ranges: &[Leading], address: IpAddr| {
        let found = ranges
            .iter()
            .find(|(first, last, _)| (*first..=*last).contains(&address));
        found.map(|(_, _, leads)| leads.clone())
    };
    // Where it changes at all.
    let both = || seen.iter().chain(planned);
    let begins = both().map(|(first, ..)| Some(*first));
    let edges = begins.chain(both().map(|(_, last, _)| after(*last)));
    let mut edges: Vec<IpAddr> = edges.flatten().collect();
    edges.sort_unstable();
    edges.into_iter().find_map(|address| {
        let (seen, planned) = (at(seen, address), at(planned, address));
        let same = seen == planned || seen.as_ref() == Some(&host);
        let said = |leads: Option<String>| leads.unwrap_or_else(|| "nothing".into());
        (!same).then(|| {
            format!(
                "{address} leads to {}, not to {}",
                said(seen),
                said(planned)
            )
        })
    })
}

/// The address after this one, if there is one.
fn after(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(address) => Some(IpAddr::V4(u32::from(address).checked_add(1)?.into())),
        IpAddr::V6(address) => Some(IpAddr::V6(u128::from(address).checked_add(1)?.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: &str, last: &str, chain: &str) -> Leading {
        let [first, last] = [first, last].map(|text| text.parse().unwrap());
        (first, last, nft::leads_to(chain))
    }

    #[test]
    fn an_address_that_leads_elsewhere_is_found() {
        let planned = [range("10.0.0.0", "10.255.255.255", "refuse-private")];
        assert_eq!(other(&planned, &planned), None);
        // The host's own cut a piece out, or stand alone.
        let host = [
            range("10.0.0.0", "10.0.0.6", "refuse-private"),
            range("10.0.0.7", "10.0.0.7", "refuse-host"),
            range("10.0.0.8", "10.255.255.255", "refuse-private"),
            range("192.0.2.1", "192.0.2.1", "refuse-host"),
        ];
        assert_eq!(other(&host, &planned), None);
        for (ranges, address) in [
            (vec![], "10.0.0.0"),
            (
                vec![range("10.0.0.0", "10.255.255.254", "refuse-private")],
                "10.255.255.255",
            ),
            (
                vec![range("10.0.0.1", "10.255.255.255", "refuse-private")],
                "10.0.0.0",
            ),
            (
                vec![range("10.0.0.0", "10.255.255.255", "refuse-cgnat")],
                "10.0.0.0",
            ),
            (
                vec![
                    planned[0].clone(),
                    range("11.0.0.0", "11.0.0.9", "let-through"),
                ],
                "11.0.0.0",
            ),
        ] {
            let found = other(&ranges, &planned).unwrap();
            assert!(found.starts_with(address), "{found}");
        }
    }
}
