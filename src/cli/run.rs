//! `bulkhead run`.

use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::Global;
use super::machine_args::{MachineArgs, WorkspaceArgs};
use super::message::{Failure, print_json, print_report, say, visible};
use super::terminal::{self, RawMode};
use crate::net::{Refused, Summary};
use crate::run::{Io, Outcome, Progress, RunError, Signal};
use crate::spec::{Bytes, Request, Script, SpecError, VmId};

/// Signals that are the command's, not ours.
const FORWARDED: [i32; 7] = {
    use nix::libc::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};
    [SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGCONT]
};

/// Options.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Name of the machine [default: random].
    #[arg(long)]
    name: Option<VmId>,
    #[command(flatten)]
    machine: MachineArgs,
    #[command(flatten)]
    workspace: WorkspaceArgs,
    /// Bring changed files back into the workspace.
    #[arg(long)]
    apply: bool,
    /// With --apply: overwrite files that changed on the host meanwhile.
    #[arg(long)]
    force: bool,
    /// Show what changed in the workspace as a diff on stderr.
    #[arg(long)]
    diff: bool,
    /// Where what the guest leaves in /workspace/output goes.
    #[arg(long, value_name = "DIR")]
    artifacts: Option<PathBuf>,
    /// With --json: how much of stdout and stderr each is collected; a command
    /// that writes more is ended.
    #[arg(long, value_name = "SIZE", default_value_t = Io::MOST)]
    max_output: Bytes,
    /// Propose on stderr a network that lets through what the command tried and no more.
    #[arg(long)]
    learn: bool,
    /// Run on a terminal.
    #[arg(long, short)]
    tty: bool,
    /// Run this script (`-`: from stdin); its `#!` line or extension says how.
    #[arg(long, value_name = "FILE")]
    script: Option<PathBuf>,
    /// Program and arguments.
    #[arg(last = true)]
    command: Vec<String>,
}

impl Args {
    fn request(self) -> Result<Request, SpecError> {
        let script = self.script.as_deref().map(read_script).transpose()?;
        let set = |flag: bool| flag.then_some(true);
        Ok(Request {
            name: self.name,
            artifacts: self.artifacts,
            apply: set(self.apply),
            force: set(self.force),
            diff: set(self.diff),
            terminal: set(self.tty),
            learn: set(self.learn),
            command: self.command,
            script,
            ..self.workspace.into_request(self.machine.request())
        })
    }
}

pub(super) fn read_script(path: &Path) -> Result<Script, SpecError> {
    let read = || {
        let mut content = Vec::new();
        let limit = Script::MAX as u64 + 1;
        if path == Path::new("-") {
            std::io::stdin()
                .lock()
                .take(limit)
                .read_to_end(&mut content)?;
        } else {
            std::fs::File::open(path)?
                .take(limit)
                .read_to_end(&mut content)?;
        }
        Ok(content)
    };
    let content = read().map_err(|source| SpecError::Read {
        path: path.to_owned(),
        source,
    })?;
    Script::new(&path.to_string_lossy(), content)
}

/// Runs the command and gives its exit code.
pub(super) async fn run(args: Args, global: &Global) -> Result<i32, Failure> {
    let script_on_stdin = args.script.as_deref() == Some(Path::new("-"));
    let most = args.max_output;
    let spec_file = args.machine.spec.clone();
    let settings = global.settings()?;
    let spec = settings.spec(args.request()?, spec_file.as_deref())?;
    let host = settings.host();
    // Every start clears away what dead runs left; failing at that stops nobody.
    if let Err(error) = crate::run::recover(&host.dirs, false) {
        tracing::debug!("recovery: {error}");
    }
    let signals = signals()?;
    let collect = global.json;
    let io = Io {
        stdin: (!script_on_stdin && terminal::has_input())
            .then(|| Box::new(tokio::io::stdin()) as _),
        stdout: (!collect).then(|| Box::new(tokio::io::stdout()) as _),
        stderr: (!collect).then(|| Box::new(tokio::io::stderr()) as _),
        spill: host.dirs.state.join("output"),
        most,
        signals,
        size: terminal::size(),
        progress: progress(spec.command.terminal, global.json),
    };
    let outcome = crate::run::run(&host, &spec, io)
        .await
        .map_err(|error| match error {
            RunError::Interrupted { signal } => Failure::from(error).with_code(128 + signal),
            error => Failure::from(error),
        })?;
    report(&outcome, global.json);
    Ok(outcome.exit_code)
}

