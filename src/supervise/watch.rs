//! Watching a running machine: what happens to it, what is asked of it, and
//! when it is to end. Nothing in here waits for QEMU or the guest while others
//! could ask for the machine's end.

use std::collections::VecDeque;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_agent::Request;
use serde::Deserialize;
use tokio::sync::mpsc;

use super::end::{End, Next, by_itself, gone, last_words, reason, told};
use super::error::SuperviseError;
use super::health::{Health, PING, ping};
use super::idle::{Idle, Used};
use super::server;
use super::supervisor::{Clock, Supervisor, Up, at_ms};
use super::tune;
use super::view::Live;
use super::wire::{Answer, Ask, Limit, Settings};
use crate::error::{Explain, Report};
use crate::qmp::Event;
use crate::run::{Asked, DiskState, State, Status};
use crate::snapshot::SnapshotName;
use crate::spec::{Spec, Timeout};

/// Longest queue of changes asked for while another is under way.
const QUEUE: usize = 32;

/// QEMU's answer to `query-status`, as far as it is of interest.
#[derive(Debug, Deserialize)]
struct RunState {
    status: String,
}

/// A change of the machine that is under way, and what is done after it.
type Job<'a> = Pin<Box<dyn Future<Output = Done> + 'a>>;

/// What a job gives.
struct Done {
    asked: Asked,
    answer: Answer,
    after: After,
}

/// What is written down after a job.
enum After {
    Nothing,
    /// The user has paused or resumed it.
    Held(bool),
    /// It is asked for differently from now on.
    Changed(Box<Spec>, Box<Settings>),
    /// A change failed, and this is what it is held to.
    Kept(Box<Spec>),
    /// It is at this snapshot now.
    Saved(SnapshotName),
}

