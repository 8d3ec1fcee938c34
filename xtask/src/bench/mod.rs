//! `cargo xtask bench`: how long things take, against bare QEMU in the same run.

mod boot;
pub(crate) mod stats;

use clap::Subcommand;

/// Options.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Subcommand)]
enum Bench {
    /// From spawn to power-off: what Bulkhead adds to bare QEMU.
    Boot(boot::Args),
}

/// Runs the task.
pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    match args.bench {
        Bench::Boot(args) => boot::run(args),
    }
}
