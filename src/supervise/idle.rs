//! Whether anything happens in a machine.

use std::time::{Duration, Instant};

/// CPU time of QEMU that an idle guest takes too, in thousandths of one
/// processor: timers, the agent's epoll, emulation of both.
const NOISE: u128 = 40;

/// When something last happened.
#[derive(Debug)]
pub(super) struct Idle {
    since: Instant,
    /// CPU time in milliseconds at the last look, and when that was.
    looked: Option<(u64, Instant)>,
}

impl Idle {
    /// Something happens right now.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            since: now,
            looked: None,
        }
    }

    /// Looks again: `busy` commands and transfers are under way, and QEMU has
    /// used `cpu_ms` of CPU time since its start.
    pub(super) fn look(&mut self, now: Instant, busy: bool, cpu_ms: Option<u64>) {
        let computed = match (self.looked, cpu_ms) {
            (Some((before, at)), Some(cpu)) => {
                let wall = now.duration_since(at).as_millis().max(1);
                u128::from(cpu.saturating_sub(before)) * 1000 / wall > NOISE
            }
            // The first look, or no figure: take no risk.
            _ => true,
        };
        self.looked = cpu_ms.map(|cpu| (cpu, now));
        if busy || computed {
            self.since = now;
        }
    }

    /// Something happens that no look would see.
    pub(super) fn touch(&mut self, now: Instant) {
        self.since = now;
    }

    /// For how long nothing has happened.
    pub(super) fn time(&self, now: Instant) -> Duration {
        now.duration_since(self.since)
    }

    /// How often to look, for a limit.
    pub(super) fn interval(limit: Duration) -> Duration {
        (limit / 4).clamp(Duration::from_millis(250), Duration::from_secs(10))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_background_build_is_not_idle_and_timer_noise_is() {
        let start = Instant::now();
        let at = |secs| start + Duration::from_secs(secs);
        let mut idle = Idle::new(start);
        idle.look(at(0), false, Some(1000));
        // 10 ms a second: noise.
        for secs in 1..=10 {
            idle.look(at(secs), false, Some(1000 + secs * 10));
        }
        assert_eq!(idle.time(at(10)), Duration::from_secs(10));
        // Half a processor, with no command that we know of.
        idle.look(at(11), false, Some(1100 + 500));
        assert_eq!(idle.time(at(11)), Duration::ZERO);
        idle.look(at(12), false, Some(1601));
        assert_eq!(idle.time(at(12)), Duration::from_secs(1));
        // A command that only waits.
        idle.look(at(13), true, Some(1602));
        assert_eq!(idle.time(at(13)), Duration::ZERO);
        // No figure is no proof.
        idle.look(at(14), false, None);
        assert_eq!(idle.time(at(14)), Duration::ZERO);
    }
}
