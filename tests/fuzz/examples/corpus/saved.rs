//! Seeds for what is saved of machines: templates, snapshots, exports.

use std::fs;
use std::path::Path;

use bulkhead::template::{Manifest, Store};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::seed;

/// Of an empty file: eight bytes of size, and nothing else.
fn nothing() -> Value {
    let digest = Sha256::digest(0_u64.to_le_bytes());
    let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    json!({ "size": 0, "sha256": digest })
}

fn key() -> Value {
    json!({ "image": "sha256-0", "machine": "microvm", "memory": "0M", "disk": "0" })
}

fn life() -> Value {
    json!({
        "boot_id": "9f9f3c2e-0000-4000-8000-000000000000", "generation": 0,
        "uptime_ms": 812, "session": "0".repeat(32), "unix_ns": 1_700_000_000_000_000_000_u64,
    })
}

fn qemu() -> Value {
    json!({ "major": 7, "minor": 2, "micro": 22, "package": "Debian" })
}

fn template_manifest() -> Value {
    json!({
        "schema": 1, "key": key(), "life": life(),
        "ram": nothing(), "state": nothing(), "disk": nothing(),
        "created_ms": 1_700_000_000_000_u64, "image": "base", "profile": "light",
        "warm": "python3 -c pass", "qemu": qemu(),
    })
}

pub(super) fn template() {
    let mut manifest = template_manifest();
    let text = serde_json::to_vec_pretty(&manifest).expect("it can be encoded");
    seed("template", "manifest.json", &[&text]);
    manifest["ram"]["size"] = u64::MAX.into();
    let text = serde_json::to_vec(&manifest).expect("it can be encoded");
    seed("template", "vast", &[&text]);
}

fn snapshot_manifest() -> Value {
    json!({
        "schema": 1, "name": "before", "description": "why", "tags": { "k": "v" },
        "parent": "older", "created_ms": 1_700_000_000_000_u64, "image": "sha256-0",
        "saved": {
            "key": key(), "life": life(), "backed": false, "qemu": qemu(),
            "paused_ms": 20, "state": nothing(),
        },
        "disk": nothing(),
    })
}

pub(super) fn snapshot() {
    let mut manifest = snapshot_manifest();
    let text = serde_json::to_vec_pretty(&manifest).expect("it can be encoded");
    seed("snapshot", "manifest.json", &[&text]);
    manifest["saved"]["state"]["size"] = u64::MAX.into();
    let text = serde_json::to_vec(&manifest).expect("it can be encoded");
    seed("snapshot", "vast", &[&text]);
    manifest["saved"] = Value::Null;
    let text = serde_json::to_vec(&manifest).expect("it can be encoded");
    seed("snapshot", "disk", &[&text]);
}

/// Header and files of an export, without chain and compression.
fn content(data: u64, content: &Value, files: &[&[u8]]) -> Vec<u8> {
    let header = json!({
        "schema": 1, "bulkhead": "0.1.0", "exported_ms": 1_700_000_000_000_u64,
        "data": data, "content": content,
    });
    let text = serde_json::to_vec(&header).expect("it can be encoded");
    let len = u32::try_from(text.len()).expect("it is short");
    [&len.to_le_bytes()[..], &text, &files.concat()].concat()
}

/// The end of a file of `size` bytes.
fn end(size: u64) -> Vec<u8> {
    [&size.to_le_bytes()[..], &[0; 4]].concat()
}

pub(super) fn export() {
    let empty = end(0);
    let machine = json!({
        "name": "vm", "image": "base", "kernel": "tuned",
        "limits": { "vcpus": 1, "memory": "256M", "disk": "64M", "timeout": "60s" },
        "machine": "microvm", "balloon": true, "isolated": true, "ipv6": false,
        "labels": { "team": "a" },
        "command": {
            "argv": ["sleep", "9"], "env": [["A", "b"]], "workdir": "/", "user": "root",
            "terminal": false, "script": null,
        },
    });
    let snapshot = json!({ "snapshot": { "manifest": snapshot_manifest(), "machine": machine } });
    let whole = content(0, &snapshot, &[&empty, &empty]);
    seed("export", "snapshot", &[&[1], &whole]);
    seed("export", "disk", &[&[0x85], &whole]);
    let template = json!({ "template": template_manifest() });
    let whole = content(0, &template, &[&empty, &empty, &empty]);
    seed("export", "template", &[&[1], &whole]);
    // One block of data, whose digest is that of nothing.
    let run = [&0_u64.to_le_bytes()[..], &5_u32.to_le_bytes(), b"hello"].concat();
    let mut short = snapshot;
    short["snapshot"]["manifest"]["saved"] = Value::Null;
    short["snapshot"]["manifest"]["disk"]["size"] = 5.into();
    let whole = content(5, &short, &[&run, &end(5)]);
    seed("export", "run", &[&[1], &whole]);
    let mut vast = template;
    vast["template"]["ram"]["size"] = u64::MAX.into();
    let whole = content(u64::MAX, &vast, &[&empty]);
    seed("export", "vast", &[&[1], &whole]);
    // As files are, made by the library from files of its own.
    seed("export", "file", &[&[0], &exported()]);
}

/// A template of nothing, exported.
fn exported() -> Vec<u8> {
    let state = tempfile::tempdir().expect("a directory can be made");
    let text = serde_json::to_vec(&template_manifest()).expect("it can be encoded");
    let manifest: Manifest = serde_json::from_slice(&text).expect("it was just encoded");
    let dir = state.path().join("templates").join(manifest.key.id());
    fs::create_dir_all(&dir).expect("it is empty");
    fs::write(dir.join("template.json"), text).expect("it is empty");
    for file in ["ram", "state", "disk"] {
        fs::write(dir.join(file), "").expect("it is empty");
    }
    let store = Store::new(state.path());
    let template = store.get(&manifest.key.id()).expect("it is whole");
    let mut bytes = Vec::new();
    bulkhead::export::template(template, 1_700_000_000_000, &mut bytes, Path::new("x"))
        .expect("memory takes it");
    bytes
}
