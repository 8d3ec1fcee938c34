//! What the kernel says of processes it ended for a system call.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, SystemTime};

use nix::libc;

use super::process;

/// Longest record of the kernel's log (printk.c, CONSOLE_EXT_LOG_MAX).
const RECORD: usize = 8192;

/// How much the times of two clocks of the kernel, each coarse, may differ: no
/// process id comes back so soon.
const SLACK_MS: u64 = 1000;

/// The system call for which the kernel's seccomp filter ended the process
/// `pid`, which started that many clock ticks after the host. None when its log
/// cannot be read, or does not say.
pub fn seccomp_kill(pid: i32, start_time: u64) -> Option<i64> {
    let mut log = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/kmsg")
        .ok()?;
    let since_ms = started_ms(start_time)?;
    let (mut buffer, mut found) = ([0; RECORD], None);
    loop {
        match log.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => {
                let record = String::from_utf8_lossy(&buffer[..count]);
                found = killed_for(&record, pid, since_ms).or(found);
            }
            // This one was overwritten meanwhile; the next one is there.
            Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    found
}

/// When a process started, in milliseconds since 1970-01-01 UTC.
fn started_ms(start_time: u64) -> Option<u64> {
    // USER_HZ is 100 on every architecture QEMU runs KVM on here (proc(5)).
    let after = Duration::from_millis(start_time.saturating_mul(10));
    let started = process::booted()?.checked_add(after)?;
    let started = started.duration_since(SystemTime::UNIX_EPOCH).ok()?;
    u64::try_from(started.as_millis()).ok()
}

/// The number in a record of type 1326 (linux/audit.h, AUDIT_SECCOMP) about a
/// process that was ended by SIGSYS, not earlier than `since_ms`: an older one is
/// about another process of that id. The time is the audit's: the log's own stands
/// still while the host sleeps, and drifts from that of /proc.
fn killed_for(record: &str, pid: i32, since_ms: u64) -> Option<i64> {
    let (_, text) = record.split_once("type=1326 audit(")?;
    let (at, text) = text.split_once(':')?;
    let (seconds, milliseconds) = at.split_once('.')?;
    let at = seconds.parse::<u64>().ok()?.checked_mul(1000)?;
    let at = at.checked_add(milliseconds.parse().ok()?)?;
    if at.saturating_add(SLACK_MS) < since_ms {
        return None;
    }
    let field = |name: &str| {
        let mut words = text.split_whitespace();
        words.find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
    };
    (field("pid")? == pid.to_string() && field("sig")? == "31")
        .then(|| field("syscall")?.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_tells_the_call_of_its_process() {
        let record = "5,1030,15647161024,-;audit: type=1326 audit(1795591998.742:3): \
            auid=4294967295 uid=1900013872 gid=1900013872 ses=4294967295 pid=7141 comm=\"qemu\" \
            exe=\"/qemu\" sig=31 arch=c000003e syscall=157 compat=0 ip=0x7f3ae9d1a45d \
            code=0x80000000\n";
        let since = 1_795_591_998_742 + SLACK_MS;
        assert_eq!(killed_for(record, 7141, since), Some(157));
        assert_eq!(killed_for(record, 7141, since + 1), None);
        // By the clock of the log it was before all that; it does not count.
        let slept = record.replace("15647161024", "1");
        assert_eq!(killed_for(&slept, 7141, since), Some(157));
        assert_eq!(killed_for(record, 714, 0), None);
        let other = record.replace("sig=31", "sig=0");
        assert_eq!(killed_for(&other, 7141, 0), None);
        assert_eq!(killed_for("6,1,1,-;something else", 7141, 0), None);
        assert_eq!(killed_for("6,1,1,-;type=1326 audit(1:2):", 7141, 0), None);
    }

    #[test]
    fn a_process_started_when_the_clock_on_the_wall_says() {
        let before = SystemTime::now();
        let child = std::process::Command::new("/bin/true").spawn();
        let mut child = child.unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let start = process::start_time(pid).unwrap();
        child.wait().unwrap();
        let found = Duration::from_millis(started_ms(start).unwrap());
        let before = before.duration_since(SystemTime::UNIX_EPOCH).unwrap();
        let slack = Duration::from_millis(SLACK_MS);
        let after = SystemTime::now();
        let after = after.duration_since(SystemTime::UNIX_EPOCH).unwrap();
        assert!(found + slack > before, "{found:?} {before:?}");
        assert!(found < after + slack, "{found:?} {after:?}");
    }
}
