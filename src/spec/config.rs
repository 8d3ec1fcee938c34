//! The configuration: what its layers say together, with the origin of every
//! value. Pure: who calls it knows where the files and the variables are.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::layer::Layer;
use super::{
    Catalog, Cidr, CustomProfile, NetworkName, NetworkPolicy, Origin, ProfileName, Request,
    Resolvers, Spec, SpecError, Timeout, UidRange,
};

/// What a configuration file can say.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where images and machines are kept; an absolute path.
    pub state_dir: Option<PathBuf>,
    /// Where sockets and this boot's verdicts are kept; an absolute path.
    pub runtime_dir: Option<PathBuf>,
    /// The QEMU binary; an absolute path. Without it the first
    /// `qemu-system-x86_64` in `PATH`.
    pub qemu: Option<PathBuf>,
    /// How long a guest may take until its agent answers, such as `5m` on a slow
    /// host: 90 s when absent, and 10 s in the proof that KVM works.
    pub boot_timeout: Option<Timeout>,
    /// User ids that are nobody else's on this host: every machine's VMM takes
    /// one while it runs.
    pub uids: Option<UidRange>,
    /// IPv4 addresses for machines on the host's side, one each, such as
    /// `10.213.0.0/16`. Without it the first of some ranges that the host has
    /// no route into.
    pub network_pool: Option<Cidr>,
    /// Who resolves names for machines, such as `1.1.1.1` or `[2606:4700::1]:53`,
    /// in this order; the host's own resolvers (`/etc/resolv.conf`) when absent.
    pub resolvers: Option<Resolvers>,
    /// What every machine gets unless asked otherwise.
    pub machine: Request,
    /// Custom profiles by name; no name of a built-in one.
    pub profile: BTreeMap<ProfileName, CustomProfile>,
    /// Named networks; no name of a network mode.
    pub network: BTreeMap<NetworkName, NetworkPolicy>,
}

/// The keys of `[machine]`: those of a [`Request`] that make sense for every
/// machine.
pub const MACHINE_KEYS: [&str; 21] = [
    "image",
    "kernel",
    "profile",
    "cpus",
    "memory",
    "disk",
    "timeout",
    "ttl",
    "idle_timeout",
    "survivors",
    "stop_grace",
    "network",
    "accel",
    "machine",
    "channel",
    "waive",
    "lsm_label",
    "user",
    "workdir",
    "env",
    "labels",
];

/// Keys beside the tables.
const TOP_KEYS: [&str; 7] = [
    "state_dir",
    "runtime_dir",
    "qemu",
    "boot_timeout",
    "uids",
    "network_pool",
    "resolvers",
];

/// Keys of `[machine]` that a profile decides together.
const LIMITS: [&str; 4] = ["cpus", "memory", "disk", "timeout"];

/// Tables of names and texts: no single variable can hold one.
pub(super) const MAPS: [&str; 2] = ["env", "labels"];

/// Table and key, such as `["machine", "memory"]`.
pub(super) type Key = Vec<String>;

pub(super) fn key(words: &[&str]) -> Key {
    words.iter().map(|word| (*word).to_owned()).collect()
}

impl Config {
    fn over(self, below: Self) -> Self {
        let mut profile = below.profile;
        profile.extend(self.profile);
        let mut network = below.network;
        network.extend(self.network);
        Self {
            state_dir: self.state_dir.or(below.state_dir),
            runtime_dir: self.runtime_dir.or(below.runtime_dir),
            qemu: self.qemu.or(below.qemu),
            boot_timeout: self.boot_timeout.or(below.boot_timeout),
            uids: self.uids.or(below.uids),
            network_pool: self.network_pool.or(below.network_pool),
            resolvers: self.resolvers.or(below.resolvers),
            machine: self.machine.over(below.machine),
            profile,
            network,
        }
    }

    /// Every key that says something, and what.
    fn values(&self) -> BTreeMap<Key, Value> {
        fn walk(value: Value, key: Key, values: &mut BTreeMap<Key, Value>) {
            match value {
                Value::Object(map) => {
                    for (name, value) in map {
                        let key = [&key[..], &[name]].concat();
                        walk(value, key, values);
                    }
                }
                Value::Null => {}
                value => {
                    values.insert(key, value);
                }
            }
        }
        let mut values = BTreeMap::new();
        // Plain data: it has nothing JSON has not.
        let value = serde_json::to_value(self).unwrap_or_default();
        walk(value, Key::new(), &mut values);
        values
    }
}

/// What all layers say together.
#[derive(Debug, Clone)]
pub struct Merged {
    /// The values.
    pub config: Config,
    /// The names that can be asked for.
    pub catalog: Catalog,
    origins: BTreeMap<Key, Origin>,
}

