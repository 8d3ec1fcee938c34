//! The ledger, without a host.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn rules(min: usize, idle: usize, max: usize) -> Rules {
    Rules {
        min,
        idle,
        max,
        parallel: 2,
        queue: 3,
        ttl: 40 * SECOND,
        idle_cost: 10,
        lent_cost: 100,
    }
}

fn plenty() -> Room {
    Room {
        spare: 1 << 40,
        stalled: false,
        tight: false,
    }
}

fn acts(ledger: &mut Ledger, now: u64, mut room: Room) -> Vec<Act> {
    std::iter::from_fn(|| ledger.next(SECOND * now as u32, &mut room)).collect()
}

/// One that has `idle` clones ready since the beginning.
fn filled(rules: Rules) -> Ledger {
    let mut ledger = Ledger::new(rules);
    while ledger.idle() < rules.idle {
        for act in acts(&mut ledger, 0, plenty()) {
            let Act::Start(id) = act else {
                panic!("{act:?}")
            };
            ledger.started(id, Duration::ZERO);
        }
    }
    ledger
}

#[test]
fn it_is_filled_a_few_at_a_time() {
    let mut ledger = Ledger::new(rules(1, 3, 5));
    assert_eq!(
        acts(&mut ledger, 0, plenty()),
        [Act::Start(1), Act::Start(2)]
    );
    ledger.started(2, Duration::ZERO);
    assert_eq!(acts(&mut ledger, 0, plenty()), [Act::Start(3)]);
    ledger.started(1, Duration::ZERO);
    ledger.started(3, Duration::ZERO);
    assert_eq!(acts(&mut ledger, 0, plenty()), []);
    assert_eq!(ledger.idle(), 3);
}

#[test]
fn callers_are_served_in_turn_and_clones_are_replaced() {
    let mut ledger = filled(rules(1, 1, 2));
    for ticket in [7, 8, 9] {
        assert!(ledger.ask(ticket, false));
    }
    assert!(!ledger.ask(10, false), "the queue is full");
    // One is there, and one more may be.
    assert_eq!(
        acts(&mut ledger, 1, plenty()),
        [Act::Lend(7, 1), Act::Start(2)]
    );
    ledger.give_up(8);
    ledger.started(2, SECOND);
    assert_eq!(acts(&mut ledger, 1, plenty()), [Act::Lend(9, 2)]);
    // Served in vain: before whoever came later.
    assert!(ledger.ask(10, false) && ledger.ask(9, true));
    ledger.returned();
    assert_eq!(acts(&mut ledger, 1, plenty()), [], "it is not gone yet");
    assert_eq!(ledger.hindrance(SECOND, &plenty()), Hindrance::Full);
    ledger.ended();
    assert_eq!(acts(&mut ledger, 1, plenty()), [Act::Start(3)]);
    assert_eq!(ledger.hindrance(SECOND, &plenty()), Hindrance::Starting);
    ledger.started(3, SECOND);
    assert_eq!(acts(&mut ledger, 1, plenty()), [Act::Lend(9, 3)]);
}

#[test]
fn a_host_that_is_short_is_asked_for_less() {
    let short = |spare| Room { spare, ..plenty() };
    let mut ledger = Ledger::new(rules(1, 3, 5));
    assert_eq!(acts(&mut ledger, 0, short(9)), []);
    assert!(ledger.wants_room(Duration::ZERO));
    assert_eq!(acts(&mut ledger, 0, short(19)), [Act::Start(1)]);
    ledger.started(1, Duration::ZERO);
    let tight = Room {
        tight: true,
        ..plenty()
    };
    assert_eq!(acts(&mut ledger, 0, tight), [], "min is there");
    let stalled = Room {
        stalled: true,
        ..plenty()
    };
    assert_eq!(acts(&mut ledger, 0, stalled), []);
    // A clone is there, but to let it run is too much.
    ledger.ask(1, false);
    assert_eq!(acts(&mut ledger, 0, short(9)), []);
    assert_eq!(
        ledger.hindrance(Duration::ZERO, &short(99)),
        Hindrance::Memory
    );
    assert_eq!(acts(&mut ledger, 0, short(105)), [Act::Lend(1, 1)]);
    assert_eq!(
        ledger.hindrance(Duration::ZERO, &short(9)),
        Hindrance::Memory
    );
    // Short of processors, those who wait are served one at a time.
    ledger.ask(2, false);
    ledger.ask(3, false);
    assert_eq!(acts(&mut ledger, 0, tight), [Act::Start(2)]);
}

