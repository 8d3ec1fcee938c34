//! A machine's network while it runs: its namespace, and the filter that holds
//! its names to the policy and keeps the record.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::error::MachineError;
use super::machine::{StartOptions, io_error};
use super::record::{Record, RecordError};
use crate::host::netns::Netns;
use crate::host::network::{self, Site, Wires};
use crate::host::{fault, nft};
use crate::net::{
    Feed, Filter, FilterConfig, Grant, Inside, Outgoing, Policy, Ports, Reach, Traffic,
    host_upstreams,
};
use crate::plan::firewall::{LOG_GROUP, Names};
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
    netns: Arc<Netns>,
    filter: Filter,
    /// Held while what is let through changes, so that nothing is let through
    /// by a policy that is none any more.
    turn: Arc<Mutex<()>>,
    /// Lets through what the filter finds.
    feeding: JoinSet<()>,
}

impl Net {
    /// Makes the machine's network, and gives the guest's end besides. The
    /// filter is there before anything can come from the guest.
    pub(super) fn make(
        network: &Network,
        plan: &Plan,
        record: &mut Record,
        options: &StartOptions,
    ) -> Result<(Self, std::os::fd::OwnedFd), MachineError> {
        let wires = Wires::choose(options.netns.clone(), options.site.clone());
        if let Some(dir) = options.netns.parent() {
            super::dirs::make_private(dir).map_err(io_error("make", dir))?;
        }
        for lease in wires.leases() {
            record.lease(lease).map_err(RecordError::from)?;
        }
        let policy = &network.policy;
        if let Some(bridge) = &policy.bridge {
            let device = &bridge.device;
            tracing::warn!("what this machine reaches on the bridge {device} is not filtered");
        }
        let wired = wires.make(policy, Names::of(policy))?;
        let net = Self::watch(wired.netns, policy, plan, record, options)?;
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
        Self::watch(netns, policy, plan, record, options)
    }

    /// Starts the filter of a namespace.
    fn watch(
        netns: Netns,
        policy: &NetworkPolicy,
        plan: &Plan,
        record: &Record,
        options: &StartOptions,
    ) -> Result<Self, MachineError> {
        let start = || {
            fault::at("open filter")?;
            let inside = netns.run_in(|| open(policy))??;
            fault::at("start filter")?;
            Filter::start(inside, config(policy, plan, record, &options.site)?)
        };
        let (filter, fed) = start().map_err(MachineError::Filter)?;
        let (netns, turn) = (Arc::new(netns), Arc::new(Mutex::new(())));
        let mut feeding = JoinSet::new();
        feeding.spawn(feed(
            fed,
            filter.policy(),
            Arc::clone(&netns),
            Arc::clone(&turn),
        ));
        Ok(Self {
            netns,
            filter,
            turn,
            feeding,
        })
    }

    pub(super) fn netns(&self) -> &Netns {
        &self.netns
    }

    pub(super) fn traffic(&self) -> &Traffic {
        self.filter.traffic()
    }

    /// Waits until the filter has failed.
    pub(super) fn broken(&self) -> impl Future<Output = ()> + Send + use<> {
        self.filter.broken()
    }

    /// Changes what may be reached, all at once. With `deny`, connections there
    /// are have to pass the new rules, too.
    pub(super) fn change(&self, policy: &NetworkPolicy, deny: bool) -> Result<(), MachineError> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let before = Arc::clone(&self.filter.policy().borrow());
        let grants = self.filter.set_policy(Arc::new(Policy::new(policy)));
        let only: Vec<_> = grants
            .iter()
            .flat_map(|grant| entries(grant, &grant.ports))
            .collect();
        let changed = network::change(&self.netns, policy, Names::of(policy), deny, Some(&only));
        if changed.is_err() {
            self.filter.set_policy(before);
        }
        Ok(changed?)
    }

    /// Ends the filter, when its machine has ended: connections there are end
    /// with it, and are in the record.
    pub(super) async fn end(self) {
        let Self {
            netns,
            filter,
            mut feeding,
            turn: _,
        } = self;
        if let Err(error) = network::forget_connections(&netns) {
            tracing::debug!("connections that are not in the record: {error}");
        }
        filter.end().await;
        feeding.shutdown().await;
    }
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
        reach: Reach {
            ipv6: policy.ipv6,
            allow_cidrs: policy.exceptions.iter().map(|one| one.cidr).collect(),
        },
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

/// Lets through what the resolver has found, as the policy is by then.
async fn feed(
    mut fed: mpsc::Receiver<Feed>,
    policy: watch::Receiver<Arc<Policy>>,
    netns: Arc<Netns>,
    turn: Arc<Mutex<()>>,
) {
    while let Some(Feed { grants, done }) = fed.recv().await {
        let (policy, netns, turn) = (policy.clone(), Arc::clone(&netns), Arc::clone(&turn));
        let work = move || {
            let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
            let policy = Arc::clone(&policy.borrow());
            let mut all = Vec::new();
            for grant in &grants {
                let allowed = policy
                    .name(&grant.name)
                    .map_err(|error| error.to_string())?;
                all.extend(entries(grant, &allowed.ports));
            }
            let allow = || nft::allow(&all);
            let allowed = netns.run_in(allow).and_then(|allowed| allowed);
            allowed.map_err(|error| format!("the address cannot be let through: {error}"))
        };
        let result = tokio::task::spawn_blocking(work).await;
        let _ = done.send(result.unwrap_or_else(|error| Err(error.to_string())));
    }
}
