//! A machine's network on the host: namespace, tap, way out, rules.
//!
//! Inside, every machine's namespace is the same (plan/network.rs). Outside, a
//! veth with an address of a pool leads to the host's side, which is the
//! caller's namespace unless another is given; there the host's routing and
//! masquerade take over.

mod bridge;
mod error;
mod route;
mod sysctl;
mod tap;
mod tracked;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::libc;

use self::bridge::Device;
use self::error::kernel;
use self::route::{End, talk};
use super::lease::Lease;
use super::netns::{self, Netns};
use super::{fault, nft, sys};
use crate::plan::firewall::{self, Names};
use crate::plan::network::{
    GATEWAY_MAC, GATEWAY4, GATEWAY6, GROUP, GUEST4, GUEST6, OUT, PREFIX4, PREFIX6, RETIRED, TAP,
};
use crate::spec::{Cidr, NetworkLimits, NetworkPolicy, fill_random};

pub use self::error::NetworkError;
pub use self::tap::guarded;

/// Where machines' addresses are taken from unless said otherwise: the first
/// that the host has no use for.
const POOLS: [&str; 3] = ["198.19.0.0/16", "10.213.0.0/16", "172.29.0.0/16"];
/// Their IPv6 addresses (a unique local prefix, RFC 4193).
const POOL6: [u16; 4] = [0xfd62, 0x756c, 0x6b69, 0];
/// What the host's end of a machine's link is called on the machine's side.
const NEXT4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
const NEXT6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
/// How often an address is chosen again that another machine took meanwhile.
const TRIES: u32 = 8;

/// Where machines' networks lead.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Site {
    /// The namespace of the host's side; the caller's own when absent.
    pub uplink: Option<PathBuf>,
    /// Addresses for machines, one each; found when absent.
    pub pool: Option<Cidr>,
    /// Who resolves names for machines, asked from the host's side; the host's
    /// own resolvers when empty.
    pub resolvers: Vec<SocketAddr>,
}

impl Site {
    fn netns(&self) -> io::Result<Netns> {
        match &self.uplink {
            Some(path) => Netns::open(path),
            None => Netns::own(),
        }
    }
}

/// The network of one machine, before it is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wires {
    /// Tells this machine's link from every other.
    token: [u8; 5],
    /// Where its namespace is kept.
    path: PathBuf,
    site: Site,
    /// The bridge or tap of the host's that it is on, where it is on one.
    device: Option<String>,
}

/// A network that was made.
#[derive(Debug)]
pub struct Wired {
    /// Its namespace.
    pub netns: Netns,
    /// The guest's end, for QEMU.
    pub tap: OwnedFd,
    /// Its address on the host's side; on a bridge, the guest's own.
    pub outer: Ipv4Addr,
}

impl Wires {
    /// Decides on names. Makes nothing yet.
    pub fn choose(path: PathBuf, site: Site, policy: &NetworkPolicy) -> Self {
        let mut token = [0; 5];
        fill_random(&mut token);
        let device = policy.bridge.as_ref().map(|bridge| bridge.device.clone());
        Self {
            token,
            path,
            site,
            device,
        }
    }

    /// What is written down before [`Wires::make`].
    pub fn leases(&self) -> [Lease; 2] {
        [
            Lease::Netns {
                path: self.path.clone(),
            },
            Lease::Uplink {
                netns: self.site.uplink.clone(),
                token: self.token(),
                device: self.device.clone(),
            },
        ]
    }

    fn token(&self) -> String {
        self.token.map(|byte| format!("{byte:02x}")).concat()
    }

    fn ends(&self) -> ([u8; 6], [u8; 6]) {
        let [a, b, c, d, e] = self.token;
        // Both of the kind that is given locally.
        ([0x02, a, b, c, d, e], [0x06, a, b, c, d, e])
    }

    /// Makes it. The leases are written down by then. `names` says what names
    /// have to do with what may be reached.
    ///
    /// # Errors
    /// Not root, or the host lacks something. What was made so far is the
    /// leases' to release.
    pub fn make(&self, policy: &NetworkPolicy, names: Names) -> Result<Wired, NetworkError> {
        self.make_on(policy, names, None)
    }