#[test]
fn what_is_old_is_replaced_before_it_ends() {
    let mut ledger = filled(rules(1, 2, 4));
    assert_eq!(ledger.due(SECOND), Some(30 * SECOND));
    assert_eq!(acts(&mut ledger, 29, plenty()), []);
    assert_eq!(
        acts(&mut ledger, 30, plenty()),
        [Act::Start(3), Act::Start(4)]
    );
    ledger.started(3, 31 * SECOND);
    assert_eq!(acts(&mut ledger, 31, plenty()), [Act::End(1)]);
    ledger.ended();
    ledger.started(4, 31 * SECOND);
    assert_eq!(acts(&mut ledger, 31, plenty()), [Act::End(2)]);
    // Where there is no room for both, one after the other.
    let mut ledger = filled(rules(1, 2, 2));
    assert_eq!(acts(&mut ledger, 30, plenty()), [Act::End(1)]);
    ledger.ended();
    assert_eq!(acts(&mut ledger, 30, plenty()), [Act::Start(3)]);
    // Never lent when too old, whoever waits.
    ledger.ask(1, false);
    ledger.ask(2, false);
    let lent = acts(&mut ledger, 40, plenty());
    assert_eq!(lent, [Act::End(2)]);
}

#[test]
fn starts_that_fail_are_tried_again_later_and_later() {
    let mut ledger = Ledger::new(rules(1, 1, 1));
    let mut now = Duration::ZERO;
    let mut pauses = Vec::new();
    for _ in 0..12 {
        let act = ledger.next(now, &mut plenty());
        assert!(matches!(act, Some(Act::Start(_))), "{act:?}");
        ledger.failed(now);
        assert_eq!(ledger.next(now, &mut plenty()), None);
        assert_eq!(ledger.hindrance(now, &plenty()), Hindrance::Failing);
        let due = ledger.due(now).unwrap();
        pauses.push(due - now);
        now = due;
    }
    assert_eq!(pauses[..2], [PAUSES[0], 2 * PAUSES[0]]);
    assert_eq!(pauses[11], PAUSES[1]);
}

#[test]
fn nothing_begins_while_it_drains() {
    let mut ledger = filled(rules(1, 2, 4));
    ledger.ask(1, false);
    assert_eq!(acts(&mut ledger, 0, plenty()), [Act::Lend(1, 1)]);
    assert_eq!(acts(&mut ledger, 1, plenty()), [Act::Start(3)]);
    ledger.ask(2, false);
    assert_eq!(ledger.drain(), BTreeSet::from([2]));
    assert!(!ledger.ask(3, false));
    assert_eq!(acts(&mut ledger, 1, plenty()), [Act::End(2)]);
    ledger.started(3, Duration::ZERO);
    assert_eq!(acts(&mut ledger, 1, plenty()), [Act::End(3)]);
    ledger.returned();
    (0..3).for_each(|_| ledger.ended());
    assert_eq!(ledger.alive(), 0);
}

