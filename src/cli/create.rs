//! `bulkhead create`.

use std::path::{Path, PathBuf};

use super::Global;
use super::machine_args::{LifetimeArgs, MachineArgs, WorkspaceArgs};
use super::message::{Failure, print_json, print_text};
use super::run::read_script;
use crate::spec::{Request, SpecError, VmId};
use crate::supervise::Machines;

/// Options.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Name of the machine [default: random].
    #[arg(long)]
    name: Option<VmId>,
    #[command(flatten)]
    machine: MachineArgs,
    #[command(flatten)]
    lifetime: LifetimeArgs,
    #[command(flatten)]
    workspace: WorkspaceArgs,
    /// Start it at once.
    #[arg(long)]
    start: bool,
    /// Run its command on a terminal.
    #[arg(long, short)]
    tty: bool,
    /// Its command is this script (`-`: from stdin).
    #[arg(long, value_name = "FILE")]
    script: Option<PathBuf>,
    /// Its command: the machine stops when this ends; without one it runs until
    /// it is stopped.
    #[arg(last = true)]
    command: Vec<String>,
}

impl Args {
    fn request(self) -> Result<Request, SpecError> {
        let script = self.script.as_deref().map(read_script).transpose()?;
        let request = self.workspace.into_request(self.machine.request());
        Ok(Request {
            name: self.name,
            terminal: self.tty.then_some(true),
            command: self.command,
            script,
            ..self.lifetime.into_request(request)
        })
    }
}

/// Makes a machine and prints its name.
pub(super) async fn run(args: Args, global: &Global) -> Result<i32, Failure> {
    let settings = global.settings()?;
    let (file, start) = (args.machine.spec.clone(), args.start);
    let merged = settings.with(args.request()?, file.as_deref().map(Path::new))?;
    let spec = merged.resolve_machine()?;
    let machines = Machines::new(settings.host());
    machines.create(&spec).await?;
    // What its supervisor warns of nobody hears.
    if let Some(bridge) = &spec.network.bridge {
        let device = &bridge.device;
        tracing::warn!("what this machine reaches on {device} is not filtered");
    }
    if start {
        machines.start(&spec.id, &settings.launcher()).await?;
    }
    match global.json {
        true => print_json(&machines.look(&spec.id).await?),
        false => print_text(&format!("{}\n", spec.id)),
    }
    Ok(0)
}
