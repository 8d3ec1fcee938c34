//! The schemas of what `--json` prints: a test holds what the program really
//! prints to each of them, and the checker is not easily content.
//!
//! Every call with `--json` that a test makes is checked in `support::printed`;
//! nothing is started here.

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use bulkhead::cli::PRINTED;
use serde_json::{Value, json};
use support::schema::Schema;
use support::{Ran, printed};

/// Each schema, and a function of a test in which the program prints that.
const SHOWN: &str = "
    config-show       config::json_tells_values_and_origins
    cp                machines::files_go_in_and_out_as_with_cp
    doctor            machine::doctor_tells_each_ability_with_reason_and_cure
    error             bad_input::errors_are_json_where_asked
    exec              machines::a_machine_outlives_its_creator_and_keeps_its_disk_until_it_is_removed
    exec-detach       machines::many_commands_at_once_and_some_that_outlive_their_client
    export            exports::exported
    forward           forward::a_service_without_a_network_is_reached_from_the_host
    gc                run::nothing_is_left_when_the_owner_is_killed
    image-build       images::a_root_tar_and_an_oci_layout_are_imported
    image-inspect     images::a_script_makes_a_new_image
    image-ls          images::a_script_makes_a_new_image
    inspect           exports::a_machine_goes_on_from_the_same_memory_after_it_was_removed
    inspect-guest     machine::a_running_machine_can_be_inspected
    inspect-qga       machine::a_running_machine_can_be_inspected
    logs-list         machines::many_commands_at_once_and_some_that_outlive_their_client
    ls                machines::lists_are_filtered_and_figures_add_up
    names             machines::a_machine_outlives_its_creator_and_keeps_its_disk_until_it_is_removed
    net-learn         names_guest::a_detached_machine_keeps_its_names_with_each_supervisor
    net-log           names_guest::a_detached_machine_keeps_its_names_with_each_supervisor
    net-show          names_guest::a_detached_machine_keeps_its_names_with_each_supervisor
    outcome           run::the_outcome_says_that_emulation_is_no_isolation
    removed           images::a_script_makes_a_new_image
    snapshot-inspect  snapshots::saves_and_restores
    snapshot-ls       snapshots::names
    stats             machines::lists_are_filtered_and_figures_add_up
    template-build    templates::what_matches_is_cloned_and_what_does_not_boots
    template-import   exports::a_template_is_taken_in_and_cloned
    template-inspect  templates::what_matches_is_cloned_and_what_does_not_boots
    template-ls       templates::a_clone_that_is_not_unique_is_not_handed_out
    template-prune    templates_stale::what_another_qemu_made_is_told_and_removed
    verify            jail::a_layer_that_was_changed_behind_our_back_is_found
";

/// Whether a function makes a call of a verb that prints what has this schema.
fn calls(body: &str, schema: &str) -> bool {
    let words = |line: &str| {
        line.split(' ').all(|word| {
            body.contains(&format!("\"{word}\"")) || body.contains(&format!(".{word}("))
        })
    };
    let mut lines = PRINTED.iter().filter(|(_, name)| *name == Some(schema));
    body.contains("json") && (schema == "error" || lines.any(|(line, _)| words(line)))
}

#[test]
fn a_test_looks_at_what_is_printed_for_each_schema() {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let mut shown = BTreeSet::new();
    for line in SHOWN.lines().filter(|line| !line.is_empty()) {
        let (schema, place) = line.trim().split_once(' ').unwrap();
        let (file, name) = place.trim().split_once("::").unwrap();
        let text = fs::read_to_string(tests.join(file).with_extension("rs")).unwrap();
        let body = text.split_once(&format!("fn {name}("));
        let body = body.and_then(|(_, rest)| rest.split("\n}\n").next());
        let body = body.unwrap_or_else(|| panic!("{schema}: no function {name} in {file}"));
        assert!(calls(body, schema), "{schema}: nothing of it in {name}");
        assert!(shown.insert(schema.to_owned()), "{schema} stands twice");
    }
    let there: BTreeSet<_> = fs::read_dir(printed::schemas())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .map(|name| name.strip_suffix(".schema.json").unwrap().to_owned())
        .collect();
    assert_eq!(shown, there, "a schema that no test holds a call to");
    let printed = PRINTED.iter().filter_map(|(_, schema)| *schema);
    let printed: BTreeSet<_> = printed.chain(["error"]).map(str::to_owned).collect();
    assert_eq!(shown, printed);
    // Every keyword in them is one that is looked at.
    for name in &there {
        printed::schema(name);
    }
}

