//! A clone out of a pool, against one that is started for the caller.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use bulkhead::run::Host;
use bulkhead::service::pool::{Pool, Settings};

use super::config::{Bed, Common, PATIENCE, explain, ms};
use super::facts::Facts;
use super::ours;
use super::report::{OURS, Report, Unit};
use super::rounds::{Sample, Series, Subject, interleaved};
use super::template::Made;

const READY: &str = "acquire";
const COMMAND: &str = "first-command";

/// Options.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    common: Common,
    /// Clones that are kept ready.
    #[arg(long, default_value_t = 4)]
    idle: usize,
    /// So many callers at once, too, with as many clones ready.
    #[arg(long, default_value_t = 0)]
    burst: usize,
}

/// Runs the bench.
pub(crate) fn run(args: Args) -> Result<()> {
    super::block_on(measure(args))
}

async fn measure(args: Args) -> Result<()> {
    let common = &args.common;
    let bed = Bed::new(common)?;
    let mut facts = Facts::gather(&bed, &common.config)?;
    let clone = common.config.with("clone")?;
    let template = Made::new(&bed, &clone).await?;
    let host = bed.host(&clone);
    let measured = async {
        let pool = open(&bed, &host, &clone, args.idle).await?;
        let from_pool = || async {
            let status = pool.filled(PATIENCE).await;
            ensure!(
                status.idle == args.idle,
                "the pool is not filled: {status:?}"
            );
            taken(&pool).await
        };
        let started = || async {
            let begin = Instant::now();
            let machine = ours::start(&bed, &clone).await?;
            let ready = begin.elapsed();
            let command = ours::run_true(machine.channel()).await?;
            ours::stop(machine).await?;
            Ok(sample(ready, command))
        };
        let subjects = vec![
            Subject::new(format!("{OURS} pool"), from_pool),
            Subject::new(OURS, started),
        ];
        let mut all = interleaved("pool", common.n, subjects).await?;
        pool.drain(PATIENCE).await.map_err(explain)?;
        if args.burst > 0 {
            let series = burst(&bed, &host, &clone, args.burst).await?;
            let came = format!("{} of {}", series.rounds.len(), args.burst);
            facts.versions.insert(series.subject.clone(), came);
            all.push(series);
        }
        anyhow::Ok(all)
    };
    let all = measured.await;
    template.remove()?;
    let report = Report::new("pool", facts, Unit::Ms, &all?, Vec::new());
    report.give(common.json, common.save.as_deref())
}

async fn open(bed: &Bed, host: &Host, config: &super::config::Config, idle: usize) -> Result<Pool> {
    let mut settings = Settings::new(idle, idle + 1);
    // Whatever else the host does.
    settings.admission.cpu_wait = 100;
    let pool = Pool::open(host.clone(), bed.spec(config)?, settings).await;
    pool.map_err(explain)
}

fn sample(ready: Duration, command: Duration) -> Sample {
    Sample::from(vec![(READY, ms(ready)), (COMMAND, ms(command))])
}

async fn taken(pool: &Pool) -> Result<Sample> {
    let begin = Instant::now();
    let clone = pool.acquire(PATIENCE).await.map_err(explain)?;
    let ready = begin.elapsed();
    let command = ours::run_true(clone.channel()).await?;
    Ok(sample(ready, command))
}

/// As many callers as there are clones ready, at once. Those that fail are
/// told, and not counted.
async fn burst(
    bed: &Bed,
    host: &Host,
    config: &super::config::Config,
    count: usize,
) -> Result<Series> {
    let pool = open(bed, host, config, count).await?;
    let status = pool.filled(PATIENCE).await;
    ensure!(status.idle == count, "the pool is not filled: {status:?}");
    let mut series = Series {
        subject: format!("{OURS} pool, {count} at once"),
        rounds: Vec::with_capacity(count),
    };
    let callers = (0..count).map(|_| taken(&pool));
    for taken in futures_util::future::join_all(callers).await {
        match taken {
            Ok(sample) => series.rounds.push(sample),
            Err(error) => eprintln!("{error:#}"),
        }
    }
    pool.drain(PATIENCE).await.map_err(explain)?;
    Ok(series)
}
