//! Switches of the kernel's network code, in the namespace of the calling
//! thread (Documentation/networking/ip-sysctl.rst).

use std::fs;
use std::io;

fn path(name: &str) -> String {
    format!("/proc/sys/net/{}", name.replace('.', "/"))
}

fn set(name: &str, value: &str) -> io::Result<()> {
    let told = |error: io::Error| io::Error::new(error.kind(), format!("net.{name}: {error}"));
    fs::write(path(name), value).map_err(told)
}

/// Makes the namespace a router.
pub(super) fn router(ipv6: bool) -> io::Result<()> {
    set("ipv4.ip_forward", "1")?;
    // Every refusal is told: there is one guest to tell it to.
    set("ipv4.icmp_ratelimit", "0")?;
    // What the rules cannot read of a source route, the kernel refuses by itself.
    set("ipv4.conf.all.accept_source_route", "0")?;
    match ipv6 {
        true => {
            set("ipv6.conf.all.accept_source_route", "-1")?;
            set("ipv6.conf.all.forwarding", "1")?;
            set("ipv6.icmp.ratelimit", "0")
        }
        false => without6(),
    }
}

/// Makes the namespace a switch: it has no addresses of its own.
pub(super) fn switch() -> io::Result<()> {
    without6()
}

/// Switches IPv6 off, for devices to come, too.
fn without6() -> io::Result<()> {
    // An older kernel, or one without IPv6, has nothing to switch off.
    if !fs::exists(path("ipv6.conf.default.disable_ipv6"))? {
        return Ok(());
    }
    set("ipv6.conf.all.disable_ipv6", "1")?;
    set("ipv6.conf.default.disable_ipv6", "1")
}

/// Counts the bytes of each connection. Exists once rules ask for connections.
pub(super) fn count_connections() -> io::Result<()> {
    set("netfilter.nf_conntrack_acct", "1")
}

/// Lets the host forward IPv4, as it must for any machine to reach anything. It
/// stays so: others may have come to rely on it.
pub(super) fn forward4() -> io::Result<()> {
    let name = "ipv4.ip_forward";
    if fs::read_to_string(path(name))?.trim() == "0" {
        set(name, "1")?;
        tracing::warn!("this host forwards IPv4 from now on (net.ipv4.ip_forward=1)");
    }
    Ok(())
}

/// The host does not forward IPv6, and to change that may cost it its own
/// addresses: it would no longer listen to router advertisements.
#[derive(Debug, thiserror::Error)]
#[error("this host does not forward IPv6")]
pub(super) struct NoForwarding6;

/// Whether the host forwards IPv6.
pub(super) fn forwards6() -> io::Result<()> {
    match fs::read_to_string(path("ipv6.conf.all.forwarding"))?.trim() {
        "0" => Err(io::Error::other(NoForwarding6)),
        _ => Ok(()),
    }
}
