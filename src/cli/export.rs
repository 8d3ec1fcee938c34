//! `export` and `import` of snapshots and templates: files, stdin and stdout.

use std::fs::File;
use std::io::{self, IsTerminal as _, Read, Write};
use std::path::{Path, PathBuf};

use super::Global;
use super::machine_args::{LifetimeArgs, MachineArgs};
use super::message::{Failure, print_json, print_text};
use super::output::Exported;
use crate::export::{ExportError, Fresh, Import};
use crate::spec::VmId;
use crate::supervise::Machines;

/// Stands for stdin or stdout.
const STANDARD: &str = "-";

/// Options of `bulkhead snapshot import`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// An export of a snapshot (`-`: from stdin)
    file: PathBuf,
    /// Name of the new machine [default: that of the machine that was saved]
    #[arg(long)]
    name: Option<VmId>,
    /// Only the disk: the machine boots with it, also with another QEMU or kernel
    #[arg(long)]
    disk_only: bool,
    /// Start it at once
    #[arg(long)]
    start: bool,
    #[command(flatten)]
    machine: MachineArgs,
    #[command(flatten)]
    lifetime: LifetimeArgs,
}

/// Writes an export, to a file that is there as a whole or not at all, or to
/// stdout, and says how many bytes it has.
pub(super) fn export<E: Into<Failure>>(
    file: &Path,
    json: bool,
    write: impl FnOnce(&mut dyn Write, &Path) -> Result<u64, E>,
) -> Result<(), Failure> {
    if file == Path::new(STANDARD) {
        let mut stdout = io::stdout().lock();
        if stdout.is_terminal() {
            return Err(ExportError::Terminal.into());
        }
        write(&mut stdout, Path::new("stdout")).map_err(Into::into)?;
        return Ok(());
    }
    let fresh = Fresh::create(file)?;
    let bytes = write(&mut fresh.file(), file).map_err(Into::into)?;
    fresh.publish()?;
    let file = file.display().to_string();
    match json {
        true => print_json(&Exported { file, bytes }),
        false => print_text(&format!("{file}\n")),
    }
    Ok(())
}

/// Opens an export to be taken in.
pub(super) fn open(file: &Path) -> Result<Import<Box<dyn Read>>, ExportError> {
    if file == Path::new(STANDARD) {
        return Import::open(Box::new(io::stdin().lock()), "stdin");
    }
    let opened = File::open(file).map_err(|source| ExportError::Io {
        action: "open",
        path: file.to_owned(),
        source,
    })?;
    Import::open(Box::new(opened), file.display().to_string())
}

/// Makes a machine of an export, and prints its name.
pub(super) async fn import(args: Args, global: &Global) -> Result<i32, Failure> {
    let settings = global.settings()?;
    let import = open(&args.file)?;
    let (manifest, machine) = import.snapshot()?;
    let below = machine.request(&manifest.image, manifest.disk.size);
    let file = args.machine.spec.clone();
    let mut request = args.lifetime.into_request(args.machine.request());
    request.name = args.name;
    let merged = settings.with_below(below, request, file.as_deref())?;
    let spec = merged.resolve_machine()?;
    let machines = Machines::new(settings.host());
    machines.import(import, spec.clone(), args.disk_only)?;
    if args.start {
        machines.start(&spec.id, &settings.launcher()).await?;
    }
    match global.json {
        true => print_json(&machines.look(&spec.id).await?),
        false => print_text(&format!("{}\n", spec.id)),
    }
    Ok(0)
}
