//! What is said of samples.

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

/// Between which two samples the median of all that could have been taken lies, with
/// 95 % (by their order alone, whatever their distribution); the extremes where
/// there are fewer than six.
pub(crate) fn median_within(samples: &[f64]) -> (f64, f64) {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let count = sorted.len();
    let Some(last) = count.checked_sub(1) else {
        return (f64::NAN, f64::NAN);
    };
    // How many of `count` tosses are heads at most, with 2.5 %.
    let (mut below, mut sum) = (0, 0.0);
    let mut exactly = 0.5f64.powi(i32::try_from(count).unwrap_or(i32::MAX));
    while below < count / 2 && sum + exactly <= 0.025 {
        sum += exactly;
        below += 1;
        exactly *= (count - below + 1) as f64 / below as f64;
    }
    let at = below.saturating_sub(1);
    (sorted[at], sorted[last - at])
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
    fn the_median_lies_within() {
        let samples = |count: u32| (1..=count).map(f64::from).collect::<Vec<_>>();
        // From tables of the sign test.
        assert_eq!(median_within(&samples(6)), (1.0, 6.0));
        assert_eq!(median_within(&samples(10)), (2.0, 9.0));
        assert_eq!(median_within(&samples(40)), (14.0, 27.0));
        assert_eq!(median_within(&samples(3)), (1.0, 3.0));
        assert!(median_within(&[]).0.is_nan());
    }
}