#[test]
fn the_schema_of_a_call_is_known() {
    for (line, expected) in [
        ("--json ls", Some(Some("ls"))),
        ("ls -q --json", Some(Some("ls"))),
        (
            "--json --resolvers 192.0.2.1 run -- true",
            Some(Some("outcome")),
        ),
        (
            "snapshot --json save vm name",
            Some(Some("snapshot-inspect")),
        ),
        ("--json exec -d vm true", Some(Some("exec-detach"))),
        ("--json exec vm true", Some(Some("exec"))),
        ("--json inspect vm --guest", Some(Some("inspect-guest"))),
        ("--json inspect vm --guest --qga", Some(Some("inspect-qga"))),
        ("--json logs vm", Some(None)),
        ("--json logs vm --list", Some(Some("logs-list"))),
        ("--json doctor --apparmor-profile", Some(None)),
        ("ls", None),
        // It is the guest's.
        ("exec vm --json", None),
        ("--json nonsense", None),
        ("--json ls --help", None),
    ] {
        let words: Vec<&str> = line.split(' ').collect();
        assert_eq!(printed::asked(&words), expected, "{line}");
    }
}

#[test]
#[should_panic(expected = "nothing is said of it")]
fn a_call_that_prints_more_than_its_schema_says_fails() {
    let ran = Ran {
        stdout: json!({ "warnings": [], "more": 1 }).to_string(),
        stderr: String::new(),
        code: 0,
    };
    printed::check_call(&["--json", "cp", "a", "vm:/b"], &ran);
}

#[test]
#[should_panic(expected = "remedy: it is missing")]
fn a_failure_without_a_remedy_fails() {
    let ran = Ran {
        stdout: String::new(),
        stderr: json!({ "error": { "code": "c", "what": "w", "cause": "" } }).to_string(),
        code: 125,
    };
    printed::check_call(&["--json", "ls"], &ran);
}

#[test]
#[should_panic(expected = "0 values")]
fn a_call_that_prints_nothing_fails() {
    let ran = Ran {
        stdout: String::new(),
        stderr: "bulkhead: nothing to say\n".into(),
        code: 0,
    };
    printed::check_call(&["--json", "ls"], &ran);
}

#[track_caller]
fn faults(schema: &Value, value: &Value) -> Vec<String> {
    Schema::new(schema.clone()).unwrap().faults(value)
}

/// An object as schemars describes one: with a reference, what may be null, a
/// map by names of a kind, and an enumeration that says which with `kind`.
fn machine() -> Value {
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Machine",
        "type": "object",
        "properties": {
            "id": { "$ref": "#/$defs/Id", "description": "Its name." },
            "cpus": { "type": "integer", "format": "uint8", "minimum": 1, "maximum": 255 },
            "load": { "type": "number" },
            "end": { "anyOf": [{ "$ref": "#/$defs/End" }, { "type": "null" }] },
            "labels": {
                "type": "object",
                "patternProperties": { "^[a-z]+$": { "type": "string" } },
                "additionalProperties": false
            },
            "sizes": { "type": "object", "additionalProperties": { "type": "integer" } },
            "lease": { "oneOf": [
                {
                    "type": "object",
                    "properties": { "kind": { "const": "file" }, "path": { "type": "string" } },
                    "required": ["kind", "path"]
                },
                {
                    "type": "object",
                    "properties": { "kind": { "const": "uid" }, "uid": { "type": "integer" } },
                    "required": ["kind", "uid"]
                }
            ] },
            "words": { "type": ["array", "null"], "items": { "type": "string" } },
            "ports": { "type": "array", "items": { "type": "integer" }, "uniqueItems": true },
            "pair": {
                "type": "array",
                "prefixItems": [{ "type": "string" }, { "type": "boolean" }],
                "minItems": 2,
                "maxItems": 2
            },
            "state": { "enum": ["running", "stopped"] },
            "own": { "description": "In somebody else's words." }
        },
        "required": ["id", "cpus"],
        "$defs": {
            "Id": { "type": "string", "pattern": "^[a-z0-9][a-z0-9-]{0,62}$" },
            "End": {
                "type": "object",
                "properties": { "code": { "type": "integer" } },
                "required": ["code"]
            }
        }
    })
}