#[test]
fn the_next_start_lets_the_one_that_was_lent_wake() {
    let mut ledger = filled(rules(1, 2, 4));
    ledger.ask(1, false);
    let mut room = plenty();
    let next = |ledger: &mut Ledger, now, room: &mut Room| ledger.next(now, room);
    let lent = next(&mut ledger, Duration::ZERO, &mut room);
    assert_eq!(lent, Some(Act::Lend(1, 1)));
    assert_eq!(next(&mut ledger, Duration::ZERO, &mut room), None);
    assert!(!ledger.wants_room(Duration::ZERO));
    assert_eq!(ledger.due(Duration::ZERO), Some(WAKING));
    assert_eq!(next(&mut ledger, WAKING, &mut room), Some(Act::Start(3)));
    // Whoever waits has nothing of that.
    ledger.ask(2, false);
    ledger.ask(3, false);
    let lent = next(&mut ledger, WAKING, &mut room);
    assert_eq!(lent, Some(Act::Lend(2, 2)));
    assert_eq!(next(&mut ledger, WAKING, &mut room), Some(Act::Start(4)));
}

/// Something that happens; numbers choose among what there is.
#[derive(Debug, Clone)]
enum Happens {
    Ask,
    GiveUp(usize),
    Up(usize),
    Failed(usize),
    Unfit(usize),
    Back(usize),
    Untouched(usize),
    Gone,
    Time(u32),
    Host(u64, bool, bool),
}

fn happens() -> impl Strategy<Value = Happens> {
    use Happens::*;
    prop_oneof![
        4 => Just(Ask),
        1 => any::<usize>().prop_map(GiveUp),
        4 => any::<usize>().prop_map(Up),
        1 => any::<usize>().prop_map(Failed),
        1 => any::<usize>().prop_map(Unfit),
        3 => any::<usize>().prop_map(Back),
        1 => any::<usize>().prop_map(Untouched),
        4 => Just(Gone),
        3 => (0..20u32).prop_map(Time),
        1 => (0..400u64, any::<bool>(), any::<bool>()).prop_map(|(a, b, c)| Host(a, b, c)),
    ]
}

/// What the world knows, to compare with.
#[derive(Debug)]
struct World {
    ledger: Ledger,
    rules: Rules,
    now: Duration,
    room: Room,
    tickets: Ticket,
    waiting: BTreeSet<Ticket>,
    starting: Vec<CloneId>,
    idle: BTreeMap<CloneId, Duration>,
    lent: BTreeMap<CloneId, Duration>,
    ending: usize,
    used: BTreeSet<CloneId>,
}

fn pick<T: Clone>(of: impl IntoIterator<Item = T>, at: usize) -> Option<T> {
    let all: Vec<T> = of.into_iter().collect();
    (!all.is_empty()).then(|| all[at % all.len()].clone())
}

impl World {
    fn happen(&mut self, what: &Happens) {
        match *what {
            Happens::Ask => {
                self.tickets += 1;
                let room = self.waiting.len() < self.rules.queue;
                assert_eq!(self.ledger.ask(self.tickets, false), room);
                if room {
                    self.waiting.insert(self.tickets);
                }
            }
            Happens::GiveUp(at) => {
                if let Some(ticket) = pick(self.waiting.clone(), at) {
                    self.waiting.remove(&ticket);
                    self.ledger.give_up(ticket);
                }
            }
            Happens::Up(at) | Happens::Failed(at) => {
                let Some(id) = pick(self.starting.clone(), at) else {
                    return;
                };
                self.starting.retain(|one| *one != id);
                match what {
                    Happens::Up(_) => {
                        self.ledger.started(id, self.now);
                        self.idle.insert(id, self.now);
                    }
                    _ => self.ledger.failed(self.now),
                }
            }
            Happens::Unfit(at) => {
                if let Some(id) = pick(self.idle.keys().copied(), at) {
                    self.idle.remove(&id);
                    self.ending += 1;
                    assert!(self.ledger.unfit(id));
                }
                assert!(!self.ledger.unfit(u64::MAX));
            }
            Happens::Back(at) | Happens::Untouched(at) => {
                let Some(id) = pick(self.lent.keys().copied(), at) else {
                    return;
                };
                let since = self.lent.remove(&id).unwrap();
                match what {
                    Happens::Back(_) => {
                        self.ending += 1;
                        self.ledger.returned();
                    }
                    _ => {
                        self.used.remove(&id);
                        self.idle.insert(id, since);
                        self.ledger.untouched(id, since);
                    }
                }
            }
            Happens::Gone if self.ending > 0 => {
                self.ending -= 1;
                self.ledger.ended();
            }
            Happens::Gone => {}
            Happens::Time(seconds) => self.now += SECOND * seconds,
            Happens::Host(spare, stalled, tight) => {
                self.room = Room {
                    spare,
                    stalled,
                    tight,
                };
            }
        }
    }

