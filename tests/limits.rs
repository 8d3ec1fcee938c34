//! Limits of a machine that runs, changed from the command line and read back
//! from the kernel.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bulkhead::host::netns::Netns;
use serde_json::Value;
use support::net::{World, sh_in};
use support::{Bulkhead, Detached};

/// Nobody answers there, and nobody is asked.
const RESOLVER: &str = "8.8.8.8:53";
/// What limits CPU time: on cgroup v2, and on v1.
const QUOTA: [&str; 2] = ["cpu.max", "cpu.cfs_quota_us"];
/// What limits writes, likewise.
const WRITES: [&str; 2] = ["io.max", "blkio.throttle.write_bps_device"];

/// What is in the files of these names in a machine's control group.
fn group(bulkhead: &Bulkhead, vm: &str, names: [&str; 2]) -> Vec<String> {
    let leases = bulkhead.state().join(format!("runs/{vm}/leases.json"));
    let leases: Vec<Value> = serde_json::from_str(&fs::read_to_string(leases).unwrap()).unwrap();
    let groups = leases.iter().filter(|lease| lease["kind"] == "cgroup");
    let groups: Vec<PathBuf> = groups
        .map(|lease| lease["path"].as_str().unwrap().into())
        .collect();
    let read = |group: &PathBuf| names.map(|name| fs::read_to_string(group.join(name)).ok());
    groups.iter().flat_map(read).flatten().collect()
}

/// The CPU time it is limited to, in percent of one core, by the kernel; `None`
/// for no limit.
fn quota(bulkhead: &Bulkhead, vm: &str) -> Option<u64> {
    let found = group(bulkhead, vm, QUOTA);
    assert_eq!(found.len(), 1, "{found:?}");
    let quota = found[0].split_whitespace().next().unwrap();
    // Of a tenth of a second.
    Some(quota.parse::<u64>().ok()? / 1000)
}

/// Whether this host limits CPU time; said when not.
fn has_quota(bulkhead: &Bulkhead, vm: &str) -> bool {
    let found = !group(bulkhead, vm, QUOTA).is_empty();
    if !found {
        println!("skipped: control_group: it has no limit of CPU time");
    }
    found
}

/// The rate, in bytes a second, that a device of a machine's namespace is held to.
fn rate(netns: &Netns, device: &str) -> Option<u64> {
    let text = sh_in(netns, &format!("tc -j qdisc show dev {device}"));
    let found: Value = serde_json::from_str(&text).unwrap();
    let found = found.as_array().unwrap().iter();
    let mut rates = found.filter(|one| one["kind"] == "tbf");
    rates
        .next()
        .map(|one| one["options"]["rate"].as_u64().unwrap())
}

/// A machine with a network, and its namespace.
fn networked<'a>(bulkhead: &'a Bulkhead, name: &str) -> (Detached<'a>, Netns) {
    let vm = bulkhead.create(name, &["--start"]);
    let path = bulkhead.runtime().join(format!("{name}.netns"));
    (vm, Netns::open(&path).unwrap())
}

/// What the kernel has in a chain. `nft list chain` takes `limits` and `quota`
/// for words of its own.
fn chain(netns: &Netns, name: &str) -> String {
    let table = sh_in(netns, "nft list table inet bulkhead");
    let begin = table.find(&format!("chain {name} {{")).expect(name);
    let chain = &table[begin..];
    chain[..chain.find("\n\t}").unwrap()].to_owned()
}

#[test]
fn limits_that_are_set_reach_the_kernel_and_are_shown() {
    let world = World::new();
    let bulkhead = Bulkhead::new()
        .with_own_state()
        .inside(&world.host.path, RESOLVER);
    let (vm, netns) = networked(&bulkhead, "limited");
    let seen = vm.inspect();
    assert_eq!(seen["network_limits"]["connections"], 2000, "{seen}");
    assert!(chain(&netns, "limits").contains("ct count over 2000"));
    assert_eq!((rate(&netns, "tap"), rate(&netns, "out")), (None, None));

    let limits = ["--upload", "1M", "--download", "2M", "--connections", "7"];
    let more = ["--connection-rate", "9", "--total", "5M"];
    bulkhead.must(&[&["set", "limited"], &limits[..], &more].concat());
    let limits = chain(&netns, "limits");
    assert!(
        limits.contains("ct count over 7 ") && limits.contains("limit rate over 9/second"),
        "{limits}"
    );
    let quota_rule = chain(&netns, "quota");
    assert!(quota_rule.contains("quota over 5 mbytes"), "{quota_rule}");
    // To the guest, and from it.
    let rates = || (rate(&netns, "tap"), rate(&netns, "out"));
    assert_eq!(rates(), (Some(2 << 20), Some(1 << 20)));
    let shown = vm.inspect()["network_limits"].clone();
    let asked = serde_json::json!({
        "upload": "1M", "download": "2M", "connections": 7, "connection_rate": 9, "total": "5M",
    });
    assert_eq!(shown, asked);
    let verify = || bulkhead.raw(&["verify", "limited"]);
    assert_eq!(verify().code, 0, "{:?}", verify());

    // What is not named stays.
    bulkhead.must(&["set", "limited", "--connections", "8", "--upload", "3M"]);
    assert!(chain(&netns, "limits").contains("ct count over 8 "));
    assert!(chain(&netns, "quota").contains("quota over 5 mbytes"));
    assert_eq!(rates(), (Some(2 << 20), Some(3 << 20)));
    let without = ["upload", "download", "total"].map(|limit| ["--without", limit]);
    bulkhead.must(&[&["set", "limited"], &without.concat()[..]].concat());
    assert!(!chain(&netns, "quota").contains("quota over"));
    assert_eq!(rates(), (None, None));
    let shown = vm.inspect()["network_limits"].clone();
    assert_eq!(
        shown,
        serde_json::json!({ "connections": 8, "connection_rate": 9 })
    );

    if has_quota(&bulkhead, "limited") {
        assert_eq!(quota(&bulkhead, "limited"), None);
        for percent in [150, 40] {
            bulkhead.must(&["set", "limited", "--cpu-quota", &percent.to_string()]);
            assert_eq!(quota(&bulkhead, "limited"), Some(percent));
            assert_eq!(vm.inspect()["tuning"]["cpu_quota"], percent);
            assert_eq!(verify().code, 0, "{:?}", verify());
        }
        bulkhead.must(&["set", "limited", "--without", "cpu-quota"]);
        assert_eq!(quota(&bulkhead, "limited"), None);
        assert_eq!(vm.inspect()["tuning"]["cpu_quota"], Value::Null);
    }
    // One without a network has no such limits.
    let options = ["--network", "isolated"];
    let isolated = bulkhead.create("isolated", &options);
    assert_eq!(isolated.inspect()["network_limits"], Value::Null);
    bulkhead.must_fail(&["set", "isolated", "--upload", "1M"], "flags-clash");
}

