//! `cargo xtask probe faults`: SIGKILL and failing calls at every step.
//!
//! The steps are those that a build with the feature `faults` passes
//! (src/host/fault.rs), found by running each verb once. At each of them each
//! set of our processes is killed, and each error comes back. Then, within five
//! seconds and one `bulkhead gc`, nothing may be left and the state on disk must
//! tell the truth.

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use bulkhead::spec::Timeout;

use super::case::{Case, Cast, Ending, Fault};
use super::place::Kit;
use super::points::{Point, SCENARIOS, Scenario, sample};
use super::{Came, Row, Rows};
use crate::setup;

/// Options.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Every point with every fault, instead of a sample.
    #[arg(long, conflicts_with = "sample")]
    all: bool,
    /// Size of the sample.
    #[arg(long, default_value_t = 24, value_name = "N")]
    sample: usize,
    /// Which sample.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only cases whose name contains this: `VERB: ROLE N POINT: FAULT`.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Only a part of the points, such as 1/4: `--all` takes hours of a small
    /// machine.
    #[arg(long, value_name = "K/N", value_parser = part)]
    part: Option<(usize, usize)>,
    /// Only list the cases there are.
    #[arg(long)]
    list: bool,
    /// Cases at a time.
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// How long it may take until everything is in order; more on a busy host.
    #[arg(long, default_value = "5s", value_name = "TIME")]
    within: Timeout,
    /// kvm or tcg.
    #[arg(long, default_value = "kvm")]
    accel: String,
    /// Kernel other than the image's, such as `tuned`.
    #[arg(long)]
    kernel: Option<String>,
    /// Print the cases as JSON; the closing line is on stderr then.
    #[arg(long)]
    json: bool,
    /// Where images are kept.
    #[arg(long, env = "BULKHEAD_STATE_DIR", default_value_os_t = setup::usual_state_dir())]
    state_dir: PathBuf,
}

/// Reads `K/N`.
fn part(text: &str) -> Result<(usize, usize), String> {
    let numbers = text
        .split_once('/')
        .and_then(|(part, of)| Some((part.parse().ok()?, of.parse().ok()?)));
    match numbers {
        Some((part, of)) if (1..=of).contains(&part) => Ok((part, of)),
        _ => Err("it is K/N with K from 1 to N, such as 1/4".into()),
    }
}

/// The faults to be tried at one point.
struct Work {
    scenario: &'static Scenario,
    point: Point,
    faults: Vec<Fault>,
}

/// Runs the task; gives whether no case failed.
pub(crate) fn run(args: Args) -> Result<bool> {
    // A copy: another build must not change what is probed.
    let copy = tempfile::tempdir()?;
    let bulkhead = copy.path().join("bulkhead");
    std::fs::copy(binary()?, &bulkhead)?;
    let kit = Kit {
        bulkhead,
        state_dir: args.state_dir.clone(),
        accel: args.accel.clone(),
        kernel: args.kernel.clone(),
        networks: nix::unistd::geteuid().is_root(),
        within: args.within.0,
    };
    let mut work = all(&args, &kit)?;
    let cases: usize = work.iter().map(|work| work.faults.len()).sum();
    eprintln!("{} points, up to {cases} cases", work.len());
    if !args.all && args.only.is_none() && !args.list {
        work = picked(work, args.sample, args.seed);
    }
    if let Some((part, of)) = args.part {
        work = work.into_iter().skip(part - 1).step_by(of).collect();
    }
    if args.list {
        for Work {
            scenario,
            point,
            faults,
        } in &work
        {
            let of = |fault: &Fault| Case {
                scenario,
                point,
                fault: *fault,
            };
            faults
                .iter()
                .for_each(|fault| println!("{}", of(fault).name()));
        }
        return Ok(true);
    }
    ensure!(!work.is_empty(), "no case has that name: see --list");
    let exhaustive = args.all || args.only.is_some();
    let (rows, next, done) = (
        Rows::default(),
        Mutex::new(work.into_iter()),
        AtomicUsize::new(0),
    );
    let begin = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..args.jobs.max(1) {
            scope.spawn(|| {
                while let Some(work) = next.lock().ok().and_then(|mut next| next.next()) {
                    at_point(&work, &kit, &rows, exhaustive);
                    let done = done.fetch_add(1, Ordering::Relaxed) + 1;
                    if done % 20 == 0 {
                        eprintln!("{done} points after {} s", begin.elapsed().as_secs());
                    }
                }
            });
        }
    });
    rows.close(args.json)
}

