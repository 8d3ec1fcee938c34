//! `bulkhead set`.

use super::Global;
use super::each::each;
use super::machine_args::word;
use super::message::Failure;
use crate::spec::{Bytes, IoLimits, NetworkChange, SpecError, Timeout, VmId};
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
    /// CPU time of the whole machine in percent of one core, such as 50 or 150.
    #[arg(long, value_name = "PERCENT")]
    cpu_quota: Option<u32>,
    /// Memory the guest keeps; the rest goes back to the host.
    #[arg(long, short, value_name = "SIZE")]
    memory: Option<Bytes>,
    /// Make its disk larger.
    #[arg(long, value_name = "SIZE")]
    disk: Option<Bytes>,
    /// Bytes it may read a second.
    #[arg(long, value_name = "SIZE")]
    read_rate: Option<Bytes>,
    /// Bytes it may write a second.
    #[arg(long, value_name = "SIZE")]
    write_rate: Option<Bytes>,
    /// Reads a second.
    #[arg(long, value_name = "N")]
    read_iops: Option<u64>,
    /// Writes a second.
    #[arg(long, value_name = "N")]
    write_iops: Option<u64>,
    /// Bytes a second from the guest to the network.
    #[arg(long, value_name = "SIZE")]
    upload: Option<Bytes>,
    /// Bytes a second from the network to the guest.
    #[arg(long, value_name = "SIZE")]
    download: Option<Bytes>,
    /// New connections a second.
    #[arg(long, value_name = "N")]
    connection_rate: Option<u32>,
    /// Connections at a time.
    #[arg(long, value_name = "N")]
    connections: Option<u32>,
    /// Bytes over the network in all.
    #[arg(long, value_name = "SIZE")]
    total: Option<Bytes>,
    /// Take a limit away: ttl, idle-timeout, cpu-quota, memory, io, upload, download or total.
    #[arg(long, value_name = "LIMIT", value_parser = word::<Limit>)]
    without: Vec<Limit>,
}

/// Changes machines, also while they run.
pub(super) async fn run(args: Args, global: &Global) -> Result<i32, Failure> {
    let settings = Settings {
        ttl: args.ttl,
        idle_timeout: args.idle_timeout,
        cpu_quota: args.cpu_quota,
        memory: args.memory,
        disk: args.disk,
        io: IoLimits {
            read_bytes: args.read_rate,
            write_bytes: args.write_rate,
            read_operations: args.read_iops,
            write_operations: args.write_iops,
        },
        network: NetworkChange {
            upload: args.upload,
            download: args.download,
            connection_rate: args.connection_rate,
            connections: args.connections,
            total: args.total,
            ..NetworkChange::default()
        },
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
