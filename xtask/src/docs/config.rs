//! `config.schema.json` and `config.md`: every key of a configuration file.

use std::fmt::Write as _;

use anyhow::{Context as _, Result};
use bulkhead::error::Report;
use bulkhead::spec::{Catalog, Config, MACHINE_KEYS, Setting, merge};
use serde_json::{Map, Value};

/// What stands before the tables.
const INTRODUCTION: &str = r#"
# Configuration

What Bulkhead does comes from these places; each wins over those before it:

1. built-in defaults
2. `/etc/bulkhead/config.toml`
3. `$XDG_CONFIG_HOME/bulkhead/config.toml` (`~/.config/bulkhead/config.toml`)
4. environment variables, `BULKHEAD_` and the key in capitals
5. the file of `--spec`
6. options of the command line

`--config FILE` or `BULKHEAD_CONFIG` names one file instead of the two; `none` means no file. `bulkhead config show --origin` shows every value and where it comes from.

A file chooses which QEMU runs: root refuses one that belongs to somebody else, or that its group or everybody can write to. An unknown key is an error. Paths are absolute. `config.schema.json` describes the file for editors.

A profile that is named in one place sets all of its limits: `cpus`, `memory`, `disk` and `timeout` of the places before it no longer count, and `network` only where the profile has none of its own.

Root keeps its state in `/var/lib/bulkhead` and `/run/bulkhead`; others in `$XDG_STATE_HOME/bulkhead` (`~/.local/state/bulkhead`) and `$XDG_RUNTIME_DIR/bulkhead` (`run` in the state directory).

```toml
[machine]
image = "default"
profile = "big"
env = { LANG = "C.UTF-8" }

[profile.big]
base = "intensive"
memory = "12G"
network = "db"

[network.db]
mode = "nat-filtered"
preset = "packages"
allow_hosts = ["git.example.org:22", "*.example.net"]
deny_hosts = ["telemetry.example.net"]
strict = true
exceptions = ["10.1.2.3/32:5432"]
limits = { download = "10M", total = "2G" }
```

A *size* is a text such as `"512M"` or `"2G"` (powers of 1024), a *time* one such as `"90s"`, `"5m"` or `"2h"`, a *name* 1 to 63 of `a-z`, `0-9`, `_` and `-`.
"#;

/// The schema of a configuration file.
pub(super) fn schema() -> Value {
    let mut schema: Value = schemars::schema_for!(Config).into();
    super::tidy(&mut schema);
    without_null(&mut schema);
    // Only here it is a table of defaults, and only with these keys.
    let machine = schema.pointer_mut("/$defs/Request");
    if let Some(Value::Object(machine)) = machine {
        let about = "What every machine gets unless asked otherwise.";
        machine.insert("description".into(), about.into());
        if let Some(Value::Object(keys)) = machine.get_mut("properties") {
            keys.retain(|key, _| MACHINE_KEYS.contains(&key.as_str()));
        }
    }
    drop_unused(&mut schema);
    schema
}

/// TOML has no null: what is absent is left out.
fn without_null(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|key, value| {
                // The default of a whole table says nothing its keys do not.
                key != "default" || !(value.is_null() || value.is_object())
            });
            if let Some(Value::Array(types)) = map.get_mut("type") {
                types.retain(|name| name != "null");
                if let [one] = &types[..] {
                    let one = one.clone();
                    map.insert("type".into(), one);
                }
            }
            if let Some(Value::Array(any)) = map.get_mut("anyOf") {
                any.retain(|one| one["type"] != "null");
                if let [Value::Object(one)] = &any[..] {
                    let one = one.clone();
                    map.remove("anyOf");
                    map.extend(one);
                }
            }
            map.values_mut().for_each(without_null);
        }
        Value::Array(values) => values.iter_mut().for_each(without_null),
        _ => {}
    }
}

/// Removes definitions nothing refers to.
fn drop_unused(schema: &mut Value) {
    loop {
        let text = schema.to_string();
        let Some(Value::Object(defs)) = schema.get_mut("$defs") else {
            return;
        };
        let before = defs.len();
        defs.retain(|name, _| text.contains(&format!("\"#/$defs/{name}\"")));
        if defs.len() == before {
            return;
        }
    }
}

