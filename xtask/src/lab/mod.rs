//! `cargo xtask lab`: commands and tests in a real KVM host, without one.
//!
//! The lab is a Bulkhead machine under emulation, which has AMD's SVM, with
//! nested virtualization on. It sees this machine's own root file system,
//! read-only, with a layer in memory on top.

mod kit;
mod machine;
mod probe;
mod terminal;
mod tests;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bulkhead::spec::{Bytes, Timeout};

use crate::setup;

use machine::Lab;
pub(crate) use tests::{Tested, ci};

/// Options.
#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Args {
    #[command(flatten)]
    options: Options,
    #[command(subcommand)]
    verb: Option<Verb>,
    /// Program and arguments, run as root in the current directory.
    #[arg(last = true)]
    command: Vec<String>,
}

/// What the lab is made of.
#[derive(Clone, clap::Args)]
pub(crate) struct Options {
    /// Where images are kept.
    #[arg(
        long,
        env = "BULKHEAD_STATE_DIR",
        default_value_os_t = setup::usual_state_dir(),
        value_name = "DIR"
    )]
    state_dir: PathBuf,
    /// Memory of the lab.
    #[arg(long, default_value = "3G", value_name = "SIZE")]
    memory: Bytes,
    /// How long all of it may take; without end for a shell.
    #[arg(long, default_value = "15m", value_name = "TIME")]
    timeout: Timeout,
    /// Say how long each step took.
    #[arg(long)]
    verbose: bool,
}

#[derive(clap::Subcommand)]
enum Verb {
    /// Run the project's own tests there; without a filter those that need a KVM host.
    Test(tests::Args),
    /// Run `cargo xtask probe vmm`, `guest` or `qmp` there, under KVM.
    Probe(probe::Args),
    /// Open a terminal.
    Shell {
        #[command(flatten)]
        options: Options,
    },
}

/// Runs the task.
pub(crate) fn run(args: Args) -> Result<()> {
    let code = match args.verb {
        Some(Verb::Test(args)) => return tests::run(&args),
        Some(Verb::Probe(args)) => probe::run(&args)?,
        Some(Verb::Shell { options }) => shell(&options)?,
        None => {
            ensure!(
                !args.command.is_empty(),
                "say what to do: `cargo xtask lab -- COMMAND`, `lab test`, `lab probe` or \
                 `lab shell`"
            );
            command(&args.options, args.command)?
        }
    };
    // The command's own, which is no failure of the task.
    std::process::exit(code)
}

fn command(options: &Options, command: Vec<String>) -> Result<i32> {
    with_lab(options, async |lab| {
        let mut io = machine::plain_io(true);
        lab.run(command, &[], &mut io, Some(options.timeout.0))
            .await
    })
}

fn shell(options: &Options) -> Result<i32> {
    with_lab(options, async |lab| {
        let raw = terminal::RawMode::enter()?;
        let mut io = machine::plain_io(true);
        io.size = raw.size;
        let env = [("TERM".to_owned(), raw.term.clone())];
        let shell = ["bash".to_owned(), "-i".to_owned()];
        lab.run_on_terminal(shell.into(), &env, &mut io).await
    })
}

/// Starts a lab, does `work` in it, and removes it whatever came of that.
fn with_lab<T>(options: &Options, work: impl AsyncFnOnce(&Lab) -> Result<T>) -> Result<T> {
    // One thread, which lives as long as the lab.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let begin = Instant::now();
    let say = |what: &str| {
        if options.verbose {
            eprintln!("lab: {what} after {:.1} s", begin.elapsed().as_secs_f32());
        }
    };
    let result = runtime.block_on(async {
        let lab = Lab::start(options).await.context("the lab did not start")?;
        say("up");
        let result = work(&lab).await;
        say("done");
        if result.is_err() {
            lab.say_last_words().await;
        }
        let ended = lab.end().await;
        say("gone");
        result.and_then(|value| ended.map(|()| value))
    });
    // A thread may wait for input that never comes.
    runtime.shutdown_timeout(Duration::ZERO);
    result
}
