//! What no socket of a guest's kernel sends: frames made by hand, by root in the
//! guest, and what comes of each; and what somebody outside sends to the guest.
//!
//! Each is heard at the machine's tap, or it was not sent. What is stopped is heard
//! nowhere beyond, and a rule has counted and recorded it. Without rules, the same
//! frames are heard.

mod support;

#[path = "support/ears.rs"]
mod ears;
#[path = "support/frames.rs"]
mod frames;
#[path = "support/frames4.rs"]
mod frames4;
#[path = "support/frames6.rs"]
mod frames6;
#[path = "support/matrix.rs"]
mod matrix;

use std::collections::BTreeMap;
use std::io::Write;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use bulkhead::host::netns::Netns;
use bulkhead::host::nft;
use bulkhead::plan::firewall::{Family, Names};
use bulkhead::plan::network::{GUEST_MAC, GUEST4, GUEST6};
use bulkhead::run::Machine;
use bulkhead::spec::{NetworkMode, NetworkPolicy};
use ears::{Counts, Ears, Judge};
use frames::{ACK, ICMP, ICMP6, IP, IP6, Maker, SYN, TCP, Try, UDP, ethernet, ip};
use matrix::{Hand, Seen, greet, hex};
use support::live::Live;
use support::net::{Wiring, World, note, sh_in};

/// More than a frame takes over a link of this host.
const SOON: Duration = Duration::from_secs(5);
/// What goes before a frame that is written to a tap (linux/virtio_net.h).
const NO_OFFLOAD: [u8; 10] = [0; 10];

fn policy(ipv6: bool) -> NetworkPolicy {
    NetworkPolicy {
        ipv6,
        ..NetworkPolicy::of_mode(NetworkMode::NatFiltered)
    }
}

fn world() -> World {
    let world = World::new();
    let forward = "sysctl -qw net.ipv6.conf.all.forwarding=1";
    sh_in(&world.host.netns, forward);
    world
}

/// What the rules in a namespace have refused so far.
fn refused(netns: &Netns) -> Counts {
    let mut counts = Counts::new();
    for family in [Family::Inet, Family::Netdev] {
        let counters = netns.run_in(|| nft::counters(family)).unwrap().unwrap();
        for (name, counted) in counters {
            if !["new", "sent", "received"].contains(&name.as_str()) {
                *counts.entry(name).or_default() += counted.packets;
            }
        }
    }
    counts
}

/// Who hears what a machine sends: at its tap, and beyond it.
fn judge<'j>(world: &World, netns: &'j Netns, others: &[&Netns]) -> Judge<'j> {
    let beyond = [&world.host.netns, &world.internet.netns];
    let beyond = beyond.iter().chain(others);
    Judge {
        before: Ears::new(netns),
        beyond: beyond.map(|netns| Ears::new(netns)).collect(),
        leaving: false,
        counts: Box::new(|| refused(netns)),
    }
}

/// Sends all of them from the guest; gives those of which something else came.
async fn send(hand: &mut Hand, judge: &Judge<'_>, tries: &[Try]) -> Vec<String> {
    let mut wrong = Vec::new();
    for one in tries {
        let before = judge.counted();
        hand.sends(&one.frames).await;
        let seen = judge.came(&one.mark, &before, &one.expected).await;
        wrong.extend(told(&one.case, &one.expected, &seen));
    }
    wrong
}

/// Writes a row down; gives it where it is wrong.
fn told(case: &str, expected: &str, seen: &str) -> Option<String> {
    note(case, expected, seen);
    (seen != expected).then(|| format!("{case}: expected {expected}, seen {seen}"))
}

