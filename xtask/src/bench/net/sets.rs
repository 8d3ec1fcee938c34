//! Networks without machines: how long one takes to make and to take away, and
//! that nothing stays.

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bulkhead::host::network::{Wired, Wires};
use bulkhead::plan::firewall::Names;
use bulkhead::spec::{NetworkMode, NetworkPolicy};

use super::Args;
use super::world::{World, sh};
use crate::bench::config::{explain, ms};
use crate::bench::rounds::{Sample, Series};

const SET_UP: &str = "set-up";
const TEAR_DOWN: &str = "tear-down";
/// From the end of the tear-down until the kernel has taken everything away.
const GONE: &str = "until-gone";
/// More than the kernel ever takes.
const SOON: Duration = Duration::from_secs(20);

/// A network, its leases to be released.
struct Set {
    wires: Wires,
    wired: Wired,
}

impl Set {
    fn make(world: &World, name: &str) -> Result<Self> {
        let policy = NetworkPolicy::of_mode(NetworkMode::NatFiltered);
        let wires = Wires::choose(world.file(name), world.site(), &policy);
        let wired = wires.make(&policy, Names::Any).map_err(explain)?;
        Ok(Self { wires, wired })
    }

    fn release(self) -> Result<()> {
        drop(self.wired);
        for lease in self.wires.leases().iter().rev() {
            lease.release().map_err(explain)?;
        }
        Ok(())
    }
}

/// Links on the host's side.
fn links(world: &World) -> Result<usize> {
    let count = || {
        let devices = std::fs::read_to_string("/proc/thread-self/net/dev")?;
        let ours = devices.lines().filter(|line| line.trim().starts_with("bh"));
        anyhow::Ok(ours.count())
    };
    world.host.run_in(count)?
}

fn settled(world: &World, count: usize) -> Result<()> {
    let begin = Instant::now();
    while links(world)? > count {
        ensure!(begin.elapsed() < SOON, "links stay on the host's side");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// One for each number of networks that are present.
pub(super) fn growth(world: &World, args: &Args) -> Result<Vec<Series>> {
    let mut counts = args.present.clone();
    counts.sort_unstable();
    let mut present = Vec::new();
    let mut all = Vec::new();
    for count in counts {
        while present.len() < count {
            present.push(Set::make(world, &format!("present{}", present.len()))?);
        }
        let mut rounds = Vec::new();
        for round in 0..=args.common.n {
            let begin = Instant::now();
            let set = Set::make(world, "one")?;
            let made = begin.elapsed();
            let begin = Instant::now();
            set.release()?;
            let released = begin.elapsed();
            let begin = Instant::now();
            settled(world, count)?;
            if round > 0 {
                rounds.push(Sample::from(vec![
                    (SET_UP, ms(made)),
                    (TEAR_DOWN, ms(released)),
                    (GONE, ms(begin.elapsed())),
                ]));
            }
        }
        all.push(Series {
            subject: format!("{count} present"),
            rounds,
        });
    }
    for set in present {
        set.release()?;
    }
    settled(world, 0)?;
    Ok(all)
}

/// Everything that could stay: on the host's side, and in this process.
fn look(world: &World) -> Result<(String, usize, usize)> {
    let text = sh(
        &world.host,
        "ip -o link | sed 's/ state.*//;s/^[0-9]*//'; ip route; ip -6 route; ip neigh show nud permanent
         nft list ruleset; cat /proc/self/net/nf_conntrack 2>/dev/null | wc -l",
    )?;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let dir = world.file("");
    let below = |line: &&str| line.contains(&*dir.to_string_lossy());
    let fds = std::fs::read_dir("/proc/self/fd").context("no /proc")?;
    Ok((text, mounts.lines().filter(below).count(), fds.count()))
}

/// Makes and takes away `count` networks; what is there then must be what was.
pub(super) fn cycles(world: &World, count: usize) -> Result<String> {
    Set::make(world, "first")?.release()?;
    settled(world, 0)?;
    let mut before = look(world)?;
    // Sockets are closed by threads of their own.
    loop {
        std::thread::sleep(Duration::from_secs(1));
        let now = look(world)?;
        if now == before {
            break;
        }
        before = now;
    }
    let begin = Instant::now();
    let shown = std::io::stderr().is_terminal();
    for round in 0..count {
        Set::make(world, "cycle")?.release()?;
        if shown {
            eprint!("\rbench net: {round} of {count} cycles");
        }
    }
    let took = begin.elapsed();
    settled(world, 0)?;
    let (mut after, since) = (look(world)?, Instant::now());
    while after != before && since.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(200));
        after = look(world)?;
    }
    ensure!(
        before == after,
        "{count} cycles left something: {before:#?} became {after:#?}"
    );
    let each = ms(took) / count.max(1) as f64;
    Ok(format!(
        "{count} in {:.1} s ({each:.1} ms each), nothing left",
        took.as_secs_f64()
    ))
}
