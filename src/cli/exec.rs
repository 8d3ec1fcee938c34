//! `bulkhead exec` and `bulkhead attach`.

use bulkhead_agent::Exec;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::oneshot;

use super::Global;
use super::machine_args::variable;
use super::message::{Failure, print_json, print_report, print_text, say};
use super::output::DetachedExec;
use super::run::signals;
use super::terminal::{self, RawMode};
use crate::run::{Captured, Commanded, Io};
use crate::spec::{Timeout, VmId};
use crate::supervise::{ExecId, ExecRequest, Machines, SuperviseError};

/// Ctrl-] leaves, as in telnet and virsh.
const LEAVE: u8 = 0x1d;

/// Options of `bulkhead exec`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Run on a terminal.
    #[arg(long, short)]
    tty: bool,
    /// Print the command's name in the machine and leave it alone: see
    /// `bulkhead logs` and `bulkhead attach`.
    #[arg(long, short)]
    detach: bool,
    /// How long it may run, fixed when it starts [default: without end].
    #[arg(long, value_name = "TIME")]
    timeout: Option<Timeout>,
    /// Set NAME=VALUE in its environment, or pass NAME on.
    #[arg(long, short, value_name = "NAME[=VALUE]", value_parser = variable)]
    env: Vec<(String, String)>,
    /// Its working directory [default: /workspace/work].
    #[arg(long, value_name = "DIR")]
    workdir: Option<String>,
    /// User in the guest: a name, a number, or root [default: agent].
    #[arg(long, short)]
    user: Option<String>,
    /// Name of a running machine.
    vm: VmId,
    /// Program and arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// Options of `bulkhead attach`.
#[derive(Debug, clap::Args)]
pub(super) struct Attach {
    /// Name of a running machine.
    vm: VmId,
    /// The command: main, e1, e2 and so on.
    #[arg(default_value = "main")]
    exec: ExecId,
}

/// What came of a command in a machine.
#[derive(Debug, serde::Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ExecOutcome {
    /// Its exit code as a shell has it; 124 after its time limit.
    exit_code: i32,
    /// The signal that ended it.
    signal: Option<i32>,
    /// The time limit ended it.
    timed_out: bool,
    /// Why it could not be run.
    refused: Option<crate::error::Report>,
    /// What it wrote to stdout.
    stdout: Option<Captured>,
    /// What it wrote to stderr.
    stderr: Option<Captured>,
}

/// Runs a command in a running machine and gives its exit code.
pub(super) async fn run(args: Args, global: &Global) -> Result<i32, Failure> {
    let machines = Machines::new(global.host()?);
    let client = machines.running(&args.vm).await?;
    let input = !args.detach && terminal::has_input();
    let exec = Exec {
        argv: args.command,
        env: args.env,
        cwd: Some(args.workdir.unwrap_or_else(|| "/workspace/work".into())),
        user: args.user,
        terminal: args.tty.then(terminal::size),
        stdin: input,
    };
    let request = ExecRequest {
        exec,
        timeout: args.timeout,
    };
    if args.detach {
        let id = client.detach(request).await?;
        match global.json {
            true => print_json(&DetachedExec { exec: id }),
            false => print_text(&format!("{id}\n")),
        }
        return Ok(0);
    }
    let mut io = io(global, input.then(|| Box::new(tokio::io::stdin()) as _))?;
    let raw = args.tty.then(RawMode::enter).flatten();
    let done = client.exec(request, &mut io).await;
    // The terminal is the user's again.
    drop((io, raw));
    Ok(report(done?, global.json))
}

/// Follows a running command, and writes to it, until it ends or Ctrl-] is
/// pressed.
pub(super) async fn attach(args: Attach, global: &Global) -> Result<i32, Failure> {
    let machines = Machines::new(global.host()?);
    let client = machines.running(&args.vm).await?;
    let raw = RawMode::enter();
    let (leave, left) = oneshot::channel();
    let stdin: Option<Box<dyn AsyncRead + Send + Unpin>> = match &raw {
        Some(_) => {
            say("Attached; Ctrl-] leaves the command alone.\r");
            Some(until_left(leave)?)
        }
        // A pipe is for those who mean it; its end leaves nothing.
        None => {
            std::mem::forget(leave);
            terminal::has_input().then(|| Box::new(tokio::io::stdin()) as _)
        }
    };
    let mut io = io(global, stdin)?;
    let done = tokio::select! {
        done = client.attach(args.exec, &mut io) => done,
        _ = left => {
            drop(raw);
            say("\nleft");
            return Ok(0);
        }
    };
    drop((io, raw));
    if let Err(SuperviseError::ExecEnded { .. }) = &done {
        // One that never was is no command that has ended.
        machines.exec(&args.vm, args.exec)?;
    }
    Ok(report(done?, global.json))
}

/// The terminal's input up to Ctrl-], which is told.
fn until_left(leave: oneshot::Sender<()>) -> Result<Box<dyn AsyncRead + Send + Unpin>, Failure> {
    let (ours, mut theirs) = tokio::io::duplex(4096);
    tokio::spawn(async move {
        use tokio::io::AsyncWriteExt;
        let mut stdin = tokio::io::stdin();
        let mut buffer = vec![0; 4096];
        while let Ok(count @ 1..) = stdin.read(&mut buffer).await {
            let bytes = &buffer[..count];
            let end = bytes.iter().position(|byte| *byte == LEAVE);
            if theirs
                .write_all(&bytes[..end.unwrap_or(count)])
                .await
                .is_err()
            {
                return;
            }
            if end.is_some() {
                let _ = leave.send(());
                return;
            }
        }
        // The end of the terminal is not the end of the command.
        std::future::pending::<()>().await;
    });
    Ok(Box::new(ours))
}

fn io(global: &Global, stdin: Option<Box<dyn AsyncRead + Send + Unpin>>) -> Result<Io, Failure> {
    let collect = global.json;
    Ok(Io {
        stdin,
        stdout: (!collect).then(|| Box::new(tokio::io::stdout()) as _),
        stderr: (!collect).then(|| Box::new(tokio::io::stderr()) as _),
        signals: signals()?,
        size: terminal::size(),
        ..Io::collecting(global.settings()?.dirs.state.join("output"))
    })
}

fn report(done: Commanded, json: bool) -> i32 {
    if json {
        print_json(&ExecOutcome {
            exit_code: done.exit_code,
            signal: done.exit.signal,
            timed_out: done.timed_out,
            refused: done.refused,
            stdout: done.stdout,
            stderr: done.stderr,
        });
        return done.exit_code;
    }
    if let Some(refused) = &done.refused {
        print_report(refused, false);
    }
    if done.timed_out {
        say("bulkhead: the command was ended by its time limit");
    }
    done.exit_code
}
