//! One run, from spec to outcome.

use std::io;
use std::time::{Duration, Instant};

use bulkhead_agent::{Configure, Control, Exec, Exit, FailureKind, Request, Size};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

use super::capture::Capture;
use super::control;
use super::exchange::{Exchange, joined};
use super::host::Host;
use super::machine::Machine;
use super::outcome::{Outcome, Resources, TIMED_OUT, Times};
use super::share;
use super::{MachineError, RunError};
use crate::error::Report;
use crate::guest::{GuestError, Input, Output, Stream};
use crate::image::Image;
use crate::plan::Channel;
use crate::spec::{Accel, ChannelKind, Spec, fill_random};

/// How long short requests to the agent may take.
pub(super) const ANSWER: Duration = Duration::from_secs(30);
/// How long a killed command may take to end before the machine is killed.
const KILL_GRACE: Duration = Duration::from_secs(2);

/// A wish of the user while the command runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// Send this signal to the command.
    Send(i32),
    /// The terminal has this size now.
    Resize(Size),
}

/// Where a run has got to, for people who wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// The machine is being started.
    Starting,
    /// The workspace is being sent.
    Sending,
    /// The command runs.
    Running,
    /// Results are being fetched.
    Fetching,
}

/// What a run is connected to.
pub struct Io {
    /// The command's input; /dev/null when absent.
    pub stdin: Option<Box<dyn AsyncRead + Send + Unpin>>,
    /// Where its output goes; collected for the outcome when absent.
    pub stdout: Option<Box<dyn AsyncWrite + Send + Unpin>>,
    /// Where its error output goes; collected when absent.
    pub stderr: Option<Box<dyn AsyncWrite + Send + Unpin>>,
    /// Where collected output goes when it is long: `<id>.stdout`, `<id>.stderr`.
    pub spill: std::path::PathBuf,
    /// Wishes of the user.
    pub signals: mpsc::Receiver<Signal>,
    /// Size of the terminal, where the spec asks for one.
    pub size: Size,
    /// Told where the run has got to.
    pub progress: Box<dyn FnMut(Progress) + Send>,
}

impl Io {
    /// No input, output collected for the outcome, nobody to interrupt.
    pub fn collecting(spill: std::path::PathBuf) -> Self {
        Self {
            stdin: None,
            stdout: None,
            stderr: None,
            spill,
            signals: mpsc::channel(1).1,
            size: Size { rows: 24, cols: 80 },
            progress: Box::new(|_| {}),
        }
    }
}

/// Runs the command of `spec` in a machine of its own and removes the machine.
///
/// # Errors
/// Everything but the command's own failure, which is in the outcome. Nothing
/// is left behind either way.
pub async fn run(host: &Host, spec: &Spec, io: Io) -> Result<Outcome, RunError> {
    let begin = Instant::now();
    let mut io = io;
    let exchange = Exchange::prepare(&spec.workspace)?;
    // With its directories as they were found, for the record.
    let spec = &Spec {
        workspace: exchange.workspace().clone(),
        ..spec.clone()
    };
    let shared = exchange.dir().cloned();
    let (image, mut machine) = start(host, spec, &mut io).await?;
    let done = Session {
        host,
        spec,
        machine: &mut machine,
        exchange,
    }
    .run(io)
    .await;
    let usage = machine.process().usage();
    let channel = match machine.plan().channel {
        Channel::Serial => ChannelKind::Serial,
        Channel::Vsock => ChannelKind::Vsock,
    };
    let phases = machine.phases();
    // A share's last writes are the guest's to flush; all else goes with it.
    let share = machine.plan().share.clone();
    let removed = if share.is_some() {
        machine.stop(Duration::from_secs(10)).await
    } else {
        machine.kill().await
    };
    let settled = match share.filter(|share| !share.read_only).and(shared) {
        Some(dir) => {
            let settle = tokio::task::spawn_blocking(move || share::settle(&dir));
            joined(settle.await)
        }
        None => Ok(share::Settled::default()),
    };
    let mut done = done?;
    match settled {
        Ok(settled) => done.warnings.extend(settled.warnings),
        Err(error) => done
            .warnings
            .push(format!("the shared workspace keeps QEMU's owners: {error}")),
    }
    for error in removed.err().into_iter().flatten() {
        done.warnings.push(format!(
            "left behind, `bulkhead gc` will try again: {error}"
        ));
    }
    let (vmm_rss_kib, vmm_cpu_ms) = usage.unwrap_or_default();
    let total_us = micros(begin);
    Ok(Outcome {
        id: spec.id.clone(),
        image: image.id,
        profile: spec.profile,
        accel: spec.accel,
        hardware_isolation: spec.accel == Accel::Kvm,
        machine: spec.machine,
        channel,
        network: spec.network,
        exit_code: done.exit_code,
        signal: done.exit.signal,
        timed_out: done.timed_out,
        refused: done.refused,
        stdout: done.stdout,
        stderr: done.stderr,
        changes: done.changes,
        artifacts: done.artifacts,
        resources: Resources {
            command_cpu_us: done.exit.cpu_us,
            command_rss_kib: done.exit.max_rss_kib,
            vmm_cpu_ms,
            vmm_rss_kib,
        },
        times: Times {
            start: phases,
            command_us: done.command_us,
            total_us,
        },
        warnings: done.warnings,
    })
}

