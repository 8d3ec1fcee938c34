//! What one QEMU offers, out of its `query-qmp-schema`.
//!
//! The reply is a flat list of named entities that refer to each other by name
//! (QEMU: `docs/devel/qapi-code-gen.rst`, "Client JSON Protocol introspection").

use std::{
    collections::{HashMap, HashSet},
    io,
};

use serde::Deserialize;
use serde_json::Value;

use crate::error::Explain;

/// Everything one QEMU offers on its monitor.
#[derive(Debug, Clone)]
pub struct Schema {
    entities: HashMap<String, Entity>,
}

/// A schema that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum SchemaError {
    /// It is not the reply of `query-qmp-schema`.
    #[error("cannot read a reply of `query-qmp-schema`")]
    Decode(#[source] serde_json::Error),
}

impl Explain for SchemaError {
    fn code(&self) -> &'static str {
        "qmp-schema-unreadable"
    }

    fn remedy(&self) -> String {
        "capture it again with `cargo xtask qmp-schema capture`".into()
    }
}

#[derive(Debug, Clone, Deserialize)]
struct Named {
    name: String,
    #[serde(flatten)]
    entity: Entity,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(tag = "meta-type", rename_all = "kebab-case")]
enum Entity {
    #[serde(rename_all = "kebab-case")]
    Command {
        arg_type: String,
        #[serde(default)]
        features: Vec<String>,
    },
    #[serde(rename_all = "kebab-case")]
    Event,
    Object {
        members: Vec<Member>,
        #[serde(default)]
        variants: Vec<Variant>,
    },
    #[serde(rename_all = "kebab-case")]
    Array {
        element_type: String,
    },
    Enum {
        values: Vec<String>,
    },
    Alternate {
        members: Vec<Choice>,
    },
    /// Built-in types, and kinds that a later QEMU may bring.
    #[serde(other)]
    Opaque,
}

#[derive(Debug, Clone, Deserialize)]
struct Member {
    name: String,
    #[serde(rename = "type")]
    type_name: String,
    #[serde(default)]
    features: Vec<String>,
}

#[derive(Debug, Clone, Deserialize)]
struct Variant {
    #[serde(rename = "type")]
    type_name: String,
}

#[derive(Debug, Clone, Deserialize)]
struct Choice {
    #[serde(rename = "type")]
    type_name: String,
}

impl Schema {
    /// Reads the reply of `query-qmp-schema`.
    ///
    /// # Errors
    /// It is something else.
    pub fn from_value(reply: Value) -> Result<Self, SchemaError> {
        let list: Vec<Named> = serde_json::from_value(reply).map_err(SchemaError::Decode)?;
        let entities = list.into_iter().map(|named| (named.name, named.entity));
        Ok(Self {
            entities: entities.collect(),
        })
    }

    /// Reads it from a file.
    ///
    /// # Errors
    /// It cannot be read, or is something else.
    pub fn from_reader(reader: impl io::Read) -> Result<Self, SchemaError> {
        Self::from_value(serde_json::from_reader(reader).map_err(SchemaError::Decode)?)
    }

    /// Names of all commands, sorted.
    pub fn commands(&self) -> Vec<&str> {
        self.names(|entity| matches!(entity, Entity::Command { .. }))
    }

    /// Names of all events, sorted.
    pub fn events(&self) -> Vec<&str> {
        self.names(|entity| matches!(entity, Entity::Event))
    }

    fn names(&self, wanted: impl Fn(&Entity) -> bool) -> Vec<&str> {
        let entities = self.entities.iter();
        let mut names: Vec<&str> = entities
            .filter(|(_, entity)| wanted(entity))
            .map(|(name, _)| name.as_str())
            .collect();
        names.sort_unstable();
        names
    }

    /// Whether there is such a command.
    pub fn offers_command(&self, command: &str) -> bool {
        matches!(self.entities.get(command), Some(Entity::Command { .. }))
    }

    /// Whether there is such an event.
    pub fn offers_event(&self, event: &str) -> bool {
        matches!(self.entities.get(event), Some(Entity::Event))
    }

    /// Whether a command takes an argument. `path` leads through objects, their
    /// variants, arrays and alternates, and may end in a value of an
    /// enumeration: `uri`, `capabilities.capability=x-ignore-shared`.
    pub fn offers_argument(&self, command: &str, path: &str) -> bool {
        let (path, value) = match path.split_once('=') {
            Some((path, value)) => (path, Some(value)),
            None => (path, None),
        };
        let found = self.resolve(command, path);
        match value {
            None => !found.is_empty(),
            Some(value) => found
                .iter()
                .any(|member| self.has_value(&member.type_name, value)),
        }
    }

