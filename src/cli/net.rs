//! `bulkhead net`.

use std::collections::BTreeMap;

use serde::Serialize;

use super::Global;
use super::each::each;
use super::message::{Failure, print_json, print_text};
use super::net_learn;
use super::net_log::{self, Log};
use crate::host::netns::Netns;
use crate::host::network::{NetworkError, guarded};
use crate::host::nft::{self, Counted};
use crate::plan::firewall::{ALLOW_CIDR, Family, guard_name};
use crate::run::Record;
use crate::spec::{Exception, HostPattern, NetworkChange, NetworkPolicy, Port, SpecError, VmId};
use crate::supervise::{Machines, Settings};

/// Options.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Show what a machine may reach, and what it tried.
    Show {
        /// Its name.
        vm: VmId,
    },
    /// Let machines reach more, also while they run.
    Allow(Change),
    /// Take from machines what they may reach, also from connections there are.
    Deny(Change),
    /// Show what a machine's network did: each question for a name, each new, refused and finished
    /// connection; with --json one event a line.
    Log(Log),
    /// Propose a network that lets through what a machine tried up to now, and no more.
    Learn {
        /// Its name.
        vm: VmId,
    },
}

#[derive(Debug, clap::Args)]
struct Change {
    /// Names of machines.
    #[arg(required = true)]
    vms: Vec<VmId>,
    /// A host: example.org, *.example.org; to allow it, also at a port: example.org:8443.
    #[arg(long = "host", value_name = "HOST")]
    hosts: Vec<HostPattern>,
    /// A port, or several: 8443, 8000-8100, 4433/udp.
    #[arg(long = "port", value_name = "PORT")]
    ports: Vec<Port>,
    /// An exception from what no machine may reach: 10.1.2.3/32:5432.
    #[arg(long = "cidr", value_name = "CIDR[:PORT]")]
    cidrs: Vec<Exception>,
}

/// A machine's network, for people and programs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct NetworkView {
    /// The machine.
    id: VmId,
    /// What it may reach and use.
    policy: NetworkPolicy,
    /// What was counted while it runs, by rule: `new` connections, bytes `sent`
    /// and `received`, what began a connection by an exception (`allow-cidr:...`),
    /// and what was refused, by reason.
    counters: BTreeMap<String, Counted>,
}

/// Runs the verb.
pub(super) async fn run(args: Args, global: &Global) -> Result<i32, Failure> {
    let (change, allow) = match args.verb {
        Verb::Show { vm } => return show(&vm, global),
        Verb::Allow(change) => (change, true),
        Verb::Deny(change) => (change, false),
        Verb::Log(log) => return net_log::run(log, global).await,
        Verb::Learn { vm } => return net_learn::run(&vm, global),
    };
    let (hosts, ports, cidrs) = (
        change.hosts.into_iter().collect(),
        change.ports.into_iter().collect(),
        change.cidrs.into_iter().collect(),
    );
    let network = match allow {
        true => NetworkChange {
            allow_hosts: hosts,
            allow_ports: ports,
            allow_cidrs: cidrs,
            ..NetworkChange::default()
        },
        false => NetworkChange {
            deny_hosts: hosts,
            deny_ports: ports,
            deny_cidrs: cidrs,
            ..NetworkChange::default()
        },
    };
    if network == NetworkChange::default() {
        return Err(SpecError::Value {
            what: "bulkhead net",
            value: "without --host, --port and --cidr".into(),
            why: "it would change nothing",
        }
        .into());
    }
    let settings = Settings {
        network,
        ..Settings::default()
    };
    let machines = Machines::new(global.host()?);
    each(&change.vms, global, async |vm| {
        machines.set(vm, settings.clone()).await
    })
    .await
}

fn show(vm: &VmId, global: &Global) -> Result<i32, Failure> {
    let dirs = global.host()?.dirs;
    let spec = Record::spec(&dirs, vm)?;
    // It is there while the machine runs, and root's to look into.
    let counters = Netns::open(&dirs.netns(vm)).and_then(|netns| {
        let count = || [Family::Netdev, Family::Inet].map(nft::counters);
        let counted = netns.run_in(count)?.into_iter();
        let mut counted = counted.collect::<Result<Vec<_>, _>>()?;
        let leases = Record::leased(&dirs, vm).map_err(std::io::Error::other)?;
        if let Some((netns, token)) = guarded(&leases)? {
            let count = || nft::counters_of(Family::Netdev, &guard_name(&token));
            counted.push(netns.run_in(count)??);
        }
        Ok(merged(counted))
    });
    let counters = match counters {
        // It does not run, or has no network.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => BTreeMap::new(),
        counters => counters.map_err(|source| NetworkError::Kernel {
            action: "read the counters of",
            what: vm.to_string(),
            source,
        })?,
    };
    let view = NetworkView {
        id: vm.clone(),
        policy: spec.network,
        counters,
    };
    match global.json {
        true => print_json(&view),
        false => print_text(&text(&view)),
    }
    Ok(0)
}

/// A reason that is there twice, at the tap and behind it, is one.
fn merged(tables: Vec<BTreeMap<String, Counted>>) -> BTreeMap<String, Counted> {
    let mut all: BTreeMap<String, Counted> = BTreeMap::new();
    for (name, counted) in tables.into_iter().flatten() {
        let one = all.entry(name).or_default();
        one.packets += counted.packets;
        one.bytes += counted.bytes;
    }
    all
}

fn text(view: &NetworkView) -> String {
    let list = |words: Vec<String>| match words.is_empty() {
        true => "none".to_owned(),
        false => words.join(" "),
    };
    let yes = |is: bool| if is { "yes" } else { "no" };
    let policy = &view.policy;
    let limits = &policy.limits;
    let rate = |bytes: Option<crate::spec::Bytes>| {
        bytes.map_or("unlimited".to_owned(), |bytes| format!("{bytes}/s"))
    };
    let mut text = format!("mode         {}\n", policy.mode.as_str());
    if policy.mode == crate::spec::NetworkMode::Isolated {
        return text;
    }
    if let Some(bridge) = &policy.bridge {
        text += &format!("bridge       {bridge}\n");
    }
    text += &format!(
        "preset       {}\nallowed      {}\ndenied       {}\nstrict       {}\nipv6         {}\nports        {}\nexceptions   {}\nupload       {}\ndownload     {}\nconnections  {} at a time, {} new a second\ntotal        {}\n",
        policy.preset,
        list(
            policy
                .allow_hosts
                .iter()
                .map(HostPattern::to_string)
                .collect()
        ),
        list(
            policy
                .deny_hosts
                .iter()
                .map(HostPattern::to_string)
                .collect()
        ),
        yes(policy.strict),
        yes(policy.ipv6),
        list(policy.ports().iter().map(Port::to_string).collect()),
        list(policy.exceptions.iter().map(Exception::to_string).collect()),
        rate(limits.upload),
        rate(limits.download),
        limits.connections,
        limits.connection_rate,
        limits
            .total
            .map_or("unlimited".to_owned(), |bytes| bytes.to_string()),
    );
    for (name, counted) in view
        .counters
        .iter()
        .filter(|(_, counted)| counted.packets > 0)
    {
        let what = match (name.as_str(), name.strip_prefix(ALLOW_CIDR)) {
            ("new" | "sent" | "received", _) => name.clone(),
            (_, Some(exception)) => format!("exception {exception}"),
            (refused, None) => format!("refused {refused}"),
        };
        text += &format!(
            "{what:<24} {} packets, {} bytes\n",
            counted.packets, counted.bytes
        );
    }
    text
}