    /// As [`Wires::make`], with the other end of the tap that the policy names.
    ///
    /// # Errors
    /// As [`Wires::make`]; it is not that tap's, or the policy names none.
    pub fn make_on(
        &self,
        policy: &NetworkPolicy,
        names: Names,
        given: Option<BorrowedFd<'_>>,
    ) -> Result<Wired, NetworkError> {
        if !nix::unistd::geteuid().is_root() {
            return Err(NetworkError::NotRoot);
        }
        let uplink = self
            .site
            .netns()
            .map_err(kernel("open the network namespace", place(&self.site)))?;
        let at = |point| fault::at(point).map_err(kernel("make", "a network"));
        let device = match &policy.bridge {
            Some(bridge) => Some(bridge::find(&uplink, bridge)?),
            None => None,
        };
        if let (Some(_), None | Some(Device::Bridge)) = (given, device) {
            return Err(NetworkError::NotThatTap);
        }
        at("make netns")?;
        let netns = Netns::make(&self.path).map_err(kernel(
            "make the network namespace",
            self.path.display().to_string(),
        ))?;
        if let Some(bridge) = &policy.bridge {
            let tap = match device {
                Some(Device::Tap) => self.take_tap(&uplink, policy, bridge, given)?,
                _ => self.make_bridged(&uplink, &netns, policy, bridge)?,
            };
            let outer = bridge.address;
            return Ok(Wired { netns, tap, outer });
        }
        let host = inside(&uplink, "read the host's addresses", || {
            talk(async |handle| route::addresses(handle).await)
        })?;
        at("fill netns")?;
        let tap = inside(&netns, "make the tap", || self.fill(policy, names, &host))?;
        at("join uplink")?;
        let mut tries = 0;
        let outer = loop {
            let outer = self.free_address(&uplink)?;
            let joined = inside(&uplink, "join to the host", || {
                self.join(policy, &netns, outer)
            });
            match joined {
                // Another machine was quicker.
                Err(NetworkError::Kernel { source, .. })
                    if source.raw_os_error() == Some(libc::EEXIST) && tries < TRIES =>
                {
                    tries += 1;
                }
                joined => break joined.map(|()| outer)?,
            }
        };
        at("route netns")?;
        inside(&netns, "route", || self.lead_out(policy, outer))?;
        Ok(Wired { netns, tap, outer })
    }

    /// In the machine's namespace: rules first, so that nothing ever passes
    /// without them.
    fn fill(&self, policy: &NetworkPolicy, names: Names, host: &[IpAddr]) -> io::Result<OwnedFd> {
        sysctl::router(policy.ipv6)?;
        let tap = sys::open_tap(TAP)?;
        nft::apply(&firewall::machine(policy, names, host))?;
        sysctl::count_connections()?;
        talk(async |handle| {
            let lo = route::index(handle, "lo").await?;
            route::up(handle, lo).await?;
            let index = route::index(handle, TAP).await?;
            route::up_as(handle, index, GATEWAY_MAC).await?;
            route::add_address(handle, index, GATEWAY4.into(), PREFIX4).await?;
            if policy.ipv6 {
                route::add_address(handle, index, GATEWAY6.into(), PREFIX6).await?;
            }
            if let Some(rate) = policy.limits.download {
                route::shape(handle, index, Some(rate.0)).await?;
            }
            Ok(())
        })?;
        Ok(tap)
    }

    /// The link, one end on the host's side, the other in the machine's namespace.
    async fn link(&self, handle: &rtnetlink::Handle, netns: &Netns, group: u32) -> io::Result<u32> {
        let name = link_name(&self.token());
        let (here, there) = self.ends();
        if route::find(handle, &name).await?.is_none() {
            let ends = (
                End {
                    name: &name,
                    mac: here,
                },
                End {
                    name: OUT,
                    mac: there,
                },
            );
            route::add_veth(handle, ends.0, group, ends.1, netns.as_fd().as_raw_fd()).await?;
        }
        route::index(handle, &name).await
    }

    /// An address nobody has, as far as routes tell.
    fn free_address(&self, uplink: &Netns) -> Result<Ipv4Addr, NetworkError> {
        let routes = inside(uplink, "read the host's routes", || {
            talk(async |handle| route::routes(handle, false).await)
        })?;
        let pools: Vec<Cidr> = match self.site.pool {
            Some(pool) => vec![pool],
            None => POOLS.iter().filter_map(|pool| pool.parse().ok()).collect(),
        };
        let mut clash = None;
        for pool in pools {
            let (IpAddr::V4(first), IpAddr::V4(last)) = (pool.first(), pool.last()) else {
                continue;
            };
            let there: Vec<_> = routes
                .iter()
                .filter(|route| route.to.overlaps(&pool))
                .collect();
            if let Some(other) = there.iter().find(|route| !route.ours) {
                clash = clash.or(Some(NetworkError::Clash {
                    pool,
                    route: other.to,
                }));
                continue;
            }
            let taken: std::collections::HashSet<_> =
                there.iter().map(|route| route.to.first()).collect();
            let (first, last) = (u32::from(first), u32::from(last));
            let count = u64::from(last - first) + 1;
            let mut seed = [0; 4];
            fill_random(&mut seed);
            // Anywhere at first, so that two starting at once do not meet.
            let start = u64::from(u32::from_le_bytes(seed)) % count;
            let free =
                (0..count).map(|step| Ipv4Addr::from(first + ((start + step) % count) as u32));
            let usual =
                |address: &Ipv4Addr| ![0, 255].contains(&address.octets()[3]) || count < 256;
            return free
                .filter(usual)
                .find(|address| !taken.contains(&IpAddr::V4(*address)))
                .ok_or(NetworkError::Full { pool });
        }
        let none = || kernel("find", "addresses for machines")(io::ErrorKind::InvalidInput.into());
        Err(clash.unwrap_or_else(none))
    }

