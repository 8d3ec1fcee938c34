//! `bulkhead gc`.

use super::Global;
use super::message::{Failure, print_json, print_report, print_text};
use crate::error::Report;
use crate::host::network;
use crate::run::{FAILED, Found, recover};
use crate::supervise::Machines;

/// Options.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only show what would be released.
    #[arg(long)]
    dry_run: bool,
}

/// Releases what dead owners left, and gives machines that run on without a
/// supervisor a new one.
pub(super) async fn run(args: &Args, global: &Global) -> Result<i32, Failure> {
    let settings = global.settings()?;
    let host = settings.host();
    let found = recover(&host.dirs, args.dry_run)?;
    if !args.dry_run {
        host.templates().sweep()?;
        if nix::unistd::geteuid().is_root() {
            network::clear(&host.site)?;
        }
    }
    if global.json {
        print_json(&found);
    }
    let mut code = 0;
    if !args.dry_run {
        let machines = Machines::new(host);
        let adopted = machines.adopt(&found, &settings.launcher()).await;
        // What is half made tells a new supervisor that its machine rests.
        machines.sweep_snapshots()?;
        for (id, adopted) in adopted {
            match adopted {
                Ok(()) if global.json => {}
                Ok(()) => print_text(&format!("took over {id}\n")),
                Err(error) => {
                    code = FAILED;
                    print_report(&Report::of(&error), global.json);
                }
            }
        }
    }
    for one in &found {
        let (id, leases, errors) = match one {
            Found::Dead { id, leases, errors } => (id, leases, errors),
            Found::Survivor { id } => {
                if args.dry_run && !global.json {
                    print_text(&format!("would take over {id}\n"));
                }
                continue;
            }
            Found::Alive { .. } | Found::Kept { .. } => continue,
        };
        if !global.json {
            let verb = if args.dry_run {
                "would release"
            } else {
                "released"
            };
            print_text(&format!("{verb} {id} ({} leases)\n", leases.len()));
        }
        for error in errors {
            code = FAILED;
            print_report(error, global.json);
        }
    }
    Ok(code)
}