/// The page.
pub(super) fn page(schema: &Value) -> Result<String> {
    let mut text = super::GENERATED.to_owned() + INTRODUCTION;
    let merged = merge(&[]).and_then(|merged| merged.settings());
    let defaults = merged.map_err(|error| anyhow::anyhow!("{:?}", Report::of(&error)))?;
    let default = |words: &[&str]| -> String {
        let found = defaults.iter().find(|setting| setting.key == words);
        match found {
            // These depend on who runs it.
            _ if words == ["state_dir"] || words == ["runtime_dir"] => "see above".into(),
            Some(Setting { value, .. }) if !value.is_null() => format!("`{value}`"),
            _ => "".into(),
        }
    };
    let head = |text: &mut String, title: &str, about: &str| {
        let _ = write!(text, "\n## {title}\n\n{about}\n");
    };
    let table_head = |text: &mut String, names: &[&str]| {
        let line = |words: Vec<&str>| format!("| {} |\n", words.join(" | "));
        text.push('\n');
        text.push_str(&line(names.to_vec()));
        text.push_str(&line(vec!["---"; names.len()]));
    };
    let table = |text: &mut String, of: &Value, above: Option<&str>| -> Result<()> {
        let keys = of["properties"].as_object().context("it has no keys")?;
        let in_order = order(keys, above);
        table_head(
            text,
            &["key", "type", "default", "variable", "what it is for"],
        );
        for name in in_order {
            let key = &keys[name];
            let kind = kind(key, schema);
            if kind.is_empty() {
                continue;
            }
            let words: Vec<&str> = above.into_iter().chain([name]).collect();
            let variable = match above {
                None | Some("machine") if !kind.starts_with("table") => {
                    format!("`BULKHEAD_{}`", name.to_uppercase())
                }
                _ => String::new(),
            };
            let default = match &key["default"] {
                Value::String(text) => format!("`\"{text}\"`"),
                _ => default(&words),
            };
            let about = about(key, schema);
            let _ = writeln!(
                text,
                "| `{name}` | {kind} | {default} | {variable} | {about} |"
            );
        }
        Ok(())
    };
    head(&mut text, "Top level", "Where things are.");
    table(&mut text, schema, None)?;
    let definition = |name: &str| &schema["$defs"][name];
    let machine = definition("Request");
    head(&mut text, "`[machine]`", &about(machine, schema));
    table(&mut text, machine, Some("machine"))?;
    let profile = definition("CustomProfile");
    let note = "What is absent comes from its base, one of these:";
    head(
        &mut text,
        "`[profile.NAME]`",
        &format!("{}\n\n{note}", about(profile, schema)),
    );
    table_head(
        &mut text,
        &["profile", "cpus", "memory", "disk", "timeout", "network"],
    );
    for (name, profile) in Catalog::default().profiles() {
        let limits = profile.limits;
        let network = profile.network.as_ref().map(ToString::to_string);
        let _ = writeln!(
            text,
            "| `{name}` | {} | {} | {} | {} | {} |",
            limits.vcpus,
            limits.memory,
            limits.disk,
            limits.timeout,
            network.unwrap_or_default()
        );
    }
    table(&mut text, profile, Some("profile"))?;
    let network = definition("NetworkPolicy");
    head(&mut text, "`[network.NAME]`", &about(network, schema));
    table(&mut text, network, Some("network"))?;
    let limits = definition("NetworkLimits");
    head(&mut text, "`[network.NAME.limits]`", &about(limits, schema));
    table(&mut text, limits, Some("limits"))?;
    Ok(text)
}

