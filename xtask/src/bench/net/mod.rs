//! What a machine's network costs: to make and to take away, and whoever uses
//! it, against the same tap, router and masquerade without a rule.

mod guests;
mod sets;
pub(crate) mod world;

use anyhow::{Context as _, Result, ensure};
use nix::sched::{CloneFlags, setns};

use self::world::World;
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
    #[arg(long, default_value_t = 8)]
    mib: u64,
    /// Connections of which the median is taken, in each round.
    #[arg(long, default_value_t = 20)]
    connections: u64,
}

/// Runs the bench.
pub(crate) fn run(args: Args) -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "networks are root's to make"
    );
    guests::check(&args)?;
    let dir = tempfile::tempdir()?;
    let world = World::new(dir.path())?;
    // Every thread to come is there: machines' networks lead to it as they would to
    // a host's own.
    setns(&world.host, CloneFlags::CLONE_NEWNET).context("cannot enter the bench's host")?;
    super::block_on(measure(args, world))
}

async fn measure(args: Args, world: World) -> Result<()> {
    let common = &args.common;
    let bed = Bed::new(common)?;
    let mut facts = Facts::gather(&bed, &common.config)?;
    // First, while nobody's connections are there.
    let left = sets::cycles(&world, args.cycles)?;
    facts.versions.insert("cycles".into(), left);
    let mut all = guests::measure(&bed, &world, &args).await?;
    all.extend(sets::growth(&world, &args)?);
    let report = Report::new("net", facts, Unit::Ms, &all, Vec::new());
    report.give(common.json, common.save.as_deref())
}
