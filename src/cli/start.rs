//! `bulkhead start`, `bulkhead restart` and `bulkhead reset`.

use super::Global;
use super::each::each;
use super::message::Failure;
use crate::snapshot::SnapshotName;
use crate::spec::{Timeout, VmId};
use crate::supervise::Machines;

/// Options of `bulkhead start`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Names of machines that do not run.
    #[arg(required = true)]
    vms: Vec<VmId>,
}

/// Options of `bulkhead restart`.
#[derive(Debug, clap::Args)]
pub(super) struct Restart {
    /// Names of machines.
    #[arg(required = true)]
    vms: Vec<VmId>,
    /// How long the guest may take to power off [default: the machine's].
    #[arg(long, value_name = "TIME")]
    time: Option<Timeout>,
}

/// Options of `bulkhead reset`.
#[derive(Debug, clap::Args)]
pub(super) struct Reset {
    /// Names of machines.
    #[arg(required = true)]
    vms: Vec<VmId>,
    /// Back to this snapshot of each, as `snapshot restore` does, instead of to
    /// the beginning
    #[arg(long, value_name = "SNAPSHOT")]
    to: Option<SnapshotName>,
}

/// Starts machines and waits until they are up.
pub(super) async fn run(args: Args, global: &Global) -> Result<i32, Failure> {
    let settings = global.settings()?;
    let machines = Machines::new(settings.host());
    let launcher = settings.launcher();
    each(&args.vms, global, async |vm| {
        machines.start(vm, &launcher).await
    })
    .await
}

/// Stops those that run, and starts them again with the same disk.
pub(super) async fn restart(args: Restart, global: &Global) -> Result<i32, Failure> {
    let settings = global.settings()?;
    let machines = Machines::new(settings.host());
    let launcher = settings.launcher();
    each(&args.vms, global, async |vm| {
        if machines.look(vm).await?.state.is_live() {
            machines.stop(vm, args.time, false).await?;
        }
        machines.start(vm, &launcher).await
    })
    .await
}

/// Throws away what happened in machines.
pub(super) async fn reset(args: Reset, global: &Global) -> Result<i32, Failure> {
    let settings = global.settings()?;
    let machines = Machines::new(settings.host());
    let launcher = settings.launcher();
    each(&args.vms, global, async |vm| match &args.to {
        Some(name) => machines.restore(vm, name, false, &launcher).await,
        None => machines.reset(vm, &launcher).await,
    })
    .await
}
