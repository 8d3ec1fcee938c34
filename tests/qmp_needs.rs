//! `qmp-schema/needs.toml` against the dumps beside it and against the source.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    path::{Path, PathBuf},
};

use bulkhead::qmp::{Needs, Schema};
use flate2::read::GzDecoder;

/// Where commands are used.
const SOURCES: [&str; 3] = ["src", "xtask/src", "examples"];
/// Bypasses everything typed; nothing may need it.
const FORBIDDEN: &str = "human-monitor-command";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn dumps() -> Vec<(String, Schema)> {
    let mut dumps = Vec::new();
    for entry in fs::read_dir(root().join("qmp-schema")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "gz") {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            let file = GzDecoder::new(File::open(&path).unwrap());
            dumps.push((name, Schema::from_reader(file).unwrap()));
        }
    }
    dumps.sort_by(|a, b| a.0.cmp(&b.0));
    dumps
}

#[test]
fn every_dump_offers_every_need() {
    let dumps = dumps();
    let names: Vec<_> = dumps.iter().map(|(name, _)| name.as_str()).collect();
    assert!(names.contains(&"qemu-7.2.json.gz"), "{names:?}");
    assert!(names.contains(&"qemu-10.0.json.gz"), "{names:?}");
    for (name, schema) in &dumps {
        let mut missing = Needs::ours().missing(schema);
        missing.retain(|item| !item.optional);
        assert!(missing.is_empty(), "{name} lacks {missing:?}");
    }
}

#[test]
fn an_optional_need_is_offered_somewhere() {
    let dumps = dumps();
    let all: Vec<_> = dumps
        .iter()
        .map(|(_, schema)| Needs::ours().missing(schema))
        .collect();
    for item in &all[0] {
        let everywhere = all.iter().all(|missing| missing.contains(item));
        assert!(!everywhere, "no dump offers {item}");
    }
}

#[test]
fn a_need_that_no_qemu_has_is_noticed() {
    let text = r#"
        [[command]]
        name = "migrate"
        arguments = ["uri", "no-such-argument"]
        reason = "a test"
        [[command]]
        name = "no-such-command"
        reason = "a test"
    "#;
    let needs = Needs::parse(text).unwrap();
    for (name, schema) in dumps() {
        assert_eq!(needs.missing(&schema).len(), 2, "{name}");
    }
}

#[test]
fn dumps_tell_the_versions_apart() {
    let dumps = dumps();
    let dump = |wanted| &dumps.iter().find(|(name, _)| name == wanted).unwrap().1;
    let (old, new) = (dump("qemu-7.2.json.gz"), dump("qemu-10.0.json.gz"));
    let mapped_ram = "capabilities.capability=mapped-ram";
    assert!(!old.offers_argument("migrate-set-capabilities", mapped_ram));
    assert!(new.offers_argument("migrate-set-capabilities", mapped_ram));
    // Through an array, an object and its variants.
    let file = "channels.addr.filename";
    assert!(!old.offers_argument("migrate", file));
    assert!(new.offers_argument("migrate", file));
    assert!(new.command_has_feature("device_add", "json-cli"));
    assert!(new.offers_argument("blockdev-add", "file.file.filename"));
}

#[test]
fn every_command_in_the_source_is_listed() {
    let needs = Needs::ours();
    let used = used_in_source();
    assert!(used.contains("qmp-capabilities"), "{used:?}");
    let listed: BTreeSet<String> = needs.commands.iter().map(|n| plain(&n.name)).collect();
    let unlisted: Vec<_> = used.difference(&listed).collect();
    assert!(unlisted.is_empty(), "not in needs.toml: {unlisted:?}");
    assert!(!listed.contains(FORBIDDEN) && !used.contains(FORBIDDEN));
}

#[test]
fn the_scan_finds_every_way_to_write_a_command() {
    let source = r#"
        use crate::qmp::schema::Schema;
        use qapi::qmp::{self, QmpCommand, query_block};
        let a = qmp::device_del { id };
        let b = qmp::blockdev_add(options);
        let c: qmp::StatusInfo = monitor.execute(qmp::query_status {}).await?;
        monitor.execute_raw("query-fdsets", Value::Null);
        monitor.execute_raw(
            "x-blockdev-change", json!({}));
        // qmp::in_a_comment {}
        let command = "query-qmp-schema"; monitor.execute_raw(command, Value::Null);
    "#;
    let mut used = BTreeSet::new();
    scan(source, &mut used);
    let expected = [
        "blockdev-add",
        "device-del",
        "query-block",
        "query-fdsets",
        "query-qmp-schema",
        "query-status",
        "x-blockdev-change",
    ];
    assert_eq!(used.into_iter().collect::<Vec<_>>(), expected);
}

fn used_in_source() -> BTreeSet<String> {
    let mut todo: Vec<PathBuf> = SOURCES.iter().map(|dir| root().join(dir)).collect();
    let mut used = BTreeSet::new();
    while let Some(path) = todo.pop() {
        if path.is_dir() {
            todo.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            scan(&fs::read_to_string(&path).unwrap(), &mut used);
        }
    }
    used
}

/// Commands are written as qapi's types (`qmp::query_status {}`, or imported
/// by name) or as a string for `execute_raw`, directly or out of a variable
/// named `command`.
fn scan(source: &str, used: &mut BTreeSet<String>) {
    // Unit tests talk to peers that are no QEMU.
    let source = source.split("#[cfg(test)]\nmod tests").next().unwrap();
    let lines = source.lines().filter(|l| !l.trim_start().starts_with("//"));
    let source = lines.collect::<Vec<_>>().join("\n");
    for rest in source.split("qmp::").skip(1) {
        match rest.strip_prefix('{') {
            Some(list) => {
                let list = list.split('}').next().unwrap();
                used.extend(list.split(',').filter_map(|item| command_type(item.trim())));
            }
            None => used.extend(command_type(rest)),
        }
    }
    for rest in source.split("execute_raw(").skip(1) {
        used.extend(literal(rest.trim_start()));
    }
    if source.contains("execute_raw(command") {
        let assigned = source.split("let command = ").skip(1);
        used.extend(assigned.filter_map(literal));
    }
}

/// `query_status {}` is a command; `StatusInfo` is a type, `schema::` a module.
fn command_type(text: &str) -> Option<String> {
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_');
    let (name, rest) = text.split_at(end.unwrap_or(text.len()));
    let is_command = name.starts_with(|c: char| c.is_ascii_lowercase())
        && name != "self"
        && !rest.starts_with("::");
    is_command.then(|| plain(name))
}

fn literal(text: &str) -> Option<String> {
    Some(plain(text.strip_prefix('"')?.split('"').next()?))
}

/// Rust names cannot have the dashes of QMP names.
fn plain(name: &str) -> String {
    name.replace('_', "-")
}
