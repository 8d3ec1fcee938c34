//! A bench's results, and how they are printed.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::facts::Facts;
use super::plot;
use super::rounds::Series;
use super::stats::{median_within, quantile};

/// Our subject.
pub(super) const OURS: &str = "bulkhead";
/// The floor: QEMU, or a program in the guest, with nothing of ours around it.
pub(super) const FLOOR: &str = "bare-qemu";

/// What a figure counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    Ms,
    Mib,
}

/// One bench's results.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Report {
    /// Name of the bench.
    pub(super) bench: String,
    /// Where and with what it was measured.
    pub(super) host: Facts,
    /// Each subject's phases.
    pub(super) rows: Vec<Row>,
    /// Each phase of one subject against another's.
    pub(super) ratios: Vec<Ratio>,
    /// Who was not measured, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) missing: Vec<Missing>,
}

/// Somebody who was not measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Missing {
    pub(super) subject: String,
    pub(super) why: String,
}

/// One phase of one subject; in milliseconds, or in the unit the names say.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Row {
    pub(super) subject: String,
    pub(super) phase: String,
    pub(super) n: usize,
    #[serde(flatten)]
    pub(super) figures: Figures,
}

/// The quartiles, and the slow end.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(untagged)]
pub(super) enum Figures {
    Ms {
        p25_ms: f64,
        p50_ms: f64,
        p75_ms: f64,
        p95_ms: f64,
        p99_ms: f64,
    },
    Mib {
        p25_mib: f64,
        p50_mib: f64,
        p75_mib: f64,
        p95_mib: f64,
        p99_mib: f64,
    },
}

/// One phase of `of` against that of `to`, in pairs measured next to each other.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Ratio {
    pub(super) of: String,
    pub(super) to: String,
    pub(super) phase: String,
    /// Median of the pairs' ratios.
    pub(super) p50: f64,
    /// Their lower and upper quartiles.
    pub(super) low: f64,
    pub(super) high: f64,
    /// Between which the median of any number of rounds would lie, with 95 %.
    #[serde(default)]
    pub(super) within: (f64, f64),
}

impl Figures {
    fn of(unit: Unit, samples: &[f64]) -> Self {
        let [p25, p50, p75, p95, p99] =
            [0.25, 0.5, 0.75, 0.95, 0.99].map(|part| rounded(quantile(samples, part)));
        match unit {
            Unit::Ms => Self::Ms {
                p25_ms: p25,
                p50_ms: p50,
                p75_ms: p75,
                p95_ms: p95,
                p99_ms: p99,
            },
            Unit::Mib => Self::Mib {
                p25_mib: p25,
                p50_mib: p50,
                p75_mib: p75,
                p95_mib: p95,
                p99_mib: p99,
            },
        }
    }

    /// 25, 50, 75, 95 and 99 of a hundred are below these.
    pub(super) fn all(&self) -> [f64; 5] {
        match *self {
            Self::Ms {
                p25_ms,
                p50_ms,
                p75_ms,
                p95_ms,
                p99_ms,
            } => [p25_ms, p50_ms, p75_ms, p95_ms, p99_ms],
            Self::Mib {
                p25_mib,
                p50_mib,
                p75_mib,
                p95_mib,
                p99_mib,
            } => [p25_mib, p50_mib, p75_mib, p95_mib, p99_mib],
        }
    }

    pub(super) fn unit(&self) -> &'static str {
        match self {
            Self::Ms { .. } => "ms",
            Self::Mib { .. } => "MiB",
        }
    }
}

/// To the microsecond: what is below was not measured.
fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

impl Ratio {
    /// Of the rounds in which both have the phase.
    fn of(of: &Series, to: &Series, phase: &str) -> Option<Self> {
        let pairs: Vec<f64> = of
            .rounds
            .iter()
            .zip(&to.rounds)
            .filter_map(|(a, b)| Some(a.get(phase)? / b.get(phase)?))
            .collect();
        (!pairs.is_empty()).then(|| Self {
            of: of.subject.clone(),
            to: to.subject.clone(),
            phase: phase.to_owned(),
            p50: rounded(quantile(&pairs, 0.5)),
            low: rounded(quantile(&pairs, 0.25)),
            high: rounded(quantile(&pairs, 0.75)),
            within: {
                let (low, high) = median_within(&pairs);
                (rounded(low), rounded(high))
            },
        })
    }
}

