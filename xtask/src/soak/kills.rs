//! `cargo xtask soak --kills N`: somebody is killed at a random moment of a
//! random verb, over and over. Machines go on from a whole snapshot each time,
//! what was half made is used by nobody, and nothing is left.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Child;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::Args;
use crate::probe::place::{Place, VERB, end, wait};
use crate::probe::{Came, Row, Rows};

/// The machine that all of it happens to.
const VM: &str = "m";
/// The snapshot that is there all the while, and the one that may come of a save.
const BASE: &str = "base";
const NEW: &str = "new";
/// The machines that may come of a verb besides.
const OTHERS: [&str; 3] = ["f-1", "f-2", "c"];
/// What each machine has.
const SIZE: [&str; 6] = ["--memory", "256M", "--cpus", "1", "--disk", "64M"];
/// Whoever is killed is killed within this.
const MOMENT: u64 = 2500;

/// Every so many kills something is said.
const TELL: usize = 10;

const VERBS: [(&str, &[&str]); 7] = [
    ("save", &["snapshot", "save", VM, NEW]),
    ("save disk", &["snapshot", "save", "--disk-only", VM, NEW]),
    ("restore", &["snapshot", "restore", VM, BASE]),
    ("fork", &["fork", VM, "-n", "2", "--name", "f"]),
    ("reset", &["reset", VM]),
    ("template", &["template", "build", "--rebuild"]),
    ("clone", &["create", "--name", "c", "--start"]),
];

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Victim {
    /// The verb.
    Verb,
    /// A machine's supervisor.
    Owner,
    /// A machine's QEMU.
    Vmm,
}

/// Numbers that look random, and are the same for the same seed (splitmix64).
struct Chance(u64);

impl Chance {
    fn below(&mut self, most: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (bits ^ (bits >> 31)) % most
    }
}

/// Kills `count` times.
pub(super) fn run(args: &Args, count: usize, place: &Place, rows: &Rows) -> Result<()> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let seed = args.seed.unwrap_or(since);
    let (begin, mut chance) = (Instant::now(), Chance(seed));
    let add = |case: String, why: Vec<String>| {
        let came = match why.is_empty() {
            true => Came::Passed,
            false => Came::Failed,
        };
        if !args.json {
            println!("{:6} {case}", format!("{came:?}").to_lowercase());
        }
        let again = format!("cargo xtask soak --kills {count} --seed {seed}");
        let ms = begin.elapsed().as_millis();
        rows.add(Row {
            case,
            came,
            why,
            again,
            ms,
            tried: None,
        });
    };
    for survivors in ["kill", "adopt"] {
        mark(place, survivors)?;
        let (mut killed, mut failed) = (BTreeMap::new(), Vec::new());
        for at in 0..count / 2 {
            let (what, words) = VERBS[chance.below(VERBS.len() as u64) as usize];
            let moment = Duration::from_millis(chance.below(MOMENT));
            let victim = match chance.below(3) {
                0 => Victim::Verb,
                1 => Victim::Owner,
                _ => Victim::Vmm,
            };
            let round = round(place, words, victim, moment, &mut chance);
            let told = format!("{survivors} {at}: {what}, {victim:?} after {moment:?}");
            let mut fail = |why: String| {
                eprintln!("failed: {why}");
                failed.push(why);
            };
            match round {
                Ok(hit) => *killed.entry((victim, hit)).or_insert(0) += 1,
                Err(error) => fail(format!("{told}: {error:#}")),
            }
            if at % TELL == TELL - 1 {
                eprintln!("{told}: {} s so far", begin.elapsed().as_secs());
            }
            if let Err(error) = whole(place) {
                fail(format!("after {told}: {error:#}"));
                // Once more from the beginning, to see the next one for itself.
                clear(place)?;
                mark(place, survivors)?;
            }
        }
        let hits: Vec<String> = killed
            .iter()
            .map(|((victim, hit), count)| {
                let hit = if *hit { "" } else { " (already gone)" };
                format!("{count} {victim:?}{hit}")
            })
            .collect();
        let what = format!("survivors {survivors}, seed {seed}: {}", hits.join(", "));
        add(what, failed);
        clear(place)?;
        add("nothing is left".into(), place.left());
    }
    Ok(())
}

/// Makes and starts the machine, marks memory and disk, and saves it.
fn mark(place: &Place, survivors: &str) -> Result<()> {
    place.must(
        &[
            &["create", "--name", VM, "--survivors", survivors],
            &SIZE[..],
        ]
        .concat(),
    )?;
    place.must(&["start", VM])?;
    let script = "echo base > /tmp/mark; echo base > /var/mark";
    place.must(&["exec", "-u", "root", VM, "sh", "-c", script])?;
    place.must(&["snapshot", "save", VM, BASE])?;
    Ok(())
}

