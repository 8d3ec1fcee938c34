//! Machines that branch off from a running one, against one that is booted.

use std::time::Instant;

use anyhow::{Context as _, Result};

use super::config::{Bed, Common, Config, ms};
use super::facts::Facts;
use super::kept::Kept;
use super::report::{OURS, Report, Unit};
use super::rounds::{Sample, Subject, interleaved};

/// From the verb to all of them ready, and that shared out among them.
const ALL: &str = "ready";
const EACH: &str = "each";
/// For how long the machine that is forked stands still.
const PAUSE: &str = "pause";

/// Options.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    common: Common,
    /// How many at once.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 8])]
    forks: Vec<u32>,
    /// So many MiB of the machine's memory are written to before.
    #[arg(long, default_value_t = 0)]
    touched: u64,
}

/// Runs the bench.
pub(crate) fn run(args: Args) -> Result<()> {
    super::block_on(measure(args))
}

async fn measure(args: Args) -> Result<()> {
    let common = &args.common;
    let bed = Bed::new(common)?;
    let facts = Facts::gather(&bed, &common.config)?;
    let (kept, config) = (&Kept::new(&bed, "fork")?, &common.config);
    let measured = async {
        kept.create(&kept.name, config)?;
        // In memory alone.
        let script = format!("head -c {}M /dev/urandom > /dev/shm/touched", args.touched);
        kept.verb(&["exec", "-u", "root", &kept.name, "sh", "-c", &script])?;
        let mut subjects: Vec<Subject> = Vec::new();
        for number in &args.forks {
            let work = move || async move { fork(kept, *number) };
            subjects.push(Subject::new(format!("{OURS} fork of {number}"), work));
        }
        let boots = move || async move { boot(kept, config) };
        subjects.push(Subject::new(format!("{OURS} boot"), boots));
        interleaved("fork", common.n, subjects).await
    };
    let all = measured.await;
    let removed = kept.verb(&["rm", "--force", &kept.name]);
    let report = Report::new("fork", facts, Unit::Ms, &all?, Vec::new());
    removed?;
    report.give(common.json, common.save.as_deref())
}

/// Forks the machine, and removes what came of it.
fn fork(kept: &Kept, number: u32) -> Result<Sample> {
    let prefix = format!("{}-f", kept.name);
    let begin = Instant::now();
    kept.verb(&[
        "fork",
        &kept.name,
        "-n",
        &number.to_string(),
        "--name",
        &prefix,
    ])?;
    let ready = ms(begin.elapsed());
    let snapshots = kept.told(&["snapshot", "ls", &format!("{prefix}-1")])?;
    let pause = snapshots[0]["manifest"]["saved"]["paused_ms"].as_f64();
    for at in 1..=number {
        kept.verb(&["rm", "--force", &format!("{prefix}-{at}")])?;
    }
    Ok(Sample::from(vec![
        (ALL, ready),
        (EACH, ready / f64::from(number)),
        (PAUSE, pause.context("the fork has no snapshot")?),
    ]))
}

/// Makes and boots one that is like it.
fn boot(kept: &Kept, config: &Config) -> Result<Sample> {
    let name = format!("{}-boot", kept.name);
    let begin = Instant::now();
    kept.create(&name, config)?;
    let ready = ms(begin.elapsed());
    kept.verb(&["rm", "--force", &name])?;
    Ok(Sample::from(vec![(ALL, ready), (EACH, ready)]))
}
