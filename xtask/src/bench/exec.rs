//! Round trips and streams through the guest agent, against a bare program on
//! another port of the same virtio-serial device in the same machine.

use std::time::Instant;

use anyhow::Result;
use bulkhead::guest::Channel;
use bulkhead_agent::Request;
use tokio::sync::Mutex;

use super::config::{Bed, Common, PATIENCE, explain, ms};
use super::echo::Echo;
use super::facts::Facts;
use super::report::{FLOOR, OURS, Report, Unit};
use super::rounds::{Sample, Subject, interleaved};
use super::{ours, peers};

/// An answer to nothing but itself.
const ROUND_TRIP: &str = "round-trip";
/// CPU time of the VMM for it.
const ROUND_TRIP_CPU: &str = "round-trip-vmm-cpu";
/// So many of them, one after the other.
const BURST: usize = 50;
/// A command that does nothing.
const TRUE: &str = "run-true";
const IN: &str = "in-16-mib";
const OUT: &str = "out-16-mib";
const STREAM: usize = 16 << 20;
/// What a `Ping` and its answers have on the wire, about.
const PING: usize = 64;

/// Options.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    common: Common,
    /// Compare with libvirt and qemu-guest-agent, too.
    #[arg(long)]
    peers: bool,
    #[command(flatten)]
    install: peers::Install,
}

/// Runs the bench.
pub(crate) fn run(args: Args) -> Result<()> {
    super::block_on(measure(args))
}

async fn measure(args: Args) -> Result<()> {
    args.install.run()?;
    let common = &args.common;
    let bed = Bed::new(common)?;
    let mut facts = Facts::gather(&bed, &common.config)?;
    let (mut missing, mut name) = (Vec::new(), "exec".to_owned());
    let mut libvirt = None;
    if args.peers {
        name += " peers";
        libvirt = peers::Libvirt::find(&bed, &common.config, &mut missing).await?;
        if let Some(libvirt) = &libvirt {
            facts
                .versions
                .insert(peers::LIBVIRT.into(), libvirt.version());
        }
    }
    let mut machine = ours::start(&bed, &common.config).await?;
    let echo = Mutex::new(Echo::start(&mut machine).await?);
    let (channel, echo, pid) = (machine.channel(), &echo, machine.process().pid());
    let bytes = &vec![7; STREAM];
    let guest = match &libvirt {
        Some(libvirt) => Some(libvirt.start().await?),
        None => None,
    };
    let mut subjects = vec![
        Subject::new(OURS, || ours_once(channel, pid, bytes)),
        Subject::new(FLOOR, move || async move {
            bare_once(&mut *echo.lock().await, pid, bytes).await
        }),
    ];
    if let Some(guest) = &guest {
        subjects.push(Subject::new(peers::LIBVIRT, || async {
            let begin = Instant::now();
            guest.ping().await?;
            let ping = begin.elapsed();
            let begin = Instant::now();
            guest.run_true().await?;
            Ok(Sample::from(vec![
                (ROUND_TRIP, ms(ping)),
                (TRUE, ms(begin.elapsed())),
            ]))
        }));
    }
    let all = interleaved(&name, common.n, subjects).await?;
    if let Some(guest) = guest {
        guest.destroy().await?;
    }
    ours::stop(machine).await?;
    let report = Report::new(&name, facts, Unit::Ms, &all, missing);
    report.give(common.json, common.save.as_deref())
}

async fn ours_once(channel: &Channel, pid: i32, bytes: &[u8]) -> Result<Sample> {
    let mut sample = Sample::default();
    let cpu = ours::cpu_of(pid)?;
    let begin = Instant::now();
    for _ in 0..BURST {
        let ask = channel.ask("answer", &Request::Ping, PATIENCE).await;
        ask.map_err(explain)?;
    }
    sample.set(ROUND_TRIP, ms(begin.elapsed()) / BURST as f64);
    let used = ours::cpu_of(pid)?.saturating_sub(cpu);
    sample.set(ROUND_TRIP_CPU, ms(used) / BURST as f64);
    sample.set(TRUE, ms(ours::run_true(channel).await?));
    let begin = Instant::now();
    let sink = "cat > /dev/null";
    ours::run(channel, &["sh", "-c", sink], bytes.to_vec()).await?;
    sample.set(IN, ms(begin.elapsed()));
    let begin = Instant::now();
    let count = STREAM.to_string();
    let wrote = ours::run(channel, &["head", "-c", &count, "/dev/zero"], Vec::new()).await?;
    anyhow::ensure!(wrote == STREAM as u64, "{wrote} of {STREAM} bytes came");
    sample.set(OUT, ms(begin.elapsed()));
    Ok(sample)
}

async fn bare_once(echo: &mut Echo, pid: i32, bytes: &[u8]) -> Result<Sample> {
    let mut sample = Sample::default();
    let cpu = ours::cpu_of(pid)?;
    let begin = Instant::now();
    for _ in 0..BURST {
        echo.echo(PING).await?;
    }
    sample.set(ROUND_TRIP, ms(begin.elapsed()) / BURST as f64);
    let used = ours::cpu_of(pid)?.saturating_sub(cpu);
    sample.set(ROUND_TRIP_CPU, ms(used) / BURST as f64);
    let begin = Instant::now();
    echo.run_true().await?;
    sample.set(TRUE, ms(begin.elapsed()));
    let begin = Instant::now();
    echo.sink(bytes).await?;
    sample.set(IN, ms(begin.elapsed()));
    let begin = Instant::now();
    echo.source(STREAM).await?;
    sample.set(OUT, ms(begin.elapsed()));
    Ok(sample)
}
