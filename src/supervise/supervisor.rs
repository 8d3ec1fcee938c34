//! The life of one machine, from its start to its end, as its supervisor sees it.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_agent::{Request, Size};
use serde::Deserialize;
use tokio::sync::{Notify, mpsc};

use super::error::SuperviseError;
use super::execs::Execs;
use super::idle::Idle;
use super::server;
use super::view::Live;
use super::wire::{Answer, Ask, ExecRequest, Limit, Settings};
use crate::error::{Explain, Report};
use crate::guest::Channel;
use crate::host::fault;
use crate::host::lease::{Lease, write_durably};
use crate::qmp::Monitor;
use crate::run::detached::{self, Detached};
use crate::run::{
    Asked, Desk, Ended, FAILED, Host, MachineError, Owner, Record, RecordError, RunError, State,
    StateFile, listen, now_ms,
};
use crate::spec::{Spec, VmId};

/// How long QEMU may take for what it does at once.
const QMP: Duration = Duration::from_secs(5);
/// How long the guest agent may take to show that it is there.
const PING: Duration = Duration::from_secs(1);
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
    let found = state.status().clone();
    let fits = match start {
        Start::Boot => found.state.may_start(),
        Start::TakeOver => found.state == State::Lost,
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
        waiting: Vec::new(),
    };
    let (record, end) = supervisor.life(record, start, ready).await;
    supervisor.finish(record, end).await
}

fn leaked(id: &VmId, left: impl Iterator<Item = String>) -> SuperviseError {
    SuperviseError::Leaked {
        id: id.clone(),
        why: left.collect::<Vec<_>>().join("; "),
    }
}

/// How a machine ended.
struct End {
    to: State,
    reason: String,
    exit_code: i32,
    /// Why it never came up.
    error: Option<SuperviseError>,
}

impl End {
    fn stopped(reason: impl Into<String>) -> Self {
        Self {
            to: State::Stopped,
            reason: reason.into(),
            exit_code: 0,
            error: None,
        }
    }

    fn failed(reason: impl Into<String>) -> Self {
        Self {
            to: State::Failed,
            reason: reason.into(),
            exit_code: FAILED,
            error: None,
        }
    }

    /// It did not come up.
    fn never(error: SuperviseError) -> Self {
        let report = Report::of(&error);
        let reason = match report.cause.as_str() {
            "" => report.what,
            cause => format!("{}: {cause}", report.what),
        };
        // Stopped by the user meanwhile is not a failure.
        let cancelled = matches!(
            &error,
            SuperviseError::Run(RunError::Machine(MachineError::Cancelled))
        );
        Self {
            to: match cancelled {
                true => State::Stopped,
                false => State::Failed,
            },
            reason,
            exit_code: FAILED,
            error: Some(error),
        }
    }
}

/// What the loop does next.
enum Next {
    /// Goes on.
    Stay,
    /// Powers the machine off.
    Stop { grace: Option<Duration>, end: End },
    /// The machine is gone already.
    Gone(End),
}

struct Supervisor<'a> {
    host: &'a Host,
    spec: Spec,
    state: StateFile,
    stop: mpsc::Receiver<()>,
    /// Answered when the machine has ended.
    waiting: Vec<Asked>,
}

/// A machine that is up, with what is asked of it.
struct Up {
    detached: Detached,
    execs: Arc<Execs>,
    desk: Arc<Desk>,
    idle: Idle,
    /// When its time is up.
    deadline: Option<Instant>,
}

impl Up {
    fn monitor(&self) -> Monitor {
        self.detached.machine.monitor().with_timeout(QMP)
    }

    fn channel(&self) -> &Channel {
        self.detached.machine.channel()
    }
}

/// QEMU's answer to `query-status`, as far as it is of interest.
#[derive(Debug, Deserialize)]
struct RunState {
    status: String,
}