/// Starts a machine, unless the user changes their mind meanwhile.
pub(super) async fn start(
    host: &Host,
    spec: &Spec,
    io: &mut Io,
) -> Result<(Image, Machine), RunError> {
    (io.progress)(Progress::Starting);
    tokio::select! {
        started = host.start(spec) => started,
        signal = interruption(&mut io.signals) => Err(RunError::Interrupted { signal }),
    }
}

fn micros(begin: Instant) -> u64 {
    u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX)
}

/// Waits for a signal that means "stop" while nothing runs yet.
async fn interruption(signals: &mut mpsc::Receiver<Signal>) -> i32 {
    use nix::libc::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
    loop {
        match signals.recv().await {
            Some(Signal::Send(signal @ (SIGHUP | SIGINT | SIGQUIT | SIGTERM))) => return signal,
            Some(_) => {}
            None => std::future::pending().await,
        }
    }
}

/// What a session gives.
#[derive(Default)]
pub(super) struct Done {
    exit: Exit,
    pub(super) exit_code: i32,
    pub(super) timed_out: bool,
    refused: Option<Report>,
    stdout: Option<super::outcome::Captured>,
    stderr: Option<super::outcome::Captured>,
    changes: Option<super::outcome::Changes>,
    artifacts: Option<Vec<String>>,
    command_us: u64,
    warnings: Vec<String>,
}

/// One command in one machine.
pub(super) struct Session<'a> {
    pub(super) host: &'a Host,
    pub(super) spec: &'a Spec,
    pub(super) machine: &'a mut Machine,
    pub(super) exchange: Exchange,
}

impl Session<'_> {
    pub(super) async fn run(mut self, mut io: Io) -> Result<Done, RunError> {
        let _control = control::serve(&self.host.dirs, self.spec, self.machine).await?;
        match self.steps(&mut io).await {
            // The channel breaks when the machine ends; the machine knows why.
            Err(RunError::Machine(MachineError::Guest(error))) if is_loss(&error) => {
                let wait =
                    tokio::time::timeout(Duration::from_millis(500), self.machine.process().wait());
                let _ = wait.await;
                Err(self
                    .machine
                    .end_reason()
                    .await
                    .unwrap_or(error.into())
                    .into())
            }
            result => result,
        }
    }

    async fn steps(&mut self, io: &mut Io) -> Result<Done, RunError> {
        let channel = self.machine.channel().clone();
        let identity = Request::Configure(identity(self.spec));
        channel.ask("take its identity", &identity, ANSWER).await?;
        (io.progress)(Progress::Sending);
        let mut warnings = self.exchange.send(&channel, self.spec).await?;
        (io.progress)(Progress::Running);
        let begin = Instant::now();
        let mut done = self.command(io).await?;
        done.command_us = micros(begin);
        (io.progress)(Progress::Fetching);
        self.exchange
            .fetch(&channel, self.machine.dir(), &mut warnings)
            .await
            .map(|fetched| {
                done.changes = fetched.changes;
                done.artifacts = fetched.artifacts;
            })?;
        warnings.append(&mut done.warnings);
        done.warnings = warnings;
        Ok(done)
    }

    async fn command(&self, io: &mut Io) -> Result<Done, RunError> {
        let exec = self.exec(io);
        let what = format!("run {}", exec.argv.first().map_or("", String::as_str));
        let mut stream = self.machine.channel().open(&Request::Exec(exec)).await?;
        let mut done = Done::default();
        match tokio::time::timeout(ANSWER, stream.started(&what)).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return refusal(error, done),
            Err(_) => {
                return Err(GuestError::Timeout {
                    what,
                    after: ANSWER,
                }
                .into());
            }
        }
        let pump = io
            .stdin
            .take()
            .map(|stdin| tokio::spawn(pump(stdin, stream.input())));
        let mut sinks = [
            Sink::new(io.stdout.take(), "stdout", io, self.spec),
            Sink::new(io.stderr.take(), "stderr", io, self.spec),
        ];
        let limit = self.spec.limits.timeout.0;
        let result = drive(&mut stream, &mut sinks, &mut io.signals, limit).await;
        if let Some(pump) = pump {
            pump.abort();
        }
        let (exit, timed_out) = result?;
        done.exit_code = match (timed_out, exit.code, exit.signal) {
            (true, ..) => TIMED_OUT,
            (_, Some(code), _) => code & 0xff,
            (.., Some(signal)) => 128 + (signal & 0x7f),
            _ => super::outcome::FAILED,
        };
        done.exit = exit;
        done.timed_out = timed_out;
        let [stdout, stderr] = sinks;
        done.stdout = stdout.finish().await?;
        done.stderr = stderr.finish().await?;
        Ok(done)
    }

    fn exec(&self, io: &Io) -> Exec {
        let command = &self.spec.command;
        let mut argv = Vec::new();
        if let Some(script) = &command.script {
            argv.extend(script.interpreter.iter().cloned());
            argv.push(format!("{}/{}", super::exchange::INPUT, script.name));
        }
        argv.extend(command.argv.iter().cloned());
        Exec {
            argv,
            env: command.env.clone(),
            cwd: Some(
                command
                    .workdir
                    .clone()
                    .unwrap_or_else(|| super::exchange::WORK.into()),
            ),
            user: self.exchange.user(self.spec),
            terminal: command.terminal.then_some(io.size),
            stdin: io.stdin.is_some(),
        }
    }
}