impl Report {
    /// All phases of all subjects, and the first subject's against each other's.
    pub(super) fn new(
        bench: &str,
        host: Facts,
        unit: Unit,
        all: &[Series],
        missing: Vec<Missing>,
    ) -> Self {
        let mut phases: Vec<&str> = Vec::new();
        for (phase, _) in all.iter().flat_map(|series| series.rounds.iter().flatten()) {
            if !phases.contains(phase) {
                phases.push(phase);
            }
        }
        let (mut rows, mut ratios) = (Vec::new(), Vec::new());
        for phase in phases {
            for series in all {
                let samples = series.column(phase);
                if !samples.is_empty() {
                    rows.push(Row {
                        subject: series.subject.clone(),
                        phase: phase.to_owned(),
                        n: samples.len(),
                        figures: Figures::of(unit, &samples),
                    });
                }
            }
            let Some((first, others)) = all.split_first() else {
                continue;
            };
            ratios.extend(
                others
                    .iter()
                    .filter_map(|other| Ratio::of(first, other, phase)),
            );
        }
        Self {
            bench: bench.to_owned(),
            host,
            rows,
            ratios,
            missing,
        }
    }

    /// For people.
    pub(super) fn table(&self) -> String {
        let mut text = format!("{}\n{}\n", self.bench, self.host.text());
        let width = |names: &mut dyn Iterator<Item = usize>| names.max().unwrap_or(0);
        let subjects = width(&mut self.rows.iter().map(|row| row.subject.len())).max(7);
        let phases = width(&mut self.rows.iter().map(|row| row.phase.len())).max(5);
        let line = |subject: &str, phase: &str, cells: [String; 6]| {
            let [n, figures @ ..] = cells;
            let figures = figures.map(|figure| format!("{figure:>10}")).join(" ");
            format!("{subject:subjects$}  {phase:phases$} {n:>5} {figures}\n")
        };
        let unit = self.rows.first().map_or("ms", |row| row.figures.unit());
        let head = ["n", "p25", "p50", "p75", "p95", "p99"].map(|name| match name {
            "n" => name.to_owned(),
            _ => format!("{name} {unit}"),
        });
        text += &line("subject", "phase", head);
        for row in &self.rows {
            let [p25, p50, p75, p95, p99] = row.figures.all().map(|value| format!("{value:.2}"));
            let cells = [row.n.to_string(), p25, p50, p75, p95, p99];
            text += &line(&row.subject, &row.phase, cells);
        }
        if !self.ratios.is_empty() {
            text += "\nratio: median of the rounds (quartiles; with 95 % the median is within)\n";
        }
        for ratio in &self.ratios {
            text += &format!(
                "{:phases$}  {} / {}: {:.2} ({:.2} to {:.2}; within {:.2} to {:.2})\n",
                ratio.phase,
                ratio.of,
                ratio.to,
                ratio.p50,
                ratio.low,
                ratio.high,
                ratio.within.0,
                ratio.within.1
            );
        }
        for missing in &self.missing {
            text += &format!("not measured: {}: {}\n", missing.subject, missing.why);
        }
        text
    }

    /// Prints it, and leaves it as JSON and as a picture in `save`.
    pub(super) fn give(&self, json: bool, save: Option<&Path>) -> Result<()> {
        let text = serde_json::to_string_pretty(self)?;
        match json {
            true => println!("{text}"),
            false => print!("{}", self.table()),
        }
        let Some(dir) = save else { return Ok(()) };
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let write = |extension: &str, text: &str| {
            let path = dir.join(format!("{}.{extension}", self.bench.replace(' ', "-")));
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
        };
        write("json", &(text + "\n"))?;
        write("svg", &plot::svg(self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(subject: &str, rounds: &[&[(&'static str, f64)]]) -> Series {
        Series {
            subject: subject.to_owned(),
            rounds: rounds.iter().map(|round| round.to_vec().into()).collect(),
        }
    }

    #[test]
    fn ratios_are_those_of_pairs() {
        let of = series("a", &[&[("all", 2.0)], &[("all", 30.0)], &[("all", 4.0)]]);
        let to = series("b", &[&[("all", 1.0)], &[("all", 10.0)], &[("all", 4.0)]]);
        let ratio = Ratio::of(&of, &to, "all").unwrap();
        assert_eq!((ratio.p50, ratio.low, ratio.high), (2.0, 1.5, 2.5));
    }

    #[test]
    fn a_phase_that_only_one_has_gives_no_ratio() {
        let of = series("a", &[&[("all", 2.0), ("cpu", 1.0)]]);
        let to = series("b", &[&[("all", 1.0)]]);
        let report = Report::new("x", Facts::default(), Unit::Ms, &[of, to], Vec::new());
        assert_eq!((report.rows.len(), report.ratios.len()), (3, 1));
    }

    #[test]
    fn the_json_names_its_unit_and_is_read_back() {
        let of = series("a", &[&[("all", 2.0)]]);
        for (unit, name) in [(Unit::Ms, "p50_ms"), (Unit::Mib, "p50_mib")] {
            let rows = std::slice::from_ref(&of);
            let report = Report::new("x", Facts::default(), unit, rows, Vec::new());
            let json = serde_json::to_value(&report).unwrap();
            assert_eq!(json["rows"][0][name], 2.0);
            let back: Report = serde_json::from_value(json).unwrap();
            assert_eq!(back.rows[0].figures.all()[1], 2.0);
        }
    }
}