impl Supervisor<'_> {
    /// Watches the machine until it ends or is to be stopped.
    pub(super) async fn watch(
        &mut self,
        up: &Up,
        clock: &mut Clock,
        asked: &mut mpsc::Receiver<Asked>,
    ) -> Next {
        let mut events = up.machine().monitor().events();
        let mut disk = up.machine().disk().state();
        let mut main = std::pin::pin!(up.execs.main_ended());
        // Why QEMU ended, where it still said so.
        let mut shutdown: Option<String> = None;
        let mut look = Instant::now();
        let mut job: Option<Job> = None;
        let mut queue = VecDeque::new();
        let mut health = Health::default();
        let mut pinging = Some(Box::pin(ping(up)));
        // It may have been paused when it was taken over.
        self.reconcile(up).await;
        loop {
            if job.is_none()
                && let Some(asked) = queue.pop_front()
            {
                job = self.job(up, asked).await;
            }
            let limit = self.spec.lifetime.idle.map(|limit| limit.0);
            let next = tokio::select! {
                // What has happened to the machine comes before what is asked of it.
                biased;
                status = up.machine().process().wait() => {
                    let why = last_words(&mut events, shutdown.take()).await;
                    Next::Gone(by_itself(up, status.is_ok(), why).await)
                }
                error = up.machine().channel().closed() => {
                    gone(up, &error, "the guest agent is gone", &mut events, shutdown.take()).await
                }
                event = events.next() => {
                    match event {
                        Ok(event) => {
                            self.event(up, &event, &mut shutdown);
                            Next::Stay
                        }
                        // It ends with QEMU, or QEMU is not to be trusted any more.
                        Err(error) if error.is_closed() => {
                            gone(up, &error, "the monitor is gone", &mut events, shutdown.take()).await
                        }
                        // Some were missed.
                        Err(_) => {
                            self.reconcile(up).await;
                            Next::Stay
                        }
                    }
                }
                error = up.machine().unfiltered() => Next::Stop {
                    grace: Some(Duration::ZERO),
                    end: End::failed(told(&error)),
                },
                Ok(()) = disk.changed() => self.disk(up, &disk.borrow_and_update().clone()),
                ended = &mut main => {
                    let end = match ended.failure {
                        Some(why) => End::failed(why),
                        None => End::stopped("its command ended"),
                    };
                    Next::Stop {
                        grace: None,
                        end: End { exit_code: ended.exit_code, ..end },
                    }
                }
                done = finished(&mut job) => {
                    job = None;
                    self.done(up, clock, done).await;
                    Next::Stay
                }
                answered = finished(&mut pinging) => {
                    pinging = Some(Box::pin(ping(up)));
                    let running = self.state.status().state == State::Running;
                    // While it is saved it may stand still for long.
                    health.look(answered || !running || self.saving, cpu(up))
                }
                () = until(clock.deadline) => Next::Stop {
                    grace: None,
                    end: End::stopped("its time to live is over"),
                },
                () = until(limit.map(|_| look)) => {
                    let limit = limit.unwrap_or_default();
                    look = Instant::now() + Idle::interval(limit);
                    idle(up, clock, limit)
                }
                Some(()) = self.stop.recv() => Next::Stop {
                    grace: None,
                    end: End::stopped("its supervisor was asked to end"),
                },
                Some(asked) = asked.recv() => self.answer(up, clock, asked, &mut queue).await,
            };
            if !matches!(next, Next::Stay) {
                return next;
            }
        }
    }

    /// Takes in what QEMU tells.
    fn event(&mut self, up: &Up, event: &Event, shutdown: &mut Option<String>) {
        match event.name.as_str() {
            "SHUTDOWN" => *shutdown = reason(event),
            "STOP" => self.stands(up, true),
            "RESUME" => self.stands(up, false),
            _ => {}
        }
    }

    /// Writes down whether the machine stands still.
    fn stands(&mut self, up: &Up, still: bool) {
        if self.saving {
            return;
        }
        let trouble = up.machine().disk().trouble();
        let advanced = match (self.state.status().state, still) {
            (State::Running, true) => {
                let why = trouble.map_or("asked to pause".into(), |trouble| trouble.to_string());
                self.state.note(State::Paused, &why)
            }
            (State::Paused, false) => self.state.note(State::Running, "resumed"),
            _ => return,
        };
        up.execs.stand_still(still);
        if let Err(error) = advanced {
            tracing::error!("{error}");
        }
    }

    /// Takes in how the disks are.
    fn disk(&mut self, up: &Up, disk: &DiskState) -> Next {
        match disk {
            // The event that comes with it says that it goes on.
            DiskState::Fine => {}
            DiskState::Full { .. } => {
                self.stands(up, true);
                // The event may have come first, without the reason.
                let why = disk.to_string();
                let paused = self.state.status().state == State::Paused;
                if paused
                    && self.state.status().reason != why
                    && let Err(error) = self.state.explain(&why)
                {
                    tracing::error!("{error}");
                }
            }
            DiskState::Failed { .. } => {
                return Next::Stop {
                    grace: Some(Duration::ZERO),
                    end: End::failed(disk.to_string()),
                };
            }
        }
        Next::Stay
    }

    /// Makes the state what QEMU says it is.
    async fn reconcile(&mut self, up: &Up) {
        let command = qapi::qmp::query_status {};
        if let Ok(found) = up.monitor().execute_into::<RunState>(command).await {
            self.stands(up, found.status != "running");
        }
    }

    /// Answers one request, or puts it into the queue of changes.
    async fn answer(
        &mut self,
        up: &Up,
        clock: &mut Clock,
        asked: Asked,
        queue: &mut VecDeque<Asked>,
    ) -> Next {
        let Some(ask) = asked.decode::<Ask>() else {
            let (desk, busy) = (Arc::clone(&up.desk), up.execs.keep_busy());
            // An open console is something that happens.
            tokio::spawn(async move {
                desk.answer(asked).await;
                drop(busy);
            });
            clock.idle.touch(Instant::now());
            return Next::Stay;
        };
        // Looking does not keep a machine alive.
        if !matches!(ask, Ask::Status | Ask::Wait | Ask::Execs) {
            clock.idle.touch(Instant::now());
        }
        let paused = self.state.status().state == State::Paused;
        let execs = Arc::clone(&up.execs);
        match ask {
            Ask::Status => {
                let idle = clock.idle.time(Instant::now());
                let live = live(self.state.status(), up, idle);
                tokio::spawn(async move {
                    asked.answer(&Answer::Status(Box::new(live.await))).await;
                });
            }
            Ask::Wait => self.waiting.push(asked),
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
            Ask::Pause | Ask::Resume | Ask::Set { .. } | Ask::Save { .. }
                if queue.len() < QUEUE =>
            {
                queue.push_back(asked);
            }
            Ask::Pause | Ask::Resume | Ask::Set { .. } | Ask::Save { .. } => {
                self.spawn_answer(asked, self.not_now("changed: others are changing it"));
            }
            Ask::Execs => self.spawn_answer(asked, Answer::Execs(execs.list())),
            Ask::Signal { exec, signal } => {
                let missing = SuperviseError::NoExec {
                    id: self.id().clone(),
                    exec,
                };
                // The guest may read nothing.
                tokio::spawn(async move {
                    let answer = match execs.signal(exec, signal).await {
                        Some(()) => Answer::Done,
                        None => Answer::Refused(Report::of(&missing)),
                    };
                    asked.answer(&answer).await;
                });
            }
            Ask::Detach { .. } | Ask::Streams if paused => {
                self.spawn_answer(asked, self.not_now("given work"));
            }
            Ask::Detach { request } => {
                tokio::spawn(async move {
                    let answer = match execs.detach(*request, false).await {
                        Ok(id) => Answer::Exec(id),
                        Err(error) => Answer::Refused(Report::of(&error)),
                    };
                    asked.answer(&answer).await;
                });
            }
            Ask::Streams => {
                tokio::spawn(async move {
                    if let Ok(connection) = asked.grant(&Answer::Streams).await {
                        server::serve(connection, execs).await;
                    }
                });
            }
        }
        Next::Stay
    }

    /// Answers without waiting for whoever asked.
    fn spawn_answer(&self, asked: Asked, answer: Answer) {
        tokio::spawn(async move { asked.answer(&answer).await });
    }

    /// Begins a change of the machine; `None` when it was answered already.
    async fn job<'a>(&mut self, up: &'a Up, asked: Asked) -> Option<Job<'a>> {
        let machine = up.machine();
        let state = self.state.status().state;
        Some(match asked.decode::<Ask>()? {
            Ask::Pause if state == State::Running => Box::pin(async move {
                // Before it stands still: nobody may take it for want of space.
                machine.disk().hold(true);
                let paused = machine.pause().await;
                machine.disk().hold(paused.is_ok());
                Done::of(asked, paused, After::Held(true))
            }),
            Ask::Resume if state == State::Paused => Box::pin(async move {
                machine.disk().hold(false);
                let resumed = machine.resume().await;
                Done::of(asked, resumed, After::Held(false))
            }),
            Ask::Set { settings } => {
                let before = self.spec.clone();
                Box::pin(async move {
                    let tune::Changed { spec, result } =
                        tune::change(machine, &settings, before).await;
                    let spec = Box::new(spec);
                    let (answer, after) = match result {
                        Ok(()) => (Answer::Done, After::Changed(spec, settings)),
                        Err(error) => (Answer::Refused(Report::of(&error)), After::Kept(spec)),
                    };
                    Done {
                        asked,
                        answer,
                        after,
                    }
                })
            }
            Ask::Save { wish } if state == State::Running => {
                let after = match wish.transient {
                    true => After::Nothing,
                    false => After::Saved(wish.name.clone()),
                };
                let save = self.save(machine, *wish);
                Box::pin(async move { Done::of(asked, save.await, after) })
            }
            Ask::Save { .. } => {
                self.spawn_answer(asked, self.not_now("saved"));
                return None;
            }
            Ask::Pause => {
                self.spawn_answer(asked, self.not_now("paused"));
                return None;
            }
            _ => {
                self.spawn_answer(asked, self.not_now("resumed"));
                return None;
            }
        })
    }

    /// Writes down what a job has changed, and answers.
    async fn done(&mut self, up: &Up, clock: &mut Clock, done: Done) {
        let Done {
            asked,
            answer,
            after,
        } = done;
        if std::mem::take(&mut self.saving) {
            self.reconcile(up).await;
        }
        match after {
            After::Nothing => {}
            After::Saved(name) => {
                // It is there, whatever becomes of this.
                if let Err(error) = self.state.keep(|status| status.snapshot = Some(name)) {
                    tracing::error!("{error}");
                }
            }
            After::Held(still) => self.stands(up, still),
            After::Changed(spec, settings) => self.changed(clock, *spec, &settings),
            After::Kept(spec) => self.spec = *spec,
        }
        self.spawn_answer(asked, answer);
    }

    /// Takes in a change that was made and written down.
    fn changed(&mut self, clock: &mut Clock, spec: Spec, settings: &Settings) {
        self.spec = spec;
        if settings.ttl.is_some() || settings.without.contains(&Limit::Ttl) {
            let now = Instant::now();
            clock.deadline = settings.ttl.map(|ttl| now + ttl.0);
            let at = clock.deadline.map(|at| at_ms(at, now));
            if let Err(error) = self.state.keep(|status| status.deadline_ms = at) {
                tracing::error!("{error}");
            }
        }
        clock.idle.touch(Instant::now());
    }
}

