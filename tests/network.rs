//! Machines' networks, in namespaces that stand for the host and the internet.

mod support;

use std::time::Duration;

use bulkhead::host::netns::Netns;
use bulkhead::host::{network, nft};
use bulkhead::plan::firewall::{self, Names, gate_mark};
use bulkhead::spec::{Bytes, NetworkMode, NetworkPolicy};
use support::net::{World, mounts_below, sh_in};

fn policy() -> NetworkPolicy {
    NetworkPolicy::of_mode(NetworkMode::NatFiltered)
}

/// Everything there is, once.
fn everything() -> NetworkPolicy {
    let mut policy = policy();
    policy.ipv6 = true;
    let mut ports = policy.ports();
    ports.extend(
        ["8000-8100", "4433/udp"].map(|port| port.parse::<bulkhead::spec::Port>().unwrap()),
    );
    policy.ports = Some(ports);
    policy.exceptions = ["10.77.0.1/32:5432", "[fd00::]/8:443/udp"]
        .map(|text| text.parse().unwrap())
        .into();
    policy.limits.total = Some(Bytes::gib(1));
    policy.limits.upload = Some(Bytes::mib(2));
    policy.limits.download = Some(Bytes::mib(4));
    policy
}

#[test]
fn the_kernel_has_the_rules_that_were_planned() {
    let world = World::new();
    sh_in(
        &world.host.netns,
        "sysctl -qw net.ipv6.conf.all.forwarding=1",
    );
    let wiring = world.wire("vm", &everything());
    // Without what was counted: the kernel says something over IPv6 by itself.
    let rules = sh_in(wiring.netns(), "nft -s -nn list ruleset");
    insta::assert_snapshot!("machine", rules);
    for names in [Names::Any, Names::Fed, Names::Strict(8443)] {
        let other = world.wire_with("other", &everything(), names);
        for table in firewall::machine(&everything(), names, &[]).tables {
            let seen = other
                .netns()
                .run_in(|| nft::rules(table.family, &table.name));
            assert_eq!(seen.unwrap().unwrap(), nft::planned(&table));
        }
    }
    let gate = sh_in(&world.host.netns, "nft -nn list table inet bulkhead");
    let gate: Vec<_> = gate
        .lines()
        .map(|line| match line.split_once("counter machine-") {
            Some((before, _)) => format!("{before}counter machine-TOKEN {{"),
            None => line.replace(&gate_mark(), "rules-HASH"),
        })
        .collect();
    insta::assert_snapshot!("gate", gate.join("\n"));
    let shaped = sh_in(
        wiring.netns(),
        "tc qdisc show dev tap; tc qdisc show dev out",
    );
    assert!(
        shaped.contains("tbf 1: root") && shaped.contains("rate 32Mbit")
            || shaped.contains("rate 33554"),
        "{shaped}"
    );
}

#[test]
fn nothing_is_left_of_two_hundred_networks() {
    let world = World::new();
    let look = || {
        let host = sh_in(
            &world.host.netns,
            "ip -o link | sed 's/ state.*//;s/^[0-9]*//'; ip route; ip neigh | wc -l; nft list ruleset; cat /proc/sys/net/netfilter/nf_conntrack_count",
        );
        let fds = std::fs::read_dir("/proc/self/fd").unwrap().count();
        (host, mounts_below(world.dir.path()), fds)
    };
    world.wire("first", &policy()).release();
    world.settle();
    let before = look();
    let rules = world.own_rules();
    for _ in 0..200 {
        world.wire("vm", &policy()).release();
    }
    world.settle();
    let after = look();
    assert_eq!((&after.0, after.1), (&before.0, before.1));
    // Other tests have some, too.
    assert!(
        after.2 < before.2 + 100,
        "{} descriptors, {} before",
        after.2,
        before.2
    );
    assert_eq!(world.own_rules(), rules);
}

/// Somebody looks into the namespace of a machine that has ended.
#[test]
fn a_link_that_stays_is_shut_and_cleared_away() {
    let world = World::new();
    let mut wiring = world.wire("vm", &policy());
    let kept = Netns::open(&world.dir.path().join("vm")).unwrap();
    let links = || sh_in(&world.host.netns, "ip -o link | grep bh || true");
    assert!(links().contains("UP"), "{}", links());
    wiring.release();
    std::thread::sleep(Duration::from_millis(500));
    let shut = links();
    assert!(!shut.is_empty() && !shut.contains("UP"), "{shut}");
    let left = sh_in(&world.host.netns, "ip route; nft list tables");
    assert!(!left.contains("bh") && !left.contains("bulkhead"), "{left}");
    let live = world.wire("other", &policy());
    assert_eq!(network::clear(&world.site()).unwrap(), 1);
    assert_eq!(
        links().lines().count(),
        1,
        "the other one lives: {}",
        links()
    );
    assert_eq!(network::clear(&world.site()).unwrap(), 0);
    drop((kept, live));
}

