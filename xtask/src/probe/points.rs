//! The verbs that are probed, and the points they pass: counted by running them,
//! never listed here.

use std::collections::BTreeSet;
use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::Path;
use std::time::Duration;

use super::place::{EXPORT, Kit, Place, TEMPLATE, VERB, end, wait};
use anyhow::{Context as _, Result, bail};

/// Name of the machine in every scenario.
pub(super) const VM: &str = "m";

/// What stands before the verb.
#[derive(Debug, Clone, Copy)]
pub(super) enum Step {
    /// A verb that succeeds.
    Verb(&'static [&'static str]),
    /// The machine's supervisor is killed.
    KillSupervisor,
    /// Supervisor and VMM are killed.
    KillAll,
    /// A verb that is killed at a point.
    Crash(&'static [&'static str], &'static str),
}

/// A verb and what stands before it.
#[derive(Debug)]
pub(super) struct Scenario {
    pub(super) name: &'static str,
    pub(super) before: &'static [Step],
    pub(super) verb: &'static [&'static str],
}

const CREATE: &[&str] = &["create", "--name", VM, "--memory", "256M", "--cpus", "1"];
const ADOPT: &[&str] = &[
    "create",
    "--name",
    VM,
    "--memory",
    "256M",
    "--cpus",
    "1",
    "--survivors",
    "adopt",
];
const START: &[&str] = &["start", VM];
pub(super) const SET: &[&str] = &["set", VM, "--write-rate", "64M", "--memory", "192M"];
const BUILD: &[&str] = &["template", "build", "--memory", "256M", "--cpus", "1"];
const SAVE: &[&str] = &["snapshot", "save", VM, "s"];
const EXPORT_SNAPSHOT: &[&str] = &["snapshot", "export", VM, "s", EXPORT];
const EXPORT_TEMPLATE: &[&str] = &["template", "export", TEMPLATE, EXPORT];
const CREATED: Step = Step::Verb(CREATE);
const ADOPTABLE: Step = Step::Verb(ADOPT);
const STARTED: Step = Step::Verb(START);

/// All of them.
pub(super) const SCENARIOS: [Scenario; 28] = {
    const fn of(
        name: &'static str,
        before: &'static [Step],
        verb: &'static [&'static str],
    ) -> Scenario {
        Scenario { name, before, verb }
    }
    [
        of("create", &[], CREATE),
        of("start", &[CREATED], START),
        of("exec", &[CREATED, STARTED], &["exec", VM, "true"]),
        of(
            "exec-detached",
            &[CREATED, STARTED],
            &["exec", "--detach", VM, "true"],
        ),
        of("stop", &[CREATED, STARTED], &["stop", VM]),
        of("rm", &[CREATED], &["rm", VM]),
        of("rm-force", &[CREATED, STARTED], &["rm", "--force", VM]),
        of("start-adoptable", &[ADOPTABLE], START),
        of(
            "create-again",
            &[Step::Crash(CREATE, "cli 1 rename state.json")],
            CREATE,
        ),
        of(
            "gc-created",
            &[Step::Crash(CREATE, "cli 1 rename state.json")],
            &["gc"],
        ),
        of("gc", &[CREATED, STARTED, Step::KillAll], &["gc"]),
        of(
            "take-over",
            &[ADOPTABLE, STARTED, Step::KillSupervisor],
            &["gc"],
        ),
        of(
            "run",
            &[],
            &[
                "run", "--name", VM, "--memory", "256M", "--cpus", "1", "--", "true",
            ],
        ),
        of("restart", &[CREATED, STARTED], &["restart", VM]),
        of("set", &[CREATED, STARTED], SET),
        of("template", &[], BUILD),
        of(
            "template-rm",
            &[Step::Verb(BUILD)],
            &["template", "rm", "--all"],
        ),
        of("clone", &[Step::Verb(BUILD), CREATED], START),
        of("reset", &[CREATED, STARTED], &["reset", VM]),
        of("snapshot-save", &[CREATED, STARTED], SAVE),
        of(
            "snapshot-save-disk",
            &[CREATED, STARTED, Step::Verb(&["stop", VM])],
            &["snapshot", "save", "--disk-only", VM, "s"],
        ),
        of(
            "snapshot-restore",
            &[CREATED, STARTED, Step::Verb(SAVE)],
            &["snapshot", "restore", VM, "s"],
        ),
        of(
            "snapshot-rm",
            &[CREATED, STARTED, Step::Verb(SAVE)],
            &["snapshot", "rm", VM, "s"],
        ),
        of("fork", &[CREATED, STARTED], &["fork", VM]),
        of(
            "snapshot-export",
            &[CREATED, STARTED, Step::Verb(SAVE)],
            EXPORT_SNAPSHOT,
        ),
        of(
            "snapshot-import",
            &[
                CREATED,
                STARTED,
                Step::Verb(SAVE),
                Step::Verb(EXPORT_SNAPSHOT),
                Step::Verb(&["rm", "--force", VM]),
            ],
            &["snapshot", "import", EXPORT],
        ),
        of("template-export", &[Step::Verb(BUILD)], EXPORT_TEMPLATE),
        of(
            "template-import",
            &[
                Step::Verb(BUILD),
                Step::Verb(EXPORT_TEMPLATE),
                Step::Verb(&["template", "rm", "--all"]),
            ],
            &["template", "import", EXPORT],
        ),
    ]
};