    fn act(&mut self, act: Act, before: Room) {
        match act {
            Act::Start(id) => {
                assert!(!before.stalled && before.spare >= self.rules.idle_cost);
                self.starting.push(id);
            }
            Act::Lend(ticket, id) => {
                assert!(before.spare >= self.rules.lent_cost);
                assert_eq!(self.waiting.pop_first(), Some(ticket), "not in turn");
                let since = self.idle.remove(&id).expect("it rests");
                assert!(self.now - since < self.rules.ttl, "too old");
                assert!(self.used.insert(id), "it was lent before");
                self.lent.insert(id, since);
            }
            Act::End(id) => {
                assert!(self.idle.remove(&id).is_some(), "it rests");
                self.ending += 1;
            }
        }
        let at_a_time = if before.tight { 1 } else { self.rules.parallel };
        if let Act::Start(_) = act {
            assert!(self.starting.len() <= at_a_time);
        }
        let ledger = &self.ledger;
        let mine = [
            self.idle.len(),
            self.starting.len(),
            self.lent.len(),
            self.ending,
        ];
        let theirs = [
            ledger.idle(),
            ledger.starting(),
            ledger.lent(),
            ledger.ending(),
        ];
        assert_eq!(mine, theirs);
        assert!(ledger.alive() <= self.rules.max);
        assert_eq!(ledger.waiting(), self.waiting.len());
    }

    fn settle(&mut self) {
        let mut room = self.room;
        for _ in 0..100 {
            let before = room;
            match self.ledger.next(self.now, &mut room) {
                Some(act) => self.act(act, before),
                None => return,
            }
        }
        panic!("it does not come to an end");
    }
}

proptest! {
    #[test]
    fn whatever_happens_the_books_are_right(
        numbers in (0..3usize, 0..3usize, 0..4usize),
        events in prop::collection::vec(happens(), 0..120),
    ) {
        let (min, idle) = (numbers.0, numbers.0 + numbers.1);
        let rules = rules(min, idle, (idle + numbers.2).max(1));
        let mut world = World {
            ledger: Ledger::new(rules),
            rules,
            now: Duration::ZERO,
            room: plenty(),
            tickets: 0,
            waiting: BTreeSet::new(),
            starting: Vec::new(),
            idle: BTreeMap::new(),
            lent: BTreeMap::new(),
            ending: 0,
            used: BTreeSet::new(),
        };
        world.settle();
        for event in &events {
            world.happen(event);
            world.settle();
        }
        // Left alone on a host with room, it is filled, and everybody is served.
        world.room = plenty();
        world.now += PAUSES[1];
        for _ in 0..200 {
            world.settle();
            world.now += WAKING;
            world.settle();
            for _ in 0..world.ending {
                world.happen(&Happens::Gone);
            }
            world.happen(&Happens::Up(0));
            if !world.waiting.is_empty() {
                world.happen(&Happens::Back(0));
            }
        }
        world.settle();
        prop_assert!(world.waiting.is_empty());
        let room_for_it = rules.max - world.lent.len() - world.ending;
        prop_assert!(world.idle.len() >= idle.min(room_for_it), "{world:?}");
    }
}
