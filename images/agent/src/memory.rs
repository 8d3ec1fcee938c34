//! Ends the largest process of a machine that is out of memory but does not
//! notice (docs/decisions/0011-out-of-memory.md).

use std::fs;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::sys::sysinfo::sysinfo;
use nix::unistd::Pid;

use crate::console::complain;

/// Time between two looks.
const INTERVAL: Duration = Duration::from_secs(1);
/// So many looks in a row must find memory exhausted: the kernel comes first.
const PATIENCE: u32 = 4;
/// Size of a page on the only architecture there is, in KiB.
const PAGE_KIB: u64 = 4;
/// Programs can run with so much for their text, however large the machine: 16 MiB.
const ENOUGH: u64 = 16 * 1024 / PAGE_KIB;

/// Watches for as long as the machine lives, or its kernel has the figures.
pub(crate) async fn watch() {
    let mut strikes = 0;
    loop {
        tokio::time::sleep(INTERVAL).await;
        if half_is_free() {
            strikes = 0;
            continue;
        }
        let text = |path| fs::read_to_string(path).unwrap_or_default();
        let reserve = text("/proc/sys/vm/min_free_kbytes");
        let Some(pages) = Pages::parse(&text("/proc/vmstat"), &reserve) else {
            return;
        };
        strikes = if pages.exhausted() { strikes + 1 } else { 0 };
        if strikes == PATIENCE {
            end_the_largest();
            strikes = 0;
        }
    }
}

/// Whether there is no need to look any closer, as in a machine that idles: one
/// call, where the figures are a long text that the kernel has to write.
fn half_is_free() -> bool {
    sysinfo().is_ok_and(|info| info.ram_unused() > info.ram_total() / 2)
}

/// Figures of /proc/vmstat and /proc/sys/vm/min_free_kbytes, in pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Pages {
    /// Free, beyond what the kernel keeps for itself.
    free: u64,
    /// Of files: all that can be dropped.
    file: u64,
    /// In memory for good, as there is no swap.
    kept: u64,
}

impl Pages {
    fn parse(text: &str, reserve_kib: &str) -> Option<Self> {
        let field = |name: &str| -> Option<u64> {
            let value = |line: &'_ str| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok();
            text.lines().find_map(value)
        };
        let sum = |names: &[&str]| names.iter().map(|name| field(name)).sum::<Option<u64>>();
        let reserve = reserve_kib.trim().parse().unwrap_or(0) / PAGE_KIB;
        Some(Self {
            free: field("nr_free_pages")?.saturating_sub(reserve),
            file: sum(&["nr_active_file", "nr_inactive_file"])?,
            kept: sum(&["nr_active_anon", "nr_inactive_anon", "nr_unevictable"])?,
        })
    }

    /// Whether what is left for the text of programs is next to nothing.
    fn exhausted(self) -> bool {
        self.free + self.file < ENOUGH.min(self.kept / 32)
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

    #[test]
    fn memory_is_exhausted_when_no_program_can_keep_its_text() {
        let pages = |free, file, kept| Pages { free, file, kept };
        // As seen in 256 MiB, standing still.
        assert!(pages(147, 72, 39_797).exhausted());
        // On the way there, and after it.
        assert!(!pages(2801, 694, 36_494).exhausted());
        assert!(!pages(39_000, 170, 600).exhausted());
        // 2 GiB with 20 MiB of programs in memory run, however full.
        assert!(!pages(150, 5120, 500_000).exhausted());
        assert!(pages(150, 1000, 500_000).exhausted());
    }

    #[test]
    fn figures_come_out_of_vmstat() {
        let text = "nr_free_pages 101\nnr_inactive_anon 2\nnr_active_anon 3\n\
                    nr_inactive_file 4\nnr_active_file 5\nnr_unevictable 6\n";
        let pages = Pages {
            free: 1,
            file: 9,
            kept: 11,
        };
        assert_eq!(Pages::parse(text, "400\n"), Some(pages));
        assert_eq!(Pages::parse("nr_free_pages 1\n", ""), None);
    }
}
