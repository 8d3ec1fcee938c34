//! What the kernel says of processes it ended for a system call.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;

use nix::libc;

/// Longest record of the kernel's log (printk.c, CONSOLE_EXT_LOG_MAX).
const RECORD: usize = 8192;

/// The system call for which the kernel's seccomp filter ended the process
/// `pid`, which started that many clock ticks after the host. None when its log
/// cannot be read, or does not say.
pub fn seccomp_kill(pid: i32, start_time: u64) -> Option<i64> {
    let mut log = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/kmsg")
        .ok()?;
    // USER_HZ is 100 on every architecture QEMU runs KVM on here (proc(5)).
    let since_us = start_time.saturating_mul(10_000);
    let (mut buffer, mut found) = ([0; RECORD], None);
    loop {
        match log.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => {
                let record = String::from_utf8_lossy(&buffer[..count]);
                found = killed_for(&record, pid, since_us).or(found);
            }
            // This one was overwritten meanwhile; the next one is there.
            Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    found
}

/// The number in a record of type 1326 (linux/audit.h, AUDIT_SECCOMP) about a
/// process that was ended by SIGSYS, not earlier than `since_us` after boot: an
/// older one is about another process of that id.
fn killed_for(record: &str, pid: i32, since_us: u64) -> Option<i64> {
    let (head, text) = record.split_once("type=1326 ")?;
    // dev-kmsg: priority, number, microseconds since boot, flags.
    let at: u64 = head.split(',').nth(2)?.parse().ok()?;
    if at < since_us {
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
        let since = 15_647_161_024;
        assert_eq!(killed_for(record, 7141, since), Some(157));
        assert_eq!(killed_for(record, 7141, since + 1), None);
        assert_eq!(killed_for(record, 714, 0), None);
        let other = record.replace("sig=31", "sig=0");
        assert_eq!(killed_for(&other, 7141, 0), None);
        assert_eq!(killed_for("6,1,1,-;something else", 7141, 0), None);
    }
}
