//! The life of one machine, from its start to its end, as its supervisor sees it.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_agent::Size;
use tokio::sync::{Notify, mpsc};

use super::end::{End, Next, with_leaks};
use super::error::SuperviseError;
use super::execs::Execs;
use super::idle::Idle;
use super::view::Live;
use super::waiting::Waiting;
use super::wire::{Answer, Ask, ExecRequest};
use super::{tune, watch};
use crate::error::Report;
use crate::host::fault;
use crate::host::lease::Lease;
use crate::qmp::Monitor;
use crate::run::detached::{self, Detached};
use crate::run::{
    Asked, Desk, Ended, Host, Machine, Owner, Record, RecordError, State, StateFile, is_keeping,
    is_served, listen, now_ms,
};
use crate::spec::{Spec, VmId};

/// How long what a save began may take after the end of its machine.
const KEEP: Duration = Duration::from_secs(60);
/// How long QEMU may take for what it does at once.
const QMP: Duration = Duration::from_secs(5);
/// Size of a terminal nobody looks at yet.
const NO_TERMINAL: Size = Size { rows: 24, cols: 80 };

/// How a machine comes to its supervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// It does not run: boot it.
    Boot,
    /// It runs, and its supervisor died: take it over.
    TakeOver,
}

/// Supervises the machine `id` from its start to its end. `ready` is called
/// when it is up; `stop` asks for its end. The calling thread must live as long
/// as this: the VMM may be tied to it.
///
/// # Errors
/// It could not be started: its state says so too. After `ready` only what
/// keeps the state on disk from being true.
pub async fn supervise(
    host: &Host,
    id: &VmId,
    start: Start,
    stop: mpsc::Receiver<()>,
    ready: impl FnOnce(),
) -> Result<(), SuperviseError> {
    let (mut record, spec, mut state) = Record::open(&host.dirs, id)?;
    if start == Start::TakeOver {
        // Nobody watches it: the lock was free.
        state.lose()?;
    }
    let found = state.status().clone();
    let fits = match start {
        Start::Boot => found.state.may_start(),
        Start::TakeOver => found.state == State::Lost && found.came_up(),
    };
    if !fits {
        return Err(SuperviseError::WrongState {
            id: id.clone(),
            state: found.state,
            reason: found.reason,
            what: match start {
                Start::Boot => "started",
                Start::TakeOver => "taken over",
            },
        });
    }
    if start == Start::TakeOver {
        in_reach(host, id, &record)?;
        if let Some(disk) = detached::standing_still(host, &record).await {
            let id = id.clone();
            return Err(SuperviseError::StandsStill { id, disk });
        }
    }
    if start == Start::Boot {
        // What an earlier life could not release.
        let left = record.release();
        if !left.is_empty() {
            return Err(leaked(id, left.iter().map(ToString::to_string)));
        }
        state.advance_with(State::Starting, "asked to start", |status| {
            status.supervisor = Some(Owner::current());
            status.started_ms = Some(now_ms());
            status.ended = None;
        })?;
    }
    let mut supervisor = Supervisor {
        host,
        spec,
        state,
        stop,
        waiting: Waiting::new(),
        saving: false,
    };
    let (record, end) = supervisor.life(record, start, ready).await;
    let finished = supervisor.finish(record, end).await;
    // A save's last part, which measures and publishes, is in a thread that would
    // end with this process, and would leave it half made.
    let begin = Instant::now();
    while is_keeping() && begin.elapsed() < KEEP {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    finished
}

fn leaked(id: &VmId, left: impl Iterator<Item = String>) -> SuperviseError {
    SuperviseError::Leaked {
        id: id.clone(),
        why: left.collect::<Vec<_>>().join("; "),
    }
}

/// Refuses a survivor whose sockets another `--runtime-dir` made: failing to
/// connect to it would end it.
fn in_reach(host: &Host, id: &VmId, record: &Record) -> Result<(), SuperviseError> {
    let looked = host.dirs.machine_sockets(id);
    let theirs = record.leases().iter().find_map(|lease| match lease {
        Lease::Dir { path } if path.file_name() == looked.file_name() => path.parent(),
        _ => None,
    });
    // The same directory may have two names.
    let real = |path: &Path| path.canonicalize().unwrap_or(path.to_owned());
    match theirs {
        Some(found) if real(found) != real(&host.dirs.runtime) => Err(SuperviseError::Elsewhere {
            id: id.clone(),
            found: found.to_owned(),
            looked: host.dirs.runtime.clone(),
        }),
        _ => Ok(()),
    }
}

pub(super) struct Supervisor<'a> {
    pub(super) host: &'a Host,
    pub(super) spec: Spec,
    pub(super) state: StateFile,
    pub(super) stop: mpsc::Receiver<()>,
    /// Answered when the machine has ended.
    pub(super) waiting: Waiting,
    /// It is being saved, and stands still for that.
    pub(super) saving: bool,
}

