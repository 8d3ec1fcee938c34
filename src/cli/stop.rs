//! `bulkhead stop`, `pause`, `resume`, `rm`, `kill` and `wait`: what is done to machines
//! by name.

use nix::sys::signal::Signal;

use super::Global;
use super::each::each;
use super::message::{Failure, print_json, print_text};
use crate::run::FAILED;
use crate::spec::{Timeout, VmId};
use crate::supervise::{ExecId, Machines};

/// Options of `bulkhead stop`.
#[derive(Debug, clap::Args)]
pub(super) struct Stop {
    /// Names of machines.
    #[arg(required = true)]
    vms: Vec<VmId>,
    /// How long the guest may take to power off before the machine is killed
    /// [default: the machine's].
    #[arg(long, value_name = "TIME", conflicts_with = "force")]
    time: Option<Timeout>,
    /// Kill at once.
    #[arg(long, short)]
    force: bool,
}

/// Options of `bulkhead pause` and `bulkhead resume`.
#[derive(Debug, clap::Args)]
pub(super) struct Names {
    /// Names of machines.
    #[arg(required = true)]
    vms: Vec<VmId>,
}

/// Options of `bulkhead rm`.
#[derive(Debug, clap::Args)]
pub(super) struct Rm {
    /// Names of machines.
    #[arg(required = true)]
    vms: Vec<VmId>,
    /// Also one that runs, or whose record is damaged.
    #[arg(long, short)]
    force: bool,
}

/// Options of `bulkhead wait`.
#[derive(Debug, clap::Args)]
pub(super) struct Wait {
    /// Name of a machine.
    vm: VmId,
}

/// Options of `bulkhead kill`.
#[derive(Debug, clap::Args)]
pub(super) struct Kill {
    /// Name of a running machine.
    vm: VmId,
    /// The command: main, e1, e2 and so on.
    #[arg(default_value = "main")]
    exec: ExecId,
    /// The signal: a name such as TERM or SIGTERM, or a number.
    #[arg(long, short, value_name = "SIGNAL", default_value = "TERM", value_parser = signal)]
    signal: i32,
}

fn signal(text: &str) -> Result<i32, String> {
    let number = text.parse().ok().filter(|number| (1..=64).contains(number));
    let name = text.trim_start_matches("SIG");
    let named = || format!("SIG{name}").parse::<Signal>().ok();
    number
        .or_else(|| named().map(|signal| signal as i32))
        .ok_or_else(|| "it is neither a signal's name nor a number from 1 to 64".into())
}

/// Sends a signal to a command of a machine.
pub(super) async fn kill(args: Kill, global: &Global) -> Result<i32, Failure> {
    let machines = Machines::new(global.host()?);
    let client = machines.running(&args.vm).await?;
    client.signal(args.exec, args.signal).await?;
    Ok(0)
}

/// Powers machines off and waits for their end.
pub(super) async fn stop(args: Stop, global: &Global) -> Result<i32, Failure> {
    let machines = Machines::new(global.host()?);
    each(&args.vms, global, async |vm| {
        machines.stop(vm, args.time, args.force).await
    })
    .await
}

/// Makes machines stand still.
pub(super) async fn pause(args: Names, global: &Global) -> Result<i32, Failure> {
    let machines = Machines::new(global.host()?);
    each(&args.vms, global, async |vm| machines.pause(vm).await).await
}

/// Makes them go on.
pub(super) async fn resume(args: Names, global: &Global) -> Result<i32, Failure> {
    let machines = Machines::new(global.host()?);
    each(&args.vms, global, async |vm| machines.resume(vm).await).await
}

/// Removes machines with their disks and logs.
pub(super) async fn rm(args: Rm, global: &Global) -> Result<i32, Failure> {
    let machines = Machines::new(global.host()?);
    each(&args.vms, global, async |vm| {
        machines.remove(vm, args.force).await
    })
    .await
}

/// Waits for the end of a machine and gives the exit code of its command.
pub(super) async fn wait(args: Wait, global: &Global) -> Result<i32, Failure> {
    let view = Machines::new(global.host()?).wait(&args.vm).await?;
    let code = view.ended.as_ref().map_or(FAILED, |ended| ended.exit_code);
    match global.json {
        true => print_json(&view),
        false => print_text(&format!("{code}\n")),
    }
    Ok(code)
}
