//! `lab probe`: what `cargo xtask probe` tries, under KVM and in control groups
//! of version 2.

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;

use super::{Options, machine, tests, with_lab};
use crate::setup;

/// Options.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    options: Options,
    /// Which probe.
    probe: Probe,
    /// More options of the probe.
    #[arg(last = true)]
    more: Vec<String>,
}

/// The probes that have to do with KVM.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Probe {
    /// A hostile program in QEMU's place.
    Vmm,
    /// What a guest sees.
    Guest,
    /// QEMU told over its monitor to reach out.
    Qmp,
}

impl Probe {
    /// As it is called in the lab, where nothing can be built.
    const fn words(self) -> &'static [&'static str] {
        match self {
            Self::Vmm => &["vmm", "--built"],
            Self::Guest => &["guest", "--kernel", "tuned"],
            Self::Qmp => &["qmp", "--kernel", "tuned"],
        }
    }
}

/// Runs the task; gives the exit code of the probe.
pub(super) fn run(args: &Args) -> Result<i32> {
    let mut build = setup::cargo(&["build", "--package", "xtask", "--bins"])?;
    ensure!(
        build.status()?.success(),
        "the hostile program cannot be built"
    );
    let program = setup::target()?.join("debug/xtask").canonicalize()?;
    let program = program.to_str().context("a path is not UTF-8")?;
    let words = [&[program, "probe"], args.probe.words()].concat();
    let words = [&words[..], &["--accel", "kvm", "--state-dir", tests::STATE]].concat();
    let given = args.more.iter().cloned();
    let argv = words.into_iter().map(str::to_owned).chain(given).collect();
    with_lab(&args.options, async |lab| {
        let env = tests::prepare(lab, &args.options).await?;
        let mut io = machine::plain_io(false);
        let limit = Some(args.options.timeout.0);
        lab.run(argv, &env, &mut io, limit).await
    })
}
