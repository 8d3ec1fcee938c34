//! The one who has the clones: does what the ledger says, and tells it what
//! happens.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};
use tokio::sync::{oneshot, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::crew::Crew;
use super::error::{PoolError, Why};
use super::gauge::Gauge;
use super::ledger::{Act, CloneId, Hindrance, Ledger, Room, Rules, Ticket};
use super::loan::Loan;
use super::settings::Settings;
use super::status::Status;
use crate::error::Report;
use crate::qmp::Monitor;
use crate::run::{Host, Machine, MachineError, RunError, rests};
use crate::spec::{Bytes, Spec, VmId};

/// How often the host is looked at while it has no room for what is wanted.
const LOOK: Duration = Duration::from_millis(200);
/// How long QEMU may take to say how a clone is.
const ANSWER: Duration = Duration::from_secs(5);

/// What the keeper is told.
#[derive(Debug)]
pub(super) enum Word {
    /// A caller wants a clone.
    Ask(Ticket, Waiter),
    /// A caller waits no more.
    GiveUp(Ticket),
    /// A clone is up and rests, or why not.
    Up(CloneId, Result<Box<Machine>, Box<Report>>),
    /// A clone that rests is not fit to be lent.
    Unfit(CloneId, &'static str),
    /// A clone that was lent comes back.
    Back {
        id: CloneId,
        machine: Box<Machine>,
        touched: bool,
    },
    /// A clone is gone, and left so many leases behind.
    Gone(usize),
    /// No more.
    Drain,
}

/// A caller who waits.
#[derive(Debug)]
pub(super) struct Waiter {
    pub(super) deadline: Instant,
    pub(super) within: Duration,
    /// It was served in vain before.
    pub(super) again: bool,
    pub(super) answer: oneshot::Sender<Result<Loan, PoolError>>,
}

/// A clone that rests.
#[derive(Debug)]
struct Resting {
    machine: Box<Machine>,
    watch: AbortHandle,
    since: Duration,
}

/// A clone that is lent.
#[derive(Debug)]
struct Lent {
    pid: i32,
    since: Duration,
}

/// What a keeper is made of.
pub(super) struct Parts {
    pub(super) host: Host,
    pub(super) spec: Spec,
    pub(super) settings: Settings,
    pub(super) rules: Rules,
    pub(super) gauge: Gauge,
    pub(super) crew: Crew,
    pub(super) inbox: UnboundedReceiver<Word>,
    pub(super) words: UnboundedSender<Word>,
    pub(super) status: watch::Sender<Status>,
}

/// Keeps the clones of one pool.
pub(super) struct Keeper {
    parts: Parts,
    ledger: Ledger,
    begin: Instant,
    resting: HashMap<CloneId, Resting>,
    lent: HashMap<CloneId, Lent>,
    waiting: BTreeMap<Ticket, Waiter>,
    last_failure: Option<Box<Report>>,
    left_behind: usize,
}

impl Keeper {
    pub(super) fn new(parts: Parts) -> Self {
        Self {
            ledger: Ledger::new(parts.rules),
            parts,
            begin: Instant::now(),
            resting: HashMap::new(),
            lent: HashMap::new(),
            waiting: BTreeMap::new(),
            last_failure: None,
            left_behind: 0,
        }
    }

    /// Works until the pool is drained and nothing of it is left.
    pub(super) async fn run(mut self) {
        loop {
            self.do_all();
            if self.ledger.is_draining() && self.ledger.alive() == 0 {
                return;
            }
            let due = self.due();
            tokio::select! {
                word = self.parts.inbox.recv() => word.into_iter().for_each(|word| self.hear(word)),
                () = tokio::time::sleep_until(due) => {}
            }
            while let Ok(word) = self.parts.inbox.try_recv() {
                self.hear(word);
            }
        }
    }

    fn now(&self) -> Duration {
        self.begin.elapsed()
    }

    /// When to look again though nobody says anything.
    fn due(&self) -> Instant {
        let now = self.now();
        let room = self.ledger.wants_room(now).then(|| now + LOOK);
        let times = self.ledger.due(now).into_iter().chain(room);
        let times = times.map(|time| self.begin + time);
        let deadlines = self.waiting.values().map(|waiter| waiter.deadline);
        let far = Instant::now() + Duration::from_secs(3600);
        times.chain(deadlines).min().unwrap_or(far)
    }

    fn hear(&mut self, word: Word) {
        match word {
            Word::Ask(ticket, waiter) => self.ask(ticket, waiter),
            Word::GiveUp(ticket) => {
                self.ledger.give_up(ticket);
                self.waiting.remove(&ticket);
            }
            Word::Up(id, Ok(machine)) => {
                self.ledger.started(id, self.now());
                self.last_failure = None;
                self.rest(id, machine, self.now());
            }
            Word::Up(_, Err(report)) => {
                tracing::warn!("a clone for the pool did not start: {}", report.what);
                self.ledger.failed(self.now());
                self.last_failure = Some(report);
            }
            Word::Unfit(id, why) => {
                if self.ledger.unfit(id) {
                    tracing::warn!("a clone of the pool is replaced: {why}");
                    self.end_resting(id);
                }
            }
            Word::Back {
                id,
                machine,
                touched,
            } => self.back(id, machine, touched),
            Word::Gone(left) => {
                self.left_behind += left;
                self.ledger.ended();
            }
            Word::Drain => {
                self.ledger.drain();
                for (_, waiter) in std::mem::take(&mut self.waiting) {
                    let _ = waiter.answer.send(Err(PoolError::Closed));
                }
            }
        }
    }

    fn ask(&mut self, ticket: Ticket, waiter: Waiter) {
        if self.ledger.ask(ticket, waiter.again) {
            self.waiting.insert(ticket, waiter);
            return;
        }
        let waiting = self.ledger.waiting();
        let error = match self.ledger.is_draining() {
            true => PoolError::Closed,
            false => PoolError::Crowded { waiting },
        };
        let _ = waiter.answer.send(Err(error));
    }

    fn back(&mut self, id: CloneId, machine: Box<Machine>, touched: bool) {
        let Some(Lent { since, .. }) = self.lent.remove(&id) else {
            return;
        };
        if touched {
            self.ledger.returned();
            self.end(machine);
        } else {
            self.ledger.untouched(id, since);
            self.rest(id, machine, since);
        }
    }

    /// Watches over a clone until it is lent or ended.
    fn rest(&mut self, id: CloneId, machine: Box<Machine>, since: Duration) {
        let (words, every) = (self.parts.words.clone(), self.parts.settings.check);
        let monitor = machine.monitor().clone();
        let (end, unfiltered) = (machine.end_of_vmm(), machine.unfiltered());
        let watch = tokio::spawn(async move {
            let why = match end {
                Ok(end) => tokio::select! {
                    () = end => "its QEMU has ended",
                    () = does_not_rest(&monitor, every) => "it does not rest any more",
                    _ = unfiltered => "its network is not filtered any more",
                },
                Err(_) => "it cannot be watched",
            };
            let _ = words.send(Word::Unfit(id, why));
        });
        let watch = watch.abort_handle();
        let resting = Resting {
            machine,
            watch,
            since,
        };
        self.resting.insert(id, resting);
    }

    fn do_all(&mut self) {
        let now = self.now();
        let mut room = match self.ledger.wants_room(now) {
            true => self.room(),
            false => NOTHING,
        };
        while let Some(act) = self.ledger.next(now, &mut room) {
            match act {
                Act::Start(id) => self.start(id),
                Act::Lend(ticket, id) => self.lend(ticket, id),
                Act::End(id) => self.end_resting(id),
            }
        }
        self.refuse_late(now, &room);
        self.parts.status.send_replace(Status {
            idle: self.ledger.idle(),
            starting: self.ledger.starting(),
            lent: self.ledger.lent(),
            ending: self.ledger.ending(),
            waiting: self.ledger.waiting(),
            closed: self.ledger.is_draining(),
            last_failure: self.last_failure.as_deref().cloned(),
            left_behind: self.left_behind,
        });
    }

    /// What the host has for this pool, less what those who have clones may
    /// still take of it.
    fn room(&self) -> Room {
        let (rules, gauge) = (&self.parts.rules, &self.parts.gauge);
        let lent = self.lent.values();
        let lent = lent.map(|lent| rules.lent_cost.saturating_sub(gauge.own(lent.pid)));
        let starting = rules
            .idle_cost
            .saturating_mul(self.ledger.starting() as u64);
        let promised = lent.fold(starting, u64::saturating_add);
        match gauge.read() {
            Ok(reading) => reading.room(&self.parts.settings.admission, promised),
            Err(error) => {
                tracing::warn!("cannot tell what the host has left: {error}");
                NOTHING
            }
        }
    }

    /// Tells those whose time is over.
    fn refuse_late(&mut self, now: Duration, room: &Room) {
        let over = Instant::now();
        let late =
            |(ticket, waiter): (&Ticket, &Waiter)| (waiter.deadline <= over).then_some(*ticket);
        let late: Vec<Ticket> = self.waiting.iter().filter_map(late).collect();
        if late.is_empty() {
            return;
        }
        let why = self.why(now, room);
        for ticket in late {
            self.ledger.give_up(ticket);
            if let Some(waiter) = self.waiting.remove(&ticket) {
                let (within, why) = (waiter.within, why.clone());
                let _ = waiter.answer.send(Err(PoolError::Late { within, why }));
            }
        }
    }

    fn why(&self, now: Duration, room: &Room) -> Why {
        let rules = &self.parts.rules;
        let waiting = self.ledger.waiting();
        match (self.ledger.hindrance(now, room), &self.last_failure) {
            (Hindrance::Full, _) => Why::Full {
                max: rules.max,
                waiting,
            },
            (Hindrance::Memory, _) => Why::Memory {
                spare: Bytes(room.spare),
                need: Bytes(match self.ledger.idle() {
                    0 => rules.idle_cost,
                    _ => rules.lent_cost,
                }),
                reserve: self.parts.settings.admission.reserve,
            },
            (Hindrance::Failing, Some(last)) => Why::Failing { last: last.clone() },
            (Hindrance::Failing | Hindrance::Starting, _) => Why::Slow { waiting },
        }
    }

    fn start(&mut self, id: CloneId) {
        let name = format!("{}-{}", self.parts.settings.name, VmId::random());
        let spec = Spec {
            // It has at most 40 characters, and these have 12.
            id: name.parse().unwrap_or_else(|_| VmId::random()),
            ..self.parts.spec.clone()
        };
        let host = self.parts.host.clone();
        let mut told = Told {
            id,
            words: self.parts.words.clone(),
            over: false,
        };
        self.parts.crew.give(move |runtime| {
            let up = begin(runtime, &host, &spec);
            told.tell(up.map_err(|error| Box::new(Report::of(&error))));
        });
    }

    fn lend(&mut self, ticket: Ticket, id: CloneId) {
        let Some(resting) = self.resting.remove(&id) else {
            return;
        };
        resting.watch.abort();
        let (pid, since) = (resting.machine.process().pid(), resting.since);
        self.lent.insert(id, Lent { pid, since });
        let loan = Loan::new(id, resting.machine, self.parts.words.clone());
        // A caller who is gone drops it, and it comes back as it was.
        if let Some(waiter) = self.waiting.remove(&ticket) {
            let _ = waiter.answer.send(Ok(loan));
        }
    }

    fn end_resting(&mut self, id: CloneId) {
        if let Some(resting) = self.resting.remove(&id) {
            resting.watch.abort();
            self.end(resting.machine);
        }
    }

    fn end(&self, machine: Box<Machine>) {
        let words = self.parts.words.clone();
        self.parts.crew.give(move |runtime| {
            let left = runtime.block_on(ended(*machine));
            let _ = words.send(Word::Gone(left));
        });
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        for resting in self.resting.values() {
            resting.watch.abort();
        }
    }
}

const NOTHING: Room = Room {
    spare: 0,
    stalled: true,
    tight: true,
};

/// Waits until QEMU does not say any more that a clone rests.
async fn does_not_rest(monitor: &Monitor, every: Duration) {
    loop {
        tokio::time::sleep(every).await;
        let asked = tokio::time::timeout(ANSWER, rests(monitor)).await;
        if asked != Ok(true) {
            return;
        }
    }
}

/// Starts a clone and brings it to rest.
fn begin(runtime: &Handle, host: &Host, spec: &Spec) -> Result<Box<Machine>, RunError> {
    runtime.block_on(async {
        let (_, machine) = host.start_clone(spec).await?;
        match machine.rest(host.boot_timeout).await {
            Ok(()) => Ok(Box::new(machine)),
            Err(error) => {
                ended(machine).await;
                Err(error.into())
            }
        }
    })
}

/// Ends a machine; gives how much of it is left behind.
async fn ended(machine: Machine) -> usize {
    let left = machine.kill().await.err().unwrap_or_default();
    for error in &left {
        tracing::warn!("left behind, `bulkhead gc` will try again: {error}");
    }
    left.len()
}

/// Tells the keeper what came of a start, whatever happens to it.
struct Told {
    id: CloneId,
    words: UnboundedSender<Word>,
    over: bool,
}

impl Told {
    fn tell(&mut self, up: Result<Box<Machine>, Box<Report>>) {
        self.over = true;
        // Without a keeper, the machine ends here.
        let _ = self.words.send(Word::Up(self.id, up));
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        if !self.over {
            let cancelled = Report::of(&MachineError::Cancelled);
            self.tell(Err(Box::new(cancelled)));
        }
    }
}