/// All cases, found by running every verb once.
fn all(args: &Args, kit: &Kit) -> Result<Vec<Work>> {
    // Only those verbs that can be meant, where the beginning of a name is given.
    let meant =
        |scenario: &&Scenario| match args.only.as_deref().and_then(|only| only.split_once(": ")) {
            Some((verb, _)) if SCENARIOS.iter().any(|one| one.name == verb) => {
                scenario.name == verb
            }
            _ => true,
        };
    let mut work = Vec::new();
    // What is only done once on a host, and kept, is no step of a verb.
    let makes_caches = |scenario: &&Scenario| ["run", "template"].contains(&scenario.name);
    for scenario in SCENARIOS.iter().filter(makes_caches) {
        scenario.points(kit)?;
    }
    for scenario in SCENARIOS.iter().filter(meant) {
        let points = scenario.points(kit);
        for point in points.with_context(|| format!("cannot record {}", scenario.name))? {
            let named = |fault: &Fault| {
                let (point, fault) = (&point, *fault);
                let case = Case {
                    scenario,
                    point,
                    fault,
                };
                args.only
                    .as_ref()
                    .is_none_or(|only| case.name().contains(only.as_str()))
            };
            let faults: Vec<Fault> = Fault::ALL.into_iter().filter(named).collect();
            if !faults.is_empty() {
                work.push(Work {
                    scenario,
                    point,
                    faults,
                });
            }
        }
    }
    Ok(work)
}

/// A sample of single cases.
fn picked(work: Vec<Work>, n: usize, seed: u64) -> Vec<Work> {
    let single = |work: Work| {
        let Work {
            scenario,
            point,
            faults,
        } = work;
        faults.into_iter().map(move |fault| Work {
            scenario,
            point: point.clone(),
            faults: vec![fault],
        })
    };
    let all: Vec<Work> = work.into_iter().flat_map(single).collect();
    sample(all, n, seed, |work| (work.scenario.name, work.faults[0]))
}

/// Tries the faults at one point. Who is there is known after the first kill;
/// in a sample, whoever is there is killed where the one to be killed is not.
fn at_point(work: &Work, kit: &Kit, rows: &Rows, exhaustive: bool) {
    let mut cast: Option<Cast> = None;
    let mut faults = work.faults.clone();
    if !exhaustive {
        faults.extend(
            Fault::ALL
                .into_iter()
                .filter(|fault| matches!(fault, Fault::Kill(_))),
        );
    }
    for fault in faults {
        if let (Fault::Kill(whom), Some(cast)) = (fault, cast)
            && !cast.has(whom)
        {
            continue;
        }
        let case = Case {
            scenario: work.scenario,
            point: &work.point,
            fault,
        };
        let begin = Instant::now();
        // An error is no verdict: on a busy host others may get to a step first,
        // or the verb comes a moment too early. A second one is.
        let (came, why) = match case.run(kit).or_else(|_| case.run(kit)) {
            Ok(Ending::Absent(there)) => {
                cast = Some(there);
                continue;
            }
            Ok(Ending::Done(wrong, there)) => {
                cast = there.or(cast);
                (
                    if wrong.is_empty() {
                        Came::Passed
                    } else {
                        Came::Failed
                    },
                    wrong,
                )
            }
            Err(error) => (Came::Failed, vec![format!("{error:#}")]),
        };
        rows.add(Row {
            again: format!("cargo xtask probe faults --only '{}'", case.name()),
            case: case.name(),
            came,
            why,
            ms: begin.elapsed().as_millis(),
            tried: None,
        });
        if !exhaustive {
            return;
        }
    }
}

/// Builds bulkhead with its points, beside the other builds.
fn binary() -> Result<PathBuf> {
    let target = setup::target()?.join("faults");
    let words = ["build", "--package", "bulkhead-vm", "--bin", "bulkhead"];
    let mut cargo = setup::cargo(&words)?;
    cargo.env("CARGO_TARGET_DIR", &target);
    setup::call(cargo.args(["--features", "faults"]))?;
    Ok(target.join("debug/bulkhead"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_told_from_other_words() {
        assert_eq!(part("4/4"), Ok((4, 4)));
        for wrong in ["0/4", "5/4", "1/0", "1", "a/b", ""] {
            assert!(part(wrong).is_err(), "{wrong}");
        }
    }
}
