//! One point, one kind of fault, and what was left.

use std::fmt;
use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use bulkhead::spec::{Bytes, IoLimits, Tuning};
use nix::sys::signal::Signal;

use super::place::{EXPORT, Kit, Place, Process, VERB, end};
use super::points::{Point, REACHED, Scenario, Since, VM, arm, reached};
use super::verdict::Found;

/// How long a verb may take to notice that the supervisor died, at most: less
/// than it waits for any answer.
const NOTICE: Duration = Duration::from_secs(15);
/// How much later than the verb a supervisor may get to a point.
const LATER: Duration = Duration::from_secs(4);

/// What happens at a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Fault {
    Kill(Whom),
    /// A call fails with this error.
    Fail(&'static str),
}

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Whom {
    Cli,
    Supervisor,
    Vmm,
    SupervisorAndVmm,
    All,
}

impl Fault {
    /// All of them. What exists at a point is only known there.
    pub(super) const ALL: [Self; 8] = [
        Self::Kill(Whom::Cli),
        Self::Kill(Whom::Supervisor),
        Self::Kill(Whom::Vmm),
        Self::Kill(Whom::SupervisorAndVmm),
        Self::Kill(Whom::All),
        Self::Fail("ENOSPC"),
        Self::Fail("EMFILE"),
        Self::Fail("EPERM"),
    ];
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fail(errno) => errno,
            Self::Kill(Whom::Cli) => "kill cli",
            Self::Kill(Whom::Supervisor) => "kill supervisor",
            Self::Kill(Whom::Vmm) => "kill vmm",
            Self::Kill(Whom::SupervisorAndVmm) => "kill supervisor+vmm",
            Self::Kill(Whom::All) => "kill all",
        })
    }
}

/// Which of our processes exist at a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cast {
    pub(super) cli: bool,
    pub(super) supervisor: bool,
    pub(super) vmm: bool,
}

impl Cast {
    /// Whether they can be killed, and it is not the same as killing fewer.
    pub(super) fn has(self, whom: Whom) -> bool {
        match whom {
            Whom::Cli => self.cli,
            Whom::Supervisor => self.supervisor,
            Whom::Vmm => self.vmm,
            Whom::SupervisorAndVmm => self.supervisor && self.vmm,
            Whom::All => self.cli && (self.supervisor || self.vmm),
        }
    }
}

/// What came of a case.
#[derive(Debug)]
pub(super) enum Ending {
    /// What was wrong; nothing, if all is well. At a kill: who was there.
    Done(Vec<String>, Option<Cast>),
    /// Those to be killed do not exist at this point.
    Absent(Cast),
}

/// One case.
#[derive(Debug, Clone, Copy)]
pub(super) struct Case<'a> {
    pub(super) scenario: &'static Scenario,
    pub(super) point: &'a Point,
    pub(super) fault: Fault,
}

