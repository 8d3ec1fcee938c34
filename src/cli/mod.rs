//! The command line: one file for each verb.

mod console;
mod doctor;
mod gc;
mod image;
mod inspect;
mod machine_args;
mod message;
mod run;
mod terminal;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::run::{Dirs, FAILED, Host};
use message::Failure;

/// Run coding agents, or any command, in disposable QEMU/KVM microVMs.
#[derive(Debug, Parser)]
#[command(name = "bulkhead", version, propagate_version = true)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    verb: Verb,
}

/// Options of every verb.
#[derive(Debug, Args)]
struct Global {
    /// Where images and runs are kept.
    #[arg(long, global = true, env = "BULKHEAD_STATE_DIR", value_name = "DIR", default_value = Dirs::STATE)]
    state_dir: PathBuf,
    /// Where sockets and this boot's verdicts are kept.
    #[arg(long, global = true, env = "BULKHEAD_RUNTIME_DIR", value_name = "DIR", default_value = Dirs::RUNTIME)]
    runtime_dir: PathBuf,
    /// The QEMU binary [default: qemu-system-x86_64 in PATH].
    #[arg(long, global = true, env = "BULKHEAD_QEMU", value_name = "FILE")]
    qemu: Option<PathBuf>,
    /// Print results and errors as JSON.
    #[arg(long, global = true)]
    json: bool,
}

impl Global {
    fn host(&self) -> Host {
        let dirs = Dirs {
            state: self.state_dir.clone(),
            runtime: self.runtime_dir.clone(),
        };
        // The one thread of this program lives as long as its machines.
        Host {
            qemu: self.qemu.clone(),
            die_with_thread: true,
            ..Host::new(dirs)
        }
    }
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Run a command in a machine of its own.
    Run(Box<run::Args>),
    /// Build, import and keep images.
    Image(image::Args),
    /// Say what this host can do, with reason and cure.
    Doctor(doctor::Args),
    /// Show a running machine.
    Inspect(inspect::Args),
    /// Open the emergency console of a running machine: a root shell.
    Console(console::Args),
    /// Release what dead runs left behind.
    Gc(gc::Args),
}

/// Parses the arguments, runs the verb, and gives its exit code.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no failures; bad usage is Bulkhead's own.
            let code = if error.use_stderr() { FAILED } else { 0 };
            let _ = error.print();
            return exit_code(code);
        }
    };
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("BULKHEAD_LOG")
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn")),
        )
        .with_writer(std::io::stderr)
        .without_time()
        .init();
    let Cli { global, verb } = cli;
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("bulkhead: cannot start: {error}");
            return exit_code(FAILED);
        }
    };
    let result = runtime.block_on(async {
        match verb {
            Verb::Run(args) => run::run(*args, &global).await,
            Verb::Image(args) => image::run(args, &global).await.map(|()| 0),
            Verb::Doctor(args) => doctor::run(&args, &global).await,
            Verb::Inspect(args) => inspect::run(args, &global).await,
            Verb::Console(args) => console::run(args, &global).await,
            Verb::Gc(args) => gc::run(&args, &global),
        }
    });
    // A thread may wait for input that never comes.
    runtime.shutdown_background();
    exit_code(result.unwrap_or_else(|failure: Failure| failure.print(global.json)))
}

fn exit_code(code: i32) -> ExitCode {
    ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX))
}
