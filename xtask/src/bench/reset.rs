//! A machine back to its template, against a clone that is started.

use std::time::Instant;

use anyhow::Result;

use super::config::{Bed, Common, ms};
use super::facts::Facts;
use super::kept::Kept;
use super::ours;
use super::report::{OURS, Report, Unit};
use super::rounds::{Sample, Subject, interleaved};
use super::template::Made;

const ALL: &str = "ready";

/// Options.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    common: Common,
}

/// Runs the bench.
pub(crate) fn run(args: Args) -> Result<()> {
    super::block_on(measure(&args.common))
}

async fn measure(common: &Common) -> Result<()> {
    let bed = Bed::new(common)?;
    let facts = Facts::gather(&bed, &common.config)?;
    let clone = common.config.with("clone")?;
    let template = Made::new(&bed, &clone).await?;
    let kept = Kept::new(&bed, "reset")?;
    let measured = async {
        kept.create(&kept.name, &clone)?;
        let reset = || async {
            let begin = Instant::now();
            kept.verb(&["reset", &kept.name])?;
            Ok(Sample::from(vec![(ALL, ms(begin.elapsed()))]))
        };
        let start = || async {
            let begin = Instant::now();
            let machine = ours::start(&bed, &clone).await?;
            let ready = begin.elapsed();
            ours::stop(machine).await?;
            Ok(Sample::from(vec![(ALL, ms(ready))]))
        };
        let subjects = vec![
            Subject::new(format!("{OURS} reset"), reset),
            Subject::new(OURS, start),
        ];
        interleaved("reset", common.n, subjects).await
    };
    let all = measured.await;
    let removed = kept.verb(&["rm", "--force", &kept.name]);
    template.remove()?;
    let report = Report::new("reset", facts, Unit::Ms, &all?, Vec::new());
    removed?;
    report.give(common.json, common.save.as_deref())
}