#[test]
fn rules_change_at_once_and_keep_what_they_counted() {
    let world = World::new();
    let wiring = world.wire("vm", &policy());
    let mut more = policy();
    more.ports = Some(
        more.ports()
            .into_iter()
            .chain(["8443".parse().unwrap()])
            .collect(),
    );
    more.exceptions.insert("10.77.0.1:5432".parse().unwrap());
    more.limits.connections = 7;
    network::change(wiring.netns(), &more, Names::Any, false, None).unwrap();
    let rules = sh_in(wiring.netns(), "nft -nn list table inet bulkhead");
    for line in [
        "22, 80, 443, 8443, 9418",
        "ip daddr 10.77.0.1",
        "counter name \"allow-cidr:10.77.0.1/32:5432\"",
        "ct count over 7",
    ] {
        assert!(rules.contains(line), "{line} is not in {rules}");
    }
    network::change(wiring.netns(), &policy(), Names::Any, true, None).unwrap();
    let rules = sh_in(wiring.netns(), "nft -nn list table inet bulkhead");
    assert!(
        !rules.contains("8443") && !rules.contains("ip daddr 10.77.0.1"),
        "{rules}"
    );
}

#[test]
fn strict_rules_are_taken_and_replaced() {
    let world = World::new();
    let names = Names::Strict(8443);
    let wiring = world.wire_with("vm", &policy(), names);
    let chain = |name: &str| {
        sh_in(
            wiring.netns(),
            &format!("nft -nn list chain inet bulkhead {name}"),
        )
    };
    let strict = chain("strict");
    assert!(
        strict.contains("vmap @never4") && strict.contains("redirect to :8443"),
        "{strict}"
    );
    assert!(
        chain("allowed").contains("@allowed4"),
        "{}",
        chain("allowed")
    );
    let mut more = policy();
    more.exceptions.insert("10.77.0.1:443".parse().unwrap());
    network::change(wiring.netns(), &more, names, false, None).unwrap();
    assert!(
        chain("not-strict").contains("10.77.0.1"),
        "{}",
        chain("not-strict")
    );
}

#[test]
fn names_stand_for_addresses_for_a_time() {
    let world = World::new();
    let wiring = world.wire("vm", &policy());
    let entries = |seconds| {
        let entry = |(address, port): (&str, u16)| nft::Entry {
            address: address.parse().unwrap(),
            port,
            time: Duration::from_secs(seconds),
        };
        [
            ("203.0.113.1", 0),
            ("203.0.113.1", 8443),
            ("2001:db8::1", 0),
        ]
        .map(entry)
    };
    let inside = |work: &(dyn Fn() -> std::io::Result<()> + Sync)| {
        wiring.netns().run_in(work).unwrap().unwrap();
    };
    let set = |name: &str| {
        let list = format!("nft -nn list set inet bulkhead {name}");
        sh_in(wiring.netns(), &list)
    };
    inside(&|| nft::allow(&entries(1)));
    // Again is not an error, and for longer.
    inside(&|| nft::allow(&entries(60)));
    std::thread::sleep(Duration::from_millis(1500));
    let text = set("allowed4");
    for entry in [
        "203.0.113.1 . 0 timeout 60s",
        "203.0.113.1 . 8443 timeout 60s",
    ] {
        assert!(text.contains(entry), "{entry}: {text}");
    }
    assert!(
        set("allowed6").contains("2001:db8::1 . 0"),
        "{}",
        set("allowed6")
    );

    // Others in their place, also more than one message takes.
    let many: Vec<_> = (0..1200_u32)
        .map(|number| nft::Entry {
            address: std::net::Ipv4Addr::from(0x0808_0000 + number).into(),
            port: 443,
            time: Duration::from_secs(60),
        })
        .collect();
    let changes = firewall::changes(&policy(), Names::Fed, 0);
    inside(&|| nft::change(&changes, Some(&many)));
    let text = set("allowed4");
    assert_eq!(text.matches("timeout 60s").count(), 1200);
    assert!(!text.contains("203.0.113.1") && !set("allowed6").contains("2001:db8::1"));
    inside(&|| nft::change(&changes, Some(&[])));
    assert!(!set("allowed4").contains("elements"), "{}", set("allowed4"));
}

/// The handle of a rule of a chain, from 0.
fn handle(netns: &Netns, chain: &str, rule: usize) -> String {
    let text = sh_in(netns, &format!("nft -a list chain {chain}"));
    let rules = text
        .lines()
        .filter(|line| line.contains(" # handle ") && !line.contains('{'));
    let line = rules.into_iter().nth(rule).unwrap();
    line.rsplit(' ').next().unwrap().to_owned()
}

