//! `bulkhead logs`.

use std::io::{self, Write};
use std::time::Duration;

use super::Global;
use super::console_log;
use super::message::{Failure, print_json};
use super::table::{Table, age};
use crate::spec::VmId;
use crate::supervise::{Entry, ExecId, ExecLog, Machines, SuperviseError};

/// How often a log that is followed is looked at.
pub(super) const LOOK: Duration = Duration::from_millis(200);

/// Options.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Name of a machine.
    vm: VmId,
    /// The command: main, e1, e2 and so on [default: main, or the last].
    exec: Option<ExecId>,
    /// List the commands that have logs.
    #[arg(long, conflicts_with_all = ["exec", "console", "follow"])]
    list: bool,
    /// The serial console instead: what the kernel said.
    #[arg(long, conflicts_with = "exec")]
    console: bool,
    /// Go on with what comes, until the command ends; with --console, until the machine does.
    #[arg(long, short)]
    follow: bool,
    /// Begin each line with its time.
    #[arg(long, short, conflicts_with = "console")]
    timestamps: bool,
}

/// Prints what a command wrote: its stdout to stdout, its stderr to stderr.
pub(super) async fn run(args: Args, global: &Global) -> Result<i32, Failure> {
    let machines = Machines::new(global.host()?);
    // A name nobody has is no empty log.
    let view = machines.look(&args.vm).await?;
    let execs = machines.execs(&args.vm);
    if args.list {
        if global.json {
            print_json(&execs);
            return Ok(0);
        }
        let mut table = Table::new(&["EXEC", "STARTED", "EXIT", "COMMAND"]);
        for exec in &execs {
            let code = exec.ended.as_ref().map(|end| end.exit_code.to_string());
            table.row(&[
                exec.id.to_string(),
                age(exec.started_ms),
                code.unwrap_or_else(|| "-".into()),
                exec.argv.join(" "),
            ]);
        }
        table.print();
        return Ok(0);
    }
    if args.console {
        return console_log::run(&machines, &view, args.follow).await;
    }
    let has_main = execs.iter().any(|exec| exec.id == ExecId::MAIN);
    let last = || match has_main {
        true => Some(ExecId::MAIN),
        false => execs.last().map(|exec| exec.id),
    };
    let exec = args.exec.or_else(last).unwrap_or(ExecId::MAIN);
    machines.exec(&args.vm, exec)?;
    let mut printer = Printer {
        times: args.timestamps,
        open: [false; 2],
    };
    let dir = machines.logs(&args.vm);
    if !args.follow {
        let mut left = false;
        let read = ExecLog::read(&dir, exec, |time, entry| {
            // A reader that went away, as in `| head`, is no failure.
            left = left || printer.print(time, &entry).is_err();
            Ok(())
        });
        read.map_err(SuperviseError::from)?;
        return Ok(0);
    }
    let mut tail = ExecLog::tail(&dir, exec).map_err(SuperviseError::from)?;
    loop {
        match tail.next() {
            Ok(Some((time, entry))) => {
                if printer.print(time, &entry).is_err() || matches!(entry, Entry::End(_)) {
                    return Ok(0);
                }
            }
            Ok(None) if machines.look(&args.vm).await?.state.is_live() => {
                tokio::time::sleep(LOOK).await;
            }
            _ => return Ok(0),
        }
    }
}

/// Prints entries of a log.
struct Printer {
    times: bool,
    /// Whether the last line of stdout, or of stderr, has no end yet.
    open: [bool; 2],
}

impl Printer {
    fn print(&mut self, time: u64, entry: &Entry) -> io::Result<()> {
        let (at, bytes): (usize, &[u8]) = match entry {
            Entry::Out(bytes) => (0, bytes),
            Entry::Err(bytes) => (1, bytes),
            Entry::Start(_) | Entry::End(_) => return Ok(()),
        };
        let bytes = match self.times {
            true => self.with_times(at, time, bytes),
            false => bytes.to_owned(),
        };
        let write = |to: &mut dyn Write| {
            to.write_all(&bytes)?;
            to.flush()
        };
        match at {
            0 => write(&mut io::stdout().lock()),
            _ => write(&mut io::stderr().lock()),
        }
    }

    fn with_times(&mut self, at: usize, time: u64, bytes: &[u8]) -> Vec<u8> {
        let stamp = super::table::clock(time);
        let mut text = Vec::with_capacity(bytes.len() + 32);
        for line in bytes.split_inclusive(|byte| *byte == b'\n') {
            if !self.open[at] {
                text.extend_from_slice(stamp.as_bytes());
                text.push(b' ');
            }
            text.extend_from_slice(line);
            self.open[at] = line.last() != Some(&b'\n');
        }
        text
    }
}
