//! A machine back to its template, against a clone that is started.

use std::time::Instant;

use anyhow::Result;

use super::config::{Bed, Common, ms};
use super::facts::Facts;
use super::ours;
use super::report::{OURS, Report, Unit};
use super::rounds::{Sample, Subject, interleaved};
use super::template::Made;
use crate::setup;

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
    let program = setup::bulkhead()?;
    let verb = |words: &[&str]| {
        let mut command = std::process::Command::new(&program);
        command
            .args(words)
            .env("BULKHEAD_CONFIG", "none")
            .env("BULKHEAD_STATE_DIR", &bed.dirs().state)
            .env("BULKHEAD_RUNTIME_DIR", &bed.dirs().runtime);
        setup::call(command.stdout(std::process::Stdio::null()))
    };
    let name = format!("bench-reset-{}", std::process::id());
    let (cpus, memory) = (clone.cpus.to_string(), format!("{}M", clone.memory));
    let mut create = vec![
        "create",
        "--name",
        &name,
        "--image",
        &clone.image,
        "--start",
    ];
    create.extend(["--machine", &clone.machine, "--accel", &clone.accel]);
    create.extend(["--cpus", &cpus, "--memory", &memory, "--channel", "serial"]);
    create.extend(["--network", "isolated", "--domain", "bench"]);
    if let Some(kernel) = &clone.kernel {
        create.extend(["--kernel", kernel]);
    }
    let qemu = clone.qemu.as_ref().and_then(|path| path.to_str());
    create.extend(qemu.into_iter().flat_map(|path| ["--qemu", path]));
    let measured = async {
        verb(&create)?;
        let reset = || async {
            let begin = Instant::now();
            verb(&["reset", &name])?;
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
    let removed = verb(&["rm", "--force", &name]);
    template.remove()?;
    let report = Report::new("reset", facts, Unit::Ms, &all?, Vec::new());
    removed?;
    report.give(common.json, common.save.as_deref())
}
