//! One layer of the configuration: a file, the environment, or the flags.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use toml::de::DeTable;

use super::config::{Config, Key, MACHINE_KEYS, MAPS, key};
use super::{Origin, Request, SpecError, Timeout};

/// What one place says.
#[derive(Debug, Clone)]
pub struct Layer {
    pub(super) config: Config,
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
        let boot_timeout = match get("boot_timeout") {
            None => None,
            Some(value) => {
                let parsed = value.to_string_lossy().parse::<Timeout>();
                Some(parsed.map_err(|error| SpecError::Variable {
                    name: variable("boot_timeout"),
                    why: error.to_string(),
                })?)
            }
        };
        let uids = get("uids").map(|value| {
            let parsed = value.to_string_lossy().parse();
            parsed.map_err(|error: super::Malformed| SpecError::Variable {
                name: variable("uids"),
                why: error.to_string(),
            })
        });
        let uids = uids.transpose()?;
        let pool = get("network_pool").map(|text| {
            let text = text.to_string_lossy();
            text.parse()
                .map_err(|error: super::Malformed| SpecError::Variable {
                    name: variable("network_pool"),
                    why: error.to_string(),
                })
        });
        let resolvers = get("resolvers").map(|text| {
            let text = text.to_string_lossy();
            text.parse()
                .map_err(|error: super::Malformed| SpecError::Variable {
                    name: variable("resolvers"),
                    why: error.to_string(),
                })
        });
        let config = Config {
            network_pool: pool.transpose()?,
            resolvers: resolvers.transpose()?,
            state_dir: path("state_dir"),
            runtime_dir: path("runtime_dir"),
            qemu: path("qemu"),
            boot_timeout,
            uids,
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

    /// Where it says this.
    pub(super) fn origin(&self, key: &Key) -> Origin {
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
