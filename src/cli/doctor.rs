//! `bulkhead doctor`.

use super::Global;
use super::message::{Failure, print_json, print_text};
use crate::run::doctor::{self, Status};

/// Options.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Print the AppArmor profile for QEMU instead: `bulkhead doctor
    /// --apparmor-profile | apparmor_parser --replace` loads it.
    #[arg(long)]
    apparmor_profile: bool,
}

/// Says what this host can do. The exit code is 1 when something needed is missing.
pub(super) async fn run(args: &Args, global: &Global) -> Result<i32, Failure> {
    if args.apparmor_profile {
        print_text(crate::vmm::APPARMOR);
        return Ok(0);
    }
    let checks = doctor::examine(&global.host()?).await;
    let code = i32::from(checks.iter().any(|check| check.status == Status::Missing));
    if global.json {
        print_json(&checks);
        return Ok(code);
    }
    for check in &checks {
        let mark = match check.status {
            Status::Ok => "ok     ",
            Status::Limited => "limited",
            Status::Missing => "MISSING",
        };
        println!("{mark}  {:<12} {}", check.name, check.seen);
        if let Some(cure) = &check.cure {
            println!("{:9}{:<12} help: {cure}", "", "");
        }
    }
    Ok(code)
}
