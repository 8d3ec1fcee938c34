//! What a machine's network costs: to make and to take away, and whoever uses
//! it, against the same tap, router and masquerade without a rule.

mod guests;
mod sets;
mod world;

use anyhow::{Result, ensure};

use super::config::{Bed, Common};
use super::facts::Facts;
use super::report::{Report, Unit};

/// Options.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    common: Common,
    /// How many networks are present while one is made and taken away.
    #[arg(long, value_name = "COUNTS", value_delimiter = ',', default_values_t = [1, 100, 500])]
    present: Vec<usize>,
    /// Make and take away so many networks, one after the other, and say what
    /// is left.
    #[arg(long, default_value_t = 1000)]
    cycles: usize,
    /// MiB moved at a time.
    #[arg(long, default_value_t = 16)]
    mib: u64,
    /// Connections of which the median is taken.
    #[arg(long, default_value_t = 50)]
    connections: u64,
}

/// Runs the bench.
pub(crate) fn run(args: Args) -> Result<()> {
    super::block_on(measure(args))
}

async fn measure(args: Args) -> Result<()> {
    let common = &args.common;
    ensure!(
        nix::unistd::geteuid().is_root(),
        "networks are root's to make"
    );
    let bed = Bed::new(common)?;
    let mut facts = Facts::gather(&bed, &common.config)?;
    let world = world::World::new(&bed.temp().join("net"))?;
    // First, while nobody's connections are there.
    let left = sets::cycles(&world, args.cycles)?;
    facts.versions.insert("cycles".into(), left);
    let mut all = guests::measure(&bed, &world, &args).await?;
    all.extend(sets::growth(&world, &args)?);
    let report = Report::new("net", facts, Unit::Ms, &all, Vec::new());
    report.give(common.json, common.save.as_deref())
}
