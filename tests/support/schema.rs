//! Whether a value is what a schema says: as much of JSON Schema as
//! `cargo xtask docs` writes, read strictly.
//!
//! A keyword that is not known here is an error, wherever it stands, and so is a
//! property or an element that no schema speaks of, also where the schema would
//! let it pass: what is printed and not described is a schema that is out of
//! date. A schema that says nothing (`true`, or no keyword) takes any value.

use std::collections::BTreeSet;

use regex_automata::dfa::regex::Regex;
use serde_json::{Map, Value};

/// Say nothing about a value.
const REMARKS: [&str; 5] = ["$schema", "title", "description", "default", "format"];
/// Say something about it that this file looks at, and hold no schemas.
const SAYINGS: [&str; 10] = [
    "type",
    "const",
    "enum",
    "required",
    "minimum",
    "maximum",
    "minItems",
    "maxItems",
    "uniqueItems",
    "pattern",
];
/// Hold one schema; a list of schemas; schemas by name.
const ONE: [&str; 2] = ["items", "additionalProperties"];
const LISTS: [&str; 4] = ["oneOf", "anyOf", "allOf", "prefixItems"];
const MAPS: [&str; 3] = ["properties", "patternProperties", "$defs"];

/// A schema with all that it refers to.
pub(crate) struct Schema(Value);

/// The properties of an object, or elements of an array by their numbers, that a
/// schema speaks of.
enum Named {
    All,
    These(BTreeSet<String>),
}

impl Named {
    fn and(&mut self, other: Self) {
        match (&mut *self, other) {
            (Self::These(names), Self::These(more)) => names.extend(more),
            _ => *self = Self::All,
        }
    }
}

impl Schema {
    /// Takes a schema in which every keyword is known.
    pub(crate) fn new(root: Value) -> Result<Self, String> {
        let schema = Self(root);
        schema.known(&schema.0, "")?;
        Ok(schema)
    }

    /// What of a value is not as the schema says, each with its place; nothing
    /// when it is.
    pub(crate) fn faults(&self, value: &Value) -> Vec<String> {
        let mut faults = Vec::new();
        self.check(&self.0, value, "", &mut faults);
        faults
    }

    fn known(&self, schema: &Value, at: &str) -> Result<(), String> {
        let map = match schema {
            Value::Bool(_) => return Ok(()),
            Value::Object(map) => map,
            other => return Err(format!("{at}: {other} is no schema")),
        };
        for (word, value) in map {
            let at = format!("{at}/{word}");
            match (word.as_str(), value) {
                ("$ref", Value::String(to)) => {
                    let found = self.target(to);
                    found.ok_or_else(|| format!("{at}: {to} is not there"))?;
                }
                (word, value) if ONE.contains(&word) => self.known(value, &at)?,
                (word, Value::Array(all)) if LISTS.contains(&word) => {
                    for (number, one) in all.iter().enumerate() {
                        self.known(one, &format!("{at}/{number}"))?;
                    }
                }
                (word, Value::Object(all)) if MAPS.contains(&word) => {
                    for (name, one) in all {
                        self.known(one, &format!("{at}/{name}"))?;
                    }
                }
                ("pattern", Value::String(text)) => drop(pattern(text)?),
                (word, _) if SAYINGS.contains(&word) || REMARKS.contains(&word) => {}
                _ => {
                    return Err(format!(
                        "{at}: this keyword is not known, as it stands here"
                    ));
                }
            }
        }
        if let Some(Value::Object(all)) = map.get("patternProperties") {
            all.keys().try_for_each(|text| pattern(text).map(drop))?;
        }
        Ok(())
    }

    fn target(&self, to: &str) -> Option<&Value> {
        self.0.get("$defs")?.get(to.strip_prefix("#/$defs/")?)
    }

    /// Looks at a value with all that is said about it: what nothing was said
    /// about must not be there.
    fn check(&self, schema: &Value, value: &Value, at: &str, faults: &mut Vec<String>) {
        let Named::These(names) = self.apply(schema, value, at, faults) else {
            return;
        };
        let there: Vec<String> = match value {
            Value::Object(map) => map.keys().cloned().collect(),
            Value::Array(values) => (0..values.len()).map(|at| at.to_string()).collect(),
            _ => Vec::new(),
        };
        for name in there.iter().filter(|name| !names.contains(*name)) {
            faults.push(format!("{at}/{name}: nothing is said of it"));
        }
    }

    /// One of several schemas that speak of the same value.
    fn apply(&self, schema: &Value, value: &Value, at: &str, faults: &mut Vec<String>) -> Named {
        let map = match schema {
            Value::Object(map) => map,
            Value::Bool(true) => return Named::All,
            _ => {
                faults.push(format!("{at}: the schema forbids it"));
                return Named::All;
            }
        };
        if map.keys().all(|word| REMARKS.contains(&word.as_str())) {
            return Named::All;
        }
        self.itself(map, value, at, faults);
        let mut named = match value {
            Value::Object(object) => self.properties(map, object, at, faults),
            Value::Array(values) => self.elements(map, values, at, faults),
            _ => Named::These(BTreeSet::new()),
        };
        if let Some(target) = map.get("$ref").and_then(Value::as_str) {
            let target = self.target(target).unwrap_or(&Value::Bool(false));
            named.and(self.apply(target, value, at, faults));
        }
        for one in list(map, "allOf") {
            named.and(self.apply(one, value, at, faults));
        }
        for word in ["anyOf", "oneOf"] {
            if map.contains_key(word) {
                named.and(self.choice(word, list(map, word), value, at, faults));
            }
        }
        named
    }

