//! What an idle machine keeps of the host's memory, its share of what several
//! processes have mapped included (PSS).

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::config::{Bed, Common};
use super::facts::Facts;
use super::floor::Bare;
use super::ours;
use super::report::{FLOOR, OURS, Report, Unit};
use super::rounds::{Sample, Series};
use super::template::Made;

const PSS: &str = "vmm-pss";
const PRIVATE: &str = "vmm-private";
const RSS: &str = "vmm-rss";
/// What our own process grew by, for each machine.
const OWN: &str = "own-pss";

/// Options.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    common: Common,
    /// Seconds a machine idles before it is looked at.
    #[arg(long, default_value_t = 3)]
    settle: u64,
    /// Clones of a template, and bare QEMU that restores the same files.
    #[arg(long)]
    clones: bool,
}

/// Runs the bench.
pub(crate) fn run(args: Args) -> Result<()> {
    super::block_on(measure(args))
}

/// All machines live at once, ours and the others in turn: what they share is
/// shared among as many.
async fn measure(args: Args) -> Result<()> {
    let common = &args.common;
    let bed = Bed::new(common)?;
    let facts = Facts::gather(&bed, &common.config)?;
    let (mut config, mut template, mut name) = (common.config.clone(), None, "memory");
    if args.clones {
        (config, name) = (config.with("clone")?, "memory clones");
        template = Some(Made::new(&bed, &config).await?);
    }
    let bare = common.config.with("bare")?;
    let (mut ours, mut others) = (Vec::new(), Vec::new());
    let mut own = Vec::new();
    let me = i32::try_from(std::process::id())?;
    for _ in 0..common.n {
        let before = Memory::of(me)?.pss;
        ours.push(ours::start(&bed, &config).await?);
        own.push(Memory::of(me)?.pss - before);
        others.push(match &template {
            None => Bare::start(&bed, &bare).await?,
            Some(template) => Bare::restore(&bed, &bare, &template.dir).await?,
        });
    }
    tokio::time::sleep(Duration::from_secs(args.settle)).await;
    let mut series = [OURS, FLOOR].map(|name| Series {
        subject: name.to_owned(),
        rounds: Vec::new(),
    });
    for ((machine, own), other) in ours.iter().zip(own).zip(&others) {
        let mut sample = Memory::of(machine.process().pid())?.sample();
        // The first one grows it most, and the allocator gives back at will.
        sample.set(OWN, own.max(0.0));
        series[0].rounds.push(sample);
        let pid = i32::try_from(other.pid()?)?;
        series[1].rounds.push(Memory::of(pid)?.sample());
    }
    for machine in ours {
        ours::stop(machine).await?;
    }
    for other in others {
        other.stop().await?;
    }
    template.map(Made::remove).transpose()?;
    let report = Report::new(name, facts, Unit::Mib, &series, Vec::new());
    report.give(common.json, common.save.as_deref())
}

/// A process's memory in MiB.
#[derive(Debug, Clone, Copy)]
pub(super) struct Memory {
    /// Its share.
    pub(super) pss: f64,
    /// What nobody else has.
    private: f64,
    /// All of it, however many others have it.
    rss: f64,
}

impl Memory {
    pub(super) fn of(pid: i32) -> Result<Self> {
        let path = format!("/proc/{pid}/smaps_rollup");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        let mib = |name: &str| -> Result<f64> {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            let value = line.context("a line is missing")?.trim();
            let kib: f64 = value.trim_end_matches(" kB").trim().parse()?;
            Ok(kib / 1024.0)
        };
        Ok(Self {
            pss: mib("Pss:")?,
            private: mib("Private_Clean:")? + mib("Private_Dirty:")?,
            rss: mib("Rss:")?,
        })
    }

    fn sample(self) -> Sample {
        Sample::from(vec![
            (PSS, self.pss),
            (PRIVATE, self.private),
            (RSS, self.rss),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_memory() {
        let memory = Memory::of(i32::try_from(std::process::id()).unwrap()).unwrap();
        assert!(memory.pss > 0.0 && memory.private <= memory.pss && memory.pss <= memory.rss);
    }
}