#[test]
fn what_the_schema_says_is_taken() {
    let schema = machine();
    for value in [
        json!({ "id": "vm", "cpus": 1 }),
        json!({ "id": "0-a", "cpus": 255, "load": 1, "end": null, "words": null }),
        json!({ "id": "vm", "cpus": 2, "load": 0.5, "end": { "code": -1 }, "words": ["a", "a"] }),
        json!({ "id": "vm", "cpus": 2, "labels": { "team": "a" }, "sizes": { "any": 7 } }),
        json!({ "id": "vm", "cpus": 2, "lease": { "kind": "file", "path": "/x" } }),
        json!({ "id": "vm", "cpus": 2, "lease": { "kind": "uid", "uid": 7 }, "ports": [1, 2] }),
        json!({ "id": "vm", "cpus": 2, "pair": ["a", true], "state": "stopped" }),
        json!({ "id": "vm", "cpus": 2, "own": { "any": [{ "thing": 1 }] } }),
    ] {
        assert_eq!(faults(&schema, &value), [""; 0], "{value}");
    }
}

#[test]
fn what_it_does_not_say_is_refused() {
    let schema = machine();
    for (more, place) in [
        (json!({ "new": 1 }), "/new: nothing is said"),
        (json!({ "new": null }), "/new: nothing is said"),
        (json!({ "id": "VM" }), "/id: \"VM\" does not match"),
        (json!({ "id": 7 }), "/id: 7 is no string"),
        (json!({ "id": null }), "/id: null is no string"),
        (json!({ "cpus": 0 }), "/cpus: 0 is less"),
        (json!({ "cpus": 256 }), "/cpus: 256 is more"),
        (json!({ "cpus": 1.5 }), "/cpus: 1.5 is no integer"),
        (json!({ "cpus": 1.0 }), "/cpus: 1.0 is no integer"),
        (json!({ "cpus": "1" }), "/cpus: \"1\" is no integer"),
        (json!({ "load": "1" }), "/load"),
        (
            json!({ "end": {} }),
            "/end: none fits: /end/code: it is missing",
        ),
        (json!({ "end": 1 }), "/end: none fits"),
        (
            json!({ "end": { "code": 1, "new": 1 } }),
            "/end/new: nothing is said",
        ),
        (
            json!({ "labels": { "A": "b" } }),
            "/labels/A: the schema forbids",
        ),
        (json!({ "labels": { "a": 1 } }), "/labels/a: 1 is no string"),
        (
            json!({ "sizes": { "a": "b" } }),
            "/sizes/a: \"b\" is no integer",
        ),
        (
            json!({ "lease": { "kind": "cgroup" } }),
            "/lease: none fits",
        ),
        (
            json!({ "lease": { "kind": "file", "uid": 7 } }),
            "/lease: none fits",
        ),
        (
            json!({ "lease": { "kind": "file", "path": "/x", "uid": 7 } }),
            "/lease/uid: nothing is said",
        ),
        (json!({ "words": ["a", 1] }), "/words/1: 1 is no string"),
        (json!({ "words": {} }), "/words: {} is none of"),
        (
            json!({ "ports": [1, 2, 1] }),
            "/ports: an element is there twice",
        ),
        (json!({ "pair": ["a"] }), "/pair: it has 1 elements"),
        (json!({ "pair": ["a", 1] }), "/pair/1: 1 is no boolean"),
        (
            json!({ "pair": ["a", true, 1] }),
            "/pair/2: nothing is said",
        ),
        (json!({ "state": "lost" }), "/state: \"lost\" is none of"),
    ] {
        let mut value = json!({ "id": "vm", "cpus": 1 });
        let map = value.as_object_mut().unwrap();
        map.extend(more.as_object().unwrap().clone());
        let found = faults(&schema, &value);
        assert!(
            found.iter().any(|one| one.starts_with(place)),
            "{value}: {found:?}"
        );
    }
    let found = faults(&schema, &json!({ "id": "vm" }));
    assert_eq!(found, ["/cpus: it is missing"]);
    assert_eq!(faults(&schema, &json!([])), [": [] is no object"]);
    // Both may be right, and only one of them may.
    let both = json!({ "oneOf": [{ "type": "integer" }, { "type": "number" }] });
    assert_eq!(faults(&both, &json!(1)), [": 2 fit where one has to"]);
    // An array or an object of which nothing is said has nothing in it.
    assert_eq!(faults(&json!({ "type": "array" }), &json!([1])).len(), 1);
    assert_eq!(
        faults(&json!({ "type": "object" }), &json!({ "a": 1 })).len(),
        1
    );
    // Properties beside a choice, as of a flattened enumeration, are all named.
    let flat = json!({
        "type": "object",
        "properties": { "at": { "type": "integer" } },
        "oneOf": [{ "properties": { "a": { "type": "integer" } }, "required": ["a"] }],
        "allOf": [{ "properties": { "b": { "type": "integer" } } }]
    });
    let value = json!({ "at": 1, "a": 2, "b": 3 });
    assert_eq!(faults(&flat, &value), [""; 0]);
    let value = json!({ "at": 1, "a": 2, "c": 3 });
    assert_eq!(faults(&flat, &value), ["/c: nothing is said of it"]);
}

