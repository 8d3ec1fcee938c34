//! One verb for several machines: a failure stops none of the others.

use super::Global;
use super::message::{Failure, print_report, print_text};
use crate::error::Report;
use crate::run::FAILED;
use crate::spec::VmId;
use crate::supervise::SuperviseError;

/// Does `work` for each machine in turn and prints the names of those for which
/// it was done.
pub(super) async fn each(
    vms: &[VmId],
    global: &Global,
    work: impl AsyncFn(&VmId) -> Result<(), SuperviseError>,
) -> Result<i32, Failure> {
    let mut code = 0;
    let mut done = Vec::new();
    for vm in vms {
        match work(vm).await {
            Ok(()) if global.json => done.push(vm),
            Ok(()) => print_text(&format!("{vm}\n")),
            Err(error) => {
                code = FAILED;
                print_report(&Report::of(&error), global.json);
            }
        }
    }
    if global.json {
        super::message::print_json(&done);
    }
    Ok(code)
}
