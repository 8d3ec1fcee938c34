//! A machine on a bridge of the host's: it reaches what is there, by addresses of
//! its own and no others.

mod support;

#[path = "support/matrix.rs"]
mod matrix;

use bulkhead::error::Explain;
use bulkhead::plan::firewall::Family;
use bulkhead::spec::{Bytes, Catalog, NetworkMode, NetworkPolicy, Request as Wish};
use matrix::{Seen, counted, greet, matrix, tries};
use support::live::{Live, sh};
use support::net::{Place, World, note, sh_in};

const BRIDGE: &str = "br0:10.99.0.50/24@10.99.0.1";

fn wish() -> Wish {
    Wish {
        network: None,
        bridge: Some(BRIDGE.parse().unwrap()),
        memory: Some(Bytes::mib(256)),
        ..Wish::default()
    }
}

/// Puts a bridge on the host, and somebody else on the bridge.
fn lan(world: &World) -> Place {
    let peer = Place::new(world.dir.path().join("peer"));
    let script = format!(
        "ip link add br0 type bridge; ip addr add 10.99.0.1/24 dev br0; ip link set br0 up
         ip link add port0 type veth peer name eth0 netns {}; ip link set port0 master br0 up",
        peer.path.display()
    );
    sh_in(&world.host.netns, &script);
    sh_in(
        &peer.netns,
        "ip addr add 10.99.0.9/24 dev eth0; ip link set eth0 up; ip route add default via 10.99.0.1",
    );
    peer
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_on_a_bridge_is_who_it_is_and_no_one_else() {
    let world = World::new();
    let peer = lan(&world);
    let seen = Seen::default();
    greet(&peer.netns, "0.0.0.0:8080", &seen);
    greet(&world.host.netns, "10.99.0.1:80", &seen);
    // But for what they counted.
    let ruleset = || {
        let text = sh_in(&world.host.netns, "nft list ruleset");
        text.replace(char::is_numeric, "")
    };
    let rules = ruleset();
    let live = Live::with_site(world.site());
    let machine = live.start(wish()).await;
    matrix(
        &machine,
        &[
            // At any port: it is not filtered.
            ("tcp 10.99.0.9 8080", "open 10.99.0.50"),
            ("tcp 10.99.0.1 80", "open 10.99.0.50"),
            ("ping 10.99.0.9", "reply"),
        ],
    )
    .await;
    let shown = sh(&machine, "cat /etc/resolv.conf /sys/class/net/eth0/address").await;
    assert_eq!(shown, "nameserver 10.99.0.1\n02:62:0a:63:00:32");
    let known = || {
        sh_in(
            &peer.netns,
            "ip neigh show 10.99.0.1; ip neigh show 10.99.0.50",
        )
    };
    let talk =
        "perl -MIO::Socket::INET -e 'IO::Socket::INET->new(PeerAddr => \"10.99.0.1:80\") or die'";
    sh_in(&peer.netns, talk);
    let macs = |text: String| -> Vec<String> {
        let words = text.lines().filter_map(|line| line.split("lladdr ").nth(1));
        words.map(|rest| rest[..17].to_owned()).collect()
    };
    let before = macs(known());
    let frames: [(&str, &[&str]); 6] = [
        ("mac", &["mac"]),
        ("ip", &["source", "elsewhere"]),
        ("arp", &["arp", "arp-mac"]),
        ("type", &["vlan", "qinq", "stp", "ra", "ipv6"]),
        ("broadcast", &["multicast", "dhcp-offer"]),
        ("dhcp", &["dhcp-unicast"]),
    ];
    let counts = counted(&machine, Family::Netdev);
    let all = frames.iter().flat_map(|(_, frames)| frames.iter());
    let lines: Vec<_> = all.map(|frame| format!("frame {frame}")).collect();
    let lines: Vec<_> = lines.iter().map(String::as_str).collect();
    assert_eq!(tries(&machine, &lines).await, vec!["sent"; lines.len()]);
    let after = counted(&machine, Family::Netdev);
    for (counter, frames) in frames {
        let stopped = after[counter] - counts[counter];
        let (expected, seen) = (frames.len(), stopped.min(frames.len() as u64));
        let row = format!("on a bridge, frames {}", frames.join(", "));
        note(&row, &expected.to_string(), &seen.to_string());
        assert!(
            stopped >= expected as u64,
            "{row}: {stopped} stopped as {counter}"
        );
    }
    assert_eq!((macs(known()), before.len()), (before, 2));
    // The host's own rules are as they were, and nothing was added.
    assert_eq!(ruleset(), rules);

    let record = std::fs::read_to_string(machine.dir().join("network.jsonl")).unwrap();
    assert!(record.contains("packet:arp"), "{record}");
    machine.kill().await.unwrap();
    world.settle();
    let ports = sh_in(&world.host.netns, "ip -o link show master br0");
    assert_eq!(ports.lines().count(), 1, "{ports}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bridge_that_is_not_there_is_told_before_anything_starts() {
    let world = World::new();
    let live = Live::with_site(world.site());
    let wish = Wish {
        image: Some("base".into()),
        kernel: Some("tuned".into()),
        accel: Some(bulkhead::spec::Accel::Tcg),
        // A device, and no bridge.
        bridge: Some("up0:192.0.2.9/24@192.0.2.1".parse().unwrap()),
        ..Wish::default()
    };
    let spec = wish.resolve_machine(&Catalog::default()).unwrap();
    assert_eq!(spec.network.mode, NetworkMode::Bridge);
    let error = live.host.start(&spec).await.unwrap_err();
    assert_eq!(error.code(), "network-no-bridge");

    // What is not filtered cannot be asked to be.
    let strict = Wish {
        strict: Some(true),
        ..wish_of(&spec.network)
    };
    let refused = strict.resolve_machine(&Catalog::default()).unwrap_err();
    assert_eq!(refused.code(), "flags-clash");
}

fn wish_of(policy: &NetworkPolicy) -> Wish {
    Wish {
        bridge: policy.bridge.clone(),
        ..Wish::default()
    }
}
