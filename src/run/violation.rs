//! What VMMs did that they may not: written down where it outlives their
//! machines, to be counted and looked into.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::audit;
use super::state::now_ms;
use crate::host::{fault, kmsg};
use crate::spec::VmId;
use crate::vmm::{VmmProcess, seccomp};

/// A system call that a VMM was ended for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Violation {
    /// When it was seen, in milliseconds since 1970-01-01 UTC.
    pub at_ms: u64,
    /// The machine.
    pub machine: VmId,
    /// The binary.
    pub qemu: PathBuf,
    /// Its process id.
    pub pid: i32,
    /// Number of the system call, where the kernel's log says it.
    pub number: Option<i64>,
    /// The call, as `socket(2)`.
    pub call: String,
}

/// Where the violations of one machine's life are written down, once.
#[derive(Debug)]
pub(super) struct Audit {
    file: PathBuf,
    told: AtomicBool,
}

impl Audit {
    pub(super) fn new(file: PathBuf) -> Self {
        Self {
            file,
            told: AtomicBool::new(false),
        }
    }

    /// Whether the kernel's log has it that the VMM was ended for a system call.
    pub(super) async fn is_violation(process: &VmmProcess) -> bool {
        logged(process, Duration::from_millis(200)).await.is_some()
    }

    /// Writes down for what the kernel ended a VMM, and gives the call's name.
    pub(super) async fn system_call(
        &self,
        machine: &VmId,
        qemu: &Path,
        process: &VmmProcess,
    ) -> String {
        let pid = process.pid();
        let number = logged(process, Duration::from_secs(5)).await;
        let violation = Violation {
            at_ms: now_ms(),
            machine: machine.clone(),
            qemu: qemu.to_owned(),
            pid,
            number,
            call: named(number),
        };
        // Whoever asks for the reason again is told the same.
        if !self.told.swap(true, Ordering::Relaxed) {
            tracing::info!(id = %machine, call = violation.call, "system call violation");
            if let Err(error) = append(&self.file, &violation) {
                tracing::error!("cannot write to {}: {error}", self.file.display());
            }
        }
        violation.call
    }
}

/// The call that the kernel's log says ended the VMM, waited for that long: the
/// log is written by a thread of the kernel, which may be behind the end of the
/// process; and of many records at once the kernel drops some.
async fn logged(process: &VmmProcess, patience: Duration) -> Option<i64> {
    let deadline = Instant::now() + patience;
    loop {
        let number = kmsg::seccomp_kill(process.pid(), process.start_time());
        if number.is_some() || Instant::now() >= deadline {
            return number;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn named(number: Option<i64>) -> String {
    let Some(number) = number else {
        return "a system call the kernel's log does not name".into();
    };
    match seccomp::name(number) {
        Some(name) => format!("{name}(2)"),
        None => format!("system call {number}"),
    }
}

fn append(file: &Path, violation: &Violation) -> io::Result<()> {
    fault::at("write violation")?;
    audit::append(file, violation)
}

/// What is written down in `file` (see [`super::Dirs::violations`]), oldest
/// first; lines that cannot be read are left out.
pub fn violations(file: &Path) -> Vec<Violation> {
    audit::lines(file)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::Write;

    use super::*;

    #[test]
    fn what_is_written_down_is_bounded_and_read_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("violations.jsonl");
        let violation = |pid| Violation {
            at_ms: 1,
            machine: "m".parse().unwrap(),
            qemu: "/usr/bin/qemu".into(),
            pid,
            number: Some(41),
            call: named(Some(41)),
        };
        append(&file, &violation(1)).unwrap();
        let half = format!("half a line{}\n", " ".repeat(1 << 20));
        let mut log = File::options().append(true).open(&file).unwrap();
        log.write_all(half.as_bytes()).unwrap();
        append(&file, &violation(2)).unwrap();
        append(&file, &violation(3)).unwrap();
        let found = violations(&file);
        assert_eq!(
            found.iter().map(|one| one.pid).collect::<Vec<_>>(),
            [1, 2, 3]
        );
        assert_eq!(found[0].call, "socket(2)");
        let mode =
            std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&file).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600);
        assert!(fs::metadata(&file).unwrap().len() < 1000);
    }

    #[test]
    fn an_unknown_number_is_a_name_too() {
        assert_eq!(named(Some(100_000)), "system call 100000");
        assert!(named(None).contains("does not name"));
    }
}
