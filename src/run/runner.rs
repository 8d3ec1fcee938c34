//! One run, from spec to outcome.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use bulkhead_agent::{Configure, Exec, Request, Size};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;

use super::command::{Commanded, command};
use super::control;
use super::disk::failed;
use super::exchange::Exchange;
use super::follow::KILL_GRACE;
use super::host::Host;
use super::machine::Machine;
use super::outcome::{FAILED, Outcome, Resources, Times};
use super::publish;
use super::share;
use super::transfer::joined;
use super::{MachineError, RunError};
use crate::error::Report;
use crate::guest::GuestError;
use crate::guest::archive::HostDir;
use crate::image::Image;
use crate::plan::Channel;
use crate::spec::{Accel, Bytes, ChannelKind, Publish, Spec, fill_random};

/// How long short requests to the agent may take.
pub(super) const ANSWER: Duration = Duration::from_secs(30);

/// How long the console may be behind the channel.
const TOLD: Duration = Duration::from_millis(300);
/// Exit code of a command that was ended by `SIGKILL`, or a shell's whose was.
const KILLED: i32 = 128 + nix::libc::SIGKILL;

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
    /// How much of each is collected; a command that writes more is ended, for
    /// the disk is not its own.
    pub most: Bytes,
    /// Wishes of the user.
    pub signals: mpsc::Receiver<Signal>,
    /// Size of the terminal, where the spec asks for one.
    pub size: Size,
    /// Told where the run has got to.
    pub progress: Box<dyn FnMut(Progress) + Send>,
}

impl Io {
    /// How much output is collected unless somebody wants it otherwise.
    pub const MOST: Bytes = Bytes::gib(4);