#[test]
fn one_operand_that_somebody_changes_is_found() {
    let world = World::new();
    let mut policy = policy();
    policy.limits.total = Some(Bytes::gib(1));
    let shapes = |wired: &Netns| {
        let tables = firewall::machine(&policy, Names::Any, &[]).tables;
        let of = |table: &firewall::Table| {
            let seen = wired.run_in(|| nft::rules(table.family, &table.name));
            (seen.unwrap().unwrap(), nft::planned(table))
        };
        tables.iter().map(of).collect::<Vec<_>>()
    };
    let wiring = world.wire("vm", &policy);
    let netns = wiring.netns();
    let tap = "netdev bulkhead";
    let inet = "inet bulkhead";
    // A rule, and what it becomes, of the same expressions. (Chains whose names are
    // words of nft's cannot be named here.)
    for (table, chain, rule, other) in [
        (tap, "ingress", 0, "ether saddr 02:62:68:00:00:03 goto own"),
        (tap, "own", 0, "ether type 0x86dd goto ip4"),
        (tap, "ip4", 3, "@nh,96,32 0xc6120003 accept"),
        (tap, "ip4", 3, "@nh,96,32 0xc6120002 return"),
        (tap, "ip4", 3, "@nh,128,32 0xc6120002 accept"),
        (inet, "forward", 0, "iifname out oifname out goto outgoing"),
        (inet, "incoming", 2, "goto refuse-invalid"),
        (
            inet,
            "service",
            1,
            "@nh,128,32 0xc6120001 meta l4proto udp th dport 54 meta mark set 1 ct mark set 1 accept",
        ),
        (
            inet,
            "service",
            1,
            "@nh,128,32 0xc6120001 meta l4proto tcp th dport 53 meta mark set 1 ct mark set 1 accept",
        ),
        // What the record would say of it.
        (
            inet,
            "service",
            1,
            "@nh,128,32 0xc6120001 meta l4proto udp th dport 53 meta mark set 1 ct mark set 2 accept",
        ),
        (
            inet,
            "refuse-cgnat",
            0,
            "counter name cgnat limit rate 200/second burst 200 packets log prefix \"refused:cgnat\" group 2 snaplen 128",
        ),
    ] {
        let fresh = world.wire("fresh", &policy);
        let netns = fresh.netns();
        assert!(shapes(netns).iter().all(|(seen, planned)| seen == planned));
        let chain_of = format!("{table} {chain}");
        let number = handle(netns, &chain_of, rule);
        sh_in(
            netns,
            &format!("nft replace rule {chain_of} handle {number} '{other}'"),
        );
        let differing: Vec<_> = shapes(netns)
            .into_iter()
            .flat_map(|(seen, planned)| {
                let chains = planned
                    .into_iter()
                    .filter(move |(name, chain)| seen.get(name) != Some(chain));
                chains.map(|(name, _)| name).collect::<Vec<_>>()
            })
            .collect();
        assert_eq!(differing, [chain], "{other}");
    }
    // What a chain does with packets that no rule decides.
    sh_in(
        netns,
        "nft chain inet bulkhead forward '{ policy accept; }'",
    );
    let (seen, planned) = shapes(netns).pop().unwrap();
    assert_ne!(seen["forward"].base, planned["forward"].base);

    // What no machine may reach.
    let ranges = || {
        let read = || nft::ranges(firewall::Family::Inet, "bulkhead", "never4");
        netns.run_in(read).unwrap().unwrap()
    };
    let lan: (std::net::IpAddr, _, _) = (
        "192.168.0.0".parse().unwrap(),
        "192.168.255.255".parse().unwrap(),
        nft::leads_to("refuse-private"),
    );
    let before = ranges();
    assert!(before.contains(&lan), "{before:#?}");
    sh_in(
        netns,
        "nft delete element inet bulkhead never4 '{ 192.168.0.0/16 : goto refuse-private }'",
    );
    let after = ranges();
    assert!(!after.contains(&lan) && after.len() == before.len() - 1);
}

#[test]
fn a_pool_that_clashes_is_refused_or_passed_over() {
    use bulkhead::error::Explain;
    use bulkhead::host::network::{Site, Wires};
    let world = World::new();
    let clash = |pool: &str| {
        let site = Site {
            pool: Some(pool.parse().unwrap()),
            ..world.site()
        };
        let wires = Wires::choose(world.dir.path().join("x"), site, &policy());
        let error = wires.make(&policy(), Names::Any).unwrap_err();
        for lease in wires.leases().iter().rev() {
            lease.release().unwrap();
        }
        error
    };
    assert_eq!(clash("10.77.0.0/28").code(), "network-clash");
    assert_eq!(clash("10.0.0.0/8").code(), "network-clash");
    sh_in(&world.host.netns, "ip route add 198.19.5.0/24 dev lan0");
    let wiring = world.wire("vm", &policy());
    let outer = wiring.wired.as_ref().unwrap().outer;
    assert!(outer.to_string().starts_with("10.213."), "{outer}");
}
