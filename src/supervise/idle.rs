//! Whether anything happens in a machine.

use std::time::{Duration, Instant};

/// CPU time of QEMU that an idle guest takes too, in thousandths of one
/// processor: timers, the agent's epoll, emulation of both.
const NOISE: u128 = 40;
/// Bytes a second that an idle guest's link carries, too: keep-alives, and what
/// keeps neighbours known.
const CHATTER: u128 = 100;

/// When something last happened.
#[derive(Debug)]
pub(super) struct Idle {
    since: Instant,
    /// What was used until the last look, and when that was.
    looked: Option<(Used, Instant)>,
}

/// What a machine has used since its start.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Used {
    /// CPU time of QEMU in milliseconds, where it is known.
    pub(super) cpu_ms: Option<u64>,
    /// Bytes that its link carried, where it has one.
    pub(super) bytes: Option<u64>,
    /// Connections to its published ports, ended ones included.
    pub(super) taken: u64,
}

impl Idle {
    /// Something happens right now.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            since: now,
            looked: None,
        }
    }

    /// Looks again: `busy` says that commands, transfers or connections to
    /// published ports are under way.
    pub(super) fn look(&mut self, now: Instant, busy: bool, used: Used) {
        let active = match (self.looked, used.cpu_ms) {
            (Some((before, at)), Some(cpu)) => {
                let wall = now.duration_since(at).as_millis().max(1);
                let rate =
                    |now: u64, before: u64| u128::from(now.saturating_sub(before)) * 1000 / wall;
                rate(cpu, before.cpu_ms.unwrap_or(0)) > NOISE
                    || used
                        .bytes
                        .zip(before.bytes)
                        .is_some_and(|(bytes, before)| rate(bytes, before) > CHATTER)
                    || used.taken != before.taken
            }
            // The first look, or no figure: take no risk.
            _ => true,
        };
        self.looked = used.cpu_ms.map(|_| (used, now));
        if busy || active {
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
        let cpu = |ms| Used {
            cpu_ms: Some(ms),
            ..Used::default()
        };
        let mut idle = Idle::new(start);
        idle.look(at(0), false, cpu(1000));
        // 10 ms a second: noise.
        for secs in 1..=10 {
            idle.look(at(secs), false, cpu(1000 + secs * 10));
        }
        assert_eq!(idle.time(at(10)), Duration::from_secs(10));
        // Half a processor, with no command that we know of.
        idle.look(at(11), false, cpu(1100 + 500));
        assert_eq!(idle.time(at(11)), Duration::ZERO);
        idle.look(at(12), false, cpu(1601));
        assert_eq!(idle.time(at(12)), Duration::from_secs(1));
        // A command that only waits.
        idle.look(at(13), true, cpu(1602));
        assert_eq!(idle.time(at(13)), Duration::ZERO);
        // No figure is no proof.
        idle.look(at(14), false, Used::default());
        assert_eq!(idle.time(at(14)), Duration::ZERO);
    }

    #[test]
    fn a_slow_download_is_not_idle_and_keep_alives_are() {
        let start = Instant::now();
        let at = |secs| start + Duration::from_secs(secs);
        let carried = |bytes| Used {
            cpu_ms: Some(1000),
            bytes: Some(bytes),
            taken: 0,
        };
        let mut idle = Idle::new(start);
        idle.look(at(0), false, carried(5000));
        // 10 KB a second cost hardly any processor time.
        for secs in 1..=10 {
            idle.look(at(secs), false, carried(5000 + secs * 10_000));
        }
        assert_eq!(idle.time(at(10)), Duration::ZERO);
        for secs in 11..=20 {
            idle.look(at(secs), false, carried(105_000 + (secs - 10) * 66));
        }
        assert_eq!(idle.time(at(20)), Duration::from_secs(10));
        // A link whose bytes cannot be read for the moment.
        idle.look(at(21), false, carried(105_660));
        let unknown = Used {
            cpu_ms: Some(1000),
            ..Used::default()
        };
        idle.look(at(22), false, unknown);
        assert_eq!(idle.time(at(22)), Duration::from_secs(12));
        // Nor do all its bytes since the boot count then.
        idle.look(at(23), false, carried(105_720));
        assert_eq!(idle.time(at(23)), Duration::from_secs(13));
        // A connection that came and went between two looks.
        let taken = Used {
            taken: 1,
            ..carried(105_720)
        };
        idle.look(at(24), false, taken);
        assert_eq!(idle.time(at(24)), Duration::ZERO);
    }
}