fn report(outcome: &Outcome, json: bool) {
    if json {
        print_json(outcome);
        return;
    }
    if let Some(diff) = outcome
        .changes
        .as_ref()
        .and_then(|changes| changes.diff.as_ref())
    {
        let diff = diff.strip_suffix('\n').unwrap_or(diff);
        // Stdout is the command's. A file gets the diff as it is, to apply it.
        let text = match std::io::stderr().is_terminal() {
            true => visible(diff),
            false => diff.to_owned(),
        };
        say(&text);
    }
    if let Some(refused) = &outcome.refused {
        print_report(refused, false);
    }
    if let Some(failed) = &outcome.failed {
        print_report(failed, false);
    }
    if outcome.timed_out {
        say("bulkhead: the command was ended by its time limit");
    }
    if let Some(traffic) = outcome
        .traffic
        .as_ref()
        .filter(|all| !all.refused.is_empty() || all.excepted())
    {
        say(&visible(&network(traffic)));
    }
    if let Some(learned) = &outcome.learned {
        say(&visible(learned.trim_end()));
    }
    for warning in &outcome.warnings {
        say(&format!("bulkhead: warning: {}", visible(warning)));
    }
}

/// What was refused, so that it does not look like something else's fault; and which
/// exceptions were used.
fn network(traffic: &Summary) -> String {
    const MOST: usize = 5;
    let one = |(to, refused): (&String, &Refused)| {
        format!("{to} ({}, {})", refused.code.as_str(), refused.rule)
    };
    let told: Vec<_> = traffic.refused.iter().take(MOST).map(one).collect();
    let more = match traffic.refused.len() > MOST {
        true => " and others",
        false => "",
    };
    let colon = if told.is_empty() { "" } else { ": " };
    format!(
        "bulkhead: network: {}{colon}{}{more}",
        traffic.line(),
        told.join(", ")
    )
}

/// Shows on a terminal what is being waited for, and gives the terminal to the
/// command for as long as it runs: until then Ctrl-C is Bulkhead's.
fn progress(terminal: bool, quiet: bool) -> Box<dyn FnMut(Progress) + Send> {
    let show = !quiet && std::io::stderr().is_terminal();
    let mut line = ProgressLine {
        enabled: show,
        shown: false,
    };
    let mut raw: Option<RawMode> = None;
    Box::new(move |progress| {
        match progress {
            Progress::Starting => line.show("bulkhead: starting a machine"),
            Progress::Sending => line.show("bulkhead: sending the workspace"),
            Progress::Running => line.show(""),
            Progress::Fetching => {}
        }
        drop(raw.take());
        if terminal && progress == Progress::Running {
            raw = RawMode::enter();
        }
    })
}

/// A line on the terminal that others replace; gone when dropped.
struct ProgressLine {
    enabled: bool,
    shown: bool,
}

impl ProgressLine {
    fn show(&mut self, text: &str) {
        if self.enabled {
            eprint!("\r{text}\x1b[K");
            self.shown = !text.is_empty();
        }
    }
}

impl Drop for ProgressLine {
    fn drop(&mut self) {
        // Where the command has the terminal, nothing may be wiped away.
        if self.shown {
            self.show("");
        }
    }
}

/// The user's signals, for as long as the program runs.
pub(super) fn signals() -> Result<mpsc::Receiver<Signal>, RunError> {
    let (sender, signals) = mpsc::channel(64);
    watch_signals(&sender).map_err(|source| RunError::Output {
        place: "signals".into(),
        source,
    })?;
    Ok(signals)
}

/// Passes signals on to the command for as long as the program runs.
fn watch_signals(sender: &mpsc::Sender<Signal>) -> std::io::Result<()> {
    for number in FORWARDED {
        let mut stream = signal(SignalKind::from_raw(number))?;
        let sender = sender.clone();
        tokio::spawn(async move {
            while stream.recv().await.is_some() && sender.send(Signal::Send(number)).await.is_ok() {
            }
        });
    }
    let mut stream = signal(SignalKind::window_change())?;
    let sender = sender.clone();
    tokio::spawn(async move {
        while stream.recv().await.is_some()
            && sender.send(Signal::Resize(terminal::size())).await.is_ok()
        {}
    });
    Ok(())
}
