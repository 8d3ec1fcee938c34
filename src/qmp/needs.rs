//! What Bulkhead needs a QEMU to offer: `qmp-schema/needs.toml`.

use std::fmt;

use serde::Deserialize;

use super::schema::Schema;
use crate::error::Explain;

/// Every QMP command this crate uses.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Needs {
    /// One entry per command.
    #[serde(rename = "command")]
    pub commands: Vec<Need>,
}

/// One command, with the arguments used.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Need {
    /// The command.
    pub name: String,
    /// Arguments, as [`Schema::offers_argument`] reads them.
    #[serde(default)]
    pub arguments: Vec<String>,
    /// Arguments that are used only where QEMU offers them.
    #[serde(default)]
    pub optional_arguments: Vec<String>,
    /// The command is used only where QEMU offers it.
    #[serde(default)]
    pub optional: bool,
    /// What for.
    pub reason: String,
}

/// `needs.toml` that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum NeedsError {
    /// Not TOML, or other keys than those of [`Need`].
    #[error("cannot read the list of needed QMP commands")]
    Parse(#[from] toml::de::Error),
}

impl Explain for NeedsError {
    fn code(&self) -> &'static str {
        "qmp-needs-unreadable"
    }

    fn remedy(&self) -> String {
        "correct the line that the cause names".into()
    }
}

/// Something needed that a QEMU does not offer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// The command.
    pub command: String,
    /// The argument; `None` when the command itself is missing.
    pub argument: Option<String>,
    /// Bulkhead does without.
    pub optional: bool,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.argument {
            None => write!(f, "command `{}`", self.command),
            Some(argument) => write!(f, "argument `{argument}` of `{}`", self.command),
        }
    }
}

impl Needs {
    /// Those of this crate.
    ///
    /// # Panics
    /// Never: a test reads the same text.
    pub fn ours() -> Self {
        Self::parse(include_str!("../../qmp-schema/needs.toml"))
            .unwrap_or_else(|error| unreachable!("needs.toml is read by a test: {error}"))
    }

    /// Reads a list.
    ///
    /// # Errors
    /// Not TOML, or unknown keys.
    pub fn parse(text: &str) -> Result<Self, NeedsError> {
        Ok(toml::from_str(text)?)
    }

    /// What `schema` lacks, in the list's order.
    pub fn missing(&self, schema: &Schema) -> Vec<Missing> {
        let mut missing = Vec::new();
        for need in &self.commands {
            let mut miss = |argument: Option<&String>, optional| {
                missing.push(Missing {
                    command: need.name.clone(),
                    argument: argument.cloned(),
                    optional,
                });
            };
            if !schema.offers_command(&need.name) {
                miss(None, need.optional);
                continue;
            }
            let offers = |argument: &&String| schema.offers_argument(&need.name, argument);
            for argument in need.arguments.iter().filter(|a| !offers(a)) {
                miss(Some(argument), false);
            }
            for argument in need.optional_arguments.iter().filter(|a| !offers(a)) {
                miss(Some(argument), true);
            }
        }
        missing
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn names_what_is_missing() {
        let schema = Schema::from_value(json!([
            {"name": "migrate", "meta-type": "command", "arg-type": "0"},
            {"name": "0", "meta-type": "object", "members": [{"name": "uri", "type": "str"}]},
        ]))
        .unwrap();
        let needs = Needs::parse(
            r#"
            [[command]]
            name = "migrate"
            arguments = ["uri", "detach"]
            optional_arguments = ["channels"]
            reason = "a test"
            [[command]]
            name = "snapshot-save"
            arguments = ["tag"]
            optional = true
            reason = "a test"
            "#,
        )
        .unwrap();
        let missing = needs.missing(&schema);
        let shown: Vec<_> = missing
            .iter()
            .map(|m| (m.to_string(), m.optional))
            .collect();
        assert_eq!(
            shown,
            [
                ("argument `detach` of `migrate`".into(), false),
                ("argument `channels` of `migrate`".into(), true),
                ("command `snapshot-save`".into(), true),
            ]
        );
    }

    #[test]
    fn ours_can_be_read_and_has_no_name_twice() {
        let mut names: Vec<_> = Needs::ours().commands.into_iter().map(|n| n.name).collect();
        let all = names.len();
        names.sort();
        names.dedup();
        assert!(all > 10 && names.len() == all);
    }

    #[test]
    fn unknown_keys_are_errors() {
        let text = "[[command]]\nname = \"x\"\nreason = \"y\"\nargs = []\n";
        assert!(Needs::parse(text).is_err());
    }
}
