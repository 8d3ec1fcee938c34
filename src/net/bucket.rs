//! A rate, as a bucket that fills up again.

use tokio::time::Instant;

/// A bucket that fills up again.
#[derive(Debug)]
pub(super) struct Bucket {
    left: f64,
    size: f64,
    per_second: f64,
    at: Instant,
}

impl Bucket {
    /// A full one.
    pub(super) fn new(size: u32, per_second: u32, at: Instant) -> Self {
        let size = f64::from(size);
        Self {
            left: size,
            size,
            per_second: f64::from(per_second),
            at,
        }
    }

    /// Takes so much, where there is so much.
    pub(super) fn take(&mut self, amount: u32, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.at = now;
        self.left = (self.left + passed * self.per_second).min(self.size);
        let enough = self.left >= f64::from(amount);
        if enough {
            self.left -= f64::from(amount);
        }
        enough
    }
}
