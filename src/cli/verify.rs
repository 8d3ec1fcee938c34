//! `bulkhead verify`.

use super::Global;
use super::message::{Failure, print_json, print_text, visible};
use crate::run::{Controller, Finding, Verdict};
use crate::spec::VmId;

/// Exit code where a layer does not hold.
const NOT_CONFINED: i32 = 1;

/// Options.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Name of a running machine.
    vm: VmId,
}

/// Reads the layers of a machine back and says what holds.
pub(super) async fn run(args: Args, global: &Global) -> Result<i32, Failure> {
    let host = global.host()?;
    let findings = Controller::new(&host.dirs, args.vm).verify().await?;
    match global.json {
        true => print_json(&findings),
        false => show(&findings),
    }
    let failed = findings.iter().any(|one| one.verdict == Verdict::Fail);
    Ok(if failed { NOT_CONFINED } else { 0 })
}

fn show(findings: &[Finding]) {
    for one in findings {
        let verdict = match one.verdict {
            Verdict::Pass => "pass",
            Verdict::Fail => "FAIL",
            Verdict::Weaker => "weaker",
            Verdict::Waived => "waived",
            Verdict::Unseen => "unseen",
        };
        let expected = match &one.expected {
            Some(expected) if expected.is_empty() => " (expected: none)".to_owned(),
            Some(expected) => format!(" (expected: {expected})"),
            None => String::new(),
        };
        let measured = if one.measured.is_empty() {
            "none"
        } else {
            &one.measured
        };
        let line = format!(
            "{verdict:<7}{:<11}{}: {measured}{expected}",
            one.layer, one.what
        );
        print_text(&format!("{}\n", visible(&line)));
    }
}
