//! Networks for the soak's clones, in namespaces of its own, and what there is
//! of them in the kernel, whatever Bulkhead says of it.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use bulkhead::host::netns::Netns;
use bulkhead::host::network::Site;

use super::{Gauge, gauge};
use crate::bench::net::world::{LAN, SERVER, World, sh};
use crate::probe::place::Place;

const LINKS: Gauge = gauge("links on the host's side", 10, 8);
const NAMESPACES: Gauge = gauge("network namespaces", 10, 8);
const OBJECTS: Gauge = gauge("nft objects on the host's side", 10, 8);
const NETLINK: Gauge = gauge("netlink sockets, host's side", 10, 8);
/// A machine has a handful.
const THEIRS: Gauge = gauge("netlink sockets, machines' side", 10, 40);

/// Networks that lead to an internet of the soak's own.
pub(super) struct Nets {
    world: World,
    uplink: PathBuf,
    /// Where everything of the soak is.
    dir: PathBuf,
}

impl Nets {
    /// None where machines have no networks.
    pub(super) fn new(place: &Place) -> Result<Option<Self>> {
        let Some(uplink) = place.uplink() else {
            return Ok(None);
        };
        let dir = place.file("world");
        Ok(Some(Self {
            world: World::beyond(Netns::open(&uplink)?, &dir)?,
            dir: place.file(""),
            uplink,
        }))
    }

    /// Where the clones' networks lead.
    pub(super) fn site(&self) -> Site {
        Site {
            uplink: Some(self.uplink.clone()),
            ..self.world.site()
        }
    }

    /// What a guest tries: an address of the internet answers, one of a LAN
    /// behind it is refused at once.
    pub(super) fn script() -> String {
        format!(
            "reached() {{\n\
             {{ printf 'GET /1 HTTP/1.0\\r\\n\\r\\n' >&3 && read -r line <&3 \
             && [[ $line == *' 200 '* ]]; }} 3<>/dev/tcp/$1/80\n\
             }}\n\
             reached {SERVER} || {{ echo the internet does not answer; exit 1; }}\n\
             told=$(reached {LAN} 2>&1) && {{ echo a LAN was reached; exit 1; }}\n\
             [[ $told == *refused* ]] || {{ echo \"not refused: $told\"; exit 1; }}"
        )
    }

    /// What there is at the moment.
    pub(super) fn count(&self) -> Result<Vec<(Gauge, usize)>> {
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        // `- nsfs` comes after the place (proc_pid_mountinfo(5)).
        let kept = mounts.lines().filter(|line| line.contains(" - nsfs "));
        let kept = kept.filter_map(|line| line.split(' ').nth(4).map(PathBuf::from));
        let kept: Vec<PathBuf> = kept.filter(|path| path.starts_with(&self.dir)).collect();
        // One that goes meanwhile has none.
        let theirs = |path: &PathBuf| {
            let netns = Netns::open(path).ok()?;
            netns.run_in(|| lines("netlink", "")).ok()?.ok()
        };
        let machines = kept.iter().filter(|path| {
            let ours = self.dir.join("world");
            **path != self.uplink && !path.starts_with(ours)
        });
        let host = &self.world.host;
        let rules = sh(host, "nft -a list ruleset")?;
        Ok(vec![
            (LINKS, host.run_in(|| lines("dev", "bh"))??),
            (NETLINK, host.run_in(|| lines("netlink", ""))??),
            (OBJECTS, rules.matches(" # handle ").count()),
            (THEIRS, machines.filter_map(theirs).sum()),
            (NAMESPACES, kept.len()),
        ])
    }
}

/// Lines of a table of the calling thread's namespace that begin so.
fn lines(table: &str, begin: &str) -> Result<usize> {
    let path = format!("/proc/thread-self/net/{table}");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let lines = text.lines().skip(1).map(str::trim);
    Ok(lines.filter(|line| line.starts_with(begin)).count())
}