#[test]
fn a_keyword_that_is_not_known_is_refused_wherever_it_stands() {
    for schema in [
        json!({ "minLength": 1 }),
        json!({ "properties": { "a": { "not": {} } } }),
        json!({ "anyOf": [{ "type": "null" }, { "if": true }] }),
        json!({ "$defs": { "Unused": { "dependentRequired": {} } } }),
        json!({ "items": { "contains": {} } }),
        json!({ "additionalProperties": { "propertyNames": {} } }),
        json!({ "items": [{ "type": "string" }] }),
        json!({ "$ref": "#/$defs/Gone" }),
        json!({ "$ref": "other.json" }),
        json!({ "pattern": "(" }),
        json!({ "patternProperties": { "(": {} } }),
        json!({ "properties": [] }),
        json!(1),
    ] {
        assert!(Schema::new(schema.clone()).is_err(), "{schema}");
    }
}

/// Of what is printed as of nothing else: each field that is taken away, given
/// another type, or comes anew is found.
#[test]
fn a_real_schema_holds_each_field() {
    let schema = printed::schema("error");
    let good = json!({ "error": { "code": "c", "what": "w", "cause": "", "remedy": "r" } });
    assert_eq!(schema.faults(&good), [""; 0]);
    for name in ["code", "what", "cause", "remedy"] {
        let mut less = good.clone();
        less["error"].as_object_mut().unwrap().remove(name);
        assert_eq!(
            schema.faults(&less),
            [format!("/error/{name}: it is missing")]
        );
        let mut other = good.clone();
        other["error"][name] = json!(1);
        assert_eq!(
            schema.faults(&other),
            [format!("/error/{name}: 1 is no string")]
        );
        let mut more = good.clone();
        more["error"][format!("{name}2")] = json!("x");
        assert_eq!(schema.faults(&more).len(), 1);
    }
}
