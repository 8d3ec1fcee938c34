//! `bulkhead gc`.

use super::Global;
use super::message::{Failure, print_json, print_report};
use crate::run::{FAILED, Found, recover};

/// Options.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only show what would be released.
    #[arg(long)]
    dry_run: bool,
}

/// Releases what dead runs left.
pub(super) fn run(args: &Args, global: &Global) -> Result<i32, Failure> {
    let found = recover(&global.host()?.dirs, args.dry_run)?;
    if global.json {
        print_json(&found);
    }
    let mut code = 0;
    for one in &found {
        let Found::Dead { id, leases, errors } = one else {
            continue;
        };
        if !global.json {
            let verb = if args.dry_run {
                "would release"
            } else {
                "released"
            };
            println!("{verb} {id} ({} leases)", leases.len());
        }
        for error in errors {
            code = FAILED;
            print_report(error, global.json);
        }
    }
    Ok(code)
}