    fn outer6(&self) -> Ipv6Addr {
        let [a, b, c, d, e] = self.token;
        let [p, q, r, s] = POOL6;
        let pair = |high, low| u16::from_be_bytes([high, low]);
        Ipv6Addr::new(p, q, r, s, 1, pair(0, a), pair(b, c), pair(d, e))
    }

    /// On the host's side: the gate first, then the link and what leads to it.
    fn join(&self, policy: &NetworkPolicy, netns: &Netns, outer: Ipv4Addr) -> io::Result<()> {
        sysctl::forward4()?;
        if policy.ipv6 {
            sysctl::forwards6()?;
        }
        nft::enter_gate(&self.token())?;
        let (_, there) = self.ends();
        talk(async |handle| {
            let index = self.link(handle, netns, GROUP).await?;
            // This is what claims the address.
            route::add_host_route(handle, index, outer.into()).await?;
            route::add_neighbour(handle, index, outer.into(), there).await?;
            if policy.ipv6 {
                let outer = self.outer6().into();
                route::add_host_route(handle, index, outer).await?;
                route::add_neighbour(handle, index, outer, there).await?;
            }
            Ok(())
        })
    }

    /// In the machine's namespace: everything goes out through the link.
    fn lead_out(&self, policy: &NetworkPolicy, outer: Ipv4Addr) -> io::Result<()> {
        let (there, _) = self.ends();
        talk(async |handle| {
            let index = route::index(handle, OUT).await?;
            route::up(handle, index).await?;
            route::add_address(handle, index, outer.into(), 32).await?;
            route::add_neighbour(handle, index, NEXT4.into(), there).await?;
            route::add_default(handle, index, NEXT4.into()).await?;
            if policy.ipv6 {
                route::add_address(handle, index, self.outer6().into(), 128).await?;
                route::add_neighbour(handle, index, NEXT6.into(), there).await?;
                route::add_default(handle, index, NEXT6.into()).await?;
            }
            if let Some(rate) = policy.limits.upload {
                route::shape(handle, index, Some(rate.0)).await?;
            }
            Ok(())
        })
    }
}

/// Does some work in a namespace and says what failed.
fn inside<T: Send>(
    netns: &Netns,
    action: &'static str,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> Result<T, NetworkError> {
    let done = netns.run_in(work).and_then(|done| done);
    done.map_err(
        |error| match error.get_ref().and_then(|inner| inner.downcast_ref()) {
            Some(sysctl::NoForwarding6) => NetworkError::NoForwarding6,
            None => kernel(action, "of a machine's network")(error),
        },
    )
}

fn place(site: &Site) -> String {
    site.uplink
        .as_deref()
        .unwrap_or(Path::new("of this process"))
        .display()
        .to_string()
}

/// Name of the host's end of a machine's link.
fn link_name(token: &str) -> String {
    format!("bh{token}")
}

/// Shuts a machine's link and takes its connections and its place at the gate
/// away; only those of this very machine. The link goes with the machine's
/// namespace: the kernel takes both away once nobody has that any more, which
/// takes it a while that nobody has to wait for. `guarded` is whether there may
/// be rules at a tap of the host's.
pub(super) fn release_uplink(uplink: Option<&Path>, token: &str, guarded: bool) -> io::Result<()> {
    let netns = match uplink {
        // With its namespace, everything of it is gone.
        Some(path) if !path.exists() => return Ok(()),
        Some(path) => Netns::open(path)?,
        None => Netns::own()?,
    };
    netns.run_in(|| {
        if guarded {
            nft::remove(firewall::Family::Netdev, &firewall::guard_name(token))?;
        }
        talk(async |handle| {
            let found = route::find(handle, &link_name(token)).await?;
            let Some(link) = found.filter(|link| is_ours(link, token)) else {
                return Ok(());
            };
            for v6 in [false, true] {
                let routes = route::routes(handle, v6).await?;
                let ours = routes
                    .iter()
                    .filter(|route| route.ours && route.link == Some(link.index));
                for route in ours {
                    tracked::forget(route.to.first())?;
                }
            }
            route::retire(handle, link.index, RETIRED).await
        })?;
        nft::leave_gate(token)
    })?
}

