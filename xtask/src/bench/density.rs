//! How many machines one host carries, and what gives first.

use std::fs;
use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use bulkhead_agent::Request;

use super::config::{Bed, Common, PATIENCE, ms};
use super::facts::Facts;
use super::memory::Memory;
use super::ours;
use super::report::{OURS, Report, Unit};
use super::rounds::{Sample, Series};
use super::template::Made;

const START: &str = "start";
const ANSWER: &str = "slowest-answer";

/// Options.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    common: Common,
    /// Stop at so many machines.
    #[arg(long, default_value_t = 100)]
    most: usize,
    /// Stop when less than this is available, in MiB.
    #[arg(long, default_value_t = 2048)]
    keep: u64,
    /// Stop when a start takes so many times as long as the first.
    #[arg(long, default_value_t = 5.0)]
    slower: f64,
    /// Stop when a machine takes longer than this to answer, in milliseconds.
    #[arg(long, default_value_t = 1000.0)]
    answer: f64,
    /// Clones of a template instead of machines that boot.
    #[arg(long)]
    clones: bool,
}

/// Runs the bench.
pub(crate) fn run(args: Args) -> Result<()> {
    super::block_on(measure(args))
}

async fn measure(args: Args) -> Result<()> {
    let common = &args.common;
    let bed = Bed::new(common)?;
    let mut facts = Facts::gather(&bed, &common.config)?;
    let (mut config, mut template, mut name) = (common.config.clone(), None, "density");
    if args.clones {
        (config, name) = (config.with("clone")?, "density clones");
        template = Some(Made::new(&bed, &config).await?);
    }
    let shown = std::io::stderr().is_terminal();
    let before = available()?;
    let mut machines = Vec::new();
    let mut series = Series {
        subject: OURS.to_owned(),
        rounds: Vec::new(),
    };
    let gave = loop {
        if machines.len() >= args.most {
            break format!("nothing: {} was the limit given", args.most);
        }
        let left = available()?;
        if left < args.keep {
            break format!("memory: {left} MiB are available");
        }
        let begin = Instant::now();
        match ours::start(&bed, &config).await {
            Ok(machine) => machines.push(machine),
            Err(error) => break format!("a start: {error:#}"),
        }
        let start = ms(begin.elapsed());
        // All of them, each in its turn.
        let mut slowest = Duration::ZERO;
        let mut lost = None;
        for machine in &machines {
            let begin = Instant::now();
            let ask = machine.channel().ask("answer", &Request::Ping, PATIENCE);
            if let Err(error) = ask.await {
                lost = Some(format!("a machine: {error}"));
            }
            slowest = slowest.max(begin.elapsed());
        }
        series
            .rounds
            .push(Sample::from(vec![(START, start), (ANSWER, ms(slowest))]));
        if shown {
            eprint!("\rbench density: {} machines", machines.len());
        }
        let first = series.rounds[0].get(START).unwrap_or(start);
        if let Some(lost) = lost {
            break lost;
        }
        if start > first * args.slower {
            break format!("the start: {start:.0} ms, the first took {first:.0} ms");
        }
        if ms(slowest) > args.answer {
            break format!("an answer: {:.0} ms", ms(slowest));
        }
    };
    if shown {
        eprintln!();
    }
    let count = machines.len();
    let pss: f64 = machines
        .iter()
        .filter_map(|machine| Memory::of(machine.process().pid()).ok())
        .map(|memory| memory.pss)
        .sum();
    let used = before.saturating_sub(available()?);
    let mut note = |name: &str, text: String| facts.versions.insert(name.to_owned(), text);
    note("machines at once", count.to_string());
    note("gave", gave);
    note(
        "memory",
        format!("{used} MiB of the host's in all, {pss:.0} MiB PSS of the VMMs"),
    );
    for machine in machines {
        ours::stop(machine).await?;
    }
    template.map(Made::remove).transpose()?;
    let report = Report::new(name, facts, Unit::Ms, &[series], Vec::new());
    report.give(common.json, common.save.as_deref())
}

/// What new programs can have without swapping, in MiB.
fn available() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib: u64 = line
        .context("/proc/meminfo lacks MemAvailable")?
        .trim()
        .trim_end_matches(" kB")
        .parse()?;
    Ok(kib / 1024)
}
