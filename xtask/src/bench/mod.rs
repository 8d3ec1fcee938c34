//! `cargo xtask bench`: how long things take, against bare QEMU in the same run.

mod boot;
mod clone;
mod compare;
mod config;
mod density;
mod echo;
mod exec;
mod facts;
mod files;
mod floor;
mod fork;
mod kept;
mod memory;
pub(crate) mod net;
mod ours;
mod peers;
mod plot;
mod pool;
mod report;
mod reset;
mod rounds;
pub(crate) mod stats;
mod template;

use std::process::Command;

use anyhow::{Result, bail};
use clap::Subcommand;

/// Options.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Measure this very build of xtask instead of an optimized one.
    #[arg(long, global = true)]
    as_built: bool,
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Subcommand)]
enum Bench {
    /// From spawn to power-off: what Bulkhead adds to bare QEMU.
    Boot(boot::Args),
    /// Commands and streams through the guest agent, against a bare program on
    /// a port of the same machine.
    Exec(exec::Args),
    /// Files into the guest and out of it, against the same bare program.
    Files(files::Args),
    /// What an idle machine keeps of the host's memory.
    Memory(memory::Args),
    /// What a machine's network costs: set-up, tear-down, and its guest.
    Net(net::Args),
    /// Start machines until something gives.
    Density(density::Args),
    /// A clone against bare QEMU that restores the same files, and a boot.
    Clone(clone::Args),
    /// A clone out of a pool against one that is started.
    Pool(pool::Args),
    /// Machines that branch off from a running one against one that is booted.
    Fork(fork::Args),
    /// A machine back to its template against a clone that is started.
    Reset(reset::Args),
    /// Say what moved between two results (--json) beyond their noise.
    Compare(compare::Args),
    /// What libvirt is run under; for `--peers`.
    #[command(hide = true)]
    Reap(peers::reap::Args),
}

/// Runs the task.
pub(crate) fn run(args: Args) -> Result<()> {
    let measures = !matches!(args.bench, Bench::Compare(_) | Bench::Reap(_));
    if cfg!(debug_assertions) && measures && !args.as_built {
        return optimized();
    }
    match args.bench {
        Bench::Boot(args) => boot::run(args),
        Bench::Exec(args) => exec::run(args),
        Bench::Files(args) => files::run(args),
        Bench::Memory(args) => memory::run(args),
        Bench::Net(args) => net::run(args),
        Bench::Density(args) => density::run(args),
        Bench::Clone(args) => clone::run(args),
        Bench::Pool(args) => pool::run(args),
        Bench::Fork(args) => fork::run(args),
        Bench::Reset(args) => reset::run(args),
        Bench::Compare(args) => compare::run(&args),
        Bench::Reap(args) => peers::reap::run(&args),
    }
}

/// The same, built as what ships is: `cargo xtask` itself is built for its developers.
fn optimized() -> Result<()> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    cargo.args(["run", "--quiet", "--release", "--package", "xtask", "--"]);
    let status = cargo.args(std::env::args_os().skip(1)).status()?;
    if !status.success() {
        bail!("the optimized bench ended with {status}");
    }
    Ok(())
}

/// Runs a bench to its end.
fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(work)
}
