//! Who is served next, and what is started or ended for it: no clock of its
//! own, no machine, no host. The keeper tells it what happens and does what it
//! says.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

/// A clone, from its start to its end; never used again.
pub(super) type CloneId = u64;
/// A caller's place: lower ones are served first.
pub(super) type Ticket = u64;

/// Pauses after starts that failed: the first, and the longest.
const PAUSES: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(30)];
/// How long the next start waits for a clone that was just lent to wake: they
/// would have the same processors, and there is somebody who waits for the one.
const WAKING: Duration = Duration::from_millis(10);

/// What the ledger keeps to. Times are those since the pool's beginning.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules {
    /// So many are kept ready also while the host is short of processors.
    pub(super) min: usize,
    /// So many are kept ready.
    pub(super) idle: usize,
    /// So many at most, whatever they do.
    pub(super) max: usize,
    /// So many are started at a time.
    pub(super) parallel: usize,
    /// So many callers may wait.
    pub(super) queue: usize,
    /// Nobody is given one that is older.
    pub(super) ttl: Duration,
    /// What a clone that is ready takes of the host's memory, in bytes.
    pub(super) idle_cost: u64,
    /// What one that is lent can come to.
    pub(super) lent_cost: u64,
}

impl Rules {
    /// From this age on one is replaced, before it is too old.
    fn stale(&self) -> Duration {
        self.ttl / 4 * 3
    }
}

/// What the host has for more clones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Room {
    /// Bytes that may still be given away.
    pub(super) spare: u64,
    /// Programs wait for memory: nothing is started.
    pub(super) stalled: bool,
    /// Programs wait for processors: one start at a time.
    pub(super) tight: bool,
}

/// What is to be done; the ledger counts it as done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Act {
    /// Start a clone, and bring it to rest.
    Start(CloneId),
    /// Give a clone that rests to the caller with this ticket.
    Lend(Ticket, CloneId),
    /// End a clone that rests.
    End(CloneId),
}

/// What stands in the way of whoever is served next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hindrance {
    /// All that there may be are lent out, or not quite gone.
    Full,
    /// The host has too little memory.
    Memory,
    /// Starts fail; the next try is later.
    Failing,
    /// One is being started.
    Starting,
}

#[derive(Debug, Clone, Copy)]
struct Idle {
    id: CloneId,
    /// When it was started.
    since: Duration,
}

/// The books of a pool.
#[derive(Debug)]
pub(super) struct Ledger {
    rules: Rules,
    /// Oldest first.
    idle: VecDeque<Idle>,
    waiting: BTreeSet<Ticket>,
    starting: usize,
    lent: usize,
    ending: usize,
    last: CloneId,
    /// Failed starts in a row, and when the next may be.
    failures: u32,
    pause_until: Duration,
    /// When the last that was lent is awake, probably.
    awake_at: Duration,
    draining: bool,
}

impl Ledger {
    pub(super) fn new(rules: Rules) -> Self {
        Self {
            rules,
            idle: VecDeque::new(),
            waiting: BTreeSet::new(),
            starting: 0,
            lent: 0,
            ending: 0,
            last: 0,
            failures: 0,
            pause_until: Duration::ZERO,
            awake_at: Duration::ZERO,
            draining: false,
        }
    }

    pub(super) fn idle(&self) -> usize {
        self.idle.len()
    }

    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    pub(super) fn starting(&self) -> usize {
        self.starting
    }

    pub(super) fn lent(&self) -> usize {
        self.lent
    }

    pub(super) fn ending(&self) -> usize {
        self.ending
    }

    pub(super) fn is_draining(&self) -> bool {
        self.draining
    }

    /// All clones, whatever they do.
    pub(super) fn alive(&self) -> usize {
        self.idle.len() + self.starting + self.lent + self.ending
    }

    /// A caller queues up; false where there is no room in the queue, or never
    /// will be a clone. One that was served in vain comes back to its place.
    pub(super) fn ask(&mut self, ticket: Ticket, again: bool) -> bool {
        let room = again || self.waiting.len() < self.rules.queue;
        room && !self.draining && self.waiting.insert(ticket)
    }

    /// A caller waits no more.
    pub(super) fn give_up(&mut self, ticket: Ticket) {
        self.waiting.remove(&ticket);
    }

    /// A clone is up and rests.
    pub(super) fn started(&mut self, id: CloneId, now: Duration) {
        self.starting -= 1;
        self.failures = 0;
        self.idle.push_back(Idle { id, since: now });
    }

    /// A clone did not come up; nothing is left of it.
    pub(super) fn failed(&mut self, now: Duration) {
        self.starting -= 1;
        let pause = PAUSES[0] * 2u32.saturating_pow(self.failures.min(16));
        self.failures += 1;
        self.pause_until = now + pause.min(PAUSES[1]);
    }

    /// A clone that rested is not fit to be lent; it is being ended now. False
    /// where it does not rest any more.
    pub(super) fn unfit(&mut self, id: CloneId) -> bool {
        let at = self.idle.iter().position(|one| one.id == id);
        let found = at.and_then(|at| self.idle.remove(at)).is_some();
        self.ending += usize::from(found);
        found
    }