    /// Whether a command carries a feature flag, such as `deprecated`.
    pub fn command_has_feature(&self, command: &str, feature: &str) -> bool {
        match self.entities.get(command) {
            Some(Entity::Command { features, .. }) => features.iter().any(|f| f == feature),
            _ => false,
        }
    }

    /// Whether an argument, given as for [`Schema::offers_argument`] but
    /// without a value, carries a feature flag.
    pub fn argument_has_feature(&self, command: &str, path: &str, feature: &str) -> bool {
        let mut found = self.resolve(command, path).into_iter();
        found.any(|member| member.features.iter().any(|f| f == feature))
    }

    /// All members that `path` can mean.
    fn resolve(&self, command: &str, path: &str) -> Vec<&Member> {
        let Some(Entity::Command { arg_type, .. }) = self.entities.get(command) else {
            return Vec::new();
        };
        let mut types = vec![arg_type.as_str()];
        let mut found = Vec::new();
        for step in path.split('.') {
            found = types.iter().flat_map(|name| self.members(name)).collect();
            found.retain(|member: &&Member| member.name == step);
            types = found
                .iter()
                .map(|member| member.type_name.as_str())
                .collect();
        }
        found
    }

    /// Members of an object in all its variants; an array stands for its
    /// elements, an alternate for its choices.
    fn members<'a>(&'a self, type_name: &'a str) -> Vec<&'a Member> {
        let mut members = Vec::new();
        self.walk(type_name, |entity| {
            if let Entity::Object { members: own, .. } = entity {
                members.extend(own);
            }
        });
        members
    }

    fn has_value(&self, type_name: &str, value: &str) -> bool {
        let mut found = false;
        self.walk(type_name, |entity| {
            if let Entity::Enum { values } = entity {
                found |= values.iter().any(|v| v == value);
            }
        });
        found
    }

    /// Visits a type and what it may stand for, each once.
    fn walk<'a>(&'a self, type_name: &'a str, mut visit: impl FnMut(&'a Entity)) {
        let mut todo = vec![type_name];
        let mut seen = HashSet::new();
        while let Some(name) = todo.pop() {
            if !seen.insert(name) {
                continue;
            }
            let Some(entity) = self.entities.get(name) else {
                continue;
            };
            visit(entity);
            match entity {
                Entity::Object { variants, .. } => {
                    todo.extend(variants.iter().map(|variant| variant.type_name.as_str()));
                }
                Entity::Array { element_type } => todo.push(element_type),
                Entity::Alternate { members } => {
                    todo.extend(members.iter().map(|choice| choice.type_name.as_str()));
                }
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn schema() -> Schema {
        Schema::from_value(json!([
            {"name": "add", "meta-type": "command", "arg-type": "0", "ret-type": "9",
             "features": ["unstable"]},
            {"name": "STOP", "meta-type": "event", "arg-type": "0"},
            {"name": "0", "meta-type": "object", "tag": "driver",
             "members": [{"name": "driver", "type": "1"},
                         {"name": "old", "type": "str", "features": ["deprecated"]}],
             "variants": [{"case": "file", "type": "2"}]},
            {"name": "1", "meta-type": "enum", "values": ["file", "null"]},
            {"name": "2", "meta-type": "object", "members": [{"name": "files", "type": "[3]"}]},
            {"name": "[3]", "meta-type": "array", "element-type": "3"},
            {"name": "3", "meta-type": "alternate", "members": [{"type": "0"}, {"type": "str"}]},
            {"name": "str", "meta-type": "builtin", "json-type": "string"},
            {"name": "4", "meta-type": "never-seen", "shape": 1},
        ]))
        .unwrap()
    }

    #[test]
    fn follows_variants_arrays_and_alternates() {
        let schema = schema();
        for path in [
            "driver",
            "driver=null",
            "files",
            "files.driver",
            "files.files.driver=file",
        ] {
            assert!(schema.offers_argument("add", path), "{path}");
        }
        for path in [
            "driver=ftp",
            "file",
            "old=x",
            "files.nothing",
            "driver.x",
            "",
        ] {
            assert!(!schema.offers_argument("add", path), "{path}");
        }
        assert!(!schema.offers_argument("STOP", "driver"));
    }

    #[test]
    fn knows_commands_events_and_features() {
        let schema = schema();
        assert_eq!(schema.commands(), ["add"]);
        assert_eq!(schema.events(), ["STOP"]);
        assert!(schema.offers_event("STOP") && !schema.offers_command("STOP"));
        assert!(schema.command_has_feature("add", "unstable"));
        assert!(schema.argument_has_feature("add", "files.old", "deprecated"));
        assert!(!schema.argument_has_feature("add", "driver", "deprecated"));
    }

    #[test]
    fn refuses_something_else() {
        assert!(Schema::from_value(json!({"return": []})).is_err());
        assert!(Schema::from_reader(&b"["[..]).is_err());
    }
}
