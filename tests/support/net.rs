//! A host, and an internet behind it, in network namespaces of the test's own.
//!
//! `ip`, `nft` and the like are used here and nowhere in the program.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead::host::lease::Lease;
use bulkhead::host::netns::{self, Netns};
use bulkhead::host::network::{Site, Wired, Wires};
use bulkhead::plan::firewall::Names;
use bulkhead::plan::network::RETIRED;
use bulkhead::spec::NetworkPolicy;

/// Runs a shell script in a namespace; it must succeed.
#[track_caller]
pub(crate) fn sh_in(netns: &Netns, script: &str) -> String {
    let run = || Command::new("sh").args(["-ec", script]).output().unwrap();
    let output = netns.run_in(run).unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{script}: {out}{err}");
    out
}

/// A namespace under a path of its own, gone when dropped.
pub(crate) struct Place {
    pub(crate) path: PathBuf,
    pub(crate) netns: Netns,
}

impl Place {
    pub(crate) fn new(path: PathBuf) -> Self {
        let netns = Netns::make(&path).unwrap();
        let place = Self { path, netns };
        sh_in(&place.netns, "ip link set lo up");
        place
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        netns::release(&self.path).unwrap();
    }
}

/// A host whose only way out leads to an internet.
pub(crate) struct World {
    pub(crate) host: Place,
    pub(crate) internet: Place,
    /// Removed last: the others are mounted in it.
    pub(crate) dir: tempfile::TempDir,
}

impl World {
    /// The host has 192.0.2.1 and 10.77.0.1 towards a LAN, and a firewall of
    /// its own; the internet has 203.0.113.1, .2 and 8.8.8.8.
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let host = Place::new(dir.path().join("host"));
        let internet = Place::new(dir.path().join("internet"));
        let inet = internet.path.display();
        sh_in(
            &host.netns,
            &format!(
                "ip link add up0 type veth peer name down0 netns {inet}
                 ip addr add 192.0.2.1/24 dev up0; ip link set up0 up
                 ip -6 addr add 2001:db8:1::1/64 dev up0 nodad
                 ip link add lan0 type veth peer name lan1 netns {inet}; ip addr add 10.77.0.1/24 dev lan0; ip link set lan0 up
                 nft add table ip filter
                 nft add chain ip filter FORWARD '{{ type filter hook forward priority 0; policy accept; }}'
                 nft add rule ip filter FORWARD counter
                 nft add table inet other
                 nft add set inet other s '{{ type ipv4_addr; elements = {{ 1.2.3.4 }}; }}'"
            ),
        );
        sh_in(
            &internet.netns,
            "ip addr add 192.0.2.254/24 dev down0; ip link set down0 up
             ip -6 addr add 2001:db8:1::ffff/64 dev down0 nodad
             ip addr add 10.77.0.9/24 dev lan1; ip link set lan1 up
             for a in 203.0.113.1 203.0.113.2 8.8.8.8; do ip addr add $a/32 dev lo; done
             ip -6 addr add 2001:db8:2::1/128 dev lo nodad",
        );
        sh_in(
            &host.netns,
            "ip route add default via 192.0.2.254; ip -6 route add default via 2001:db8:1::ffff",
        );
        Self {
            dir,
            host,
            internet,
        }
    }

    pub(crate) fn site(&self) -> Site {
        Site {
            uplink: Some(self.host.path.clone()),
            ..Site::default()
        }
    }

    /// The network of a machine of this name.
    pub(crate) fn wire(&self, name: &str, policy: &NetworkPolicy) -> Wiring {
        self.wire_with(name, policy, Names::Any)
    }

    /// As [`World::wire`], with what names have to do with it.
    pub(crate) fn wire_with(&self, name: &str, policy: &NetworkPolicy, names: Names) -> Wiring {
        let wires = Wires::choose(self.dir.path().join(name), self.site(), policy);
        let leases = wires.leases();
        let wired = wires.make(policy, names).unwrap();
        Wiring {
            leases,
            wired: Some(wired),
        }
    }

    /// Waits until the kernel has taken away what was released.
    pub(crate) fn settle(&self) {
        let retired = format!("ip -o link show group {RETIRED}");
        let begin = Instant::now();
        while !sh_in(&self.host.netns, &retired).is_empty() {
            assert!(begin.elapsed() < Duration::from_secs(60), "links stay");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The rules on the host that are not ours.
    pub(crate) fn own_rules(&self) -> String {
        sh_in(
            &self.host.netns,
            "nft list table ip filter; nft list table inet other",
        )
    }
}

/// A network, released when dropped.
pub(crate) struct Wiring {
    pub(crate) leases: [Lease; 2],
    pub(crate) wired: Option<Wired>,
}

impl Wiring {
    pub(crate) fn netns(&self) -> &Netns {
        &self.wired.as_ref().unwrap().netns
    }

    pub(crate) fn release(&mut self) {
        self.wired = None;
        for lease in self.leases.iter().rev() {
            lease.release().unwrap();
        }
    }
}

impl Drop for Wiring {
    fn drop(&mut self) {
        self.release();
    }
}

/// Mounts below a directory.
pub(crate) fn mounts_below(dir: &Path) -> usize {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    mounts
        .lines()
        .filter(|line| line.contains(&*dir.to_string_lossy()))
        .count()
}

/// Writes a row down for `cargo xtask probe network`.
pub(crate) fn note(case: &str, expected: &str, seen: &str) {
    let Some(path) = std::env::var_os("BULKHEAD_MATRIX") else {
        return;
    };
    // In one piece: other tests write there, too.
    let row = serde_json::json!({ "case": case, "expected": expected, "seen": seen });
    let row = format!("{row}\n");
    let mut file = std::fs::File::options()
        .append(true)
        .create(true)
        .open(path)
        .unwrap();
    file.write_all(row.as_bytes()).unwrap();
}
