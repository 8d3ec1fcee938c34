//! A machine's network while it runs: its namespace, and the filter that holds
//! its names to the policy and keeps the record.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::error::MachineError;
use super::exception::{Counted, ExceptedEvent, Exceptions};
use super::machine::io_error;
use super::options::StartOptions;
use super::record::{Record, RecordError};
use crate::host::lease::Lease;
use crate::host::netns::Netns;
use crate::host::network::{self, Site, Wires};
use crate::host::{fault, nft};
use crate::net::{
    Feed, Filter, FilterConfig, Grant, Inside, Outgoing, Policies, Policy, Ports, Traffic,
    host_upstreams,
};
use crate::plan::firewall::{Family, LOG_GROUP, Names};
use crate::plan::network::{GATEWAY4, GATEWAY6, GUEST4, GUEST6};
use crate::plan::{Network, Plan};
use crate::spec::NetworkPolicy;

/// The host's own resolvers (resolv.conf(5)).
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Name of the record in a machine's directory: one event a line.
const RECORD: &str = "network.jsonl";

/// The record of what a machine's network did, in the machine's directory, and
/// what was put aside of it when it grew too long.
pub(crate) fn record_files(dir: &Path) -> [std::path::PathBuf; 2] {
    [dir.join(format!("{RECORD}.1")), dir.join(RECORD)]
}

/// A machine's network. Dropped, its filter ends: no name is resolved any more.
#[derive(Debug)]
pub(super) struct Net {
    rules: Arc<Rules>,
    filter: Filter,
    /// Lets through what the filter finds.
    feeding: JoinSet<()>,
}

/// The rules of a machine's network, and who changes them.
#[derive(Debug)]
pub(super) struct Rules {
    netns: Netns,
    policies: Policies,
    /// What it is held to. Locked while what is let through changes, so that
    /// nothing is let through by a policy that is none any more.
    held: Arc<Mutex<NetworkPolicy>>,
    exceptions: Exceptions,
    /// Whether the end of its exceptions was written down.
    ended: AtomicBool,
}

impl Drop for Rules {
    /// Of a machine that did not come up nobody says that it has ended.
    fn drop(&mut self) {
        self.end_exceptions();
    }
}

impl Net {
    /// Makes the machine's network, and gives the guest's end besides. The
    /// filter is there before anything can come from the guest.
    pub(super) fn make(
        network: &Network,
        plan: &Plan,
        record: &mut Record,
        options: &StartOptions,
    ) -> Result<(Self, OwnedFd), MachineError> {
        let (policy, given) = (&network.policy, &options.given);
        if let Some(dir) = options.netns.parent() {
            super::dirs::make_private(dir).map_err(io_error("make", dir))?;
        }
        let mut site = options.site.clone();
        if let Some(uplink) = &given.uplink {
            site.uplink = Some(kept(uplink, record, options)?);
        }
        let wires = Wires::choose(options.netns.clone(), site.clone(), policy);
        for lease in wires.leases() {
            record.lease(lease).map_err(RecordError::from)?;
        }
        if let Some(bridge) = &policy.bridge {
            let device = &bridge.device;
            tracing::warn!("what this machine reaches on {device} is not filtered");
        }
        let tap = given.tap.as_ref().map(|tap| tap.as_fd());
        let wired = wires.make_on(policy, Names::of(policy), tap)?;
        let net = Self::watch(wired.netns, policy, plan, record, &site, options)?;
        Ok((net, wired.tap))
    }

    /// Takes over the network of a machine whose owner died: what was let
    /// through by name is not known any more, and so is not let through.
    pub(super) fn take_over(
        network: &Network,
        plan: &Plan,
        record: &Record,
        options: &StartOptions,
    ) -> Result<Self, MachineError> {
        let netns = Netns::open(&options.netns).map_err(io_error("open", &options.netns))?;
        let policy = &network.policy;
        if policy.bridge.is_none() {
            network::change(&netns, policy, Names::of(policy), false, Some(&[]))?;
        }
        let uplink = record.leases().iter().find_map(|lease| match lease {
            Lease::Uplink { netns, .. } => netns.clone(),
            _ => None,
        });
        let site = Site {
            uplink,
            ..options.site.clone()
        };
        Self::watch(netns, policy, plan, record, &site, options)
    }