impl Case<'_> {
    /// Its name, by which it can be run again.
    pub(super) fn name(&self) -> String {
        let Self {
            scenario,
            point,
            fault,
        } = self;
        format!("{}: {}: {fault}", scenario.name, point.place)
    }

    /// Runs it.
    ///
    /// # Errors
    /// It could not be brought about: nothing is known then.
    pub(super) fn run(&self, kit: &Kit) -> Result<Ending> {
        let place = Place::new(kit)?;
        let order = match self.fault {
            Fault::Kill(_) => format!("stop={}", self.point.place),
            Fault::Fail(errno) => format!("{errno}={}", self.point.place),
        };
        let before = (self.point.since == Since::Before).then_some(order.as_str());
        self.scenario.prepare(&place, before)?;
        let mut command = place.verb(self.scenario.verb)?;
        if self.point.since == Since::Verb {
            arm(&mut command, &place, &order);
        }
        let mut verb = command.spawn()?;
        let mut cast = None;
        if let Fault::Kill(whom) = self.fault {
            let stopped = reached(&place, Some(&mut verb), VERB)?;
            stopped.context("the verb ended without getting there")?;
            let there = Actors::of(&place, &mut verb)?;
            if !there.cast().has(whom) {
                return Ok(Ending::Absent(there.cast()));
            }
            cast = Some(there.cast());
            there.kill(whom);
        }
        let mut wrong = Vec::new();
        let begin = Instant::now();
        let code = loop {
            if let Some(status) = verb.try_wait()? {
                break status.code().or(status.signal().map(|signal| 128 + signal));
            }
            let supervised = place.processes().iter().any(Process::is_supervise);
            let limit = if supervised {
                VERB
            } else {
                kit.within.min(NOTICE)
            };
            if begin.elapsed() > limit && !(cast.is_none() && begin.elapsed() < VERB) {
                wrong.push(format!("the verb hung for {} s", limit.as_secs()));
                let _ = verb.kill();
                let _ = verb.wait();
                break None;
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        if cast.is_none() {
            arrive(&place)?;
        }
        let said = fs::read_to_string(place.file("verb.err")).unwrap_or_default();
        if said.contains("panicked at") {
            wrong.push(format!("it panicked: {}", said.trim()));
        }
        let gc = place.run(&["gc"])?;
        if gc.code != Some(0) {
            wrong.push(format!("gc gave {:?}: {}", gc.code, gc.stderr.trim()));
        }
        let found = place.settled()?;
        wrong.extend(found.wrong.iter().cloned());
        wrong.extend(self.kept(&found, code));
        if wrong.is_empty() {
            wrong.extend(self.usable(&place, &found)?);
        }
        Ok(Ending::Done(wrong, cast))
    }

    /// What the verb said it did and did not.
    fn kept(&self, found: &Found, code: Option<i32>) -> Option<String> {
        let machine = found.of(VM);
        let live = machine.map(|view| view.state.is_live());
        let failed = matches!(self.fault, Fault::Fail(_));
        let verb = match self.scenario.name {
            name @ "snapshot-import" => name,
            _ => self.scenario.verb[0],
        };
        let wanted = match (verb, code == Some(0)) {
            ("create" | "snapshot-import", true) => live == Some(false),
            // What is refused is not half there.
            ("create" | "snapshot-import", false) if failed => live.is_none(),
            ("start" | "restart" | "reset", true) if failed => live == Some(true),
            // All of it, or nothing; whether the answer arrives is another matter.
            ("set", true) => machine.is_some_and(|view| is_set(&view.tuning)),
            ("set", false) if failed && self.point.place.starts_with("supervisor") => {
                machine.is_some_and(|view| view.tuning == Tuning::default())
            }
            ("set", false) => {
                machine.is_some_and(|view| view.tuning == Tuning::default() || is_set(&view.tuning))
            }
            ("stop", true) => live == Some(false),
            ("rm" | "run", true) => live.is_none(),
            _ => true,
        };
        let state = machine.map_or("absent", |view| view.state.as_str());
        (!wanted).then(|| format!("{verb} gave {code:?}, and the machine is {state}"))
    }

    /// Whether the machine can be used, removed, and made again.
    fn usable(&self, place: &Place, found: &Found) -> Result<Vec<String>> {
        let mut wrong = Vec::new();
        let mut must = |words: &[&str]| -> Result<()> {
            let given = place.run(words)?;
            if given.code != Some(0) {
                let (words, said) = (words.join(" "), given.stderr.trim());
                wrong.push(format!("{words} gave {:?}: {said}", given.code));
            }
            Ok(())
        };
        // Whatever became of its maker, a template that is there is whole.
        must(&["template", "ls"])?;
        for id in templates(place)? {
            must(&["template", "inspect", &id])?;
        }
        match found.of(VM) {
            Some(view) => {
                let starts = [
                    "start",
                    "start-adoptable",
                    "gc",
                    "take-over",
                    "clone",
                    "reset",
                    "snapshot-import",
                ];
                if view.state.may_start() && starts.contains(&self.scenario.name) {
                    must(&["start", VM])?;
                }
            }
            None => must(&["create", "--name", VM])?,
        }
        if self.scenario.name == "set" && found.of(VM).is_some_and(|view| view.state.is_live()) {
            must(&["verify", VM])?;
        }
        must(&["rm", "--force", VM])?;
        // So is an export.
        if place.file(EXPORT).exists() {
            match self.scenario.verb[0] {
                "template" => {
                    must(&["template", "rm", "--all"])?;
                    must(&["template", "import", EXPORT])?;
                }
                _ => {
                    must(&["snapshot", "import", EXPORT])?;
                    must(&["rm", VM])?;
                }
            }
        }
        // Forks are machines of their own.
        for fork in found.machines.iter().filter(|view| view.id.as_str() != VM) {
            must(&["rm", "--force", fork.id.as_str()])?;
        }
        // What removes it may still be ending.
        let begin = Instant::now();
        let left = loop {
            let left = place.left();
            if left.is_empty() || begin.elapsed() > place.kit.within {
                break left;
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        wrong.extend(left.iter().map(|one| format!("after rm, {one} is left")));
        Ok(wrong)
    }
}

/// Whether a machine is held to what [`SET`](super::points::SET) asks for.
fn is_set(tuning: &Tuning) -> bool {
    let asked = Tuning {
        memory: Some(Bytes::mib(192)),
        io: IoLimits {
            write_bytes: Some(Bytes::mib(64)),
            ..IoLimits::default()
        },
        ..Tuning::default()
    };
    *tuning == asked
}

/// Ids of the templates there are.
fn templates(place: &Place) -> Result<Vec<String>> {
    let given = place.must(&["template", "ls", "--json"])?;
    let all: Vec<serde_json::Value> = serde_json::from_slice(&given)?;
    let ids = all.iter().filter_map(|one| one["id"].as_str());
    Ok(ids.map(str::to_owned).collect())
}

/// Waits for who fails. A supervisor may get there when the verb is over.
fn arrive(place: &Place) -> Result<()> {
    let begin = Instant::now();
    while !place.file(REACHED).exists() {
        if begin.elapsed() > LATER {
            anyhow::bail!("the verb ended without getting there");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Who is there at a point.
struct Actors {
    cli: Option<Process>,
    supervisors: Vec<Process>,
    vmm: Vec<Process>,
}

impl Actors {
    fn of(place: &Place, verb: &mut Child) -> Result<Self> {
        let pid = verb.id().cast_signed();
        let running = verb.try_wait()?.is_none();
        let all = place.processes();
        let is_supervisor = |one: &Process| {
            let parent = all.iter().find(|other| other.pid == one.parent);
            one.is_supervise() && !parent.is_some_and(Process::is_supervise)
        };
        let cli = all.iter().find(|one| running && one.pid == pid);
        let supervisors: Vec<Process> = all
            .iter()
            .filter(|one| is_supervisor(one))
            .cloned()
            .collect();
        // What is neither was made by one of them: QEMU, or what will be.
        let vmm = all
            .iter()
            .filter(|one| one.pid != pid && !supervisors.contains(one));
        Ok(Self {
            cli: cli.cloned(),
            vmm: vmm.cloned().collect(),
            supervisors,
        })
    }

    fn cast(&self) -> Cast {
        Cast {
            cli: self.cli.is_some(),
            supervisor: !self.supervisors.is_empty(),
            vmm: !self.vmm.is_empty(),
        }
    }

    /// Kills some, and has the others go on.
    fn kill(self, whom: Whom) {
        let chosen = |of: &[Whom]| of.contains(&whom) || whom == Whom::All;
        let groups = [
            (
                chosen(&[Whom::Cli]),
                self.cli.into_iter().collect::<Vec<_>>(),
            ),
            (
                chosen(&[Whom::Supervisor, Whom::SupervisorAndVmm]),
                self.supervisors,
            ),
            (chosen(&[Whom::Vmm, Whom::SupervisorAndVmm]), self.vmm),
        ];
        let of = |killed: bool| {
            let groups = groups.iter().filter(move |group| group.0 == killed);
            groups.flat_map(|group| group.1.iter().cloned())
        };
        end(&of(true).collect::<Vec<_>>());
        of(false).for_each(|one| one.signal(Signal::SIGCONT));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_those_who_are_there_are_killed_and_each_set_once() {
        let cast = |cli, supervisor, vmm| Cast {
            cli,
            supervisor,
            vmm,
        };
        let count = |cast: Cast| {
            let whom = Fault::ALL.into_iter().filter_map(|fault| match fault {
                Fault::Kill(whom) => Some(whom),
                Fault::Fail(_) => None,
            });
            whom.filter(|whom| cast.has(*whom)).count()
        };
        assert_eq!(count(cast(true, false, false)), 1);
        assert_eq!(count(cast(true, true, false)), 3);
        assert_eq!(count(cast(false, true, true)), 3);
        assert_eq!(count(cast(true, true, true)), 5);
        assert_eq!(count(cast(true, false, true)), 3);
    }
}