impl Done {
    fn of<E: Explain>(asked: Asked, result: Result<(), E>, after: After) -> Self {
        let (answer, after) = match result {
            Ok(()) => (Answer::Done, after),
            Err(error) => (Answer::Refused(Report::of(&error)), After::Nothing),
        };
        Self {
            asked,
            answer,
            after,
        }
    }
}

/// Waits for a future that may not be there.
async fn finished<F: Future + Unpin>(future: &mut Option<F>) -> F::Output {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

fn cpu(up: &Up) -> Option<u64> {
    up.machine().process().usage().map(|(_, ms)| ms)
}

/// Looks whether anything happens in the machine.
fn idle(up: &Up, clock: &mut Clock, limit: Duration) -> Next {
    let now = Instant::now();
    let connections = up.detached.connections();
    let busy = up.execs.busy() > 0 || connections.open() > 0;
    let used = Used {
        cpu_ms: cpu(up),
        bytes: up.machine().carried(),
        taken: connections.taken(),
    };
    clock.idle.look(now, busy, used);
    match clock.idle.time(now) >= limit {
        true => Next::Stop {
            grace: None,
            end: End::stopped(format!("idle for {}", Timeout(limit))),
        },
        false => Next::Stay,
    }
}

/// How the machine is; asks QEMU and guest without holding anything up.
pub(super) fn live(status: &Status, up: &Up, idle: Duration) -> impl Future<Output = Live> + use<> {
    let machine = up.machine();
    let mut live = Live {
        vmm_pid: Some(machine.process().pid()),
        busy: up.execs.busy(),
        idle_ms: u64::try_from(idle.as_millis()).unwrap_or(u64::MAX),
        vmm_cpu_ms: cpu(up).unwrap_or_default(),
        vmm_rss_kib: machine.process().memory().unwrap_or_default(),
        disk_bytes: disk_bytes(&machine.dir().join("disk.img")),
        ..Live::of(status)
    };
    let (monitor, channel) = (up.monitor(), machine.channel().clone());
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

/// What a file takes of the host's disk.
fn disk_bytes(path: &Path) -> Option<u64> {
    use std::os::unix::fs::MetadataExt;
    Some(std::fs::metadata(path).ok()?.blocks() * 512)
}