/// Host name, machine id, clock and entropy of a machine of this spec.
fn identity(spec: &Spec) -> Configure {
    let hex = |bytes: &[u8]| {
        bytes
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>()
    };
    let (mut id, mut seed) = ([0; 16], [0; 64]);
    fill_random(&mut id);
    fill_random(&mut seed);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    Configure {
        hostname: Some(spec.id.to_string()),
        machine_id: Some(hex(&id)),
        unix_ns: now.ok().and_then(|now| u64::try_from(now.as_nanos()).ok()),
        seed: Some(hex(&seed)),
    }
}

/// Whether an error says that the other end is gone.
fn is_loss(error: &GuestError) -> bool {
    matches!(error, GuestError::Closed | GuestError::Io { .. })
}

/// A command that could not be run is an outcome, as in a shell; all else is an error.
fn refusal(error: GuestError, mut done: Done) -> Result<Done, RunError> {
    let GuestError::Refused { failure, .. } = &error else {
        return Err(error.into());
    };
    done.exit_code = match failure.kind {
        FailureKind::NotFound => 127,
        FailureKind::NotExecutable => 126,
        _ => return Err(error.into()),
    };
    done.refused = Some(Report::of(&error));
    Ok(done)
}

/// Carries the user's input to the command until either ends.
async fn pump(mut stdin: Box<dyn AsyncRead + Send + Unpin>, input: Input) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(count @ 1..) = stdin.read(&mut buffer).await {
        if !matches!(input.send(&buffer[..count]).await, Ok(true)) {
            return;
        }
    }
    let _ = input.end().await;
}

/// Follows a command to its end: `true` when the time limit ended it.
async fn drive(
    stream: &mut Stream,
    sinks: &mut [Sink; 2],
    signals: &mut mpsc::Receiver<Signal>,
    limit: Duration,
) -> Result<(Exit, bool), RunError> {
    let deadline = tokio::time::sleep(limit);
    tokio::pin!(deadline);
    let mut timed_out = false;
    loop {
        tokio::select! {
            output = stream.next() => match output? {
                Output::Exit(exit) => return Ok((exit, timed_out)),
                Output::Out(bytes) => sinks[0].write(&bytes, stream).await?,
                Output::Err(bytes) => sinks[1].write(&bytes, stream).await?,
            },
            Some(signal) = signals.recv() => {
                let control = match signal {
                    Signal::Send(signal) => Control::Signal { signal },
                    Signal::Resize(size) => Control::Resize(size),
                };
                stream.control(&control).await?;
            }
            () = &mut deadline => {
                if timed_out {
                    // It does not even end when killed: the machine goes with it.
                    return Ok((Exit::default(), true));
                }
                timed_out = true;
                stream.control(&Control::Kill).await?;
                deadline.as_mut().reset(tokio::time::Instant::now() + KILL_GRACE);
            }
        }
    }
}

/// Where one kind of output goes.
enum Sink {
    Pass {
        to: Box<dyn AsyncWrite + Send + Unpin>,
        name: &'static str,
    },
    Collect(Capture),
    /// Nobody reads it any more.
    Closed,
}

impl Sink {
    fn new(
        to: Option<Box<dyn AsyncWrite + Send + Unpin>>,
        name: &'static str,
        io: &Io,
        spec: &Spec,
    ) -> Self {
        match to {
            Some(to) => Self::Pass { to, name },
            None => Self::Collect(Capture::new(io.spill.join(format!("{}.{name}", spec.id)))),
        }
    }

    async fn write(&mut self, bytes: &[u8], stream: &Stream) -> Result<(), RunError> {
        match self {
            Self::Pass { to, name } => {
                let written = async {
                    to.write_all(bytes).await?;
                    to.flush().await
                };
                match written.await {
                    // As with any program in a pipe whose reader went away.
                    Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                        *self = Self::Closed;
                        let signal = nix::libc::SIGPIPE;
                        Ok(stream.control(&Control::Signal { signal }).await?)
                    }
                    other => {
                        let place = (*name).to_owned();
                        other.map_err(|source| RunError::Output { place, source })
                    }
                }
            }
            Self::Collect(capture) => capture.push(bytes).map_err(|source| RunError::Output {
                place: capture.path().display().to_string(),
                source,
            }),
            Self::Closed => Ok(()),
        }
    }

    async fn finish(self) -> Result<Option<super::outcome::Captured>, RunError> {
        Ok(match self {
            Self::Collect(capture) => Some(capture.finish()),
            Self::Pass { .. } | Self::Closed => None,
        })
    }
}