impl Supervisor<'_> {
    fn id(&self) -> &VmId {
        &self.spec.id
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
        let socket = || {
            let lease = Lease::File { path: path.clone() };
            record.lease(lease).map_err(RecordError::from)?;
            listen(path.clone()).map_err(|source| SuperviseError::Socket {
                path: path.clone(),
                source,
            })
        };
        let mut socket = socket;
        let (_listener, mut asked) = match socket() {
            Ok(socket) => socket,
            Err(error) => return clear(record, End::never(error)),
        };
        let detached = match self.bring_up(record, start, &mut asked).await {
            Ok(detached) => detached,
            Err((error, record)) => return clear(record, End::never(error)),
        };
        let mut up = match self.up(detached, start) {
            Ok(up) => up,
            Err((error, detached)) => {
                let (record, left) = detached.end().await;
                return (record, with_leaks(End::never(error), left));
            }
        };
        // From here on it is the user's, and a failure is the machine's.
        let _ = fault::at("tell ready");
        ready();
        let next = match self.main(&up, start).await {
            Ok(()) => self.watch(&mut up, &mut asked).await,
            Err(end) => Next::Stop {
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
        let (record, left) = up.detached.end().await;
        (record, with_leaks(end, left))
    }

    /// Boots or takes over, answering meanwhile.
    async fn bring_up(
        &mut self,
        record: Record,
        start: Start,
        asked: &mut mpsc::Receiver<Asked>,
    ) -> Result<Detached, (SuperviseError, Record)> {
        let (host, spec) = (self.host.clone(), self.spec.clone());
        let first = !self.state.status().provisioned;
        let machine_id = machine_id(&spec.id, self.state.status().created_ms);
        let cancel = Notify::new();
        let boot = async {
            match start {
                Start::Boot => {
                    let cancelled = cancel.notified();
                    detached::boot(&host, &spec, record, first, machine_id, cancelled).await
                }
                Start::TakeOver => detached::take_over(&host, &spec, record).await,
            }
        };
        let mut boot = std::pin::pin!(boot);
        loop {
            tokio::select! {
                booted = &mut boot => {
                    return booted.map_err(|(error, record)| (error.into(), record));
                }
                Some(asked) = asked.recv() => match asked.decode() {
                    Some(Ask::Stop { .. }) => {
                        cancel.notify_one();
                        self.waiting.push(asked);
                    }
                    Some(Ask::Wait) => self.waiting.push(asked),
                    Some(Ask::Status) => {
                        let live = Live {
                            state: self.state.status().state,
                            vmm_pid: None,
                            vmm: None,
                            agent: false,
                            busy: 0,
                            idle_ms: 0,
                            vmm_cpu_ms: 0,
                            vmm_rss_kib: 0,
                            disk_bytes: None,
                        };
                        asked.answer(&Answer::Status(Box::new(live))).await;
                    }
                    _ => asked.answer(&self.not_now("asked that")).await,
                },
                Some(()) = self.stop.recv() => cancel.notify_one(),
            }
        }
    }

    /// Writes down that it is up.
    fn up(&mut self, detached: Detached, start: Start) -> Result<Up, (SuperviseError, Detached)> {
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
        let reason = match start {
            Start::Boot => "the guest agent answers",
            Start::TakeOver => "taken over by a new supervisor",
        };
        let advanced = self.state.advance_with(State::Running, reason, |status| {
            status.supervisor = Some(Owner::current());
            status.provisioned = true;
            status.deadline_ms = deadline.map(|at| at_ms(at, now));
        });
        if let Err(error) = advanced {
            return Err((error.into(), detached));
        }
        for warning in &detached.warnings {
            tracing::warn!("{warning}");
        }
        let mut detached = detached;
        let logs = detached::logs(detached.machine.dir());
        // Without it there are no logs, and the commands run all the same.
        if let Err(error) = std::fs::create_dir_all(&logs) {
            tracing::warn!("cannot make {}: {error}", logs.display());
        }
        Ok(Up {
            execs: Arc::new(Execs::new(detached.machine.channel().clone(), logs)),
            desk: Arc::new(Desk::new(&mut detached.machine)),
            idle: Idle::new(now),
            deadline,
            detached,
        })
    }

    /// Starts the main command, if there is one.
    async fn main(&self, up: &Up, start: Start) -> Result<(), End> {
        let Some(exec) = detached::main_command(&self.spec, NO_TERMINAL) else {
            return Ok(());
        };
        if start == Start::TakeOver {
            return Err(End::failed(
                "its command was lost with the supervisor that died",
            ));
        }
        let request = ExecRequest {
            exec,
            timeout: None,
        };
        match up.execs.detach(request, true).await {
            Ok(_) => Ok(()),
            Err(error) => {
                let end = up.execs.main_ended().await;
                Err(End {
                    exit_code: end.exit_code,
                    ..End::failed(Report::of(&error).what)
                })
            }
        }
    }

    /// Watches the machine until it ends or is to be stopped.
    async fn watch(&mut self, up: &mut Up, asked: &mut mpsc::Receiver<Asked>) -> Next {
        let mut events = up.detached.machine.monitor().events();
        let execs = Arc::clone(&up.execs);
        let mut main = std::pin::pin!(execs.main_ended());
        let channel = up.channel().clone();
        // Why QEMU ended, where it still said so.
        let mut shutdown: Option<String> = None;
        let mut look = Instant::now();
        loop {
            let limit = self.spec.lifetime.idle.map(|limit| limit.0);
            let next = tokio::select! {
                // What has happened to the machine comes before what is asked of it.
                biased;
                status = up.detached.machine.process().wait() => {
                    Next::Gone(self.by_itself(up, status.is_ok(), shutdown.take()).await)
                }
                error = channel.closed() => self.agent_gone(up, error, shutdown.take()).await,
                event = events.next() => {
                    match event {
                        Ok(event) if event.name == "SHUTDOWN" => {
                            shutdown = event.data["reason"].as_str().map(str::to_owned);
                        }
                        Ok(event) if event.name == "STOP" || event.name == "RESUME" => {
                            self.reconcile(up).await;
                        }
                        // The end of the monitor comes with that of QEMU.
                        Err(error) if error.is_closed() => {
                            tokio::time::sleep(Duration::from_millis(50)).await;
                        }
                        _ => {}
                    }
                    Next::Stay
                }
                end = &mut main => Next::Stop {
                    grace: None,
                    end: End {
                        exit_code: end.exit_code,
                        ..End::stopped("its command ended")
                    },
                },
                () = until(up.deadline) => Next::Stop {
                    grace: None,
                    end: End::stopped("its time to live is over"),
                },
                () = until(limit.map(|_| look)) => {
                    look = Instant::now() + Idle::interval(limit.unwrap_or_default());
                    idle(up, limit.unwrap_or_default())
                }
                Some(()) = self.stop.recv() => Next::Stop {
                    grace: None,
                    end: End::stopped("its supervisor was asked to end"),
                },
                Some(asked) = asked.recv() => self.answer(up, asked).await,
            };
            if !matches!(next, Next::Stay) {
                return next;
            }
        }
    }

    /// The VMM has ended.
    async fn by_itself(&self, up: &Up, known: bool, shutdown: Option<String>) -> End {
        match up.detached.machine.end_reason().await {
            Some(error @ MachineError::GuestPanic { .. }) => End::failed(told(&error)),
            Some(MachineError::GuestEnded { .. }) => End::stopped(match shutdown.as_deref() {
                Some("guest-reset") => "the guest restarted, which ends it",
                _ => "the guest powered off",
            }),
            // A process that was taken over leaves no status, but QEMU said why.
            _ if shutdown.as_deref() == Some("guest-shutdown") => {
                End::stopped("the guest powered off")
            }
            Some(error) => End::failed(told(&error)),
            None if known => End::failed("QEMU ended"),
            None => End::failed("QEMU ended, and nobody knows how"),
        }
    }

    /// The channel to the guest agent is gone, and with it what the machine is for.
    async fn agent_gone(
        &self,
        up: &Up,
        error: crate::guest::GuestError,
        shutdown: Option<String>,
    ) -> Next {
        let process = up.detached.machine.process();
        // Mostly the machine is about to be gone as a whole.
        match tokio::time::timeout(Duration::from_secs(1), process.wait()).await {
            Ok(status) => Next::Gone(self.by_itself(up, status.is_ok(), shutdown).await),
            Err(_) => Next::Gone(End::failed(format!(
                "the guest agent is gone: {}",
                told(&error)
            ))),
        }
    }

    /// Makes the state what QEMU says it is.
    async fn reconcile(&mut self, up: &Up) {
        let command = qapi::qmp::query_status {};
        let Ok(found) = up.monitor().execute_into::<RunState>(command).await else {
            return;
        };
        let state = self.state.status().state;
        let advanced = match (state, found.status.as_str()) {
            (State::Running, "running") | (State::Paused, "paused" | "io-error") => return,
            (State::Running, "io-error") => {
                let why = "the host could not write its disk: no space left";
                self.state.advance(State::Paused, why)
            }
            (State::Running, "paused") => self.state.advance(State::Paused, "asked to pause"),
            (State::Paused, "running") => self.state.advance(State::Running, "resumed"),
            _ => return,
        };
        up.execs
            .stand_still(self.state.status().state == State::Paused);
        if let Err(error) = advanced {
            tracing::error!("{error}");
        }
    }

    /// Answers one request.
    async fn answer(&mut self, up: &mut Up, asked: Asked) -> Next {
        let Some(ask) = asked.decode::<Ask>() else {
            let desk = Arc::clone(&up.desk);
            tokio::spawn(async move { desk.answer(asked).await });
            return Next::Stay;
        };
        up.idle.touch(match ask {
            // Looking does not keep a machine alive.
            Ask::Status | Ask::Wait | Ask::Execs => Instant::now() - up.idle.time(Instant::now()),
            _ => Instant::now(),
        });
        let answer = match ask {
            Ask::Status => {
                let live = self.live(up);
                tokio::spawn(async move {
                    let live = live.await;
                    asked.answer(&Answer::Status(Box::new(live))).await;
                });
                return Next::Stay;
            }
            Ask::Wait => {
                self.waiting.push(asked);
                return Next::Stay;
            }
            Ask::Stop { grace, force } => {
                let reason = match asked.uid {
                    0 => "stopped by root".to_owned(),
                    uid => format!("stopped by user {uid}"),
                };
                self.waiting.push(asked);
                return Next::Stop {
                    grace: match force {
                        true => Some(Duration::ZERO),
                        false => grace.map(|grace| grace.0),
                    },
                    end: End::stopped(reason),
                };
            }
            Ask::Pause if self.state.status().state == State::Running => {
                match up.detached.machine.pause().await {
                    Ok(()) => {
                        self.reconcile(up).await;
                        Answer::Done
                    }
                    Err(error) => Answer::Refused(Report::of(&error)),
                }
            }
            Ask::Resume if self.state.status().state == State::Paused => {
                match up.detached.machine.resume().await {
                    Ok(()) => {
                        self.reconcile(up).await;
                        Answer::Done
                    }
                    Err(error) => Answer::Refused(Report::of(&error)),
                }
            }
            Ask::Pause => self.not_now("paused"),
            Ask::Resume => self.not_now("resumed"),
            Ask::Set { settings } => match self.set(up, settings) {
                Ok(()) => Answer::Done,
                Err(error) => Answer::Refused(Report::of(&error)),
            },
            Ask::Execs => Answer::Execs(up.execs.list()),
            Ask::Signal { exec, signal } => match up.execs.signal(exec, signal).await {
                Some(()) => Answer::Done,
                None => Answer::Refused(Report::of(&SuperviseError::NoExec {
                    id: self.id().clone(),
                    exec,
                })),
            },
            Ask::Detach { .. } | Ask::Streams if self.state.status().state == State::Paused => {
                self.not_now("given work")
            }
            Ask::Detach { request } => {
                // The guest may take its time: others are answered meanwhile.
                let execs = Arc::clone(&up.execs);
                tokio::spawn(async move {
                    let answer = match execs.detach(*request, false).await {
                        Ok(id) => Answer::Exec(id),
                        Err(error) => Answer::Refused(Report::of(&error)),
                    };
                    asked.answer(&answer).await;
                });
                return Next::Stay;
            }
            Ask::Streams => {
                let execs = Arc::clone(&up.execs);
                tokio::spawn(async move {
                    if let Ok(connection) = asked.grant(&Answer::Streams).await {
                        server::serve(connection, execs).await;
                    }
                });
                return Next::Stay;
            }
        };
        asked.answer(&answer).await;
        Next::Stay
    }

    fn not_now(&self, what: &'static str) -> Answer {
        let status = self.state.status();
        Answer::Refused(Report::of(&SuperviseError::WrongState {
            id: self.id().clone(),
            state: status.state,
            reason: status.reason.clone(),
            what,
        }))
    }

    /// Changes limits, on disk first.
    fn set(&mut self, up: &mut Up, settings: Settings) -> Result<(), SuperviseError> {
        let mut spec = self.spec.clone();
        settings.apply(&mut spec);
        save_spec(up.detached.machine.dir(), &spec)?;
        self.spec = spec;
        let without_ttl = settings.without.contains(&Limit::Ttl);
        if settings.ttl.is_some() || without_ttl {
            let now = Instant::now();
            up.deadline = settings.ttl.map(|ttl| now + ttl.0);
            let at = up.deadline.map(|at| at_ms(at, now));
            self.state.update(|status| status.deadline_ms = at)?;
        }
        up.idle.touch(Instant::now());
        Ok(())
    }

    /// How the machine is; asks QEMU and guest without holding anything up.
    fn live(&self, up: &Up) -> impl Future<Output = Live> + use<> {
        let machine = &up.detached.machine;
        let (cpu, rss) = machine
            .process()
            .usage()
            .map_or((0, 0), |(kib, ms)| (ms, kib));
        let disk = disk_bytes(&machine.dir().join("disk.img"));
        let mut live = Live {
            state: self.state.status().state,
            vmm_pid: Some(machine.process().pid()),
            vmm: None,
            agent: false,
            busy: up.execs.busy(),
            idle_ms: u64::try_from(up.idle.time(Instant::now()).as_millis()).unwrap_or(u64::MAX),
            vmm_cpu_ms: cpu,
            vmm_rss_kib: rss,
            disk_bytes: disk,
        };
        let (monitor, channel) = (up.monitor(), up.channel().clone());
        async move {
            let command = qapi::qmp::query_status {};
            let (vmm, agent) = tokio::join!(
                monitor.execute_into::<RunState>(command),
                channel.ask("show that it is there", &Request::Ping, PING),
            );
            live.vmm = vmm.ok().map(|found| found.status);
            live.agent = agent.is_ok();
            live
        }
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
                        let live = self.live(up).await;
                        asked.answer(&Answer::Status(Box::new(live))).await;
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
            });
        });
        // Whoever waits may start it again at once.
        let _ = fault::at("let go");
        drop(record);
        let _ = fault::at("tell end");
        for asked in self.waiting {
            asked.answer(&Answer::Done).await;
        }
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