/// Where the process that passes a point is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Since {
    /// By the verb.
    Verb,
    /// By what stands before it.
    Before,
}

/// The n-th passing of a point by one of our programs.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Point {
    pub(super) since: Since,
    /// `ROLE N POINT`, as `BULKHEAD_FAULT` has it.
    pub(super) place: String,
}

impl Scenario {
    /// Brings about what stands before the verb; `fault` is for the processes
    /// started by that.
    pub(super) fn prepare(&self, place: &Place, fault: Option<&str>) -> Result<()> {
        for step in self.before {
            match step {
                Step::Verb(words) => {
                    let mut command = place.verb(*words)?;
                    if let Some(fault) = fault {
                        arm(&mut command, place, fault);
                    }
                    let code = wait(&mut command.spawn()?, VERB)?;
                    if code != Some(0) {
                        let said = fs::read_to_string(place.file("verb.err")).unwrap_or_default();
                        bail!("bulkhead {} gave {code:?}: {said}", words.join(" "));
                    }
                }
                Step::KillSupervisor | Step::KillAll => {
                    let all = place.processes().into_iter();
                    let all = all.filter(|one| one.ours || matches!(step, Step::KillAll));
                    end(&all.collect::<Vec<_>>());
                }
                Step::Crash(words, point) => {
                    let mut command = place.verb(*words)?;
                    arm(&mut command, place, &format!("stop={point}"));
                    let mut child = command.spawn()?;
                    let reached = reached(place, Some(&mut child), VERB)?;
                    reached.context("what should crash did not get there")?;
                    child.kill()?;
                    child.wait()?;
                    fs::remove_file(place.file(REACHED))?;
                }
            }
        }
        Ok(())
    }

    /// The points that the verb passes, in their order.
    pub(super) fn points(&self, kit: &Kit) -> Result<Vec<Point>> {
        let place = Place::new(kit)?;
        let file = place.file("points");
        let record = format!("record={}", file.display());
        self.prepare(&place, Some(&record))?;
        let before = fs::read_to_string(&file).unwrap_or_default();
        let mut command = place.verb(self.verb)?;
        arm(&mut command, &place, &record);
        let code = wait(&mut command.spawn()?, VERB)?;
        if code != Some(0) {
            let said = fs::read_to_string(place.file("verb.err")).unwrap_or_default();
            bail!("{} gave {code:?}: {said}", self.name);
        }
        // A supervisor may have a step to go when the verb has ended.
        std::thread::sleep(Duration::from_millis(300));
        let all = fs::read_to_string(&file).context("the verb passed no point")?;
        let points = passed(&before, &all);
        anyhow::ensure!(!points.is_empty(), "{} passed no point", self.name);
        Ok(points)
    }
}

/// The points in `all` after `before`: lines of `PID ROLE N POINT`.
fn passed(before: &str, all: &str) -> Vec<Point> {
    let split = |line: &str| -> Option<(String, String)> {
        let (pid, place) = line.split_once(' ')?;
        Some((pid.to_owned(), place.to_owned()))
    };
    let old: BTreeSet<String> = before
        .lines()
        .filter_map(split)
        .map(|(pid, _)| pid)
        .collect();
    let new = all.get(before.len()..).unwrap_or_default();
    let point = |(pid, place): (String, String)| Point {
        since: match old.contains(&pid) {
            true => Since::Before,
            false => Since::Verb,
        },
        place,
    };
    new.lines().filter_map(split).map(point).collect()
}