    /// No input, output collected for the outcome, nobody to interrupt.
    pub fn collecting(spill: std::path::PathBuf) -> Self {
        Self {
            stdin: None,
            stdout: None,
            stderr: None,
            spill,
            most: Self::MOST,
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
    let published = publish::bind(&spec.publish)?;
    let (image, mut machine) = start(host, spec, exchange.dir(), &mut io).await?;
    let done = Session {
        host,
        spec,
        machine: &mut machine,
        exchange,
        published,
    }
    .run(&mut io)
    .await;
    // The terminal is the user's again.
    drop(io);
    let usage = machine.process().usage();
    let stalls = machine.disk().stalls();
    let channel = match machine.plan().channel {
        Channel::Serial => ChannelKind::Serial,
        Channel::Vsock => ChannelKind::Vsock,
    };
    let phases = machine.phases();
    let template = machine.template().map(str::to_owned);
    let layers = machine.proof().to_vec();
    let traffic = machine.traffic();
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
    done.warnings.extend(stalls);
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
        template,
        profile: spec.profile.clone(),
        accel: spec.accel,
        hardware_isolation: spec.accel == Accel::Kvm,
        machine: spec.machine,
        channel,
        network: spec.network.mode,
        exit_code: match done.failed {
            Some(_) => FAILED,
            None => done.command.exit_code,
        },
        failed: done.failed,
        signal: done.command.exit.signal,
        timed_out: done.command.timed_out,
        refused: done.command.refused,
        stdout: done.command.stdout,
        stderr: done.command.stderr,
        changes: done.changes,
        artifacts: done.artifacts,
        layers,
        learned: traffic
            .as_ref()
            .filter(|_| spec.learn)
            .map(|traffic| traffic.learned().to_toml()),
        traffic: traffic.map(|traffic| traffic.summary()),
        resources: Resources {
            command_cpu_us: done.command.exit.cpu_us,
            command_rss_kib: done.command.exit.max_rss_kib,
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
    share: Option<&HostDir>,
    io: &mut Io,
) -> Result<(Image, Machine), RunError> {
    (io.progress)(Progress::Starting);
    let started = unless_interrupted(&mut io.signals, host.start_with(spec, share)).await;
    if matches!(started, Err(RunError::Interrupted { .. })) {
        // The start was dropped halfway, and with it the machine; what it had
        // written down is cleared away like that of any dead run.
        if let Err(error) = super::recover(&host.dirs, false) {
            tracing::warn!("{error}");
        }
    }
    started
}

fn micros(begin: Instant) -> u64 {
    u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX)
}

/// Waits for a signal that means "stop" while no command runs.
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

/// Wishes of the user.
pub(super) type Signals = mpsc::Receiver<Signal>;

/// Does `work` unless the user ends it.
pub(super) async fn unless_interrupted<T>(
    signals: &mut Signals,
    work: impl Future<Output = Result<T, RunError>>,
) -> Result<T, RunError> {
    tokio::select! {
        done = work => done,
        signal = interruption(signals) => Err(RunError::Interrupted { signal }),
    }
}

/// What a session gives.
#[derive(Default)]
pub(super) struct Done {
    pub(super) command: Commanded,
    failed: Option<Report>,
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
    /// Ports that are listened at, to be led to the guest.
    pub(super) published: Vec<(Publish, TcpListener)>,
}

impl Session<'_> {
    pub(super) async fn run(mut self, io: &mut Io) -> Result<Done, RunError> {
        let _control = control::serve(&self.host.dirs, self.spec, self.machine).await?;
        let disk = self.machine.disk().state();
        let unfiltered = self.machine.unfiltered();
        let done = tokio::select! {
            done = self.steps(io) => done,
            // A disk that is full may be waited for, as long as the time limit
            // allows; one that fails may not.
            state = failed(disk) => Err(MachineError::DiskFailed(state).into()),
            error = unfiltered => Err(error.into()),
        };
        match done {
            // The channel breaks when the machine ends; the machine knows why.
            Err(RunError::Machine(MachineError::Guest(error))) if is_loss(&error) => {
                let wait =
                    tokio::time::timeout(Duration::from_secs(5), self.machine.process().wait());
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
        // A clone has its own already.
        if self.machine.template().is_none() {
            let identity = Request::Configure(identity(self.spec));
            channel.ask("take its identity", &identity, ANSWER).await?;
        }
        let published = std::mem::take(&mut self.published);
        let _published = publish::serve(published, &channel)?;
        (io.progress)(Progress::Sending);
        let send = self.exchange.send(&channel, self.spec);
        let mut warnings = unless_interrupted(&mut io.signals, send).await?;
        (io.progress)(Progress::Running);
        let begin = Instant::now();
        let mut done = Done {
            command: self.command(io).await?,
            command_us: micros(begin),
            ..Done::default()
        };
        (io.progress)(Progress::Fetching);
        let fetch = async {
            if done.command.stuck {
                let what = "send anything after the time limit".into();
                return Err(GuestError::Timeout {
                    what,
                    after: KILL_GRACE,
                }
                .into());
            }
            let (dir, kept) = (self.machine.dir(), self.host.dirs.kept(&self.spec.id));
            let signals = &mut io.signals;
            let fetch = self
                .exchange
                .fetch(&channel, dir, &kept, signals, &mut warnings);
            fetch.await
        };
        match fetch.await {
            Ok(fetched) => {
                done.changes = fetched.changes;
                done.artifacts = fetched.artifacts;
                done.failed = fetched.failed;
            }
            // That it ran out of time is what the user has to know.
            Err(RunError::Machine(MachineError::Guest(error))) if done.command.timed_out => {
                if self.exchange.wants_something() {
                    warnings.push(format!("nothing was brought back: {error}"));
                }
            }
            Err(error) => return Err(error),
        }
        if done.command.exit_code == KILLED && self.out_of_memory().await {
            warnings.push(format!(
                "the guest ran out of memory ({}) and killed its largest process: give it more \
                 with --memory",
                self.spec.limits.memory
            ));
        }
        done.warnings = warnings;
        Ok(done)
    }

    /// Whether the guest's kernel or agent says so, in the same words.
    async fn out_of_memory(&self) -> bool {
        let console = self.machine.console();
        console.says("Out of memory: Killed", TOLD).await
    }

    async fn command(&self, io: &mut Io) -> Result<Commanded, RunError> {
        let exec = self.exec(io);
        let what = format!("run {}", exec.argv.first().map_or("", String::as_str));
        let stream = self.machine.channel().open(&Request::Exec(exec)).await?;
        let limit = self.spec.limits.timeout.0;
        command(stream, what, io, self.spec.id.as_str(), Some(limit)).await
    }

    fn exec(&self, io: &Io) -> Exec {
        let command = &self.spec.command;
        Exec {
            argv: super::exchange::argv(command),
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
pub(super) fn identity(spec: &Spec) -> Configure {
    fresh(&Configure {
        hostname: Some(spec.id.to_string()),
        machine_id: Some(random_hex::<16>()),
        ..Configure::default()
    })
}

/// `identity` with the time that it is now, and entropy that nobody else gets.
pub(super) fn fresh(identity: &Configure) -> Configure {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    Configure {
        unix_ns: now.ok().and_then(|now| u64::try_from(now.as_nanos()).ok()),
        seed: Some(random_hex::<64>()),
        ..identity.clone()
    }
}

pub(super) fn random_hex<const BYTES: usize>() -> String {
    let mut bytes = [0; BYTES];
    fill_random(&mut bytes);
    bytes.map(|byte| format!("{byte:02x}")).concat()
}

/// Whether an error says that the other end is gone.
fn is_loss(error: &GuestError) -> bool {
    matches!(error, GuestError::Closed | GuestError::Io { .. })
}