fn with_leaks(end: End, left: Vec<String>) -> End {
    match left[..] {
        [] => end,
        _ => End {
            reason: format!(
                "{}; left behind, `bulkhead gc` will try again: {}",
                end.reason,
                left.join("; ")
            ),
            ..end
        },
    }
}

/// Looks whether anything happens in the machine.
fn idle(up: &mut Up, limit: Duration) -> Next {
    let now = Instant::now();
    let cpu = up.detached.machine.process().usage().map(|(_, ms)| ms);
    up.idle.look(now, up.execs.busy() > 0, cpu);
    match up.idle.time(now) >= limit {
        true => Next::Stop {
            grace: None,
            end: End::stopped(format!("idle for {}", crate::spec::Timeout(limit))),
        },
        false => Next::Stay,
    }
}

/// An error and its causes in one line.
fn told(error: &dyn Explain) -> String {
    let report = Report::of(error);
    match report.cause.as_str() {
        "" => report.what,
        cause => format!("{}: {cause}", report.what),
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

fn at_ms(at: Instant, now: Instant) -> u64 {
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

/// What a file takes of the host's disk.
pub(super) fn disk_bytes(path: &Path) -> Option<u64> {
    use std::os::unix::fs::MetadataExt;
    Some(std::fs::metadata(path).ok()?.blocks() * 512)
}

/// Writes a changed spec down.
pub(super) fn save_spec(dir: &Path, spec: &Spec) -> Result<(), SuperviseError> {
    let path = dir.join("spec.json");
    let text = serde_json::to_vec_pretty(spec).map_err(std::io::Error::from);
    text.and_then(|text| write_durably(&path, &text))
        .map_err(|source| {
            RecordError::Io {
                action: "write",
                path,
                source,
            }
            .into()
        })
}

impl Settings {
    /// Changes a spec accordingly.
    pub(super) fn apply(&self, spec: &mut Spec) {
        let lifetime = &mut spec.lifetime;
        lifetime.ttl = self.ttl.or(lifetime.ttl);
        lifetime.idle = self.idle_timeout.or(lifetime.idle);
        for limit in &self.without {
            match limit {
                Limit::Ttl => lifetime.ttl = None,
                Limit::IdleTimeout => lifetime.idle = None,
            }
        }
    }
}