    /// Starts the filter of a namespace.
    fn watch(
        netns: Netns,
        policy: &NetworkPolicy,
        plan: &Plan,
        record: &Record,
        site: &Site,
        options: &StartOptions,
    ) -> Result<Self, MachineError> {
        let exceptions = Exceptions::new(options.exceptions.clone(), plan.id.clone());
        // Before anything can come from the guest.
        exceptions
            .note(&policy.exceptions, ExceptedEvent::Allowed, None)
            .map_err(io_error("write to", exceptions.file()))?;
        let start = || {
            fault::at("open filter")?;
            let opened = || io::Result::Ok((open(policy)?, nft::Allowing::open()?));
            let (inside, allowing) = netns.run_in(opened)??;
            fault::at("start filter")?;
            let (filter, fed) = Filter::start(inside, config(policy, plan, record, site)?)?;
            io::Result::Ok((filter, fed, allowing))
        };
        let (filter, fed, allowing) = start().map_err(MachineError::Filter)?;
        let held = Arc::new(Mutex::new(policy.clone()));
        let mut feeding = JoinSet::new();
        let feeder = Feeder {
            allowing,
            policy: filter.policies().watch(),
        };
        feeding.spawn(feed(fed, feeder, Arc::clone(&held)));
        let rules = Arc::new(Rules {
            netns,
            policies: filter.policies().clone(),
            held,
            exceptions,
            ended: AtomicBool::new(false),
        });
        Ok(Self {
            rules,
            filter,
            feeding,
        })
    }

    pub(super) fn netns(&self) -> &Netns {
        &self.rules.netns
    }

    /// What it is held to now.
    pub(super) fn held(&self) -> Arc<Mutex<NetworkPolicy>> {
        Arc::clone(&self.rules.held)
    }

    /// What can change it for as long as it is there.
    pub(super) fn rules(&self) -> Weak<Rules> {
        Arc::downgrade(&self.rules)
    }

    pub(super) fn traffic(&self) -> &Traffic {
        self.filter.traffic()
    }

    /// Waits until the filter has failed.
    pub(super) fn broken(&self) -> impl Future<Output = ()> + Send + use<> {
        self.filter.broken()
    }

    /// Changes what may be reached, all at once. With `deny`, connections there
    /// are have to pass the new rules, too. What fails is taken back.
    pub(super) fn change(&self, policy: &NetworkPolicy, deny: bool) -> Result<(), MachineError> {
        self.rules.change(policy, deny)
    }

    /// Ends the filter, when its machine has ended: connections there are end
    /// with it, and are in the record.
    pub(super) async fn end(self) {
        let Self {
            rules,
            filter,
            mut feeding,
        } = self;
        rules.end_exceptions();
        if let Err(error) = network::forget_connections(&rules.netns) {
            tracing::debug!("connections that are not in the record: {error}");
        }
        filter.end().await;
        feeding.shutdown().await;
    }
}

impl Rules {
    /// As [`Net::change`].
    pub(super) fn change(&self, policy: &NetworkPolicy, deny: bool) -> Result<(), MachineError> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let made = policy.exceptions.difference(&held.exceptions);
        // What cannot be written down is not made.
        self.exceptions
            .note(made.clone(), ExceptedEvent::Allowed, None)
            .map_err(io_error("write to", self.exceptions.file()))?;
        let before = self.policies.now();
        let grants = self.policies.set(Arc::new(Policy::new(policy)));
        let only: Vec<_> = grants
            .iter()
            .flat_map(|grant| entries(grant, &grant.ports))
            .collect();
        let changed = network::change(&self.netns, policy, Names::of(policy), deny, Some(&only));
        let other = policy.exceptions != held.exceptions;
        let counted = other.then(|| self.counted()).flatten();
        let Err(source) = changed else {
            let gone = held.exceptions.difference(&policy.exceptions);
            self.exceptions
                .note_after(gone, ExceptedEvent::Denied, counted.as_ref());
            held.clone_from(policy);
            return Ok(());
        };
        let grants = self.policies.set(before);
        let entries = grants.iter().flat_map(|grant| entries(grant, &grant.ports));
        let only: Vec<_> = entries.collect();
        // What failed may have come after the rules.
        let back = network::change(&self.netns, &held, Names::of(&held), true, Some(&only));
        self.exceptions
            .note_after(made, ExceptedEvent::Denied, counted.as_ref());
        match back {
            Ok(()) => Err(source.into()),
            Err(back) => {
                tracing::warn!("the network may be the one that was refused: {back}");
                let back = back.into();
                Err(MachineError::NetworkAstray { back, source })
            }
        }
    }

    /// What was counted so far.
    fn counted(&self) -> Option<Counted> {
        let count = || nft::counters(Family::Inet);
        self.netns.run_in(count).and_then(|counted| counted).ok()
    }

    /// Writes down how exceptions were used, when all is over; once.
    fn end_exceptions(&self) {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if self.ended.swap(true, Ordering::Relaxed) || held.exceptions.is_empty() {
            return;
        }
        let counted = self.counted();
        self.exceptions
            .note_after(&held.exceptions, ExceptedEvent::Ended, counted.as_ref());
    }
}

