//! What a guest does by the thousand, and what it overhears.

mod support;

#[path = "support/matrix.rs"]
mod matrix;

use std::net::TcpListener;
use std::time::Instant;

use bulkhead::plan::firewall::Family;
use bulkhead::spec::{Bytes, Catalog, NetworkMode, NetworkPolicy, Request as Wish};
use matrix::{Seen, counted, greet, matrix, tries};
use support::live::Live;
use support::net::{World, note, sh_in};

/// SYNs of a flood.
const SYNS: u64 = 10_000;

fn wish() -> Wish {
    Wish {
        network: Some("own".parse().unwrap()),
        memory: Some(Bytes::mib(256)),
        ..Wish::default()
    }
}

/// Takes connections and keeps them, as many as may come.
fn keep(world: &World, address: &str) {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most.min(20_000), most).unwrap();
    let bind = || TcpListener::bind(address);
    let listener = world.internet.netns.run_in(bind).unwrap().unwrap();
    std::thread::spawn(move || {
        let all: Vec<_> = listener.incoming().flatten().collect();
        drop(all);
    });
}

/// Connections that the kernel keeps for a namespace.
fn kept(netns: &bulkhead::host::netns::Netns) -> u64 {
    let text = sh_in(netns, "cat /proc/sys/net/netfilter/nf_conntrack_count");
    text.trim().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn floods_stop_at_the_limits_and_neighbours_are_not_heard() {
    let world = World::new();
    let seen = Seen::default();
    greet(&world.internet.netns, "0.0.0.0:80", &seen);
    keep(&world, "0.0.0.0:443");
    let usual = NetworkPolicy::of_mode(NetworkMode::NatFiltered);
    let neighbour = world.wire("neighbour", &usual);
    let mut policy = usual.clone();
    policy.limits.connection_rate = 1_000_000;
    let mut catalog = Catalog::default();
    catalog
        .add_network("own".parse().unwrap(), policy.clone())
        .unwrap();
    let live = Live::with_site(world.site());
    let machine = live.start_from(wish(), &catalog).await;

    // While it listens, a neighbour talks.
    let talk = "for i in 1 2 3 4 5 6; do perl -MIO::Socket::INET -e 'IO::Socket::INET->new(PeerAddr => \"203.0.113.1:80\", Timeout => 2) or die'; sleep 1; done";
    let before = seen.lock().unwrap().len();
    std::thread::scope(|scope| {
        scope.spawn(|| sh_in(neighbour.netns(), talk));
        tokio::task::block_in_place(|| {
            tokio::runtime::Handle::current()
                .block_on(matrix(&machine, &[("sniff 5", "own only")]));
        });
    });
    assert!(seen.lock().unwrap().len() >= before + 5, "it was silent");

    // At a time: ten thousand, of which two thousand are let through.
    let row = ("hold 203.0.113.1 443 10000", "2000 open, 8000 refused");
    matrix(&machine, &[row]).await;
    // The other ends are open still: they count until they are forgotten.
    machine.set_network(&policy, true).unwrap();
    matrix(&machine, &[("tcp 203.0.113.1 80", "open 192.0.2.1")]).await;

    // In a second: as many as the limit says, whatever comes.
    machine.set_network(&usual, false).unwrap();
    let begun = counted(&machine, Family::Inet);
    let begin = Instant::now();
    let flood = format!("flood 203.0.113.1 80 {SYNS}");
    assert_eq!(tries(&machine, &[&flood]).await, [format!("{SYNS} sent")]);
    // A burst, and as many each second.
    let most = 500 * (begin.elapsed().as_secs() + 2);
    let over = counted(&machine, Family::Inet);
    let new = over["new"] - begun["new"];
    let stopped = over["rate"] + over["connections"] - begun["rate"] - begun["connections"];
    let outcome = if new <= most {
        "limited"
    } else {
        "not limited"
    };
    note(&flood, "limited", outcome);
    assert!(
        new <= most && new + stopped >= SYNS,
        "{new} of at most {most}, {stopped} stopped"
    );
    // Of all its connections, the host keeps no more than were let through: the
    // two thousand, these, and what was opened to see whether it can.
    let let_through = 2000 + new + 20;
    let host = kept(&world.host.netns);
    assert!(
        host <= let_through,
        "{host} connections on the host, {new} new"
    );
    let after = kept(machine.netns().unwrap());
    assert!(
        after <= 2000 + new,
        "{after} connections in its own namespace"
    );
    matrix(&machine, &[("ping 198.18.0.1", "reply")]).await;
    machine.kill().await.unwrap();
}
