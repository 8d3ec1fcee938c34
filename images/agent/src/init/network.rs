//! The network device, as the kernel's command line says: `bulkhead.ip=` and
//! `bulkhead.ip6=`, each `ADDRESS/PREFIX@GATEWAY`.
//!
//! There is no DHCP: what a machine's network is like inside is the same for
//! every machine, and known before it boots.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use super::sys;
use crate::failure::{Context, Result, invalid};

/// The one network device.
const DEVICE: &str = "eth0";

/// An address, the length of its prefix, and the gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Address<A> {
    pub(crate) address: A,
    pub(crate) prefix: u8,
    pub(crate) gateway: A,
}

impl<A: FromStr> FromStr for Address<A> {
    type Err = ();
    fn from_str(text: &str) -> std::result::Result<Self, ()> {
        let (address, gateway) = text.split_once('@').ok_or(())?;
        let (address, prefix) = address.split_once('/').ok_or(())?;
        let most = u8::try_from(8 * size_of::<A>()).map_err(|_| ())?;
        Ok(Self {
            address: address.parse().map_err(|_| ())?,
            prefix: prefix
                .parse()
                .ok()
                .filter(|prefix| *prefix <= most)
                .ok_or(())?,
            gateway: gateway.parse().map_err(|_| ())?,
        })
    }
}

/// What the command line asks for.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Network {
    pub(crate) ip: Option<Address<Ipv4Addr>>,
    pub(crate) ip6: Option<Address<Ipv6Addr>>,
}

impl Network {
    /// Puts the device up. Nothing is done where nothing is asked for.
    pub(super) fn up(&self) -> Result<()> {
        let Some(ip) = &self.ip else { return Ok(()) };
        let index = fs::read_to_string(format!("/sys/class/net/{DEVICE}/ifindex"));
        let index = index.context(|| format!("there is no {DEVICE}"))?;
        let index: u32 = index
            .trim()
            .parse()
            .map_err(|_| invalid(format!("{DEVICE} has no index")))?;
        // Before it is up: else the kernel gives it addresses and asks around.
        self.settle_ipv6();
        let what = |action: &'static str| move || format!("cannot {action} {DEVICE}");
        sys::set_address(DEVICE, ip.address, ip.prefix).context(what("set the address of"))?;
        sys::link_up(DEVICE).context(what("bring up"))?;
        sys::add_default_route(ip.gateway).context(what("route over"))?;
        if let Some(ip6) = &self.ip6 {
            sys::add_address6(index, ip6.address, ip6.prefix)
                .context(what("set the IPv6 address of"))?;
            sys::add_default_route6(index, ip6.gateway).context(what("route IPv6 over"))?;
        }
        resolve_at(ip.gateway.into())
    }

    /// With IPv6, no waiting whether somebody else has our address and no
    /// asking for routers; without it, none of it.
    fn settle_ipv6(&self) {
        let set = |name: &str, value: &str| {
            // A kernel without IPv6 has nothing to switch.
            let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{DEVICE}/{name}"), value);
        };
        match self.ip6 {
            Some(_) => {
                set("accept_dad", "0");
                set("dad_transmits", "0");
                set("accept_ra", "0");
                set("router_solicitations", "0");
            }
            None => set("disable_ipv6", "1"),
        }
    }
}

/// Names are resolved at the gateway.
fn resolve_at(gateway: IpAddr) -> Result<()> {
    const FILE: &str = "/etc/resolv.conf";
    // Often a link into a directory of a service that does not run.
    let _ = fs::remove_file(FILE);
    fs::write(FILE, format!("nameserver {gateway}\n")).context(|| format!("cannot write {FILE}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_with_prefix_and_gateway() {
        let read = |text: &str| text.parse::<Address<Ipv4Addr>>();
        let expected = Address {
            address: Ipv4Addr::new(10, 0, 0, 2),
            prefix: 30,
            gateway: Ipv4Addr::new(10, 0, 0, 1),
        };
        assert_eq!(read("10.0.0.2/30@10.0.0.1"), Ok(expected));
        for bad in [
            "",
            "10.0.0.2",
            "10.0.0.2/30",
            "10.0.0.2/33@10.0.0.1",
            "10.0.0.2/@10.0.0.1",
            "::1/64@::2",
        ] {
            assert!(read(bad).is_err(), "{bad}");
        }
        assert!("fd00::2/64@fd00::1".parse::<Address<Ipv6Addr>>().is_ok());
    }
}
