//! What `--json` prints, against the schemas in `docs/reference/json`.

use std::path::{Path, PathBuf};

use bulkhead::cli::PRINTED;
use serde_json::{Deserializer, Value};

use super::Ran;
use super::schema::Schema;

/// How a failure on stderr begins; a guest or QEMU may write there, too.
const FAILURE: &str = "{\"error\":";

/// Where the schemas are.
pub(crate) fn schemas() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/reference/json")
}

/// The schema of this name.
#[track_caller]
pub(crate) fn schema(name: &str) -> Schema {
    let path = schemas().join(format!("{name}.schema.json"));
    let text = std::fs::read_to_string(&path);
    let text = text.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let schema = Schema::new(serde_json::from_str(&text).unwrap());
    schema.unwrap_or_else(|error| panic!("{name}.schema.json: {error}"))
}

/// A value is what the schema of this name says, and has nothing besides.
#[track_caller]
pub(crate) fn check(name: &str, value: &Value) {
    let faults = schema(name).faults(value);
    assert!(
        faults.is_empty(),
        "this is not what {name}.schema.json says (`cargo xtask docs` writes it from the \
         code): {faults:#?} in {value:#}"
    );
}

/// What `bulkhead` prints to stdout for these words: nothing for words it does
/// not take or without `--json`, else the name of the schema, where it is JSON.
pub(crate) fn asked(words: &[&str]) -> Option<Option<&'static str>> {
    let words = std::iter::once("bulkhead").chain(words.iter().copied());
    let matches = bulkhead::cli::command().try_get_matches_from(words).ok()?;
    let (mut verb, mut below) = (Vec::new(), &matches);
    while let Some((name, matches)) = below.subcommand() {
        verb.push(name);
        below = matches;
    }
    if !below.get_flag("json") {
        return None;
    }
    let fits = |line: &str| {
        let mut words = line.split(' ');
        let named = verb.iter().all(|name| words.next() == Some(name));
        // Clap's id of an option is the field's name.
        let given = |word: &str| {
            word.strip_prefix("--")
                .is_some_and(|option| below.get_flag(&option.replace('-', "_")))
        };
        named && words.all(given)
    };
    let found = PRINTED.iter().find(|(line, _)| fits(line));
    Some(
        found
            .unwrap_or_else(|| panic!("nothing of {verb:?} in PRINTED"))
            .1,
    )
}

/// Checks all that a call with `--json` printed, whatever its test looks at.
#[track_caller]
pub(crate) fn check_call(words: &[&str], ran: &Ran) {
    if !words.contains(&"--json") {
        return;
    }
    let Some(schema) = asked(words) else {
        return;
    };
    let mut failures = 0;
    for line in ran.stderr.lines().filter(|line| line.starts_with(FAILURE)) {
        let failure = serde_json::from_str(line);
        check(
            "error",
            &failure.unwrap_or_else(|error| panic!("{error}: {line}")),
        );
        failures += 1;
    }
    let Some(schema) = schema else {
        return;
    };
    let values = Deserializer::from_str(&ran.stdout).into_iter::<Value>();
    let values: Result<Vec<_>, _> = values.collect();
    let values = values.unwrap_or_else(|error| panic!("{words:?}: {error}: {ran:?}"));
    let usual = match (schema, values.len()) {
        ("net-log", _) | (_, 1) => true,
        // It failed, and says so; or was killed.
        (_, 0) => failures > 0 || ran.code == -1,
        _ => false,
    };
    assert!(usual, "{words:?}: {} values: {ran:?}", values.len());
    values.iter().for_each(|value| check(schema, value));
}
