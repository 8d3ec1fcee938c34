//! The command line: one file for each verb.

mod completions;
mod config;
mod console;
mod doctor;
mod gc;
mod image;
mod inspect;
mod machine_args;
mod man;
mod message;
mod run;
mod settings;
mod terminal;

use std::cell::OnceCell;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand};

use crate::run::{FAILED, Host};
use crate::spec::SpecError;
use message::Failure;
use settings::Settings;

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
#[command(next_help_heading = "Options of every verb")]
struct Global {
    /// Configuration file instead of /etc/bulkhead/config.toml and
    /// ~/.config/bulkhead/config.toml, or none [env: BULKHEAD_CONFIG].
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where images and runs are kept [env: BULKHEAD_STATE_DIR].
    #[arg(long, global = true, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Where sockets and this boot's verdicts are kept [env: BULKHEAD_RUNTIME_DIR].
    #[arg(long, global = true, value_name = "DIR")]
    runtime_dir: Option<PathBuf>,
    /// The QEMU binary [env: BULKHEAD_QEMU] [default: qemu-system-x86_64 in PATH].
    #[arg(long, global = true, value_name = "FILE")]
    qemu: Option<PathBuf>,
    /// Print results and errors as JSON.
    #[arg(long, global = true)]
    json: bool,
    #[arg(skip)]
    settings: OnceCell<Settings>,
}

impl Global {
    /// What is configured; read at the first call.
    fn settings(&self) -> Result<&Settings, SpecError> {
        if let Some(settings) = self.settings.get() {
            return Ok(settings);
        }
        let settings = Settings::load(self)?;
        Ok(self.settings.get_or_init(|| settings))
    }

    /// The host that is configured.
    fn host(&self) -> Result<Host, SpecError> {
        Ok(self.settings()?.host())
    }
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Run a command in a machine of its own.
    Run(Box<run::Args>),
    /// Build, import and keep images.
    Image(Box<image::Args>),
    /// Say what this host can do, with reason and cure.
    Doctor(doctor::Args),
    /// Show a running machine.
    Inspect(inspect::Args),
    /// Open the emergency console of a running machine: a root shell.
    Console(console::Args),
    /// Release what dead runs left behind.
    Gc(gc::Args),
    /// Show what is configured.
    Config(config::Args),
    /// Print completions for a shell.
    Completions(completions::Args),
    /// Print the manual page.
    Man(man::Args),
}

/// The command with all verbs and options, for what is generated from it.
pub fn command() -> clap::Command {
    Cli::command()
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
            Verb::Image(args) => image::run(*args, &global).await.map(|()| 0),
            Verb::Doctor(args) => doctor::run(&args, &global).await,
            Verb::Inspect(args) => inspect::run(args, &global).await,
            Verb::Console(args) => console::run(args, &global).await,
            Verb::Gc(args) => gc::run(&args, &global),
            Verb::Config(args) => config::run(args, &global),
            Verb::Completions(args) => completions::run(&args),
            Verb::Man(args) => man::run(&args),
        }
    });
    // A thread may wait for input that never comes.
    runtime.shutdown_background();
    exit_code(result.unwrap_or_else(|failure: Failure| failure.print(global.json)))
}

fn exit_code(code: i32) -> ExitCode {
    ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX))
}