    /// `anyOf` and `oneOf`.
    fn choice(
        &self,
        word: &str,
        all: &[Value],
        value: &Value,
        at: &str,
        faults: &mut Vec<String>,
    ) -> Named {
        let mut named = Named::These(BTreeSet::new());
        let (mut fitting, mut why) = (0, Vec::new());
        for one in all {
            let mut here = Vec::new();
            let spoken = self.apply(one, value, at, &mut here);
            match here.is_empty() {
                true => {
                    fitting += 1;
                    named.and(spoken);
                }
                false => why.push(here.join("; ")),
            }
        }
        match (word, fitting) {
            (_, 0) => faults.push(format!("{at}: none fits: {}", why.join(" | "))),
            ("oneOf", 2..) => faults.push(format!("{at}: {fitting} fit where one has to")),
            _ => return named,
        }
        // What is wrong is said; that nothing was said of a property adds nothing.
        Named::All
    }

    /// What needs no other schema.
    fn itself(&self, map: &Map<String, Value>, value: &Value, at: &str, faults: &mut Vec<String>) {
        let mut fault = |text: String| faults.push(format!("{at}: {text}"));
        match map.get("type") {
            Some(Value::String(kind)) if !is(value, kind) => fault(format!("{value} is no {kind}")),
            Some(Value::Array(kinds))
                if !kinds
                    .iter()
                    .any(|kind| kind.as_str().is_some_and(|kind| is(value, kind))) =>
            {
                fault(format!("{value} is none of {kinds:?}"));
            }
            _ => {}
        }
        if map.get("const").is_some_and(|wanted| wanted != value) {
            fault(format!("{value} is not {}", map["const"]));
        }
        if map.contains_key("enum") && !list(map, "enum").contains(value) {
            fault(format!("{value} is none of {}", map["enum"]));
        }
        if let Some(number) = value.as_f64() {
            let bound = |word: &str| map.get(word).and_then(Value::as_f64);
            if bound("minimum").is_some_and(|least| number < least) {
                fault(format!("{value} is less than {}", map["minimum"]));
            }
            if bound("maximum").is_some_and(|most| number > most) {
                fault(format!("{value} is more than {}", map["maximum"]));
            }
        }
        if let (Some(text), Some(wanted)) = (value.as_str(), map.get("pattern")) {
            let wanted = wanted.as_str().unwrap_or_default();
            if !pattern(wanted).is_ok_and(|wanted| wanted.is_match(text)) {
                fault(format!("{value} does not match {wanted}"));
            }
        }
    }

    fn properties(
        &self,
        map: &Map<String, Value>,
        object: &Map<String, Value>,
        at: &str,
        faults: &mut Vec<String>,
    ) -> Named {
        for name in list(map, "required").iter().filter_map(Value::as_str) {
            if !object.contains_key(name) {
                faults.push(format!("{at}/{name}: it is missing"));
            }
        }
        let by_name = |word: &str| map.get(word).and_then(Value::as_object);
        let mut named = BTreeSet::new();
        for (name, value) in object {
            let at = format!("{at}/{name}");
            let mut spoken = false;
            if let Some(schema) = by_name("properties").and_then(|all| all.get(name)) {
                self.check(schema, value, &at, faults);
                spoken = true;
            }
            for (wanted, schema) in by_name("patternProperties").into_iter().flatten() {
                if pattern(wanted).is_ok_and(|wanted| wanted.is_match(name)) {
                    self.check(schema, value, &at, faults);
                    spoken = true;
                }
            }
            match map.get("additionalProperties") {
                Some(schema) if !spoken => self.check(schema, value, &at, faults),
                None if !spoken => continue,
                _ => {}
            }
            named.insert(name.clone());
        }
        Named::These(named)
    }

    fn elements(
        &self,
        map: &Map<String, Value>,
        values: &[Value],
        at: &str,
        faults: &mut Vec<String>,
    ) -> Named {
        let first = list(map, "prefixItems");
        let mut named = BTreeSet::new();
        for (number, value) in values.iter().enumerate() {
            if let Some(schema) = first.get(number).or(map.get("items")) {
                self.check(schema, value, &format!("{at}/{number}"), faults);
                named.insert(number.to_string());
            }
        }
        let bound = |word: &str| map.get(word).and_then(Value::as_u64);
        let count = values.len() as u64;
        if bound("minItems").is_some_and(|least| count < least)
            || bound("maxItems").is_some_and(|most| count > most)
        {
            faults.push(format!("{at}: it has {count} elements"));
        }
        let unique = map.get("uniqueItems") == Some(&Value::Bool(true));
        if unique && (1..values.len()).any(|end| values[..end].contains(&values[end])) {
            faults.push(format!("{at}: an element is there twice"));
        }
        Named::These(named)
    }
}

/// The array that stands under a keyword; empty where none does.
fn list<'a>(map: &'a Map<String, Value>, word: &str) -> &'a [Value] {
    map.get(word)
        .and_then(Value::as_array)
        .map_or(&[], Vec::as_slice)
}

/// Whether a value is of a type. Nothing here writes 1 as 1.0.
fn is(value: &Value, kind: &str) -> bool {
    match kind {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        _ => false,
    }
}

fn pattern(text: &str) -> Result<Regex, String> {
    Regex::new(text).map_err(|error| format!("{text}: {error}"))
}
