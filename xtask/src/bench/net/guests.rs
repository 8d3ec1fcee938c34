//! Guests that use their networks: one without rules, one that is held to names,
//! one whose every connection is read.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bulkhead::host::netns::Netns;
use bulkhead::plan::network::GATEWAY4;
use bulkhead::run::Machine;
use bulkhead::spec::{NetworkPolicy, Preset};
use tokio::sync::Mutex;

use super::Args;
use super::world::{DNS, SERVER, World, sh};
use crate::bench::config::{Bed, explain};
use crate::bench::echo::{Echo, Web};
use crate::bench::ours;
use crate::bench::report::OURS;
use crate::bench::rounds::{Sample, Series, Subject, interleaved};

/// Tap, router and masquerade, and no rules.
const BARE: &str = "bare-tap";
const STRICT: &str = "strict";
const DOWN: &str = "download";
const UP: &str = "upload";
/// A connection, and the first byte of an answer.
const REQUEST: &str = "request";
/// The same to a name that was never asked for.
const FIRST: &str = "first-request";
/// What of that is beyond the bare tap's, in the same round.
const EXTRA: &str = "first-extra";
/// Each by itself, all guests in turn: rounds are short, so that what the host does
/// meanwhile meets the guests alike.
const PHASES: [&str; 4] = [DOWN, UP, REQUEST, FIRST];
/// Names that a guest can ask for before it looks as if it sent data in them
/// (src/net/resolver/budget.rs: 8 KiB, about five characters each).
const NAMES: u64 = 1500;
/// What a guest may ask for in a second, in the long run
/// (src/net/resolver/config.rs).
const QUESTIONS: u64 = 50;

/// A guest, and who resolves names for it.
struct Guest {
    machine: Machine,
    echo: Mutex<Echo>,
    dns: Ipv4Addr,
}

pub(super) async fn measure(bed: &Bed, world: &World, args: &Args) -> Result<Vec<Series>> {
    let mut closed = NetworkPolicy::of_preset(Preset::Offline);
    closed.allow_hosts = ["*.example.net".parse()?].into();
    // What is looked up by the hundred is no tunnel here.
    let strict = NetworkPolicy {
        strict: true,
        ..closed.clone()
    };
    let bare = Guest::start(bed, world, args, closed.clone(), DNS).await?;
    strip(world, bare.machine.netns().context("it has no network")?)?;
    let ours = Guest::start(bed, world, args, closed, GATEWAY4).await?;
    let read = Guest::start(bed, world, args, strict, GATEWAY4).await?;
    let guests = [(BARE, &bare), (OURS, &ours), (STRICT, &read)];
    let mut all: Vec<Series> = Vec::new();
    for phase in PHASES {
        let subjects =
            guests.map(|(name, guest)| Subject::new(name, move || guest.once(args, phase)));
        let name = format!("net {phase}");
        let measured = interleaved(&name, args.common.n, subjects.into()).await?;
        match all.is_empty() {
            true => all = measured,
            false => all
                .iter_mut()
                .zip(measured)
                .for_each(|(one, more)| one.add(more)),
        }
    }
    beyond(&mut all);
    for guest in [bare, ours, read] {
        ours::stop(guest.machine).await?;
    }
    Ok(all)
}

/// Says of each round what a first request took beyond the bare tap's.
fn beyond(all: &mut [Series]) {
    let Some((bare, others)) = all.split_first_mut() else {
        return;
    };
    for series in others {
        for (one, bare) in series.rounds.iter_mut().zip(&bare.rounds) {
            if let (Some(ours), Some(bare)) = (one.get(FIRST), bare.get(FIRST)) {
                one.set(EXTRA, ours - bare);
            }
        }
    }
}

/// Says whether so much can be measured.
pub(super) fn check(args: &Args) -> Result<()> {
    let round = args.connections + PHASES.len() as u64;
    let names = (args.common.n as u64 + 1) * round;
    ensure!(
        names <= NAMES,
        "{names} names would be asked for, and the resolver takes {NAMES}: fewer rounds or --connections"
    );
    Ok(())
}

/// Takes all rules from a machine, on both sides, and masquerades by one of the
/// bench's own.
fn strip(world: &World, netns: &Netns) -> Result<()> {
    let outer = sh(
        netns,
        "nft flush ruleset
         nft add table ip bare
         nft add chain ip bare post '{ type nat hook postrouting priority 100; }'
         nft add rule ip bare post oifname out masquerade
         ip -o -4 addr show dev out | awk '{print $4}'",
    )?;
    let outer = outer.trim().trim_end_matches("/32");
    let link = format!("ip -o route show {outer} | sed 's/.*dev //;s/ .*//'");
    sh(&world.host, &format!("ip link set $({link}) group default"))?;
    Ok(())
}

impl Guest {
    async fn start(
        bed: &Bed,
        world: &World,
        args: &Args,
        policy: NetworkPolicy,
        dns: Ipv4Addr,
    ) -> Result<Self> {
        let config = &args.common.config;
        let mut spec = bed.spec(config)?;
        spec.network = policy;
        let mut host = bed.host(config);
        host.site = world.site();
        let (_, mut machine) = host.start(&spec).await.map_err(explain)?;
        let echo = Mutex::new(Echo::start(&mut machine).await?);
        Ok(Self { machine, echo, dns })
    }

    async fn once(&self, args: &Args, phase: &'static str) -> Result<Sample> {
        let mut echo = self.echo.lock().await;
        let size = args.mib << 20;
        let web = |count, up, down, dns| Web {
            server: SERVER,
            dns,
            count,
            up,
            down,
        };
        let none = Ipv4Addr::UNSPECIFIED;
        if phase == FIRST {
            let answered = Duration::from_secs(1) * (args.connections + 1) as u32;
            tokio::time::sleep(answered / QUESTIONS as u32).await;
        }
        // So that its name is known, and nobody has been asleep.
        echo.web(web(1, 0, 1, self.dns)).await?;
        let wanted = match phase {
            DOWN => web(1, 0, size, none),
            UP => web(1, size, 0, none),
            REQUEST => web(args.connections, 0, 1, none),
            _ => web(args.connections, 0, 1, self.dns),
        };
        Ok(Sample::from(vec![(phase, echo.web(wanted).await?)]))
    }
}