/// Takes away the links of machines that were released and whose namespace
/// somebody has still open, and waits until they are gone; gives how many there
/// were.
///
/// # Errors
/// Not root, or the kernel refuses.
pub fn clear(site: &Site) -> Result<usize, NetworkError> {
    let uplink = site
        .netns()
        .map_err(kernel("open the network namespace", place(site)))?;
    inside(&uplink, "remove links", || {
        talk(async |handle| {
            let mut links = route::in_group(handle, RETIRED).await?;
            links.retain(|link| {
                link.mac
                    .get(1..)
                    .is_some_and(|own| is_ours(link, &hex(own)))
            });
            for link in &links {
                route::delete(handle, link.index).await?;
            }
            Ok(links.len())
        })
    })
}

/// A name can be had by chance, the address after it hardly.
fn is_ours(link: &route::Link, token: &str) -> bool {
    link.name == link_name(token) && link.mac.get(1..).map(hex).as_deref() == Some(token)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Takes a machine's namespace away: link and tap go with it.
pub(super) fn release_netns(path: &Path) -> io::Result<()> {
    netns::release(path)
}

/// Bytes that a machine's link has carried, both ways, whatever became of them.
/// Nothing where the link has another name: it is somebody else's.
///
/// # Errors
/// The namespace cannot be looked into.
pub fn carried(netns: &Netns) -> io::Result<Option<u64>> {
    let read = || std::fs::read_to_string("/proc/thread-self/net/dev");
    let text = netns.run_in(read).and_then(|done| done)?;
    Ok(carried_by(TAP, &text))
}

/// Reads `NAME: RECEIVED ...7 more... SENT ...`.
fn carried_by(link: &str, text: &str) -> Option<u64> {
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    let mut lines = lines.filter(|(name, _)| name.trim() == link);
    let figures: Vec<&str> = lines.next()?.1.split_whitespace().collect();
    let bytes = |at: usize| figures.get(at)?.parse::<u64>().ok();
    bytes(0)?.checked_add(bytes(8)?)
}

/// Has the kernel forget the guest's connections: it tells of each that it is
/// over, and what goes on of them has to pass the rules.
///
/// # Errors
/// The kernel refuses.
pub fn forget_connections(netns: &Netns) -> Result<(), NetworkError> {
    inside(netns, "forget connections", || {
        tracked::forget(GUEST4.into())?;
        tracked::forget(GUEST6.into())
    })
}

/// Changes what a running machine may reach, at once; the bandwidth afterwards.
/// With `deny`, connections there are have to pass the new rules, too; with
/// `only`, nothing else is let through by name.
///
/// # Errors
/// The kernel refuses. Where that is the bandwidth, the rules are the new ones: the
/// caller takes them back.
pub fn change(
    netns: &Netns,
    policy: &NetworkPolicy,
    names: Names,
    deny: bool,
    only: Option<&[nft::Entry]>,
) -> Result<(), NetworkError> {
    let counted = inside(netns, "read the counters", || {
        nft::counters(firewall::Family::Inet)
    })?;
    let bytes = |name: &str| counted.get(name).map_or(0, |counted| counted.bytes);
    let used = bytes("sent") + bytes("received");
    inside(netns, "change the rules", || {
        nft::change(&firewall::changes(policy, names, used), only)
    })?;
    if deny {
        forget_connections(netns)?;
    }
    let NetworkLimits {
        upload, download, ..
    } = policy.limits;
    inside(netns, "change the bandwidth", || {
        talk(async |handle| {
            for (name, rate) in [(TAP, download), (OUT, upload)] {
                let index = route::index(handle, name).await?;
                route::shape(handle, index, rate.map(|rate| rate.0)).await?;
            }
            Ok(())
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_one_link_are_read() {
        let text = "Inter-|   Receive                |  Transmit\n \
             face |bytes    packets errs drop fifo frame compressed multicast|bytes packets\n\
             \x20 tap:  1000      5    0    0    0     0          0         0    234       6 0\n\
             \x20mytap: 9 9 9 9 9 9 9 9 9 9 9\n";
        assert_eq!(carried_by("tap", text), Some(1234));
        assert_eq!(carried_by("out", text), None);
        assert_eq!(carried_by("tap", "tap: 1 2 3"), None);
    }
}
