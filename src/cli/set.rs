//! `bulkhead set`.

use super::Global;
use super::each::each;
use super::machine_args::word;
use super::message::Failure;
use crate::spec::{SpecError, Timeout, VmId};
use crate::supervise::{Limit, Machines, Settings};

/// Options.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Names of machines.
    #[arg(required = true)]
    vms: Vec<VmId>,
    /// Stop the machine so long from now (one that does not run: so long after
    /// its start).
    #[arg(long, value_name = "TIME")]
    ttl: Option<Timeout>,
    /// Stop it when nothing happened in it for so long.
    #[arg(long, value_name = "TIME")]
    idle_timeout: Option<Timeout>,
    /// Take a limit away: ttl, idle-timeout.
    #[arg(long, value_name = "LIMIT", value_parser = word::<Limit>)]
    without: Vec<Limit>,
}

/// Changes machines, also while they run.
pub(super) async fn run(args: Args, global: &Global) -> Result<i32, Failure> {
    let settings = Settings {
        ttl: args.ttl,
        idle_timeout: args.idle_timeout,
        without: args.without,
    };
    if settings == Settings::default() {
        return Err(SpecError::Value {
            what: "bulkhead set",
            value: "without a setting".into(),
            why: "it would change nothing",
        }
        .into());
    }
    let machines = Machines::new(global.host()?);
    each(&args.vms, global, async |vm| {
        machines.set(vm, settings.clone()).await
    })
    .await
}