/// The keys in the order of the code; JSON has lost it.
fn order<'k>(keys: &'k Map<String, Value>, above: Option<&str>) -> Vec<&'k str> {
    let mut names: Vec<&str> = keys.keys().map(String::as_str).collect();
    let place = |name: &str| match above {
        None => [
            "state_dir",
            "runtime_dir",
            "qemu",
            "boot_timeout",
            "network_pool",
            "resolvers",
        ]
        .iter()
        .position(|known| *known == name),
        _ if name == "base" => Some(0),
        _ => MACHINE_KEYS
            .iter()
            .position(|known| *known == name)
            .map(|place| place + 1),
    };
    names.sort_by_key(|name| place(name).unwrap_or(usize::MAX));
    names
}

/// The type as people say it; empty for a table with a section of its own.
fn kind(key: &Value, schema: &Value) -> String {
    if let Some(name) = key["$ref"].as_str() {
        return match name.trim_start_matches("#/$defs/") {
            "Bytes" => "size".into(),
            "Timeout" => "time".into(),
            "NetworkName" | "ProfileName" => "name".into(),
            "LsmLabel" => "text".into(),
            "Cidr" => "range of addresses".into(),
            "UidRange" => "range of user ids".into(),
            "Waived" => "list of layers".into(),
            "Resolvers" => "list of addresses".into(),
            "Bridge" => "bridge".into(),
            name => match schema["$defs"][name]["oneOf"].as_array() {
                Some(choices) => {
                    let choices = choices
                        .iter()
                        .map(|one| format!("`{}`", as_text(&one["const"])));
                    choices.collect::<Vec<_>>().join(", ")
                }
                None => String::new(),
            },
        };
    }
    match as_text(&key["type"]) {
        "object" if key["additionalProperties"]["type"] == "string" => "table of texts".into(),
        // Names of a form of their own, and texts.
        "object" if named_texts(key) => "table of texts".into(),
        "object" => String::new(),
        "string" => "text".into(),
        "array" => "list of texts".into(),
        kind => kind.into(),
    }
}

fn named_texts(key: &Value) -> bool {
    let patterns = key["patternProperties"].as_object();
    patterns.is_some_and(|patterns| patterns.values().all(|one| one["type"] == "string"))
}

fn about(key: &Value, schema: &Value) -> String {
    let own = as_text(&key["description"]);
    let of_type = || {
        let name = as_text(&key["$ref"]).trim_start_matches("#/$defs/");
        as_text(&schema["$defs"][name]["description"])
    };
    match own.is_empty() {
        true => of_type().to_owned(),
        false => own.to_owned(),
    }
}

fn as_text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_schema_has_the_keys_of_the_code_and_no_others() {
        let schema = schema();
        let keys = schema["$defs"]["Request"]["properties"]
            .as_object()
            .unwrap();
        let mut expected = MACHINE_KEYS.to_vec();
        expected.sort_unstable();
        assert_eq!(
            keys.keys().map(String::as_str).collect::<Vec<_>>(),
            expected
        );
        for table in ["/$defs/Request", "/$defs/NetworkPolicy", ""] {
            let closed = schema.pointer(table).unwrap();
            assert_eq!(closed["additionalProperties"], false, "{table}");
        }
        assert!(!schema.to_string().contains("null"), "{schema}");
    }

    #[test]
    fn every_key_is_on_the_page_with_type_and_purpose() {
        let page = page(&schema()).unwrap();
        for key in MACHINE_KEYS {
            let start = format!("| `{key}` | ");
            let line = page.lines().find(|line| line.starts_with(&start));
            let cells: Vec<&str> = line
                .unwrap_or_else(|| panic!("{key}"))
                .split(" | ")
                .collect();
            assert_eq!(cells.len(), 5, "{cells:?}");
            assert!(!cells[1].is_empty() && cells[4].len() > 5, "{cells:?}");
        }
    }

    /// The example of the page is a file that is taken.
    #[test]
    fn the_example_is_valid() {
        let example = INTRODUCTION.split("```").nth(1).unwrap();
        let example = example.trim_start_matches("toml");
        let layer = bulkhead::spec::Layer::file("example.toml".as_ref(), example).unwrap();
        let spec = merge(&[layer]).unwrap().resolve_machine().unwrap();
        assert_eq!(spec.limits.memory, bulkhead::spec::Bytes::gib(12));
    }
}