/// How many of them are not in the record, by rule.
async fn unrecorded(machine: &Machine, tries: &[Try]) -> Vec<String> {
    let mut wanted: BTreeMap<&str, usize> = BTreeMap::new();
    for one in tries {
        if let Some(rule) = one.expected.strip_prefix("stopped as ") {
            *wanted.entry(rule).or_default() += 1;
        }
    }
    let begin = Instant::now();
    loop {
        let record = std::fs::read_to_string(machine.dir().join("network.jsonl")).unwrap();
        let missing = wanted.iter().filter_map(|(rule, count)| {
            let found = record.matches(&format!("\"packet:{rule}\"")).count();
            (found < *count).then(|| format!("{rule}: {found} of {count} recorded"))
        });
        let missing: Vec<_> = missing.collect();
        if missing.is_empty() || begin.elapsed() > SOON {
            return missing;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Writes a frame to the guest's end of a tap, as QEMU does.
fn write(wiring: &Wiring, frame: &[u8]) {
    let tap = wiring.wired.as_ref().unwrap().tap.try_clone().unwrap();
    let frame = [&NO_OFFLOAD[..], frame].concat();
    let written = std::fs::File::from(tap).write(&frame).unwrap();
    assert_eq!(written, frame.len());
}

/// Which of those that a router without rules sends on are not heard on the host
/// when there are none.
async fn lost_without_rules(world: &World, wiring: &Wiring, tries: &[Try]) -> Vec<String> {
    sh_in(wiring.netns(), "nft flush ruleset");
    let host = Ears::new(&world.host.netns);
    let mut lost = Vec::new();
    let mut all = 0;
    for one in tries.iter().filter(|one| one.sent_on) {
        all += 1;
        for frame in &one.frames {
            write(wiring, frame);
        }
        if !host.hears(&one.mark, false, SOON).await {
            lost.push(one.case.clone());
        }
    }
    assert!(all > 50, "{all}");
    lost
}

/// Its address outside, of either kind.
fn outer(netns: &Netns) -> [IpAddr; 2] {
    ["-4", "-6"].map(|family| {
        let show = format!("ip {family} -o addr show dev out scope global");
        let text = sh_in(netns, &show);
        let address = text.split_whitespace().nth(3).unwrap();
        ip(address.split('/').next().unwrap())
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_sent_by_hand_is_held_to_the_rules_too() {
    let world = world();
    let neighbour = world.wire("neighbour", &policy(true));
    let seen = Seen::default();
    greet(&world.internet.netns, "[::]:80", &seen);
    let live = Live::with_site(world.site());
    let machine = live.start_in(policy(true)).await;
    let netns = machine.netns().unwrap();

    let [_, other] = outer(neighbour.netns());
    let mut tries = frames6::six("2001:db8:1::1", &other.to_string());
    tries.extend(frames4::four("10.77.0.9"));
    let mut hand = Hand::new(&machine).await;
    let judge = judge(&world, netns, &[neighbour.netns()]);
    let mut wrong = send(&mut hand, &judge, &tries).await;
    drop(judge);
    wrong.extend(unrecorded(&machine, &tries).await);

    // Nobody has taken anybody's place.
    let known = "(ip neigh show dev tap; ip -6 neigh show dev tap) | grep lladdr | cut -d' ' -f1";
    let known = sh_in(netns, known);
    let own = ["198.18.0.2", "fd62:756c:6b68::2", "fe80::62:68ff:fe00:2"];
    let others: Vec<&str> = known.lines().filter(|one| !own.contains(one)).collect();
    let case = "ipv6: others whom its gateway knows on its link";
    wrong.extend(told(case, "", &others.join(" ")));
    for (line, expected) in [
        ("tcp 203.0.113.1 80", "open ::ffff:192.0.2.1"),
        ("tcp 2001:db8:2::1 80", "open 2001:db8:1::1"),
        ("ping 198.18.0.1", "reply"),
    ] {
        let seen = hand.tries(line).await;
        wrong.extend(told(&format!("{line}, after all that"), expected, &seen));
    }

    wrong.extend(nothing_comes_in(&world, netns).await);
    // What was stopped was something that goes on.
    let lost = lost_without_rules(&world, &neighbour, &tries)
        .await
        .join(", ");
    wrong.extend(told("frames that are lost without any rules", "", &lost));
    wrong.extend(told(
        "from the host to a guest without any rules",
        "through",
        &knocked_in(&world, &neighbour).await,
    ));
    assert!(wrong.is_empty(), "{wrong:#?}");
    machine.kill().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn without_ipv6_no_frame_of_it_is_taken() {
    let world = world();
    let live = Live::with_site(world.site());
    let machine = live.start_in(policy(false)).await;
    let mut tries = frames6::six("2001:db8:1::1", "fd62:756c:6b69:0:1::9");
    for one in &mut tries {
        one.case = one.case.replace("ipv6:", "without ipv6:");
        if one.expected != "stopped as mac" {
            one.expected = "stopped as type".into();
        }
    }
    let mut hand = Hand::new(&machine).await;
    let judge = judge(&world, machine.netns().unwrap(), &[]);
    let mut wrong = send(&mut hand, &judge, &tries).await;
    drop(judge);
    wrong.extend(unrecorded(&machine, &tries).await);
    assert!(wrong.is_empty(), "{wrong:#?}");
    machine.kill().await.unwrap();
}

/// In the sets that the resolver feeds, port 0 stands for the policy's ports.
#[tokio::test(flavor = "multi_thread")]
async fn port_zero_of_an_allowed_name_is_no_port() {
    let world = world();
    for names in [Names::Fed, Names::Strict(8443)] {
        let wiring = world.wire_with("named", &policy(true), names);
        let hosts = ["203.0.113.1", "2001:db8:2::1"].map(ip);
        let fed = hosts.map(|address| nft::Entry {
            address,
            port: 0,
            time: Duration::from_secs(600),
        });
        wiring.netns().run_in(|| nft::allow(&fed)).unwrap().unwrap();
        let judge = judge(&world, wiring.netns(), &[]);
        for (host, number) in hosts.into_iter().zip([5000, 5100]) {
            let from = if host.is_ipv4() {
                GUEST4.into()
            } else {
                GUEST6.into()
            };
            for (port, expected) in [
                (22, "through"),
                (0, "stopped as port"),
                (8443, "stopped as port"),
            ] {
                let maker = Maker {
                    from,
                    to: host,
                    number: number + port % 97,
                };
                let before = judge.counted();
                write(&wiring, &maker.frame(TCP, &maker.tcp(port, SYN)));
                let seen = judge.came(&maker.mark(), &before, expected).await;
                let case = format!("port {port} of {host}, an allowed name's, {names:?}");
                assert_eq!(told(&case, expected, &seen), None);
            }
        }
    }
}

/// Where a knock comes in, and where it leads.
struct Way<'w> {
    from: &'w str,
    /// Where it is sent, and by which link, with these hardware addresses.
    netns: &'w Netns,
    link: String,
    macs: [[u8; 6]; 2],
}

/// The index is what a packet socket takes.
fn mac_of(netns: &Netns, link: &str) -> [u8; 6] {
    let text = sh_in(
        netns,
        &format!("ip -o link show {link} | sed 's/.*ether \\([^ ]*\\).*/\\1/'"),
    );
    let bytes = text.trim().split(':');
    let bytes: Vec<u8> = bytes
        .map(|byte| u8::from_str_radix(byte, 16).unwrap())
        .collect();
    bytes.try_into().unwrap()
}

/// The host's end of a machine's link.
fn link_to(world: &World, outer: IpAddr) -> String {
    let find = format!("ip -o route get {outer} | sed 's/.* dev \\([^ ]*\\).*/\\1/'");
    sh_in(&world.host.netns, &find).trim().to_owned()
}

fn throw(way: &Way<'_>, frame: &[u8]) {
    let hex = hex(&[frame.to_vec()]);
    let script = format!(
        "perl -e 'my ($i, $h) = @ARGV; socket(my $s, 17, 3, 0) or die; send($s, pack(\"H*\", $h), 0, pack(\"SnlSCCa8\", 17, 3, $i, 0, 0, 6, \"\")) or die' $(ip -o link show {} | cut -d: -f1) {hex}",
        way.link
    );
    sh_in(way.netns, &script);
}

/// What knocks at an address, from another.
fn knocks(from: IpAddr, to: IpAddr, number: &mut u16) -> Vec<(&'static str, Vec<u8>, Vec<u8>)> {
    type Make = fn(&Maker) -> Vec<u8>;
    let echo: Make = |m| match m.from {
        IpAddr::V4(_) => m.packet(ICMP, &m.icmp(8, &[0, 1, 0, 1])),
        IpAddr::V6(_) => m.packet(ICMP6, &m.icmp6(128, &[0, 1, 0, 1])),
    };
    let all: [(&'static str, Make); 6] = [
        ("TCP SYN", |m| m.packet(TCP, &m.tcp(22, SYN))),
        ("TCP ACK", |m| m.packet(TCP, &m.tcp(22, ACK))),
        ("UDP", |m| m.packet(UDP, &m.udp(53, 5353))),
        ("DNS", |m| m.packet(UDP, &m.udp(5353, 53))),
        ("echo request", echo),
        ("GRE", |m| m.packet(47, &m.udp_with(0, 0, &[0; 24]))),
    ];
    let made = all.map(|(name, make)| {
        *number += 1;
        let maker = Maker {
            from,
            to,
            number: *number,
        };
        (name, maker.mark(), make(&maker))
    });
    made.into()
}

/// Knocks from the internet, and from the host, at the machine's outer address and
/// at the guest's own; gives what was wrong.
async fn nothing_comes_in(world: &World, netns: &Netns) -> Vec<String> {
    let (host, internet) = (&world.host.netns, &world.internet.netns);
    let [outer4, outer6] = outer(netns);
    let link = link_to(world, outer4);
    let routes = format!(
        "ip route add {GUEST4} via {outer4} dev {link} onlink
         ip -6 route add {GUEST6} via {outer6} dev {link} onlink"
    );
    sh_in(host, &routes);
    let ways = [
        Way {
            from: "internet",
            netns: internet,
            link: "down0".into(),
            macs: [mac_of(host, "up0"), mac_of(internet, "down0")],
        },
        Way {
            from: "host",
            netns: host,
            macs: [mac_of(netns, "out"), mac_of(host, &link)],
            link,
        },
    ];
    let mut wrong = Vec::new();
    let mut number = 6000;
    for way in &ways {
        // The host's rules stop what is sent on; the machine's, what the host sends.
        let place = if way.from == "host" { netns } else { host };
        let judge = Judge {
            before: Ears::new(place),
            beyond: vec![Ears::new(netns)],
            leaving: true,
            counts: Box::new(|| refused(place)),
        };
        for (from, to, name) in [
            ("203.0.113.1", outer4, "the machine's address"),
            ("203.0.113.1", GUEST4.into(), "the guest's address"),
            ("2001:db8:2::1", outer6, "the machine's IPv6 address"),
            ("2001:db8:2::1", GUEST6.into(), "the guest's IPv6 address"),
        ] {
            let kind = if to.is_ipv4() { IP } else { IP6 };
            for (knock, mark, packet) in knocks(ip(from), to, &mut number) {
                let before = judge.counted();
                throw(way, &ethernet(way.macs[0], way.macs[1], kind, &packet));
                let seen = judge.came(&mark, &before, "stopped as inbound").await;
                let case = format!("from the {} to {name}: {knock}", way.from);
                wrong.extend(told(&case, "stopped as inbound", &seen));
            }
        }
    }
    wrong
}

/// What comes of the same where there are no rules (see [`lost_without_rules`]).
async fn knocked_in(world: &World, wiring: &Wiring) -> String {
    let netns = wiring.netns();
    let mac = bulkhead::plan::network::mac(GUEST_MAC);
    let known = format!(
        "ip neigh replace {GUEST4} lladdr {mac} dev tap; ip -6 neigh replace {GUEST6} lladdr {mac} dev tap"
    );
    sh_in(netns, &known);
    let host = &world.host.netns;
    let link = link_to(world, outer(netns)[0]);
    let way = Way {
        from: "host",
        netns: host,
        macs: [mac_of(netns, "out"), mac_of(host, &link)],
        link,
    };
    let ears = Ears::new(netns);
    let mut number = 7000;
    let mut lost = Vec::new();
    for (from, to) in [
        ("203.0.113.1", GUEST4.into()),
        ("2001:db8:2::1", GUEST6.into()),
    ] {
        let to: IpAddr = to;
        let kind = if to.is_ipv4() { IP } else { IP6 };
        for (knock, mark, packet) in knocks(ip(from), to, &mut number) {
            throw(&way, &ethernet(way.macs[0], way.macs[1], kind, &packet));
            if !ears.hears(&mark, true, SOON).await {
                lost.push(format!("{knock} to {to}"));
            }
        }
    }
    match lost.is_empty() {
        true => "through".into(),
        false => format!("lost: {}", lost.join(", ")),
    }
}
