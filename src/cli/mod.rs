//! The command line: one file for each verb.

mod completions;
mod config;
mod console;
mod console_log;
mod cp;
mod create;
mod doctor;
mod each;
mod exec;
mod export;
mod forward;
mod gc;
mod image;
mod inspect;
mod logs;
mod ls;
mod machine_args;
mod man;
mod message;
mod net;
mod net_learn;
mod net_log;
mod output;
mod run;
mod set;
mod settings;
mod snapshot;
mod start;
mod stats;
mod stop;
mod supervise;
mod table;
mod template;
mod terminal;
mod verify;

use std::cell::OnceCell;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand};

use crate::run::{FAILED, Host};
use crate::spec::{SpecError, Timeout};
use message::Failure;
use settings::Settings;

pub use self::{
    exec::ExecOutcome,
    net::NetworkView,
    net_learn::Proposal,
    output::{
        BuiltImage, BuiltTemplate, Copied, DetachedExec, Exported, Forwarded, ImportedTemplate,
        PRINTED, PrunedTemplates, Removed, ShownImage,
    },
    stats::MachineUse,
};

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
    /// How long a guest may take until its agent answers [env: BULKHEAD_BOOT_TIMEOUT]
    /// [default: 90s, and 10s in the proof that KVM works].
    #[arg(long, global = true, value_name = "TIME")]
    boot_timeout: Option<Timeout>,
    /// User ids for the VMMs of machines, nobody else's on this host
    /// [env: BULKHEAD_UIDS] [default: 1900000000-1900065535].
    #[arg(long, global = true, value_name = "FIRST-LAST")]
    uids: Option<crate::spec::UidRange>,
    /// Addresses for machines, one each [env: BULKHEAD_NETWORK_POOL] [default: one the host has no
    /// use for].
    #[arg(long, global = true, value_name = "CIDR")]
    network_pool: Option<crate::spec::Cidr>,
    /// Who resolves names for machines: addresses with commas between [env: BULKHEAD_RESOLVERS]
    /// [default: the host's own resolvers].
    #[arg(long, global = true, value_name = "ADDRESSES")]
    resolvers: Option<crate::spec::Resolvers>,
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
    /// Make a machine that outlives this command.
    Create(Box<create::Args>),
    /// Start machines and wait until they are up.
    Start(start::Args),
    /// Stop machines and start them again, with the same disk.
    Restart(start::Restart),
    /// Give machines a fresh disk; those that run are started again, from a template where one matches.
    Reset(start::Reset),
    /// Run a command in a running machine.
    Exec(exec::Args),
    /// Follow a running command of a machine, and write to it.
    Attach(exec::Attach),
    /// Copy files into a machine or out of it.
    Cp(cp::Args),
    /// Lead ports of this host to services in a machine.
    Forward(forward::Args),
    /// Show what commands of a machine wrote, or its serial console.
    Logs(logs::Args),
    /// List machines.
    Ls(ls::Args),
    /// Show what machines use.
    Stats(stats::Args),
    /// Show what machines use, live.
    Top(stats::Top),
    /// Change limits of machines, also while they run: of each machine all that is asked for, or
    /// nothing.
    Set(set::Args),
    /// Show or change what machines may reach.
    Net(net::Args),
    /// Make machines stand still.
    Pause(stop::Names),
    /// Make paused machines go on.
    Resume(stop::Names),
    /// Power machines off.
    Stop(stop::Stop),
    /// Send a signal to a command of a machine.
    Kill(stop::Kill),
    /// Wait for the end of a machine and give its command's exit code.
    Wait(stop::Wait),
    /// Remove machines with their disks and logs.
    Rm(stop::Rm),
    #[command(hide = true)]
    Supervise(supervise::Args),
    /// Build, import and keep images.
    Image(Box<image::Args>),
    /// Build, show and remove templates: booted machines that others start from.
    Template(template::Args),
    /// Save machines as they are, and go back to that.
    Snapshot(snapshot::Args),
    /// Branch a running machine: new machines go on from where it is.
    Fork(snapshot::Fork),
    /// Say what this host can do, with reason and cure.
    Doctor(doctor::Args),
    /// Show a machine, with its last 100 changes of state, or ask its guest.
    Inspect(inspect::Args),
    /// Read every layer that confines a running machine back, and say what holds.
    Verify(verify::Args),
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
        // It would tell of a log on a full disk on stderr, which is that log,
        // and panic.
        .log_internal_errors(false)
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
            Verb::Template(args) => template::run(args, &global).await,
            Verb::Snapshot(args) => snapshot::run(args, &global).await,
            Verb::Fork(args) => snapshot::fork(args, &global).await,
            Verb::Doctor(args) => doctor::run(&args, &global).await,
            Verb::Inspect(args) => inspect::run(args, &global).await,
            Verb::Verify(args) => verify::run(args, &global).await,
            Verb::Console(args) => console::run(args, &global).await,
            Verb::Gc(args) => gc::run(&args, &global).await,
            Verb::Create(args) => create::run(*args, &global).await,
            Verb::Start(args) => start::run(args, &global).await,
            Verb::Restart(args) => start::restart(args, &global).await,
            Verb::Reset(args) => start::reset(args, &global).await,
            Verb::Exec(args) => exec::run(args, &global).await,
            Verb::Attach(args) => exec::attach(args, &global).await,
            Verb::Cp(args) => cp::run(args, &global).await,
            Verb::Forward(args) => forward::run(args, &global).await,
            Verb::Logs(args) => logs::run(args, &global).await,
            Verb::Ls(args) => ls::run(args, &global).await,
            Verb::Stats(args) => stats::run(args, &global).await,
            Verb::Top(args) => stats::top(args, &global).await,
            Verb::Set(args) => set::run(args, &global).await,
            Verb::Net(args) => net::run(args, &global).await,
            Verb::Pause(args) => stop::pause(args, &global).await,
            Verb::Resume(args) => stop::resume(args, &global).await,
            Verb::Stop(args) => stop::stop(args, &global).await,
            Verb::Kill(args) => stop::kill(args, &global).await,
            Verb::Wait(args) => stop::wait(args, &global).await,
            Verb::Rm(args) => stop::rm(args, &global).await,
            Verb::Supervise(args) => supervise::run(args, &global).await,
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