/// Has somebody killed while a verb is under way; gives whether they were there
/// to be killed. The verb may fail, and must end.
fn round(
    place: &Place,
    words: &[&str],
    victim: Victim,
    moment: Duration,
    chance: &mut Chance,
) -> Result<bool> {
    let size: &[&str] = match words[0] {
        "template" | "create" => &SIZE,
        _ => &[],
    };
    let mut verb = place.verb([words, size].concat())?.spawn()?;
    std::thread::sleep(moment);
    let hit = strike(place, &mut verb, victim, chance)?;
    wait(&mut verb, VERB).context("the verb hangs")?;
    Ok(hit)
}

fn strike(place: &Place, verb: &mut Child, victim: Victim, chance: &mut Chance) -> Result<bool> {
    if victim == Victim::Verb {
        let lives = verb.try_wait()?.is_none();
        verb.kill()?;
        // Where networks are kept apart, it is the child of what enters them.
        let pid = i32::try_from(verb.id())?;
        let all = place.processes().into_iter();
        let all = all.filter(|one| one.ours && !one.is_supervise() && one.parent == pid);
        end(&all.collect::<Vec<_>>());
        return Ok(lives);
    }
    let fits = |one: &crate::probe::place::Process| match victim {
        Victim::Owner => one.is_supervise(),
        _ => !one.ours && one.words.first().is_some_and(|word| word.contains("qemu")),
    };
    let mut all: Vec<_> = place.processes().into_iter().filter(fits).collect();
    if all.is_empty() {
        return Ok(false);
    }
    let one = all.swap_remove(chance.below(all.len() as u64) as usize);
    end(&[one]);
    Ok(true)
}

/// Whether everything that is there is whole, nothing else is there, and the
/// machine goes on from its snapshot.
fn whole(place: &Place) -> Result<()> {
    // A supervisor that was just killed may be on its way out.
    let gc = place.run(&["gc"])?;
    ensure!(gc.code == Some(0), "gc: {}", gc.stderr.trim());
    for name in OTHERS {
        let removed = place.run(&["rm", "--force", name])?;
        let told = removed.stderr.contains("machine-not-found");
        ensure!(
            removed.code == Some(0) || told,
            "rm {name}: {}",
            removed.stderr.trim()
        );
    }
    let found = place.settled()?;
    ensure!(found.wrong.is_empty(), "{}", found.wrong.join("; "));
    let listed: Value = serde_json::from_slice(&place.must(&["--json", "snapshot", "ls", VM])?)?;
    let names: Option<BTreeSet<String>> = listed.as_array().map(|all| {
        let names = all.iter().map(|one| one["manifest"]["name"].as_str());
        names
            .map(|name| name.unwrap_or_default().to_owned())
            .collect()
    });
    let names = names.context("snapshot ls gave no list")?;
    ensure!(names.contains(BASE), "the snapshot is gone: {names:?}");
    for name in &names {
        ensure!([BASE, NEW].contains(&name.as_str()), "{name} is left");
        place.must(&["snapshot", "inspect", VM, name])?;
    }
    let listed: Value = serde_json::from_slice(&place.must(&["--json", "template", "ls"])?)?;
    for one in listed.as_array().into_iter().flatten() {
        let id = one["id"].as_str().context("a template has no id")?;
        place.must(&["template", "inspect", id])?;
    }
    if names.contains(NEW) {
        goes_on(place, NEW)?;
        place.must(&["snapshot", "rm", VM, NEW])?;
    }
    goes_on(place, BASE)
}

/// Goes back to a snapshot, and looks at disk and memory.
fn goes_on(place: &Place, name: &str) -> Result<()> {
    place.must(&["snapshot", "restore", VM, name])?;
    // The disk alone may have been saved, of a machine that did not run.
    if place
        .settled()?
        .machines
        .iter()
        .any(|view| view.id.as_str() == VM && view.state.may_start())
    {
        place.must(&["start", VM])?;
    }
    let told = place.must(&["exec", VM, "sh", "-c", "cat /tmp/mark /var/mark 2>&1; true"])?;
    let told = String::from_utf8_lossy(&told).into_owned();
    match name {
        BASE if told != "base\nbase\n" => bail!("{name} is another: {told:?}"),
        _ => Ok(()),
    }
}

/// Removes everything.
fn clear(place: &Place) -> Result<()> {
    place.run(&["gc"])?;
    for name in [VM].iter().chain(&OTHERS) {
        place.run(&["rm", "--force", name])?;
    }
    place.must(&["gc"])?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chance_is_the_same_for_the_same_seed_and_reaches_everything() {
        let draw = |seed| {
            let mut chance = Chance(seed);
            (0..100).map(|_| chance.below(7)).collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
        assert_eq!(draw(3).into_iter().collect::<BTreeSet<_>>().len(), 7);
    }
}