    /// A clone that was lent comes back, and is being ended now.
    pub(super) fn returned(&mut self) {
        self.lent -= 1;
        self.ending += 1;
    }

    /// A clone that was lent at `since` comes back as it was: nobody took it.
    pub(super) fn untouched(&mut self, id: CloneId, since: Duration) {
        self.lent -= 1;
        let at = self.idle.partition_point(|one| one.since <= since);
        self.idle.insert(at, Idle { id, since });
    }

    /// A clone is gone.
    pub(super) fn ended(&mut self) {
        self.ending -= 1;
    }

    /// Nobody is served any more, and everything that rests is ended. Gives
    /// those who waited.
    pub(super) fn drain(&mut self) -> BTreeSet<Ticket> {
        self.draining = true;
        std::mem::take(&mut self.waiting)
    }

    /// What is to be done next, if anything; `room` becomes less by it. To be
    /// called until there is nothing.
    pub(super) fn next(&mut self, now: Duration, room: &mut Room) -> Option<Act> {
        if let Some(id) = self.overdue(now) {
            self.ending += 1;
            return Some(Act::End(id));
        }
        if self.draining {
            return None;
        }
        if let (Some(ticket), Some(clone)) = (self.waiting.first(), self.idle.front())
            && self.has_room_to_lend(room)
        {
            let act = Act::Lend(*ticket, clone.id);
            self.waiting.pop_first();
            self.idle.pop_front();
            self.lent += 1;
            self.awake_at = now + WAKING;
            room.spare -= self.rules.lent_cost;
            return Some(act);
        }
        if self.may_start(now, room) && self.wants_more(now, room) {
            self.starting += 1;
            self.last += 1;
            room.spare -= self.rules.idle_cost;
            return Some(Act::Start(self.last));
        }
        None
    }

    /// One that rests and is to be ended.
    fn overdue(&mut self, now: Duration) -> Option<CloneId> {
        let oldest = self.idle.front()?;
        let age = now.saturating_sub(oldest.since);
        let stale = age >= self.rules.stale() && self.waiting.is_empty();
        // It makes room for its successor where there is no other.
        let in_the_way = self.alive() >= self.rules.max && self.starting == 0 && self.ending == 0;
        let spare = self.idle.len() > self.rules.idle;
        let over = self.draining || age >= self.rules.ttl || stale && (spare || in_the_way);
        let one = if over { self.idle.pop_front() } else { None };
        one.map(|one| one.id)
    }

    fn has_room_to_lend(&self, room: &Room) -> bool {
        room.spare >= self.rules.lent_cost
    }

    fn may_start(&self, now: Duration, room: &Room) -> bool {
        let at_a_time = if room.tight { 1 } else { self.rules.parallel };
        self.alive() < self.rules.max
            && self.starting < at_a_time
            && now >= self.pause_until
            && (now >= self.awake_at || !self.waiting.is_empty())
            && !room.stalled
            && room.spare >= self.rules.idle_cost
    }

    fn wants_more(&self, now: Duration, room: &Room) -> bool {
        let fresh = |one: &&Idle| now.saturating_sub(one.since) < self.rules.stale();
        let fresh = self.idle.iter().filter(fresh).count() + self.starting;
        let ready = if room.tight {
            self.rules.min
        } else {
            self.rules.idle
        };
        // More of them do not help those who wait for memory.
        let taken = if self.has_room_to_lend(room) {
            self.waiting.len()
        } else {
            0
        };
        fresh < ready + taken
    }

    /// What stands in the way of the first of those who wait.
    pub(super) fn hindrance(&self, now: Duration, room: &Room) -> Hindrance {
        match () {
            () if !self.idle.is_empty() && !self.has_room_to_lend(room) => Hindrance::Memory,
            () if self.starting > 0 || !self.idle.is_empty() => Hindrance::Starting,
            () if self.alive() >= self.rules.max => Hindrance::Full,
            () if room.stalled || room.spare < self.rules.idle_cost => Hindrance::Memory,
            () if now < self.pause_until => Hindrance::Failing,
            () => Hindrance::Starting,
        }
    }

    /// When something is to be done though nothing happens, but for what the
    /// host's room allows.
    pub(super) fn due(&self, now: Duration) -> Option<Duration> {
        let ages = [self.rules.stale(), self.rules.ttl];
        let ages = self
            .idle
            .iter()
            .flat_map(|one| ages.map(|age| one.since + age));
        let times = ages.chain([self.pause_until, self.awake_at]);
        times.filter(|time| *time > now).min()
    }

    /// Whether it would do more if the host had more room.
    pub(super) fn wants_room(&self, now: Duration) -> bool {
        let roomy = Room {
            spare: u64::MAX,
            stalled: false,
            tight: false,
        };
        let lend = !self.waiting.is_empty() && !self.idle.is_empty();
        !self.draining && (lend || self.may_start(now, &roomy) && self.wants_more(now, &roomy))
    }
}

#[cfg(test)]
#[path = "ledger_tests.rs"]
mod tests;
