//! `bulkhead doctor`.

use super::Global;
use super::message::{Failure, print_json};
use crate::run::doctor::{self, Status};

/// Options.
#[derive(Debug, clap::Args)]
pub(super) struct Args {}

/// Says what this host can do. The exit code is 1 when something needed is missing.
pub(super) async fn run(_args: &Args, global: &Global) -> Result<i32, Failure> {
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
