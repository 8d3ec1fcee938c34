//! Whether a guest is alive: that it is busy is no reason to end it, but one
//! that has halted will never do anything again.

use std::time::Duration;

use bulkhead_agent::Request;

use super::end::{End, Next};
use super::supervisor::Up;

/// How long the guest agent may take to show that it is there.
pub(super) const PING: Duration = Duration::from_secs(1);
/// How often it is asked to.
const HEALTH: Duration = Duration::from_secs(5);
/// So many times without an answer and without any work done, and a guest has halted.
const SILENT: u32 = 3;
/// CPU time of a guest that does nothing at all, between two looks at it.
const HALTED_MS: u64 = 20;
/// Whether the guest is alive.
#[derive(Debug, Default)]
pub(super) struct Health {
    /// Looks in a row without an answer and without work done.
    silent: u32,
    cpu_ms: Option<u64>,
}

impl Health {
    /// Takes in whether the guest agent answered, and QEMU's CPU time. A guest
    /// that is only busy uses some; one that has halted never will again.
    pub(super) fn look(&mut self, answered: bool, cpu_ms: Option<u64>) -> Next {
        let before = std::mem::replace(&mut self.cpu_ms, cpu_ms);
        let idle = match (before, cpu_ms) {
            (Some(before), Some(now)) => now.saturating_sub(before) < HALTED_MS,
            _ => false,
        };
        self.silent = match !answered && idle {
            true => self.silent + 1,
            false => 0,
        };
        match self.silent >= SILENT {
            true => Next::Stop {
                grace: Some(Duration::ZERO),
                end: End::stopped("the guest halted"),
            },
            false => Next::Stay,
        }
    }
}

/// Asks the guest agent for a sign of life, after a while.
pub(super) async fn ping(up: &Up) -> bool {
    tokio::time::sleep(HEALTH).await;
    let ask = up
        .machine()
        .channel()
        .ask("show that it is there", &Request::Ping, PING);
    ask.await.is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_guest_that_neither_answers_nor_works_has_halted() {
        let mut health = Health::default();
        let mut cpu = 1000;
        let mut look = |answered, used| {
            cpu += used;
            matches!(health.look(answered, Some(cpu)), Next::Stop { .. })
        };
        // Busy, and too busy to answer.
        for _ in 0..10 {
            assert!(!look(false, 900));
        }
        // Idle, and there.
        for _ in 0..10 {
            assert!(!look(true, 5));
        }
        assert!(!look(false, 0) && !look(false, 0) && !look(true, 0));
        assert!(!look(false, 0) && !look(false, 1) && look(false, 0));
    }
}