/// What a caller has for a machine's network, in the place of what would be looked
/// up by name. Both are used for as long as the machine lives, and stay the
/// caller's.
#[derive(Debug, Clone, Default)]
pub struct Given {
    /// The network namespace that the machine's network leads to, in the place of
    /// that of its [`Site`].
    pub uplink: Option<Arc<OwnedFd>>,
    /// The other end of the tap that the network names (mode `bridge`), which is
    /// in that namespace. Nobody else reads it.
    pub tap: Option<Arc<OwnedFd>>,
}

/// Gives a namespace of the caller's a name, under which its leases are released
/// by whoever comes after us.
fn kept(
    uplink: &OwnedFd,
    record: &mut Record,
    options: &StartOptions,
) -> Result<PathBuf, MachineError> {
    let path = options.netns.with_extension("uplink");
    let lease = Lease::Netns { path: path.clone() };
    record.lease(lease).map_err(RecordError::from)?;
    Netns::keep(uplink.as_fd(), &path).map_err(io_error("keep the network namespace", &path))?;
    Ok(path)
}

/// Opens the filter's sockets in the namespace of the calling thread.
fn open(policy: &NetworkPolicy) -> io::Result<Inside> {
    let gateways = match policy.bridge {
        None => [IpAddr::V4(GATEWAY4), IpAddr::V6(GATEWAY6)],
        // Where no guest comes: there is one only because a record is kept.
        Some(_) => [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()],
    };
    let gateways = &gateways[..1 + usize::from(policy.ipv6)];
    let proxy = match Names::of(policy) {
        Names::Strict(port) => Some(port),
        Names::Any | Names::Fed => None,
    };
    Inside::open(gateways, proxy, LOG_GROUP)
}

fn config(
    policy: &NetworkPolicy,
    plan: &Plan,
    record: &Record,
    site: &Site,
) -> io::Result<FilterConfig> {
    let [_, file] = record_files(record.dir());
    Ok(FilterConfig {
        machine: plan.id.to_string(),
        policy: Policy::new(policy),
        upstreams: upstreams(site),
        from: match &site.uplink {
            None => Outgoing::here(),
            Some(path) => Outgoing::within(File::open(path)?.into())?,
        },
        guests: vec![GUEST4.into(), GUEST6.into()],
        record: file,
    })
}

fn upstreams(site: &Site) -> Vec<SocketAddr> {
    match site.resolvers.is_empty() {
        true => host_upstreams(Path::new(RESOLV_CONF)),
        false => site.resolvers.clone(),
    }
}

/// What the firewall has to let through for a name.
fn entries(grant: &Grant, ports: &Ports) -> Vec<nft::Entry> {
    let general = ports.general().then_some(0);
    let own = ports.own().iter().copied();
    let entry = |port| nft::Entry {
        address: grant.address,
        port,
        time: grant.lifetime,
    };
    general.into_iter().chain(own).map(entry).collect()
}

/// Who lets through what the resolver has found, as the policy is by then.
struct Feeder {
    allowing: nft::Allowing,
    policy: watch::Receiver<Arc<Policy>>,
}

impl Feeder {
    fn let_through(&self, grants: &[Grant]) -> Result<(), String> {
        let policy = Arc::clone(&self.policy.borrow());
        let mut all = Vec::new();
        for grant in grants {
            let allowed = policy
                .name(&grant.name)
                .map_err(|error| error.to_string())?;
            all.extend(entries(grant, &allowed.ports));
        }
        let allowed = self.allowing.allow(&all);
        allowed.map_err(|error| format!("the address cannot be let through: {error}"))
    }
}

/// Lets through for good. A guest waits for it with every new name: no thread is
/// begun or waited for, but where somebody changes what may be reached.
async fn feed(mut fed: mpsc::Receiver<Feed>, feeder: Feeder, held: Arc<Mutex<NetworkPolicy>>) {
    let feeder = Arc::new(feeder);
    while let Some(Feed { grants, done }) = fed.recv().await {
        let free = held.try_lock().ok();
        let at_once = free.map(|_held| feeder.let_through(&grants));
        let result = match at_once {
            Some(result) => result,
            None => {
                let (feeder, held) = (Arc::clone(&feeder), Arc::clone(&held));
                let work = move || {
                    let _held = held.lock().unwrap_or_else(PoisonError::into_inner);
                    feeder.let_through(&grants)
                };
                let result = tokio::task::spawn_blocking(work).await;
                result.unwrap_or_else(|error| Err(error.to_string()))
            }
        };
        let _ = done.send(result);
    }
}