/// What the record says of a machine.
fn record(bulkhead: &Bulkhead, vm: &str) -> String {
    fs::read_to_string(bulkhead.state().join(format!("runs/{vm}/spec.json"))).unwrap()
}

fn set<'a>(words: &[&'a str]) -> Vec<&'a str> {
    [&["set", "whole"], words].concat()
}

#[test]
fn a_set_that_fails_changes_nothing() {
    let world = World::new();
    let bulkhead = Bulkhead::new()
        .with_own_state()
        .inside(&world.host.path, RESOLVER);
    let (vm, netns) = networked(&bulkhead, "whole");
    let has_quota = has_quota(&bulkhead, "whole");
    let quotas = |percent| match has_quota {
        true => vec!["--cpu-quota", percent],
        false => vec![],
    };
    let available = || -> u64 {
        let words = ["exec", "whole", "awk", "/MemAvailable/ {print $2}"];
        let kib = bulkhead.must(&[&words[..], &["/proc/meminfo"]].concat());
        kib.trim().parse().unwrap()
    };
    let little = || {
        let begin = Instant::now();
        while available() > 120 << 10 {
            let patience = Duration::from_secs(60);
            assert!(begin.elapsed() < patience, "{} KiB", available());
        }
    };
    bulkhead.must(&set(&[&["--memory", "128M"], &quotas("80")[..]].concat()));
    little();
    let (before, written, view) = (
        group(&bulkhead, "whole", QUOTA),
        record(&bulkhead, "whole"),
        vm.inspect(),
    );
    let same = || {
        assert_eq!(group(&bulkhead, "whole", QUOTA), before);
        let writes = group(&bulkhead, "whole", WRITES).concat();
        assert!(!writes.contains("1048576"), "{writes}");
        assert_eq!(record(&bulkhead, "whole"), written);
        let now = vm.inspect();
        for part in [
            "tuning",
            "disk",
            "network_limits",
            "lifetime",
            "deadline_ms",
        ] {
            assert_eq!(now[part], view[part], "{part}");
        }
        let verify = bulkhead.raw(&["verify", "whole"]);
        assert_eq!(verify.code, 0, "{verify:?}");
    };

    // The disk comes last, and cannot become smaller.
    let many = ["--memory", "256M", "--write-rate", "1M", "--upload", "1M"];
    let many = [&many[..], &["--connections", "7", "--ttl", "1h"]].concat();
    let many = [&many[..], &quotas("20")].concat();
    let refused = set(&[&many[..], &["--disk", "1M"]].concat());
    let said = bulkhead.must_fail(&refused, "value-invalid");
    let words = "cannot change the disk of whole (nothing was changed)";
    assert!(
        said.contains(words) && said.contains("cannot shrink"),
        "{said}"
    );
    same();
    assert!(chain(&netns, "limits").contains("ct count over 2000 "));
    assert_eq!(rate(&netns, "out"), None);
    little();

    // The network comes in between; where it cannot be taken back, that is said.
    sh_in(&netns, "ip link set out down; ip link set out name gone");
    let said = bulkhead.must_fail(&set(&many), "network-refused");
    let words = "cannot change the network of whole (nothing else was changed)";
    let back = "its network could not be put back as it was";
    assert!(said.contains(words) && said.contains(back), "{said}");
    same();
    assert!(chain(&netns, "limits").contains("ct count over 2000 "));
    sh_in(&netns, "ip link set gone name out; ip link set out up");

    // All of it is possible.
    bulkhead.must(&set(&many));
    let now = vm.inspect();
    assert_eq!(now["tuning"]["io"]["write_bytes"], "1M", "{now}");
    assert_eq!(now["network_limits"]["connections"], 7, "{now}");
    assert!(now["deadline_ms"].is_u64(), "{now}");
    if has_quota {
        assert_eq!(quota(&bulkhead, "whole"), Some(20));
    }
    assert_eq!(rate(&netns, "out"), Some(1 << 20));
    // Of one that does not run, likewise.
    bulkhead.must(&["stop", "whole"]);
    let written = record(&bulkhead, "whole");
    let disk = bulkhead.state().join("runs/whole/disk.img");
    let length = |disk: &Path| fs::metadata(disk).unwrap().len();
    let before = length(&disk);
    let refused = set(&["--cpu-quota", "30", "--disk", "1M"]);
    bulkhead.must_fail(&refused, "value-invalid");
    assert_eq!(
        (record(&bulkhead, "whole"), length(&disk)),
        (written, before)
    );
}
