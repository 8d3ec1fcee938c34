//! Samples, what is said of them, and how it is printed.

use serde::Serialize;

/// One bench's results; times in milliseconds.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// Name of the bench.
    pub(super) bench: &'static str,
    /// Where and with what it was measured.
    pub(super) host: Host,
    /// Each subject's phases.
    pub(super) rows: Vec<Row>,
    /// Each phase of one subject against another's.
    pub(super) ratios: Vec<Ratio>,
}

/// Where and with what.
#[derive(Debug, Serialize)]
pub(super) struct Host {
    pub(super) cpu: String,
    pub(super) cpus: usize,
    pub(super) kernel: String,
    pub(super) qemu: String,
    pub(super) guest_kernel: String,
    pub(super) machine: String,
    pub(super) accel: String,
    pub(super) commit: String,
}

/// One phase of one subject.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub(super) subject: &'static str,
    pub(super) phase: &'static str,
    pub(super) n: usize,
    pub(super) p50_ms: f64,
    pub(super) p95_ms: f64,
    pub(super) p99_ms: f64,
}

/// One phase of `of` against that of `to`, in pairs measured next to each other.
#[derive(Debug, Serialize)]
pub(super) struct Ratio {
    pub(super) of: &'static str,
    pub(super) to: &'static str,
    pub(super) phase: &'static str,
    /// Median of the pairs' ratios.
    pub(super) p50: f64,
    /// Their lower and upper quartiles.
    pub(super) low: f64,
    pub(super) high: f64,
}

/// The value below which `part` of the samples lie, interpolated.
pub(crate) fn quantile(samples: &[f64], part: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else {
        return f64::NAN;
    };
    let at = part * last as f64;
    let (below, above) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    below + (above - below) * at.fract()
}

impl Row {
    pub(super) fn of(subject: &'static str, phase: &'static str, samples: &[f64]) -> Self {
        Self {
            subject,
            phase,
            n: samples.len(),
            p50_ms: quantile(samples, 0.5),
            p95_ms: quantile(samples, 0.95),
            p99_ms: quantile(samples, 0.99),
        }
    }
}

impl Ratio {
    pub(super) fn of(
        (of, ours): (&'static str, &[f64]),
        (to, theirs): (&'static str, &[f64]),
        phase: &'static str,
    ) -> Self {
        let pairs: Vec<f64> = ours.iter().zip(theirs).map(|(a, b)| a / b).collect();
        Self {
            of,
            to,
            phase,
            p50: quantile(&pairs, 0.5),
            low: quantile(&pairs, 0.25),
            high: quantile(&pairs, 0.75),
        }
    }
}

impl Report {
    /// For people.
    pub(super) fn table(&self) -> String {
        let host = &self.host;
        let mut text = format!(
            "{} on {} x {}, Linux {}\n{}, {} {}, guest kernel {}\n\n",
            self.bench,
            host.cpus,
            host.cpu,
            host.kernel,
            host.qemu,
            host.machine,
            host.accel,
            host.guest_kernel
        );
        let line = |cells: [&str; 6]| {
            let [subject, phase, n, p50, p95, p99] = cells;
            format!("{subject:12} {phase:14} {n:>4} {p50:>9} {p95:>9} {p99:>9}\n")
        };
        text += &line(["subject", "phase", "n", "p50 ms", "p95 ms", "p99 ms"]);
        for row in &self.rows {
            let ms = [row.p50_ms, row.p95_ms, row.p99_ms].map(|ms| format!("{ms:.1}"));
            let n = row.n.to_string();
            text += &line([row.subject, row.phase, &n, &ms[0], &ms[1], &ms[2]]);
        }
        text += "\nratio (median of pairs, quartiles)\n";
        for ratio in &self.ratios {
            text += &format!(
                "{} / {}  {:14} {:.2} ({:.2} to {:.2})\n",
                ratio.of, ratio.to, ratio.phase, ratio.p50, ratio.low, ratio.high
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_interpolated() {
        let samples = [4.0, 1.0, 3.0, 2.0];
        assert_eq!(quantile(&samples, 0.5), 2.5);
        assert_eq!(quantile(&samples, 1.0), 4.0);
        assert!(quantile(&[], 0.5).is_nan());
    }

    #[test]
    fn ratios_are_those_of_pairs() {
        let ratio = Ratio::of(("a", &[2.0, 30.0, 4.0]), ("b", &[1.0, 10.0, 4.0]), "all");
        assert_eq!((ratio.p50, ratio.low, ratio.high), (2.0, 1.5, 2.5));
    }
}
