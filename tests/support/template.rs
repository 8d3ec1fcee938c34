//! Templates of the smallest machine.

use super::{Bulkhead, accel};

/// The smallest machine that boots soonest.
pub(crate) const SMALL: [&str; 10] = [
    "--image", "base", "--kernel", "tuned", "--memory", "256M", "--cpus", "1", "--disk", "64M",
];

/// Builds a template and gives its id.
#[track_caller]
pub(crate) fn build(bulkhead: &Bulkhead, words: &[&str]) -> String {
    let fixed = ["template", "build", "--accel", &accel()];
    let built = bulkhead.must(&[&fixed, &SMALL[..], words].concat());
    built.trim_end().to_owned()
}
