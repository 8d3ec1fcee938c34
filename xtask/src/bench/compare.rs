//! What moved between two results beyond the noise of either.
//!
//! Where both runs have a floor, the ratios to it are compared: they are pairs
//! measured next to each other, and most of what the host does cancels out.
//! What has no ratio is compared as it is. Something moved when the quartiles
//! do not overlap; with quartiles apart, the medians are too.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use super::report::Report;

/// Options.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Results of an earlier run (`--json` or `--save`).
    old: PathBuf,
    /// Results of a later one.
    new: PathBuf,
    /// Fail when something got slower.
    #[arg(long)]
    strict: bool,
}

/// Lower quartile, median, upper quartile.
type Spread = [f64; 3];

/// A thing measured in both runs.
#[derive(Debug, PartialEq)]
struct Moved {
    what: String,
    old: Spread,
    new: Spread,
    verdict: Verdict,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Faster,
    Slower,
    Noise,
}

/// Runs the comparison.
pub(crate) fn run(args: &Args) -> Result<()> {
    let (old, new) = (read(&args.old)?, read(&args.new)?);
    if old.bench != new.bench {
        bail!("{} cannot be compared with {}", old.bench, new.bench);
    }
    for (name, report) in [("old", &old), ("new", &new)] {
        print!("{name}: {}", report.host.text());
    }
    let moved = moves(&old, &new);
    let width = moved.iter().map(|one| one.what.len()).max().unwrap_or(0);
    for one in &moved {
        let text = |[low, median, high]: Spread| format!("{median:.2} ({low:.2} to {high:.2})");
        println!(
            "{:width$}  {} -> {}  {}",
            one.what,
            text(one.old),
            text(one.new),
            match one.verdict {
                Verdict::Faster => "less",
                Verdict::Slower => "MORE",
                Verdict::Noise => "within the noise",
            }
        );
    }
    let slower = moved.iter().filter(|one| one.verdict == Verdict::Slower);
    let slower = slower.count();
    if args.strict && slower > 0 {
        bail!("{slower} of {} got more", moved.len());
    }
    Ok(())
}

fn read(path: &Path) -> Result<Report> {
    let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let report = serde_json::from_slice(&text);
    report.with_context(|| format!("{} is not a bench's result", path.display()))
}

fn verdict(old: Spread, new: Spread) -> Verdict {
    if new[2] < old[0] {
        Verdict::Faster
    } else if new[0] > old[2] {
        Verdict::Slower
    } else {
        Verdict::Noise
    }
}

fn moves(old: &Report, new: &Report) -> Vec<Moved> {
    let mut moved = Vec::new();
    for ratio in &new.ratios {
        let earlier = old
            .ratios
            .iter()
            .find(|one| one.phase == ratio.phase && one.of == ratio.of && one.to == ratio.to);
        if let Some(earlier) = earlier {
            let old = [earlier.low, earlier.p50, earlier.high];
            let new = [ratio.low, ratio.p50, ratio.high];
            moved.push(Moved {
                what: format!("{} of {} / {}", ratio.phase, ratio.of, ratio.to),
                old,
                new,
                verdict: verdict(old, new),
            });
        }
    }
    for row in &new.rows {
        let related = |report: &Report| {
            report.ratios.iter().any(|ratio| {
                ratio.phase == row.phase && [&ratio.of, &ratio.to].contains(&&row.subject)
            })
        };
        if related(new) && related(old) {
            continue;
        }
        let earlier = old
            .rows
            .iter()
            .find(|one| one.phase == row.phase && one.subject == row.subject);
        if let Some(earlier) = earlier {
            let spread = |all: [f64; 5]| [all[0], all[1], all[2]];
            let (old, new) = (spread(earlier.figures.all()), spread(row.figures.all()));
            moved.push(Moved {
                what: format!("{} of {}, {}", row.phase, row.subject, row.figures.unit()),
                old,
                new,
                verdict: verdict(old, new),
            });
        }
    }
    moved
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::facts::Facts;
    use crate::bench::report::Unit;
    use crate::bench::rounds::Series;

    fn report(ours: [f64; 4], cpu: [f64; 4], floor: [f64; 4]) -> Report {
        let rounds = |columns: &[(&'static str, [f64; 4])]| {
            let round = |at: usize| {
                let cells = columns.iter().map(|(name, column)| (*name, column[at]));
                cells.collect::<Vec<_>>().into()
            };
            (0..4).map(round).collect()
        };
        let series = |subject: &str, rounds| Series {
            subject: subject.to_owned(),
            rounds,
        };
        let all = [
            series("ours", rounds(&[("all", ours), ("cpu", cpu)])),
            series("floor", rounds(&[("all", floor)])),
        ];
        Report::new("x", Facts::default(), Unit::Ms, &all, Vec::new())
    }

    #[test]
    fn a_busy_host_moves_nothing_and_a_slow_program_does() {
        let quiet = report([1.1, 1.2, 1.1, 1.2], [5.0; 4], [1.0; 4]);
        let busy = report([3.3, 2.4, 1.1, 4.8], [5.0; 4], [3.0, 2.0, 1.0, 4.0]);
        let slow = report([1.6, 1.7, 1.6, 1.5], [9.0; 4], [1.0; 4]);
        let verdicts = |new: &Report| -> Vec<Verdict> {
            moves(&quiet, new).iter().map(|one| one.verdict).collect()
        };
        assert_eq!(verdicts(&busy), [Verdict::Noise; 2]);
        assert_eq!(verdicts(&slow), [Verdict::Slower; 2]);
    }

    #[test]
    fn only_what_both_have_is_compared() {
        let old = report([1.0; 4], [1.0; 4], [1.0; 4]);
        let mut new = old.clone();
        new.ratios[0].phase = "other".to_owned();
        // The two rows of that phase have no ratio in common any more.
        assert_eq!(moves(&old, &new).len(), 3);
    }
}