/// File that says who got to the point.
pub(super) const REACHED: &str = "reached";

/// Has a command, and what it starts, stop or fail.
pub(super) fn arm(command: &mut std::process::Command, place: &Place, fault: &str) {
    command
        .env("BULKHEAD_FAULT", fault)
        .env("BULKHEAD_FAULT_REACHED", place.file(REACHED));
}

/// Waits until somebody has stopped at the point, and gives its process id;
/// `None` when the verb ended before that.
pub(super) fn reached(
    place: &Place,
    mut verb: Option<&mut std::process::Child>,
    limit: Duration,
) -> Result<Option<i32>> {
    let begin = std::time::Instant::now();
    let mut over = None;
    while begin.elapsed() < limit {
        if let Some(pid) = who(&place.file(REACHED))
            && is_stopped(pid)
        {
            return Ok(Some(pid));
        }
        if over.is_none()
            && let Some(verb) = &mut verb
            && verb.try_wait()?.is_some()
        {
            over = Some(std::time::Instant::now());
        }
        // The supervisor may get there a little later.
        if over.is_some_and(|at| at.elapsed() > Duration::from_secs(1)) {
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    bail!("nobody got there within {} s", limit.as_secs())
}

fn who(path: &Path) -> Option<i32> {
    fs::read_to_string(path).ok()?.parse().ok()
}

fn is_stopped(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        stat.rsplit_once(')')
            .is_some_and(|(_, rest)| rest.starts_with(" T"))
    })
}

/// Picks `n` of `all` by `seed`: as evenly as can be over the groups of both kinds.
pub(super) fn sample<T, A: Eq, B: Eq>(
    all: Vec<T>,
    n: usize,
    seed: u64,
    groups: impl Fn(&T) -> (A, B),
) -> Vec<T> {
    let mut left: Vec<(u64, T)> = all
        .into_iter()
        .enumerate()
        .map(|(at, one)| {
            let mut hasher = DefaultHasher::new();
            (seed, at).hash(&mut hasher);
            (hasher.finish(), one)
        })
        .collect();
    left.sort_by_key(|(order, _)| *order);
    let mut picked: Vec<T> = Vec::new();
    while picked.len() < n && !left.is_empty() {
        let crowd = |one: &T| {
            let (a, b) = groups(one);
            let same = picked.iter().map(|other| {
                let (c, d) = groups(other);
                usize::from(a == c) + usize::from(b == d)
            });
            same.sum::<usize>()
        };
        let (at, _) = left
            .iter()
            .enumerate()
            .min_by_key(|(_, (_, one))| crowd(one))
            .unwrap_or((0, &left[0]));
        picked.push(left.remove(at).1);
    }
    picked
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_those_after_the_preparation_and_know_their_process() {
        let before = "7 cli 1 lock run\n8 supervisor 1 fork\n";
        let all = format!("{before}8 supervisor 2 fork\n9 cli 1 lock run\n");
        let point = |since, place: &str| Point {
            since,
            place: place.to_owned(),
        };
        assert_eq!(
            passed(before, &all),
            [
                point(Since::Before, "supervisor 2 fork"),
                point(Since::Verb, "cli 1 lock run")
            ]
        );
    }

    #[test]
    fn a_sample_is_even_and_the_same_for_the_same_seed() {
        let all: Vec<(usize, usize)> = (0..300)
            .map(|at| (if at < 250 { 0 } else { 1 + at % 3 }, at % 5))
            .collect();
        let pick = |seed| sample(all.clone(), 20, seed, |one| *one);
        let picked = pick(1);
        assert_eq!(picked.len(), 20);
        assert_eq!(picked, pick(1));
        assert_ne!(picked, pick(2));
        for group in 0..4 {
            let of = picked.iter().filter(|one| one.0 == group).count();
            assert!((3..=7).contains(&of), "{of} of group {group}");
        }
        for kind in 0..5 {
            let of = picked.iter().filter(|one| one.1 == kind).count();
            assert!((2..=6).contains(&of), "{of} of kind {kind}");
        }
        assert_eq!(sample(all, 1000, 1, |one| *one).len(), 300);
    }
}
