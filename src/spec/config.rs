//! The configuration: what files, the environment and flags say, one layer
//! each, merged with the origin of every value. Pure: who calls it knows where
//! the files and the variables are.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use toml::de::DeTable;

use super::{
    Catalog, CustomProfile, NetworkName, NetworkPolicy, Origin, ProfileName, Request, Spec,
    SpecError,
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
    /// What every machine gets unless asked otherwise.
    pub machine: Request,
    /// Custom profiles by name; no name of a built-in one.
    pub profile: BTreeMap<ProfileName, CustomProfile>,
    /// Named networks; no name of a network mode.
    pub network: BTreeMap<NetworkName, NetworkPolicy>,
}

/// The keys of `[machine]`: those of a [`Request`] that make sense for every
/// machine.
pub const MACHINE_KEYS: [&str; 19] = [
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
    "user",
    "workdir",
    "env",
    "labels",
];

/// Keys beside the tables.
const TOP_KEYS: [&str; 3] = ["state_dir", "runtime_dir", "qemu"];

/// Keys of `[machine]` that a profile decides together.
const LIMITS: [&str; 4] = ["cpus", "memory", "disk", "timeout"];

/// Tables of names and texts: no single variable can hold one.
const MAPS: [&str; 2] = ["env", "labels"];

/// Table and key, such as `["machine", "memory"]`.
type Key = Vec<String>;

fn key(words: &[&str]) -> Key {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// What one place says.
#[derive(Debug, Clone)]
pub struct Layer {
    config: Config,
    source: Source,
}

#[derive(Debug, Clone)]
enum Source {
    /// With the line of each key.
    File(PathBuf, BTreeMap<Key, usize>),
    Environment,
    Flags,
}

impl Layer {
    /// A configuration file.
    ///
    /// # Errors
    /// Not TOML, an unknown key, a malformed value or a path that depends on
    /// where Bulkhead is started, with file and line.
    pub fn file(path: &Path, text: &str) -> Result<Self, SpecError> {
        let lines = lines(path, text)?;
        let refuse = |key: &Key, why: String| SpecError::Key {
            path: path.to_owned(),
            line: lines[key],
            key: format!("`{}`", key.join(".")),
            why,
        };
        for key in lines.keys() {
            if let [table, name] = &key[..]
                && table == "machine"
                && !MACHINE_KEYS.contains(&name.as_str())
            {
                let why = format!("is none of {}", MACHINE_KEYS.join(", "));
                return Err(refuse(key, why));
            }
        }
        let config: Config = from_toml(path, text)?;
        let kernel = config.machine.kernel.as_deref().map(Path::new);
        let paths = [
            (&["state_dir"][..], config.state_dir.as_deref()),
            (&["runtime_dir"], config.runtime_dir.as_deref()),
            (&["qemu"], config.qemu.as_deref()),
            // Without a slash it is the name of an installed one.
            (
                &["machine", "kernel"],
                kernel.filter(|path| path.components().count() > 1),
            ),
        ];
        for (words, value) in paths {
            if value.is_some_and(|path| !path.is_absolute()) {
                let why = "must begin with `/`: a file means the same wherever it is used";
                return Err(refuse(&key(words), why.to_owned()));
            }
        }
        let source = Source::File(path.to_owned(), lines);
        Ok(Self { config, source })
    }

    /// The file of `--spec`: a whole [`Request`].
    ///
    /// # Errors
    /// Not TOML, an unknown key or a malformed value, with file and line.
    pub fn spec(path: &Path, text: &str) -> Result<Self, SpecError> {
        let config = Config {
            machine: from_toml(path, text)?,
            ..Config::default()
        };
        let lines = lines(path, text)?.into_iter().map(|(mut key, line)| {
            key.insert(0, "machine".to_owned());
            (key, line)
        });
        let source = Source::File(path.to_owned(), lines.collect());
        Ok(Self { config, source })
    }

    /// The variables `BULKHEAD_<KEY>` of all keys that take one value.
    ///
    /// # Errors
    /// A variable that is not UTF-8, or a malformed value.
    pub fn environment(lookup: impl Fn(&str) -> Option<OsString>) -> Result<Self, SpecError> {
        let get = |key: &str| lookup(&variable(key)).filter(|value| !value.is_empty());
        let path = |key: &str| get(key).map(PathBuf::from);
        let mut machine = Request::default();
        let mut table = toml::Table::new();
        for key in MACHINE_KEYS.into_iter().filter(|key| !MAPS.contains(key)) {
            let Some(value) = get(key) else { continue };
            let refuse = |why: String| SpecError::Variable {
                name: variable(key),
                why,
            };
            let text = value
                .into_string()
                .map_err(|_| refuse("it is not UTF-8".into()))?;
            let value = match text.parse() {
                Ok(number) if key == "cpus" => toml::Value::Integer(number),
                _ => toml::Value::String(text),
            };
            table.insert(key.to_owned(), value);
            // Up to here it made sense: this variable is the one to blame.
            machine = Request::deserialize(table.clone())
                .map_err(|error| refuse(error.message().into()))?;
        }
        let config = Config {
            state_dir: path("state_dir"),
            runtime_dir: path("runtime_dir"),
            qemu: path("qemu"),
            machine,
            ..Config::default()
        };
        let source = Source::Environment;
        Ok(Self { config, source })
    }

    /// The command line.
    pub fn flags(config: Config) -> Self {
        let source = Source::Flags;
        Self { config, source }
    }

    fn origin(&self, key: &Key) -> Origin {
        let word = key
            .get(usize::from(key[0] == "machine"))
            .map_or("", String::as_str);
        match &self.source {
            Source::File(path, lines) => Origin::File {
                path: path.clone(),
                // A key that is there by default: its table's line.
                line: (1..=key.len())
                    .rev()
                    .find_map(|len| lines.get(&key[..len]))
                    .copied()
                    .unwrap_or(1),
            },
            Source::Environment => Origin::Environment {
                variable: variable(word),
            },
            Source::Flags => Origin::Flag {
                flag: match word {
                    "labels" => "--label".into(),
                    word => format!("--{}", word.replace('_', "-")),
                },
            },
        }
    }
}

/// The variable of a key.
fn variable(key: &str) -> String {
    format!("BULKHEAD_{}", key.to_ascii_uppercase())
}

/// Reads TOML; errors name the file, the line and the key.
pub(super) fn from_toml<T: DeserializeOwned>(path: &Path, text: &str) -> Result<T, SpecError> {
    toml::from_str(text).map_err(|source| SpecError::Parse {
        path: path.to_owned(),
        source: Box::new(source),
    })
}

/// The line of each table and key.
fn lines(path: &Path, text: &str) -> Result<BTreeMap<Key, usize>, SpecError> {
    fn walk(table: &DeTable<'_>, above: &Key, text: &str, lines: &mut BTreeMap<Key, usize>) {
        for (name, value) in table {
            let mut key = above.clone();
            key.push(name.get_ref().to_string());
            if let Some(table) = value.get_ref().as_table() {
                walk(table, &key, text, lines);
            }
            let before = &text.as_bytes()[..name.span().start];
            let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
            lines.insert(key, line);
        }
    }
    let table = DeTable::parse(text).map_err(|source| SpecError::Parse {
        path: path.to_owned(),
        source: Box::new(source),
    })?;
    let mut lines = BTreeMap::new();
    walk(table.get_ref(), &Key::new(), text, &mut lines);
    Ok(lines)
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
            .add_network(name.clone(), *policy)
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
