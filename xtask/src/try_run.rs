//! `cargo xtask try -- CMD`: from a bare machine to a command in a microVM.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Context as _;

use crate::setup;

/// Options.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Where images are kept.
    #[arg(
        long,
        env = "BULKHEAD_STATE_DIR",
        default_value_os_t = setup::usual_state_dir(),
        value_name = "DIR"
    )]
    state_dir: PathBuf,
    /// Program and arguments.
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// One line of `bulkhead doctor --json`.
#[derive(serde::Deserialize)]
struct Check {
    name: String,
    status: String,
    seen: String,
}

/// Sets up what is missing and runs the command; exits with its code.
pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let ready = setup::ensure(&args.state_dir, true)?;
    let bulkhead = || {
        let mut command = Command::new(&ready.bulkhead);
        command.arg("--state-dir").arg(&args.state_dir);
        command
    };
    let doctor = bulkhead()
        .args(["--json", "doctor"])
        .output()
        .context("cannot run doctor")?;
    let checks: Vec<Check> =
        serde_json::from_slice(&doctor.stdout).context("doctor gave no proper answer")?;
    let kvm = checks
        .iter()
        .find(|check| check.name == "kvm")
        .context("doctor says nothing of kvm")?;
    let mut run = bulkhead();
    run.arg("run");
    if kvm.status != "ok" {
        eprintln!("KVM is {}", kvm.seen);
        eprintln!("using software emulation (--accel tcg): slow, and no isolation by hardware");
        run.args(["--accel", "tcg"]);
    }
    let status = run
        .arg("--")
        .args(&args.command)
        .status()
        .context("cannot run bulkhead")?;
    std::process::exit(status.code().unwrap_or(125))
}
