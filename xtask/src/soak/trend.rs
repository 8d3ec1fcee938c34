//! Whether what is measured again and again grows.

use std::collections::BTreeMap;

use super::{Gauge, Samples};
use crate::bench::stats::quantile;

/// How one thing went.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Trend {
    pub(super) of: String,
    /// Medians of the second and the last quarter.
    second: f64,
    last: f64,
    limit: f64,
    pub(super) flat: bool,
}

impl Trend {
    /// The first quarter is left out: things find their size then.
    fn of(gauge: Gauge, of: &str, samples: &[f64]) -> Self {
        let quarter = samples.len() / 4;
        let median = |from: usize| quantile(&samples[from * quarter..(from + 1) * quarter], 0.5);
        let (second, last) = (median(1), median(3));
        let limit = second * (1.0 + f64::from(gauge.percent) / 100.0) + f64::from(gauge.more);
        Self {
            of: of.to_owned(),
            second,
            last,
            limit,
            // Too few samples are not flat.
            flat: last <= limit,
        }
    }

    pub(super) fn shown(&self) -> String {
        let Self {
            second,
            last,
            limit,
            of,
            ..
        } = self;
        format!("{second:.0} in the second quarter, {last:.0} in the last, up to {limit:.0} ({of})")
    }
}

/// The worst trend of each gauge.
pub(super) fn worst(samples: &Samples) -> BTreeMap<Gauge, Trend> {
    let mut found: BTreeMap<Gauge, Trend> = BTreeMap::new();
    for ((gauge, of), values) in samples {
        let trend = Trend::of(*gauge, of, values);
        let over = |trend: &Trend| match trend.flat {
            true => trend.last - trend.limit,
            false if trend.last.is_nan() => f64::INFINITY,
            false => trend.last - trend.limit,
        };
        match found.get(gauge) {
            Some(worse) if over(worse) >= over(&trend) => {}
            _ => drop(found.insert(*gauge, trend)),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::super::{LINKS, gauge};
    use super::*;

    const TEN: Gauge = gauge("things", 10, 1);

    fn trend(of: impl Fn(usize) -> f64) -> Trend {
        let samples: Vec<f64> = (0..100).map(of).collect();
        Trend::of(TEN, "it", &samples)
    }

    #[test]
    fn what_grows_at_first_and_stays_is_flat() {
        assert!(trend(|at| at.min(25) as f64).flat);
        // Single outliers do not count.
        assert!(trend(|at| if at % 10 == 9 { 1e6 } else { 5.0 }).flat);
    }

    #[test]
    fn what_goes_on_growing_is_not() {
        let grown = trend(|at| 100.0 + at as f64);
        assert!(!grown.flat, "{grown:?}");
        assert!(trend(|at| 100.0 + at as f64 / 10.0).flat);
        assert!(!Trend::of(TEN, "it", &[1.0, 2.0]).flat, "too few to tell");
    }

    #[test]
    fn the_worst_of_each_gauge_is_told() {
        let mut samples = Samples::new();
        samples.insert((TEN, "steady".into()), vec![5.0; 40]);
        samples.insert((TEN, "growing".into()), (0..40).map(f64::from).collect());
        samples.insert((LINKS, "all".into()), vec![1.0; 40]);
        let worst = worst(&samples);
        assert_eq!(worst[&TEN].of, "growing");
        assert!(!worst[&TEN].flat && worst[&LINKS].flat);
    }
}
