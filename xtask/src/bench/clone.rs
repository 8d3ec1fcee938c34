//! A clone against bare QEMU that restores the same files, and against a boot;
//! one after the other, and many at once.

use std::time::Instant;

use anyhow::Result;
use tokio::task::JoinSet;

use super::config::{Bed, Common, Config, explain, ms};
use super::facts::Facts;
use super::floor::{self, Bare};
use super::peers::{self, Libvirt};
use super::report::{FLOOR, OURS, Report, Unit};
use super::rounds::{Sample, Series, Subject, interleaved};
use super::template::Made;
use super::{ours, ours::AGENT};

/// Options.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    common: Common,
    /// Guests' memory in MiB, besides --memory, such as `1024,4096`.
    #[arg(long, value_delimiter = ',')]
    sizes: Vec<u64>,
    /// So many at once, too.
    #[arg(long, default_value_t = 0)]
    burst: usize,
    /// Compare with `virsh restore` and a boot by libvirt, too.
    #[arg(long)]
    peers: bool,
    #[command(flatten)]
    install: peers::Install,
}

/// Runs the bench.
pub(crate) fn run(args: Args) -> Result<()> {
    // Starts block here and there: as in a program that does many at once.
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(measure(args))
}

async fn measure(args: Args) -> Result<()> {
    args.install.run()?;
    let common = &args.common;
    let bed = Bed::new(common)?;
    let mut facts = Facts::gather(&bed, &common.config)?;
    let (mut missing, mut name) = (Vec::new(), "clone".to_owned());
    let mut libvirt = None;
    if args.peers {
        name += " peers";
        libvirt = Libvirt::find(&bed, &common.config, &mut missing).await?;
    }
    if let Some(libvirt) = &libvirt {
        facts
            .versions
            .insert(peers::LIBVIRT.into(), libvirt.version());
        libvirt.save().await?;
    }
    let clone = common.config.with("clone")?;
    let mut made = vec![(clone.clone(), Made::new(&bed, &clone).await?)];
    for size in &args.sizes {
        let config = clone.with(&format!("memory={size}"))?;
        let template = Made::new(&bed, &config).await?;
        made.push((config, template));
    }
    let measured = async {
        let mut subjects = subjects(&bed, &common.config, &made);
        if let Some(libvirt) = &libvirt {
            let restore = format!("{} restore", peers::LIBVIRT);
            subjects.push(Subject::new(restore, || libvirt.restored_life()));
            let boot = format!("{} boot", peers::LIBVIRT);
            subjects.push(Subject::new(boot, || libvirt.life()));
        }
        let mut all = interleaved(&name, common.n, subjects).await?;
        if args.burst > 0 {
            let (config, template) = &made[0];
            for bare in [false, true] {
                let series = burst(&bed, config, template, args.burst, bare).await?;
                let came = format!("{} of {}", series.rounds.len(), args.burst);
                facts.versions.insert(series.subject.clone(), came);
                all.push(series);
            }
        }
        anyhow::Ok(all)
    };
    let all = measured.await;
    for (_, template) in made {
        template.remove()?;
    }
    let report = Report::new(&name, facts, Unit::Ms, &all?, missing);
    report.give(common.json, common.save.as_deref())
}

/// Each clone and its floor, and a boot.
fn subjects<'a>(bed: &'a Bed, boot: &'a Config, made: &'a [(Config, Made)]) -> Vec<Subject<'a>> {
    let name = |who: &str, at: usize, config: &Config| match at {
        0 => who.to_owned(),
        _ => format!("{who} {}M", config.memory),
    };
    let mut subjects = Vec::new();
    for (at, (config, template)) in made.iter().enumerate() {
        let ours = move || ours::life(bed, config);
        subjects.push(Subject::new(name(OURS, at, config), ours));
        let floor = move || floor::cloned_life(bed, config, &template.dir);
        subjects.push(Subject::new(name(FLOOR, at, config), floor));
    }
    let boots = move || ours::life(bed, boot);
    subjects.push(Subject::new(format!("{OURS} boot"), boots));
    subjects
}

/// So many clones at once: when the agent of each answers. Those that fail are
/// told, and not counted.
async fn burst(
    bed: &Bed,
    config: &Config,
    template: &Made,
    count: usize,
    bare: bool,
) -> Result<Series> {
    let who = if bare { FLOOR } else { OURS };
    let mut series = Series {
        subject: format!("{who} {count} at once"),
        rounds: Vec::with_capacity(count),
    };
    let (host, spec) = (bed.host(config), bed.spec(config)?);
    let begin = Instant::now();
    if bare {
        let starts = (0..count).map(|_| async {
            let bare = Bare::restore(bed, config, &template.dir).await;
            (bare, begin.elapsed())
        });
        let mut up = Vec::new();
        for (bare, time) in futures_util::future::join_all(starts).await {
            match bare {
                Ok(bare) => {
                    series.rounds.push(Sample::from(vec![(AGENT, ms(time))]));
                    up.push(bare);
                }
                Err(error) => eprintln!("bare QEMU: {error:#}"),
            }
        }
        for bare in up {
            bare.stop().await?;
        }
        return Ok(series);
    }
    let mut starts = JoinSet::new();
    for _ in 0..count {
        let (host, mut spec) = (host.clone(), spec.clone());
        spec.id = bulkhead::spec::VmId::random();
        starts.spawn_blocking(move || {
            let started = tokio::runtime::Handle::current().block_on(host.start_clone(&spec));
            (started, begin.elapsed())
        });
    }
    let mut up = Vec::new();
    while let Some(started) = starts.join_next().await {
        match started? {
            (Ok((_, machine)), time) => {
                series.rounds.push(Sample::from(vec![(AGENT, ms(time))]));
                up.push(machine);
            }
            (Err(error), _) => eprintln!("{:#}", explain(error)),
        }
    }
    for machine in up {
        machine
            .kill()
            .await
            .map_err(|errors| anyhow::anyhow!("{errors:?}"))?;
    }
    Ok(series)
}
