//! Ends the largest process of a machine that is out of memory but does not
//! notice.
//!
//! With memory full of what cannot be moved out, the kernel goes on dropping
//! and reading back the few pages of program text there are: each one counts as
//! progress, so it kills nobody, and everything stands still. Seen with
//! `tail /dev/zero` in 256 MiB: 7 of 12 times under Linux 6.1, 2 of 12 under
//! 6.12. (`min_ttl_ms` of multi-generation LRU cures it as well, but few
//! kernels are built with that switched on.)

use std::collections::VecDeque;
use std::fs;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::console::complain;

/// Time between two looks.
const INTERVAL: Duration = Duration::from_secs(1);
/// So many looks in a row are considered, at least and at most: on a busy host
/// it takes a while until every page was read back.
const LOOKS: std::ops::RangeInclusive<usize> = 3..=15;

/// Size of a page on the only architecture there is, in KiB.
const PAGE_KIB: u64 = 4;

/// Watches for as long as the machine lives. Kernels that do not tell how
/// often a page was read back are left alone.
pub(crate) async fn watch() {
    let mut watch = Watch::default();
    loop {
        tokio::time::sleep(INTERVAL).await;
        let text = |path| fs::read_to_string(path).unwrap_or_default();
        let reserve = text("/proc/sys/vm/min_free_kbytes");
        let Some(pages) = Pages::parse(&text("/proc/vmstat"), &reserve) else {
            return;
        };
        if watch.stands_still(pages) {
            end_the_largest();
            watch = Watch::default();
        }
    }
}

/// Figures of /proc/vmstat and /proc/sys/vm/min_free_kbytes, in pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Pages {
    /// Free, beyond what the kernel keeps for itself: where that is a tenth of
    /// memory, programs are out of it with as much free.
    free: u64,
    /// Of files, and in use by nobody or soon to be dropped.
    file: u64,
    /// In memory for good, as there is no swap.
    anonymous: u64,
    /// Pages of files read back soon after they were dropped, since boot.
    read_back: u64,
}

impl Pages {
    fn parse(text: &str, reserve_kib: &str) -> Option<Self> {
        let field = |name: &str| -> Option<u64> {
            let value = |line: &'_ str| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok();
            text.lines().find_map(value)
        };
        let reserve = reserve_kib.trim().parse().unwrap_or(0) / PAGE_KIB;
        Some(Self {
            free: field("nr_free_pages")?.saturating_sub(reserve),
            file: field("nr_active_file")? + field("nr_inactive_file")?,
            anonymous: field("nr_active_anon")? + field("nr_inactive_anon")?,
            // Its name before Linux 5.9 had no ending.
            read_back: field("workingset_refault_file").or(field("workingset_refault"))?,
        })
    }
}

/// What was seen so far.
#[derive(Debug, Default)]
struct Watch {
    /// [`Pages::read_back`] of the last looks, all of which found memory full.
    full: VecDeque<u64>,
}

impl Watch {
    /// Whether it is time to act.
    fn stands_still(&mut self, now: Pages) -> bool {
        // Little is free, and less than a sixteenth is left for files.
        let full = (now.file + now.free) * 8 < now.anonymous && now.file * 16 < now.anonymous;
        if !full {
            self.full.clear();
            return false;
        }
        self.full.push_back(now.read_back);
        if self.full.len() > *LOOKS.end() {
            self.full.pop_front();
        }
        let first = self.full.front().copied().unwrap_or_default();
        // What is left for files was read back twice over.
        self.full.len() >= *LOOKS.start() && now.read_back.saturating_sub(first) > 2 * now.file
    }
}

/// Kills the process the kernel itself would choose.
fn end_the_largest() {
    let score = |pid: i32| -> Option<u64> {
        let text = fs::read_to_string(format!("/proc/{pid}/oom_score")).ok()?;
        text.trim().parse().ok()
    };
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    let largest = all
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        // PID 1 is exempt from the kernel's killer, and so is the server.
        .filter(|&pid| pid > 1 && pid.unsigned_abs() != std::process::id())
        .filter_map(|pid| Some((score(pid)?, pid)))
        .max();
    if let Some((1.., pid)) = largest {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        // In the kernel's words, for those who look for them.
        complain!("Out of memory: Killed process {pid} ({})", name.trim());
        // It may be gone already, which is what is wanted.
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const THRASHING: Pages = Pages {
        free: 1000,
        file: 500,
        anonymous: 40_000,
        read_back: 0,
    };

    fn looks(pages: Pages, read_back: &[u64]) -> Vec<bool> {
        let mut watch = Watch::default();
        let looks = read_back
            .iter()
            .map(|&read_back| Pages { read_back, ..pages });
        looks.map(|now| watch.stands_still(now)).collect()
    }

    #[test]
    fn only_a_machine_that_reads_the_same_pages_again_and_again_stands_still() {
        assert_eq!(looks(THRASHING, &[0, 600, 1200]), [false, false, true]);
        // Where the host is busy it takes longer.
        let busy: Vec<u64> = (0..16).map(|look| look * 100).collect();
        assert!(looks(THRASHING, &busy)[11]);
        // What is read back now and then is none of our business.
        let slow: Vec<u64> = (0..60).map(|look| look * 70).collect();
        assert_eq!(looks(THRASHING, &slow), [false; 60]);
        let cached = Pages {
            file: 10_000,
            ..THRASHING
        };
        assert_eq!(looks(cached, &[0, 20_000, 40_000]), [false; 3]);
        let roomy = Pages {
            free: 10_000,
            ..THRASHING
        };
        assert_eq!(looks(roomy, &[0, 600, 1200]), [false; 3]);
    }

    #[test]
    fn figures_come_out_of_vmstat() {
        let text = "nr_free_pages 101\nnr_inactive_anon 2\nnr_active_anon 3\n\
                    nr_inactive_file 4\nnr_active_file 5\nworkingset_refault_anon 9\n";
        let new = format!("{text}workingset_refault_file 6\n");
        let pages = Pages {
            free: 1,
            file: 9,
            anonymous: 5,
            read_back: 6,
        };
        assert_eq!(Pages::parse(&new, "400\n"), Some(pages));
        let old = format!("{text}workingset_refault 6\n");
        assert_eq!(Pages::parse(&old, "400\n"), Some(pages));
        assert_eq!(Pages::parse(text, ""), None);
    }
}