/// Merges layers, lowest first.
///
/// # Errors
/// A profile or network that cannot be.
pub fn merge<'l>(layers: impl IntoIterator<Item = &'l Layer>) -> Result<Merged, SpecError> {
    let mut config = Config::default();
    let mut origins = BTreeMap::new();
    for layer in layers {
        let above = &layer.config;
        // As `over` does: a profile replaces what was said of its limits.
        origins.retain(|key: &Key, _| {
            above.machine.profile.is_none()
                || !matches!(&key[..], [table, limit] if table == "machine" && LIMITS.contains(&limit.as_str()))
        });
        for key in above.values().into_keys() {
            let origin = layer.origin(&key);
            origins.insert(key, origin);
        }
        config = above.clone().over(config);
    }
    if let Some(pool) = config
        .network_pool
        .filter(|pool| !pool.first().is_ipv4() || pool.length() > 30)
    {
        return Err(SpecError::Value {
            what: "network_pool",
            value: pool.to_string(),
            why: "it is a range of at least four IPv4 addresses",
        });
    }
    let mut catalog = Catalog::default();
    let at = |words: [&str; 3], error| match origins.get(&key(&words)) {
        Some(origin) => SpecError::At {
            origin: origin.clone(),
            source: Box::new(error),
        },
        None => error,
    };
    for (name, policy) in &config.network {
        catalog
            .add_network(name.clone(), policy.clone())
            .map_err(|error| at(["network", name.as_str(), "mode"], error))?;
    }
    for (name, custom) in &config.profile {
        catalog.add_profile(name.clone(), custom).map_err(|error| {
            let word = match &error {
                SpecError::Value { what, .. } => what,
                SpecError::Unknown {
                    kind: "network", ..
                } => "network",
                _ => "base",
            };
            at(["profile", name.as_str(), word], error)
        })?;
    }
    Ok(Merged {
        config,
        catalog,
        origins,
    })
}

/// A value and where it comes from.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Setting {
    /// Table and key, such as `["machine", "memory"]`.
    pub key: Vec<String>,
    /// Its value as in a configuration file; null when it has none.
    pub value: Value,
    /// Where it comes from.
    pub origin: Origin,
}

impl Merged {
    /// The spec for a run of one command.
    ///
    /// # Errors
    /// As [`Request::resolve`]; the error says which layer it comes from.
    pub fn resolve(&self) -> Result<Spec, SpecError> {
        let spec = self.config.machine.clone().resolve(&self.catalog);
        spec.map_err(|error| self.located(error))
    }

    /// The spec for a detached machine.
    ///
    /// # Errors
    /// As [`Request::resolve_machine`]; the error says which layer it comes from.
    pub fn resolve_machine(&self) -> Result<Spec, SpecError> {
        let spec = self.config.machine.clone().resolve_machine(&self.catalog);
        spec.map_err(|error| self.located(error))
    }

    fn located(&self, error: SpecError) -> SpecError {
        let word = match &error {
            SpecError::Unknown { kind, .. } => kind,
            SpecError::Value { what, .. } => what.trim_start_matches("--"),
            _ => return error,
        };
        match self.origins.get(&key(&["machine", word])) {
            // Who typed it knows where.
            None | Some(Origin::Flag { .. }) => error,
            Some(origin) => SpecError::At {
                origin: origin.clone(),
                source: Box::new(error),
            },
        }
    }

    /// Every value with every default filled in, and where it comes from.
    ///
    /// # Errors
    /// As [`Merged::resolve_machine`].
    pub fn settings(&self) -> Result<Vec<Setting>, SpecError> {
        let spec = self.resolve_machine()?;
        let profile = self.catalog.profile(&spec.profile)?;
        let asked = &self.config.machine;
        let machine = Request {
            image: Some(spec.image),
            cpus: Some(spec.limits.vcpus),
            memory: Some(spec.limits.memory),
            disk: Some(spec.limits.disk),
            timeout: Some(spec.limits.timeout),
            survivors: Some(spec.lifetime.survivors),
            stop_grace: Some(spec.lifetime.stop_grace),
            network: Some(asked.network_with(profile)),
            accel: Some(spec.accel),
            machine: Some(spec.machine),
            channel: Some(spec.channel),
            profile: Some(spec.profile.clone()),
            ..asked.clone()
        };
        let values = Config {
            machine,
            ..self.config.clone()
        }
        .values();
        let of_profile = |name: &str| match name {
            "network" => asked.network.is_none() && profile.network.is_some(),
            name => LIMITS.contains(&name) && !self.origins.contains_key(&key(&["machine", name])),
        };
        let setting = |key: Key, value| {
            let origin = match self.origins.get(&key) {
                _ if key[0] == "machine" && of_profile(&key[1]) => Origin::Profile {
                    profile: spec.profile.to_string(),
                },
                Some(origin) => origin.clone(),
                None => Origin::Default,
            };
            Setting { key, value, origin }
        };
        let single = MACHINE_KEYS.into_iter().filter(|name| !MAPS.contains(name));
        let single = TOP_KEYS
            .into_iter()
            .map(|name| key(&[name]))
            .chain(single.map(|name| key(&["machine", name])));
        let mut settings: Vec<Setting> = single
            .map(|key| {
                let value = values.get(&key).cloned().unwrap_or_default();
                setting(key, value)
            })
            .collect();
        let mut tables = |wanted: &dyn Fn(&[String]) -> bool| {
            let wanted = values.iter().filter(|(key, _)| wanted(key));
            settings.extend(wanted.map(|(key, value)| setting(key.clone(), value.clone())));
        };
        tables(&|key| key.len() == 3 && key[0] == "machine" && MAPS.contains(&key[1].as_str()));
        tables(&|key| key.len() == 3 && key[0] != "machine");
        Ok(settings)
    }
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
