//! A machine on a bridge, or a tap, of the host's: it reaches what is there, by
//! addresses of its own and no others.

mod support;

#[path = "support/ears.rs"]
mod ears;
#[path = "support/frames.rs"]
mod frames;
#[path = "support/matrix.rs"]
mod matrix;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use bulkhead::error::Explain;
use bulkhead::host::netns::Netns;
use bulkhead::host::network::guarded;
use bulkhead::host::nft;
use bulkhead::plan::firewall::{Family, guard_name};
use bulkhead::run::{Given, Machine, failures};
use bulkhead::spec::{Bytes, Catalog, NetworkMode, NetworkPolicy, Request as Wish};
use ears::{Ears, Judge};
use frames::{IP, Maker, UDP, ethernet, ip};
use matrix::{Hand, Seen, counted, greet, matrix, tries};
use support::live::{Live, sh};
use support::net::{Place, World, note, sh_in};

const BRIDGE: &str = "br0:10.99.0.50/24@10.99.0.1";
const TAP: &str = "tap7:10.99.0.50/24@10.99.0.1";

fn wish(bridge: &str) -> Wish {
    Wish {
        network: None,
        bridge: Some(bridge.parse().unwrap()),
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

/// The host's rules, but for what they counted.
fn ruleset(world: &World) -> String {
    let text = sh_in(&world.host.netns, "nft list ruleset");
    text.replace(char::is_numeric, "")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_on_a_bridge_is_who_it_is_and_no_one_else() {
    let world = World::new();
    let peer = lan(&world);
    let seen = Seen::default();
    greet(&peer.netns, "0.0.0.0:8080", &seen);
    greet(&world.host.netns, "10.99.0.1:80", &seen);
    let rules = ruleset(&world);
    let live = Live::with_site(world.site());
    let machine = live.start(wish(BRIDGE)).await;
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
    let counts = || counted(&machine, Family::Netdev);
    held(&machine, &peer, "on a bridge", counts).await;
    let ears = Ears::new(machine.netns().unwrap());
    plain(machine.netns().unwrap());
    plain(&world.host.netns);
    served(&machine, &peer, "on a bridge", ears, &counts).await;
    // The host's own rules are as they were, and nothing was added.
    assert_eq!(ruleset(&world), rules);

    let record = std::fs::read_to_string(machine.dir().join("network.jsonl")).unwrap();
    assert!(record.contains("packet:arp"), "{record}");
    machine.kill().await.unwrap();
    world.settle();
    let ports = sh_in(&world.host.netns, "ip -o link show master br0");
    assert_eq!(ports.lines().count(), 1, "{ports}");
}

/// What is not the machine's own is stopped, and its neighbours do not notice.
async fn held(
    machine: &Machine,
    peer: &Place,
    place: &str,
    counts: impl Fn() -> BTreeMap<String, u64>,
) {
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
    let first = counts();
    let all = frames.iter().flat_map(|(_, frames)| frames.iter());
    let lines: Vec<_> = all.map(|frame| format!("frame {frame}")).collect();
    let lines: Vec<_> = lines.iter().map(String::as_str).collect();
    assert_eq!(tries(machine, &lines).await, vec!["sent"; lines.len()]);
    // QEMU sends the last ones after the command has ended.
    let (mut after, begin) = (counts(), std::time::Instant::now());
    let missing = |after: &BTreeMap<String, u64>| {
        let mut counters = frames.iter();
        counters.any(|(name, all)| after[*name] - first[*name] < all.len() as u64)
    };
    while missing(&after) && begin.elapsed() < std::time::Duration::from_secs(20) {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        after = counts();
    }
    for (counter, frames) in frames {
        let stopped = after[counter] - first[counter];
        let (expected, seen) = (frames.len(), stopped.min(frames.len() as u64));
        let row = format!("{place}, frames {}", frames.join(", "));
        note(&row, &expected.to_string(), &seen.to_string());
        assert!(
            stopped >= expected as u64,
            "{row}: {stopped} stopped as {counter}"
        );
    }
    assert_eq!((macs(known()), before.len()), (before, 2));
}

/// Has bridges pass on what comes, as they do where br_netfilter is not loaded: with
/// it they look at packets themselves.
fn plain(netns: &Netns) {
    let switch = "/proc/sys/net/bridge/bridge-nf-call-iptables";
    sh_in(
        netns,
        &format!("if [ -e {switch} ]; then echo 0 > {switch}; fi"),
    );
}

/// What would serve its neighbour with an address does not get there, however it is
/// wrapped up; `before` is where it is heard in any case.
async fn served(
    machine: &Machine,
    peer: &Place,
    place: &str,
    before: Ears,
    counts: &dyn Fn() -> BTreeMap<String, u64>,
) {
    let judge = Judge {
        before,
        beyond: vec![Ears::new(&peer.netns)],
        leaving: false,
        counts: Box::new(counts),
    };
    let theirs = sh_in(&peer.netns, "cat /sys/class/net/eth0/address");
    let theirs = theirs.trim().split(':');
    let theirs: Vec<u8> = theirs
        .map(|byte| u8::from_str_radix(byte, 16).unwrap())
        .collect();
    let theirs: [u8; 6] = theirs.try_into().unwrap();
    let bridge: bulkhead::spec::Bridge = BRIDGE.parse().unwrap();
    type Make = fn(&Maker) -> Vec<u8>;
    // Where the length of a packet is, which its checksum covers.
    const LENGTH: usize = 2;
    fn long(m: &Maker, length: u16) -> Vec<u8> {
        let mut packet = m.packet(UDP, &m.udp(1067, 68));
        let sum = u16::from_be_bytes([packet[10], packet[11]]);
        let old = u16::from_be_bytes([packet[LENGTH], packet[LENGTH + 1]]);
        // RFC 1624.
        let mut new = u32::from(!sum) + u32::from(!old) + u32::from(length);
        new = (new & 0xffff) + (new >> 16);
        new = (new & 0xffff) + (new >> 16);
        packet[LENGTH..LENGTH + 2].copy_from_slice(&length.to_be_bytes());
        packet[10..12].copy_from_slice(&(!(new as u16)).to_be_bytes());
        packet
    }
    let all: [(&str, &str, Make); 8] = [
        ("UDP to its neighbour", "through", |m| {
            m.packet(UDP, &m.udp(1067, 8080))
        }),
        ("DHCP from port 67", "dhcp", |m| {
            m.packet(UDP, &m.udp(67, 68))
        }),
        ("DHCP from port 67 to another", "dhcp", |m| {
            m.packet(UDP, &m.udp(67, 1068))
        }),
        ("DHCP from another port", "dhcp", |m| {
            m.packet(UDP, &m.udp(1067, 68))
        }),
        ("DHCP as a first piece", "dhcp", |m| {
            m.packet4(UDP, &[], 0x2000, &m.udp(1067, 68))
        }),
        ("DHCP behind options", "dhcp", |m| {
            m.packet4(UDP, &[1, 1, 1, 1], 0, &m.udp(1067, 68))
        }),
        ("DHCP with a length too long", "ip", |m| long(m, 600)),
        ("DHCP with a length too short", "ip", |m| long(m, 8)),
    ];
    let mut hand = Hand::new(machine).await;
    let mut wrong = Vec::new();
    for ((case, expected, make), number) in all.into_iter().zip(100..) {
        let expected = match expected {
            "through" => expected.to_owned(),
            rule => format!("stopped as {rule}"),
        };
        let maker = Maker {
            from: bridge.address.into(),
            to: ip("10.99.0.9"),
            number,
        };
        let counted = judge.counted();
        let frame = ethernet(theirs, bridge.mac(), IP, &make(&maker));
        hand.sends(&[frame]).await;
        let seen = judge.came(&maker.mark(), &counted, &expected).await;
        let case = format!("{place}: {case}");
        note(&case, &expected, &seen);
        if seen != expected {
            wrong.push(format!("{case}: expected {expected}, seen {seen}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
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

/// Somebody's tap, on the bridge.
fn tap(world: &World) {
    let script = "ip tuntap add tap7 mode tap; ip link set tap7 master br0 up";
    sh_in(&world.host.netns, script);
}

/// The other end of it, as its owner has it.
#[allow(unsafe_code)]
fn end_of(world: &World) -> OwnedFd {
    nix::ioctl_write_ptr_bad!(
        set_iff,
        nix::request_code_write!(b'T', 202, size_of::<nix::libc::c_int>()),
        nix::libc::ifreq
    );
    let open = || {
        let mut options = std::fs::File::options();
        let end = options.read(true).write(true).open("/dev/net/tun").unwrap();
        // SAFETY: all zeroes is a valid `ifreq`.
        let mut request: nix::libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(b"tap7") {
            *to = *from as nix::libc::c_char;
        }
        let flags = nix::libc::IFF_TAP | nix::libc::IFF_NO_PI;
        request.ifr_ifru.ifru_flags = flags as nix::libc::c_short;
        // SAFETY: a valid descriptor, and the kernel reads and writes one `ifreq`.
        unsafe { set_iff(std::os::fd::AsRawFd::as_raw_fd(&end), &raw const request) }.unwrap();
        end.into()
    };
    world.host.netns.run_in(open).unwrap()
}

/// What was stopped at the tap of a machine.
fn stopped(live: &Live, machine: &Machine) -> BTreeMap<String, u64> {
    let leases = bulkhead::run::Record::leased(&live.host.dirs, &machine.plan().id).unwrap();
    let (netns, token) = guarded(&leases).unwrap().unwrap();
    let count = || nft::counters_of(Family::Netdev, &guard_name(&token));
    let counted = netns.run_in(count).unwrap().unwrap();
    let packets = counted.into_iter().map(|(name, one)| (name, one.packets));
    packets.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tap_of_the_hosts_is_used_and_left_as_it_was() {
    let world = World::new();
    let peer = lan(&world);
    tap(&world);
    let seen = Seen::default();
    greet(&peer.netns, "0.0.0.0:8080", &seen);
    greet(&world.host.netns, "10.99.0.1:80", &seen);
    let links = || {
        sh_in(
            &world.host.netns,
            "ip -br link | awk '{print $1, $3}'; ip -br link show master br0 | awk '{print $1}'",
        )
    };
    let (rules, before) = (ruleset(&world), links());
    let live = Live::with_site(world.site());
    let machine = live.start(wish(TAP)).await;
    let rows = [
        ("tcp 10.99.0.9 8080", "open 10.99.0.50"),
        ("tcp 10.99.0.1 80", "open 10.99.0.50"),
        ("ping 10.99.0.9", "reply"),
    ];
    matrix(&machine, &rows).await;
    let counts = || stopped(&live, &machine);
    held(&machine, &peer, "on a tap", counts).await;
    let ears = Ears::new(&world.host.netns);
    plain(&world.host.netns);
    served(&machine, &peer, "on a tap", ears, &counts).await;

    // It is nobody else's meanwhile, and what cannot be limited is not said to be.
    let other = |wish: Wish| {
        let wish = wish.over(Wish {
            image: Some("base".into()),
            kernel: Some("tuned".into()),
            accel: Some(bulkhead::spec::Accel::Tcg),
            ..Wish::default()
        });
        wish.resolve_machine(&Catalog::default()).unwrap()
    };
    let error = live.host.start(&other(wish(TAP))).await.unwrap_err();
    assert_eq!(error.code(), "network-refused", "{error:?}");
    let mut limited = other(wish(TAP));
    limited.network.limits.upload = Some(Bytes::mib(1));
    let error = live.host.start(&limited).await.unwrap_err();
    assert_eq!(error.code(), "network-no-limits", "{error:?}");

    // Rules that somebody changes there are missed, too.
    assert_eq!(failures(&machine.verify().await.unwrap()), [""; 0]);
    let table = sh_in(&world.host.netns, "nft list tables netdev");
    let table = table.trim().trim_start_matches("table ").to_owned();
    sh_in(
        &world.host.netns,
        &format!("nft add rule {table} own accept"),
    );
    let failed = failures(&machine.verify().await.unwrap()).join("; ");
    assert!(failed.contains("4 rules instead of 3"), "{failed}");
    machine.kill().await.unwrap();
    world.settle();
    assert_eq!((ruleset(&world), links()), (rules, before));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tap_and_where_it_is_can_be_given_as_descriptors() {
    let world = World::new();
    let peer = lan(&world);
    tap(&world);
    let seen = Seen::default();
    greet(&peer.netns, "0.0.0.0:8080", &seen);
    let rules = ruleset(&world);
    // It is told nothing of where that is.
    let live = Live::new();
    let netns = || {
        Some(Arc::new(
            std::fs::File::open(&world.host.path).unwrap().into(),
        ))
    };
    let wish = |bridge: &str| {
        let wish = wish(bridge).over(Wish {
            image: Some("base".into()),
            kernel: Some("tuned".into()),
            accel: Some(bulkhead::spec::Accel::Tcg),
            cpus: Some(1),
            ..Wish::default()
        });
        wish.resolve_machine(&Catalog::default()).unwrap()
    };
    for (bridge, uplink) in [(BRIDGE, netns()), (TAP, None)] {
        let given = Given {
            uplink,
            tap: Some(Arc::new(end_of(&world))),
        };
        let error = live.host.start_on(&wish(bridge), given).await.unwrap_err();
        let codes = ["network-other-tap", "network-no-bridge"];
        assert!(codes.contains(&error.code()), "{error:?}");
    }
    let given = Given {
        uplink: netns(),
        tap: Some(Arc::new(end_of(&world))),
    };
    let (_, machine) = live.host.start_on(&wish(TAP), given).await.unwrap();
    matrix(&machine, &[("tcp 10.99.0.9 8080", "open 10.99.0.50")]).await;
    tries(&machine, &["frame mac", "frame arp"]).await;
    let (mut counts, begin) = (stopped(&live, &machine), std::time::Instant::now());
    while (counts["mac"] == 0 || counts["arp"] == 0)
        && begin.elapsed() < std::time::Duration::from_secs(20)
    {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        counts = stopped(&live, &machine);
    }
    assert!(counts["mac"] > 0 && counts["arp"] > 0, "{counts:?}");
    assert_eq!(failures(&machine.verify().await.unwrap()), [""; 0]);
    machine.kill().await.unwrap();
    world.settle();
    assert_eq!(ruleset(&world), rules);
    assert_eq!(support::net::mounts_below(&live.host.dirs.runtime), 0);
}