/// A machine that is up.
pub(super) struct Up {
    pub(super) detached: Detached,
    pub(super) execs: Arc<Execs>,
    pub(super) desk: Arc<Desk>,
}

/// When a machine is to end by itself.
pub(super) struct Clock {
    pub(super) idle: Idle,
    /// When its time is up.
    pub(super) deadline: Option<Instant>,
}

impl Up {
    pub(super) fn machine(&self) -> &Machine {
        &self.detached.machine
    }

    pub(super) fn monitor(&self) -> Monitor {
        self.machine().monitor().with_timeout(QMP)
    }
}

impl Supervisor<'_> {
    pub(super) fn id(&self) -> &VmId {
        &self.spec.id
    }

    /// What the guest knows its machine by.
    pub(super) fn machine_id(&self) -> String {
        machine_id(&self.spec.id, self.state.status().created_ms)
    }

    /// From the start to the end; the record comes back with its lock, the
    /// leases released as far as they could be.
    async fn life(
        &mut self,
        mut record: Record,
        start: Start,
        ready: impl FnOnce(),
    ) -> (Record, End) {
        let path = self.host.dirs.control_socket(self.id());
        let refused = |source| SuperviseError::Socket {
            path: path.clone(),
            source,
        };
        let mut socket = || {
            if is_served(&path) {
                return Err(refused(std::io::ErrorKind::AddrInUse.into()));
            }
            let lease = Lease::File { path: path.clone() };
            record.lease(lease).map_err(RecordError::from)?;
            listen(path.clone()).map_err(refused)
        };
        let (_listener, mut asked) = match socket() {
            Ok(socket) => socket,
            Err(error) => return clear(record, End::never(error)),
        };
        let (detached, stopped) = match self.bring_up(record, start, &mut asked).await {
            Ok(up) => up,
            Err((error, record)) => return clear(record, End::never(error)),
        };
        let mut clock = match self.up(start, detached.machine.template()) {
            Ok(clock) => clock,
            Err(error) => {
                let (record, left) = detached.end().await;
                return (record, with_leaks(End::never(error), left));
            }
        };
        let up = Self::open(detached);
        // What it may use is part of what was asked for.
        let tuned = match start {
            Start::Boot => tune::all(up.machine(), &self.spec.tuning).await,
            Start::TakeOver => {
                // Whoever died may have been changing it.
                if let Err(error) = tune::quota_again(up.machine(), &self.spec.tuning) {
                    tracing::warn!("{error}");
                }
                Ok(())
            }
        };
        if let Err(error) = tuned {
            let (record, left) = up.detached.end().await;
            return (record, with_leaks(End::never(error.into()), left));
        }
        // From here on it is the user's, and a failure is the machine's.
        let _ = fault::at("tell ready");
        ready();
        let next = match self.main(&up, start, stopped) {
            None => self.watch(&up, &mut clock, &mut asked).await,
            Some(end) => Next::Stop {
                grace: Some(Duration::ZERO),
                end,
            },
        };
        let end = match next {
            Next::Stop { grace, end } => self.power_off(&up, grace, end, &mut asked).await,
            Next::Gone(end) => end,
            Next::Stay => End::failed("its supervisor lost track of it"),
        };
        up.execs.machine_ends(&end.reason);
        let traffic = up.machine().traffic();
        let (record, left) = up.detached.end().await;
        up.execs.settled().await;
        let network = traffic.map(|traffic| traffic.summary().line());
        (record, with_leaks(End { network, ..end }, left))
    }

    /// Boots or takes over, answering meanwhile.
    async fn bring_up(
        &mut self,
        record: Record,
        start: Start,
        asked: &mut mpsc::Receiver<Asked>,
    ) -> Result<(Detached, bool), (SuperviseError, Record)> {
        let (host, spec) = (self.host.clone(), self.spec.clone());
        let restore = self.state.status().restore.clone();
        let paused = self.state.status().was_paused();
        let how = detached::Start {
            first: !self.state.status().provisioned && restore.is_none(),
            restore,
            machine_id: self.machine_id(),
        };
        let cancel = Notify::new();
        let boot = async {
            match start {
                Start::Boot => {
                    let cancelled = cancel.notified();
                    detached::boot(&host, &spec, record, how, cancelled).await
                }
                Start::TakeOver => detached::take_over(&host, &spec, record, paused).await,
            }
        };
        let mut boot = std::pin::pin!(boot);
        let mut stopped = false;
        loop {
            tokio::select! {
                booted = &mut boot => {
                    return match booted {
                        Ok(detached) => Ok((detached, stopped)),
                        Err((error, record)) => Err((error.into(), record)),
                    };
                }
                Some(asked) = asked.recv() => match asked.decode() {
                    Some(Ask::Stop { .. }) => {
                        stopped = true;
                        cancel.notify_one();
                        self.waiting.push(asked);
                    }
                    Some(Ask::Wait) => self.waiting.push(asked),
                    Some(Ask::Status) => {
                        let live = Live::of(self.state.status());
                        asked.answer(&Answer::Status(Box::new(live))).await;
                    }
                    _ => asked.answer(&self.not_now("asked that")).await,
                },
                Some(()) = self.stop.recv() => {
                    stopped = true;
                    cancel.notify_one();
                }
            }
        }
    }

    /// Writes down that it is up; gives when it is to end.
    fn up(&mut self, start: Start, template: Option<&str>) -> Result<Clock, SuperviseError> {
        let now = Instant::now();
        let status = self.state.status();
        let ttl = self.spec.lifetime.ttl.map(|ttl| ttl.0);
        let deadline = match (start, status.deadline_ms) {
            // The time goes on where it was.
            (Start::TakeOver, Some(at)) => {
                Some(now + Duration::from_millis(at.saturating_sub(now_ms())))
            }
            _ => ttl.map(|ttl| now + ttl),
        };
        let reason = match (start, template, &status.restore) {
            (Start::Boot, None, None) => "the guest agent answers".to_owned(),
            (Start::Boot, _, Some(name)) => format!("restored from snapshot {name}"),
            (Start::Boot, Some(template), None) => format!("cloned from template {template}"),
            (Start::TakeOver, ..) => "taken over by a new supervisor".to_owned(),
        };
        self.state.advance_with(State::Running, &reason, |status| {
            status.supervisor = Some(Owner::current());
            status.provisioned = true;
            if let Some(name) = status.restore.take() {
                status.snapshot = Some(name);
            }
            status.deadline_ms = deadline.map(|at| at_ms(at, now));
        })?;
        let idle = Idle::new(now);
        Ok(Clock { idle, deadline })
    }

    /// What it is asked for over its socket.
    fn open(mut detached: Detached) -> Up {
        for warning in &detached.warnings {
            tracing::warn!("{warning}");
        }
        let logs = detached::logs(detached.machine.dir());
        // Without it there are no logs, and the commands run all the same.
        if let Err(error) = std::fs::create_dir_all(&logs) {
            tracing::warn!("cannot make {}: {error}", logs.display());
        }
        Up {
            execs: Arc::new(Execs::new(detached.machine.channel().clone(), logs)),
            desk: Arc::new(Desk::new(&mut detached.machine)),
            detached,
        }
    }

    /// Starts the main command, if there is one; how that goes is seen where its
    /// end is waited for. `stopped` is a wish that came while it was brought up.
    /// Gives the end, where this is it already.
    fn main(&self, up: &Up, start: Start, stopped: bool) -> Option<End> {
        if stopped {
            return Some(End::stopped("stopped while it came up"));
        }
        let exec = detached::main_command(&self.spec, NO_TERMINAL)?;
        if start == Start::TakeOver {
            let why = "its command was lost with the supervisor that died";
            return Some(End::failed(why));
        }
        let request = ExecRequest {
            exec,
            timeout: None,
        };
        let execs = Arc::clone(&up.execs);
        execs.expect_main();
        tokio::spawn(async move { execs.detach(request, true).await });
        None
    }

    pub(super) fn not_now(&self, what: &'static str) -> Answer {
        let status = self.state.status();
        Answer::Refused(Report::of(&SuperviseError::WrongState {
            id: self.id().clone(),
            state: status.state,
            reason: status.reason.clone(),
            what,
        }))
    }

    /// Powers the machine off, answering meanwhile.
    async fn power_off(
        &mut self,
        up: &Up,
        grace: Option<Duration>,
        end: End,
        asked: &mut mpsc::Receiver<Asked>,
    ) -> End {
        if let Err(error) = self.state.advance(State::Stopping, &end.reason) {
            tracing::error!("{error}");
        }
        let _ = fault::at("power off");
        up.execs.machine_ends(&end.reason);
        let grace = grace.unwrap_or(self.spec.lifetime.stop_grace.0);
        let machine = &up.detached.machine;
        let work = async {
            if grace.is_zero() {
                return true;
            }
            machine.disk().hold(false);
            // Standing still it would not hear. One that runs does not mind.
            let _ = up.monitor().execute(qapi::qmp::cont {}).await;
            machine.power_off(grace).await
        };
        let mut work = std::pin::pin!(work);
        loop {
            tokio::select! {
                gentle = &mut work => {
                    let reason = match gentle {
                        true => end.reason,
                        false => format!(
                            "{}; killed, for the guest did not power off within {}",
                            end.reason,
                            crate::spec::Timeout(grace)
                        ),
                    };
                    return End { reason, ..end };
                }
                Some(asked) = asked.recv() => match asked.decode() {
                    Some(Ask::Stop { force: true, .. }) => {
                        self.waiting.push(asked);
                        return End { reason: format!("{}, then killed", end.reason), ..end };
                    }
                    Some(Ask::Stop { .. } | Ask::Wait) => self.waiting.push(asked),
                    Some(Ask::Status) => {
                        let live = watch::live(self.state.status(), up, Duration::ZERO);
                        tokio::spawn(async move {
                            asked.answer(&Answer::Status(Box::new(live.await))).await;
                        });
                    }
                    _ => asked.answer(&self.not_now("asked that")).await,
                },
            }
        }
    }

    /// Writes the end down, lets go of the machine, and tells those who wait.
    async fn finish(mut self, record: Record, end: End) -> Result<(), SuperviseError> {
        let written = self.state.advance_with(end.to, &end.reason, |status| {
            status.ended = Some(Ended {
                exit_code: end.exit_code,
                at_ms: now_ms(),
                network: end.network,
            });
        });
        // Whoever waits may start it again at once.
        let _ = fault::at("let go");
        drop(record);
        let _ = fault::at("tell end");
        self.waiting.tell().await;
        match end.error {
            Some(error) => Err(error),
            None => Ok(written?),
        }
    }
}

/// Releases what a machine that never came up held.
fn clear(mut record: Record, end: End) -> (Record, End) {
    let left = record.release().iter().map(ToString::to_string).collect();
    (record, with_leaks(end, left))
}

pub(super) fn at_ms(at: Instant, now: Instant) -> u64 {
    let left = at.saturating_duration_since(now).as_millis();
    now_ms().saturating_add(u64::try_from(left).unwrap_or(u64::MAX))
}

/// The same at every start, and no secret: the guest's programs keep things by it.
fn machine_id(id: &VmId, created_ms: u64) -> String {
    use sha2::{Digest, Sha256};
    let digest = Sha256::digest(format!("bulkhead machine {id} {created_ms}"));
    digest[..16]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Writes a changed spec down.
pub(super) fn save_spec(dir: &Path, spec: &Spec) -> Result<(), SuperviseError> {
    Ok(crate::run::save_spec(dir, spec)?)
}
