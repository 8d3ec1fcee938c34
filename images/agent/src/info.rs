//! What the machine can say about itself.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use bulkhead_agent::{Info, Interface, Process};
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::SockaddrStorage;
use nix::sys::utsname::uname;
use nix::time::{ClockId, clock_gettime};

/// Most processes listed.
const MAX_PROCESSES: usize = 256;
/// Most bytes of a command line.
const MAX_COMMAND: usize = 128;

/// Collects it all; what cannot be read stays empty.
pub(crate) fn collect() -> Info {
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let uptime = clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from);
    let name = uname().ok();
    let text = |part: Option<&std::ffi::OsStr>| {
        part.map_or_else(String::new, |part| part.to_string_lossy().into_owned())
    };
    Info {
        os: os_name(&fs::read_to_string("/etc/os-release").unwrap_or_default()),
        kernel: text(name.as_ref().map(|name| name.release())),
        hostname: text(name.as_ref().map(|name| name.nodename())),
        uptime_ms: uptime.map_or(0, |uptime| uptime.as_millis() as u64),
        memory_kib: field(&memory, "MemTotal:"),
        available_kib: field(&memory, "MemAvailable:"),
        interfaces: interfaces(),
        processes: processes(),
    }
}

fn os_name(release: &str) -> String {
    let line = release
        .lines()
        .find_map(|line| line.strip_prefix("PRETTY_NAME="));
    line.unwrap_or_default().trim_matches('"').to_owned()
}

/// The number after a key of a /proc file.
fn field(text: &str, key: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    let number = line.and_then(|line| line.split_whitespace().next());
    number.and_then(|number| number.parse().ok()).unwrap_or(0)
}

fn interfaces() -> Vec<Interface> {
    let mut found: BTreeMap<String, Interface> = BTreeMap::new();
    for address in getifaddrs().into_iter().flatten() {
        let interface = found
            .entry(address.interface_name.clone())
            .or_insert_with(|| Interface {
                name: address.interface_name.clone(),
                ..Interface::default()
            });
        let bits = |mask: &SockaddrStorage| match (mask.as_sockaddr_in(), mask.as_sockaddr_in6()) {
            (Some(v4), _) => v4.ip().to_bits().count_ones(),
            (_, Some(v6)) => v6.ip().to_bits().count_ones(),
            _ => 0,
        };
        let prefix = address.netmask.as_ref().map_or(0, bits);
        let Some(address) = &address.address else {
            continue;
        };
        if let Some(link) = address.as_link_addr() {
            let mac = link.addr().unwrap_or_default();
            interface.mac = mac.map(|byte| format!("{byte:02x}")).join(":");
        } else if let Some(v4) = address.as_sockaddr_in() {
            interface.addresses.push(format!("{}/{prefix}", v4.ip()));
        } else if let Some(v6) = address.as_sockaddr_in6() {
            interface.addresses.push(format!("{}/{prefix}", v6.ip()));
        }
    }
    found.into_values().collect()
}

fn processes() -> Vec<Process> {
    let mut pids: Vec<u32> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    pids.sort_unstable();
    let found = pids.into_iter().filter_map(process);
    found.take(MAX_PROCESSES).collect()
}

fn process(pid: u32) -> Option<Process> {
    let status = fs::read(format!("/proc/{pid}/status")).ok()?;
    let status = String::from_utf8_lossy(&status);
    let mut line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    line.truncate(MAX_COMMAND);
    let line = String::from_utf8_lossy(&line).replace('\0', " ");
    let name = status.lines().find_map(|line| line.strip_prefix("Name:"));
    Some(Process {
        pid,
        ppid: field(&status, "PPid:") as u32,
        uid: field(&status, "Uid:") as u32,
        rss_kib: field(&status, "VmRSS:"),
        command: match line.trim() {
            // Kernel threads have no command line.
            "" => format!("[{}]", name.unwrap_or_default().trim()),
            line => line.to_owned(),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_listed() {
        let info = collect();
        assert!(info.memory_kib >= info.available_kib && info.available_kib > 0);
        assert!(info.uptime_ms > 0 && !info.kernel.is_empty());
        let lo = info.interfaces.iter().find(|i| i.name == "lo").unwrap();
        assert!(lo.mac == "00:00:00:00:00:00", "{lo:?}");
        let own = process(std::process::id()).unwrap();
        assert!(own.rss_kib > 0 && own.command.len() <= MAX_COMMAND);
    }

    #[test]
    fn the_pretty_name_is_unquoted() {
        assert_eq!(os_name("ID=x\nPRETTY_NAME=\"A B\"\n"), "A B");
    }
}
