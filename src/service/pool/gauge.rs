//! What the host has left for machines: memory that is available without
//! swapping, and how long programs have to wait.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::ledger::Room;
use super::settings::Admission;

/// Reads the host, by its /proc or one in its place.
#[derive(Debug, Clone)]
pub(super) struct Gauge {
    proc: PathBuf,
    page: u64,
}

/// What was read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Reading {
    /// Bytes that programs can have without swapping (MemAvailable).
    pub(super) available: u64,
    /// Percent of the last ten seconds in which something waited for memory;
    /// none where the kernel does not tell.
    pub(super) memory: Option<f64>,
    /// The same for processors.
    pub(super) cpu: Option<f64>,
}

impl Gauge {
    pub(super) fn new(proc: &Path) -> Self {
        let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE);
        let page = page
            .ok()
            .flatten()
            .and_then(|page| u64::try_from(page).ok());
        Self {
            proc: proc.to_owned(),
            page: page.unwrap_or(4096),
        }
    }

    /// Reads the host.
    ///
    /// # Errors
    /// There is no `meminfo`, or it is odd.
    pub(super) fn read(&self) -> io::Result<Reading> {
        let text = fs::read_to_string(self.proc.join("meminfo"))?;
        let odd = || io::Error::new(io::ErrorKind::InvalidData, "it has no MemAvailable");
        let pressure = |what: &str| {
            let text = fs::read_to_string(self.proc.join("pressure").join(what)).ok()?;
            waited(&text)
        };
        Ok(Reading {
            available: available(&text).ok_or_else(odd)?,
            memory: pressure("memory"),
            cpu: pressure("cpu"),
        })
    }

    /// Bytes that a process has for itself, not counting what it shares
    /// (proc(5), statm); 0 where it cannot be told.
    pub(super) fn own(&self, pid: i32) -> u64 {
        let text = fs::read_to_string(self.proc.join(pid.to_string()).join("statm"));
        let text = text.unwrap_or_default();
        let mut pages = text.split(' ').skip(1).map(|pages| pages.parse::<u64>());
        match (pages.next(), pages.next()) {
            (Some(Ok(resident)), Some(Ok(shared))) => resident.saturating_sub(shared) * self.page,
            _ => 0,
        }
    }
}

/// `MemAvailable:   123 kB` of proc_meminfo(5).
fn available(meminfo: &str) -> Option<u64> {
    let line = |line: &str| line.strip_prefix("MemAvailable:").map(str::to_owned);
    let text = meminfo.lines().find_map(line)?;
    let kib: u64 = text.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// `some avg10=1.23 ...` (Documentation/accounting/psi.rst).
fn waited(pressure: &str) -> Option<f64> {
    let some = pressure
        .lines()
        .find_map(|line| line.strip_prefix("some "))?;
    let words = &mut some.split(' ');
    words
        .find_map(|word| word.strip_prefix("avg10="))?
        .parse()
        .ok()
}

impl Reading {
    /// What may be given away, where `promised` bytes are others' already.
    pub(super) fn room(&self, admission: &Admission, promised: u64) -> Room {
        let over = |waited: Option<f64>, limit: u8| waited.is_some_and(|part| part > limit.into());
        let kept = admission.reserve.0.saturating_add(promised);
        Room {
            spare: self.available.saturating_sub(kept),
            stalled: over(self.memory, admission.memory_wait),
            tight: over(self.cpu, admission.cpu_wait),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Bytes;

    #[test]
    fn the_kernels_words_are_read() {
        let meminfo = "MemTotal:  24684000 kB\nMemAvailable:     2048 kB\nBuffers: 1 kB\n";
        assert_eq!(available(meminfo), Some(2 << 20));
        assert_eq!(available("MemFree: 1 kB\n"), None);
        let pressure = "some avg10=12.34 avg60=0.00 avg300=0.00 total=1\nfull avg10=1.00\n";
        assert_eq!(waited(pressure), Some(12.34));
        assert_eq!(waited(""), None);
    }

    #[test]
    fn this_host_can_be_read() {
        let gauge = Gauge::new(Path::new("/proc"));
        assert!(gauge.read().unwrap().available > 1 << 20);
        assert!(gauge.own(std::process::id().cast_signed()) > 1 << 16);
        assert_eq!(gauge.own(-1), 0);
        assert!(Gauge::new(Path::new("/nothing")).read().is_err());
    }

    #[test]
    fn what_is_promised_and_kept_is_not_given_away() {
        let admission = Admission {
            reserve: Bytes::mib(100),
            memory_wait: 10,
            cpu_wait: 80,
        };
        let reading = Reading {
            available: 300 << 20,
            memory: Some(10.0),
            cpu: Some(80.5),
        };
        let room = reading.room(&admission, 50 << 20);
        assert_eq!(
            (room.spare, room.stalled, room.tight),
            (150 << 20, false, true)
        );
        let reading = Reading {
            memory: Some(10.1),
            cpu: None,
            ..reading
        };
        let room = reading.room(&admission, 500 << 20);
        assert_eq!((room.spare, room.stalled, room.tight), (0, true, false));
    }
}
