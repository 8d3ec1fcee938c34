//! The network matrix: what root in a guest tries, against what comes of it.

mod support;

#[path = "support/matrix.rs"]
mod matrix;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::thread;
use std::time::Duration;

use bulkhead::host::netns::Netns;
use bulkhead::host::network;
use bulkhead::plan::firewall::Family;
use bulkhead::spec::{Bytes, Catalog, NetworkMode, NetworkName, NetworkPolicy, Request as Wish};
use matrix::{Seen, counted, echo, greet, matrix, tries};
use support::live::{Live, sh};
use support::net::{World, note, sh_in};

fn wish(network: &str) -> Wish {
    Wish {
        network: Some(network.parse().unwrap()),
        memory: Some(Bytes::mib(256)),
        ..Wish::default()
    }
}

fn policy() -> NetworkPolicy {
    NetworkPolicy::of_mode(NetworkMode::NatFiltered)
}

fn catalog(policy: NetworkPolicy) -> Catalog {
    let mut catalog = Catalog::default();
    catalog
        .add_network("own".parse::<NetworkName>().unwrap(), policy)
        .unwrap();
    catalog
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_gets_through_that_should_not() {
    let world = World::new();
    let (out, home) = (Seen::default(), Seen::default());
    for port in [22, 53, 80, 81, 443, 853, 5432, 9418] {
        greet(&world.internet.netns, &format!("0.0.0.0:{port}"), &out);
        greet(&world.host.netns, &format!("0.0.0.0:{port}"), &home);
    }
    for port in [53, 67, 123, 443, 5353] {
        echo(&world.internet.netns, &format!("0.0.0.0:{port}"), &out);
        echo(&world.host.netns, &format!("0.0.0.0:{port}"), &home);
    }
    let rules = world.own_rules();
    let neighbour = world.wire("neighbour", &policy());
    let (there, own) = (neighbour.wired.as_ref().unwrap().outer, Seen::default());
    greet(neighbour.netns(), "0.0.0.0:80", &own);
    let live = Live::with_site(world.site());
    let machine = live.start(wish("nat-filtered")).await;

    let own_outer = sh_in(
        machine.netns().unwrap(),
        "ip -o -4 addr show dev out | awk '{print $4}'",
    );
    let own_outer = own_outer.trim().trim_end_matches("/32");
    matrix(
        &machine,
        &[
            // What everybody may.
            ("tcp 203.0.113.1 80", "open 192.0.2.1"),
            ("tcp 203.0.113.2 443", "open 192.0.2.1"),
            ("tcp 203.0.113.1 22", "open 192.0.2.1"),
            ("tcp 203.0.113.1 9418", "open 192.0.2.1"),
            ("ping 198.18.0.1", "reply"),
            // Ports.
            ("tcp 203.0.113.1 81", "refused"),
            ("tcp 203.0.113.1 5432", "refused"),
            ("udp 203.0.113.1 443", "prohibited"),
            ("udp 203.0.113.1 123", "prohibited"),
            ("ping 203.0.113.1", "prohibited"),
            // Names are resolved at the gateway only.
            ("udp 8.8.8.8 53", "prohibited"),
            ("tcp 8.8.8.8 53", "refused"),
            ("tcp 8.8.8.8 853", "refused"),
            // The host, by each of its addresses.
            ("tcp 192.0.2.1 80", "refused"),
            ("tcp 10.77.0.1 22", "refused"),
            ("tcp 198.18.0.1 80", "refused"),
            ("tcp 169.254.1.1 80", "refused"),
            (&format!("tcp {own_outer} 80"), "refused"),
            ("udp 192.0.2.1 53", "prohibited"),
            ("ping 192.0.2.1", "prohibited"),
            // Another machine.
            (&format!("tcp {there} 80"), "refused"),
            (&format!("ping {there}"), "prohibited"),
            // The LAN, and the rest of what is not the internet.
            ("tcp 10.77.0.9 80", "refused"),
            ("tcp 10.0.0.1 443", "refused"),
            ("tcp 172.16.0.1 443", "refused"),
            ("tcp 192.168.1.1 443", "refused"),
            ("tcp 100.64.0.1 443", "refused"),
            ("tcp 169.254.169.254 80", "refused"),
            ("tcp 169.254.7.7 443", "refused"),
            ("tcp 0.1.2.3 443", "refused"),
            ("tcp 240.0.0.1 443", "refused"),
            ("udp 224.0.0.251 5353", "silence"),
            ("udp 255.255.255.255 67", "silence"),
            ("tcp 2001:db8:2::1 80", "no route"),
            ("tcp 2001:db8:1::1 80", "no route"),
            // In pieces: what is whole again is looked at; what overlaps is none.
            ("pieces 203.0.113.1 80", "open"),
            ("pieces 203.0.113.1 81", "refused"),
            ("pieces 169.254.169.254 80", "refused"),
            ("overlap 203.0.113.1 80 81", "silence"),
            // Options that nobody knows, and a route of the sender's own.
            ("options 203.0.113.1 80", "open"),
            ("options 203.0.113.1 81", "refused"),
            ("detour 203.0.113.1 80 10.77.0.9", "silence"),
            // All ports there are at once.
            ("scan 203.0.113.1 1 500", "22 80 443"),
        ],
    )
    .await;
    let peers = |seen: &Seen| seen.lock().unwrap().clone();
    let ports = [80, 443, 22, 9418];
    for (peer, to) in peers(&out) {
        assert_eq!(peer.ip().to_string(), "192.0.2.1", "{to}");
        assert!(ports.contains(&to.port()), "{to}");
    }
    assert_eq!((peers(&home), peers(&own)), (vec![], vec![]));
    let beyond = counted(&machine, Family::Inet);
    let least = [
        ("new", 7),
        ("port", 499),
        ("dns", 3),
        ("host", 6),
        ("private", 5),
        ("cgnat", 1),
        ("metadata", 1),
        ("link-local", 2),
        ("special", 2),
    ];
    for (name, count) in least {
        assert!(beyond[name] >= count, "{name}: {beyond:?}");
    }

    // What no socket of the guest's kernel would send.
    let before = counted(&machine, Family::Netdev);
    let frames = [
        ("mac", "mac"),
        ("source", "ip"),
        ("elsewhere", "ip"),
        ("arp", "arp"),
        ("arp-mac", "arp"),
        ("vlan", "type"),
        ("qinq", "type"),
        ("stp", "type"),
        ("multicast", "broadcast"),
        ("dhcp-offer", "broadcast"),
        ("ra", "type"),
        ("ipv6", "type"),
    ];
    let heard = peers(&out).len();
    for (frame, counter) in frames {
        let before = counted(&machine, Family::Netdev)[counter];
        assert_eq!(
            tries(&machine, &[&format!("frame {frame}")]).await,
            ["sent"]
        );
        let after = counted(&machine, Family::Netdev)[counter];
        let seen = if after > before {
            "stopped"
        } else {
            "not stopped"
        };
        note(&format!("frame {frame} as {counter}"), "stopped", seen);
        assert!(after > before, "{frame} was not stopped as {counter}");
    }
    assert_eq!(peers(&out).len(), heard, "after {before:?}");
    assert_eq!(
        tries(&machine, &["tcp 203.0.113.1 80"]).await,
        ["open 192.0.2.1"]
    );

    // Nothing comes in: not from the host, not from beyond.
    let knock = |netns: &Netns, via: &str| {
        let script = format!(
            "{via} perl -MIO::Socket::INET -e 'print IO::Socket::INET->new(PeerAddr => \"{own_outer}:22\", Timeout => 2) ? \"in\" : \"out\"'"
        );
        sh_in(netns, &script)
    };
    sh(&machine, "perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new(LocalPort => 22, Listen => 1) or die; exit if fork; $s->accept' >/dev/null 2>&1 </dev/null &").await;
    sh_in(
        &world.internet.netns,
        &format!("ip route add {own_outer}/32 via 192.0.2.1"),
    );
    for (whence, netns) in [
        ("host", &world.host.netns),
        ("internet", &world.internet.netns),
    ] {
        let seen = knock(netns, "");
        note(
            &format!("from the {whence} to the guest's port 22"),
            "out",
            &seen,
        );
        assert_eq!(seen, "out", "{whence}");
    }

    drop(neighbour);
    let address = own_outer.to_owned();
    machine.kill().await.unwrap();
    assert_eq!(
        world.own_rules().replace(char::is_numeric, ""),
        rules.replace(char::is_numeric, "")
    );
    // Who listens for the neighbour has its namespace still open.
    assert!(network::clear(&world.site()).unwrap() > 0);
    world.settle();
    let left = sh_in(&world.host.netns, "ip -o link; ip route; nft list tables");
    assert!(
        !left.contains("bh") && !left.contains(&address) && !left.contains("bulkhead"),
        "{left}"
    );
    let flows = sh_in(
        &world.host.netns,
        "cat /proc/self/net/nf_conntrack 2>/dev/null || true",
    );
    // What the test's knocking left is not the machine's.
    let began = |line: &str| {
        line.split(' ')
            .find(|word| word.starts_with("src="))
            .map(str::to_owned)
    };
    let own = format!("src={address}");
    assert!(
        !flows.lines().any(|line| began(line).as_ref() == Some(&own)),
        "{flows}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn ipv6_is_filtered_as_ipv4_is_and_exceptions_are_exact() {
    let world = World::new();
    sh_in(
        &world.host.netns,
        "sysctl -qw net.ipv6.conf.all.forwarding=1",
    );
    let seen = Seen::default();
    for port in [53, 80, 81, 443, 5432] {
        greet(&world.internet.netns, &format!("[::]:{port}"), &seen);
        greet(&world.host.netns, &format!("[::]:{port}"), &seen);
    }
    sh_in(
        &world.internet.netns,
        "ip -6 addr add fd00::9/128 dev lo nodad",
    );
    let mut policy = policy();
    policy.ipv6 = true;
    policy.exceptions = ["10.77.0.9/32:5432"]
        .map(|text| text.parse().unwrap())
        .into();
    let live = Live::with_site(world.site());
    let machine = live.start_from(wish("own"), &catalog(policy)).await;
    matrix(
        &machine,
        &[
            ("tcp 203.0.113.1 80", "open ::ffff:192.0.2.1"),
            ("tcp 2001:db8:2::1 80", "open 2001:db8:1::1"),
            ("tcp 2001:db8:2::1 443", "open 2001:db8:1::1"),
            ("tcp 2001:db8:2::1 81", "refused"),
            ("tcp 2001:db8:2::1 53", "refused"),
            ("tcp 2001:db8:1::1 80", "refused"),
            ("tcp fd62:756c:6b68::1 80", "refused"),
            ("tcp fd00::9 80", "refused"),
            ("tcp fd00:ec2::254 80", "refused"),
            ("tcp 64:ff9b::a00:1 80", "refused"),
            ("tcp 2002:a00:1::1 80", "refused"),
            // The exception, and nothing beside it.
            ("tcp 10.77.0.9 5432", "open ::ffff:10.77.0.1"),
            ("tcp 10.77.0.9 80", "refused"),
            ("tcp 10.77.0.1 5432", "refused"),
            ("udp 10.77.0.9 5432", "prohibited"),
        ],
    )
    .await;
    for (frame, counter) in [("ra", "router"), ("ipv6", "ip")] {
        let before = counted(&machine, Family::Netdev)[counter];
        assert_eq!(
            tries(&machine, &[&format!("frame {frame}")]).await,
            ["sent"]
        );
        let stopped = counted(&machine, Family::Netdev)[counter] > before;
        let seen = if stopped { "stopped" } else { "not stopped" };
        note(
            &format!("frame {frame} as {counter}, with IPv6"),
            "stopped",
            seen,
        );
        assert!(stopped, "{frame}");
    }
    machine.kill().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_hold_and_change_while_it_runs() {
    let world = World::new();
    let seen = Seen::default();
    greet(&world.internet.netns, "0.0.0.0:80", &seen);
    let source = world
        .internet
        .netns
        .run_in(|| TcpListener::bind("0.0.0.0:443"))
        .unwrap()
        .unwrap();
    thread::spawn(move || {
        for mut stream in source.incoming().flatten() {
            thread::spawn(move || stream.write_all(&vec![1; 1 << 20]));
        }
    });
    let sink = world
        .internet
        .netns
        .run_in(|| TcpListener::bind("0.0.0.0:22"))
        .unwrap()
        .unwrap();
    thread::spawn(move || {
        for mut stream in sink.incoming().flatten() {
            thread::spawn(move || {
                let mut all = Vec::new();
                let _ = stream.read_to_end(&mut all);
                let _ = writeln!(stream, "{} bytes", all.len());
            });
        }
    });
    let mut policy = policy();
    policy.limits.connections = 5;
    policy.limits.download = Some(Bytes(128 << 10));
    policy.limits.upload = Some(Bytes(128 << 10));
    let live = Live::with_site(world.site());
    let machine = live.start_from(wish("own"), &catalog(policy.clone())).await;
    // Where the other end stays open, too: a connection that one end has closed
    // and that closes again, because the answer was late, is not counted.
    let held = tries(&machine, &["hold 203.0.113.1 22 8"]).await;
    assert_eq!(held, ["5 open, 3 refused"]);
    let change = |policy: &NetworkPolicy| machine.set_network(policy, false).unwrap();
    let timed = async |line: &str, expected: &str| {
        let begin = std::time::Instant::now();
        assert_eq!(tries(&machine, &[line]).await, [expected]);
        begin.elapsed()
    };
    policy.limits.connections = 100;
    change(&policy);
    let carried = machine.carried().unwrap();
    let lines = ["get 203.0.113.1 443", "put 203.0.113.1 22 1048576"];
    let mut limited = Vec::new();
    for line in lines {
        let slow = timed(line, "1048576 bytes").await;
        assert!(slow > Duration::from_millis(7000), "{line}: {slow:?}");
        limited.push(slow);
    }
    // Whether a machine is idle is told by it, too.
    let carried = machine.carried().unwrap() - carried;
    assert!((2 << 20..8 << 20).contains(&carried), "{carried} bytes");
    policy.limits.download = None;
    policy.limits.upload = None;
    change(&policy);
    for (line, slow) in lines.into_iter().zip(limited) {
        let fast = timed(line, "1048576 bytes").await;
        assert!(
            fast + Duration::from_secs(2) < slow,
            "{line}: {fast:?}, {slow:?} with limits"
        );
    }
    // What went through before counts.
    policy.limits.total = Some(Bytes((4 << 20) + (512 << 10)));
    change(&policy);
    let cut = tries(&machine, &["get 203.0.113.1 443", "tcp 203.0.113.1 80"]).await;
    assert!(
        cut[0].ends_with("and no end") || cut[0] == "error 104",
        "{cut:?}"
    );
    assert!(counted(&machine, Family::Inet)["quota"] > 0, "{cut:?}");
    policy.limits.total = None;
    policy.limits.connection_rate = 3;
    change(&policy);
    let held = tries(&machine, &["hold 203.0.113.1 80 30"]).await;
    assert!(held[0].contains("refused"), "{held:?}");
    assert!(counted(&machine, Family::Inet)["rate"] > 0);
    machine.kill().await.unwrap();
}
