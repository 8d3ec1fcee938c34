//! Templates that outlived what they were built with, against real QEMU.

mod support;

use std::path::Path;

use serde_json::Value;
use support::template::{SMALL, build};
use support::{Bulkhead, accel, entries};

/// Of one template: whether it is usable, and what differs, by name; `ls` and
/// `inspect` tell the same.
#[track_caller]
fn told(bulkhead: &Bulkhead, id: &str) -> (bool, String) {
    let all = bulkhead.json(&["template", "ls"]);
    let all = all.as_array().unwrap();
    let one = all.iter().find(|one| one["id"] == id).unwrap();
    assert_eq!(*one, bulkhead.json(&["template", "inspect", id]));
    let differences = one["differences"].as_array().unwrap().iter();
    let parts = differences.map(|one| one["part"].as_str().unwrap());
    let parts = parts.collect::<Vec<_>>().join(" ");
    (one["usable"].as_bool().unwrap(), parts)
}

/// A QEMU in `dir`, with the host's modules and firmware.
fn copy_of_qemu(dir: &Path) -> String {
    let own = bulkhead::host::probe::find_qemu(None).unwrap();
    let own = own.canonicalize().unwrap();
    let lib = own.ancestors().nth(2).unwrap().join("lib");
    std::fs::create_dir(dir.join("bin")).unwrap();
    std::os::unix::fs::symlink(lib, dir.join("lib")).unwrap();
    let copy = dir.join("bin/qemu-system-x86_64");
    std::fs::copy(own, &copy).unwrap();
    copy.to_str().unwrap().to_owned()
}

/// As an update does it: another file of that name, which does the same.
fn update(qemu: &str) {
    let mut bytes = std::fs::read(qemu).unwrap();
    bytes.push(0);
    let fresh = format!("{qemu}.new");
    std::fs::copy(qemu, &fresh).unwrap();
    std::fs::write(&fresh, bytes).unwrap();
    std::fs::rename(fresh, qemu).unwrap();
}

#[test]
fn what_another_qemu_made_is_told_and_removed() {
    let dir = tempfile::tempdir().unwrap();
    let qemu = copy_of_qemu(dir.path());
    let bulkhead = Bulkhead::new().with_own_state().with_qemu(&qemu);
    let old = build(&bulkhead, &[]);
    assert_eq!(told(&bulkhead, &old), (true, String::new()));
    assert!(bulkhead.must(&["template", "ls"]).contains(" usable "));
    assert!(
        bulkhead
            .must(&["template", "inspect", &old])
            .contains("usable        yes\n")
    );
    let pruned = bulkhead.json(&["template", "prune"]);
    assert_eq!(
        pruned,
        serde_json::json!({ "dry_run": false, "removed": [], "bytes": 0 })
    );
    let words = ["sh", "-c", "echo ready; read go; hostname; cat"];
    let words = [&SMALL[2..], &["--template", &old, "--"], &words].concat();
    let mut clone = bulkhead.start("clone", &words);

    update(&qemu);
    assert_eq!(told(&bulkhead, &old), (false, "qemu".into()));
    assert!(bulkhead.must(&["template", "ls"]).contains(" stale: qemu "));
    let shown = bulkhead.must(&["template", "inspect", &old]);
    assert!(shown.contains("usable        no: qemu is "), "{shown}");
    // No machine is cloned from it any more.
    let fixed = ["--json", "run", "--accel", &accel()];
    let ran = bulkhead.must(&[&fixed, &SMALL[..], &["--", "true"]].concat());
    let outcome: Value = serde_json::from_str(&ran).unwrap();
    assert_eq!(outcome["template"], Value::Null);
    let new = build(&bulkhead, &[]);
    assert_ne!(old, new);

    let templates = bulkhead.state().join("templates");
    let both = [&old, &new].map(String::clone);
    let would = bulkhead.json(&["template", "prune", "--dry-run"]);
    let text = bulkhead.must(&["template", "prune", "--dry-run"]);
    let first = format!("would remove {old} ({} bytes): qemu is ", would["bytes"]);
    assert!(text.starts_with(&first), "{text}");
    assert!(text.ends_with(&format!("{} bytes would be given back\n", would["bytes"])));
    let left = entries(&templates);
    assert!(both.iter().all(|id| left.contains(id)), "{left:?}");
    let pruned = bulkhead.json(&["template", "prune"]);
    assert_eq!(
        (&would["dry_run"], &pruned["dry_run"]),
        (&true.into(), &false.into())
    );
    assert_eq!(pruned["removed"], would["removed"]);
    let removed = pruned["removed"].as_array().unwrap();
    assert_eq!(
        (removed.len(), &removed[0]["id"]),
        (1, &old.as_str().into())
    );
    assert_eq!(removed[0]["damage"], Value::Null);
    assert_eq!(removed[0]["differences"][0]["part"], "qemu");
    assert!(pruned["bytes"].as_u64().unwrap() > 1 << 20, "{pruned}");
    assert_eq!(entries(&templates), [new.as_str()]);
    assert_eq!(told(&bulkhead, &new), (true, String::new()));
    // Its clone has what it has open.
    assert_eq!(clone.ask("go"), "clone\n");
    assert_eq!(clone.finish().code, 0);

    // What is damaged goes with that reason.
    std::fs::remove_file(templates.join(&new).join("template.json")).unwrap();
    bulkhead.must_fail(&["template", "ls"], "template-corrupt");
    let text = bulkhead.must(&["template", "prune"]);
    assert!(text.contains("it is damaged: template.json: "), "{text}");
    assert_eq!(entries(&templates), [""; 0]);
}

#[test]
fn a_template_goes_with_its_image() {
    let own = tempfile::tempdir().unwrap();
    let prepared = Bulkhead::new();
    let images = own.path().join("images");
    std::fs::create_dir_all(images.join("names")).unwrap();
    // The prepared images, but names of our own.
    for name in entries(&prepared.state().join("images")) {
        let there = prepared.state().join("images").join(&name);
        if name.starts_with("sha256-") {
            std::os::unix::fs::symlink(there, images.join(name)).unwrap();
        }
    }
    let kernels = prepared.state().join("kernels");
    std::os::unix::fs::symlink(kernels, own.path().join("kernels")).unwrap();
    let of = |name: &str| {
        let link = prepared.state().join("images/names").join(name);
        std::fs::read_link(link).unwrap()
    };
    let (base, other) = (of("base"), of("default"));
    let name = |target: &Path| {
        let link = images.join("names/base");
        let _ = std::fs::remove_file(&link);
        std::os::unix::fs::symlink(target, link).unwrap();
    };
    name(&base);
    let bulkhead = Bulkhead::new().with_state(own.path());
    let id = build(&bulkhead, &[]);
    assert_eq!(told(&bulkhead, &id), (true, String::new()));
    // Built again: the name stands for another image.
    name(&other);
    let (usable, parts) = told(&bulkhead, &id);
    assert!(!usable && parts.contains("image"), "{parts}");
    name(&base);
    assert_eq!(told(&bulkhead, &id), (true, String::new()));
    // Removed.
    std::fs::remove_file(images.join("names/base")).unwrap();
    std::fs::remove_file(images.join(base.file_name().unwrap())).unwrap();
    assert_eq!(told(&bulkhead, &id), (false, "image".into()));
    let text = bulkhead.must(&["template", "prune"]);
    assert!(
        text.contains("): image is absent, and was sha256-"),
        "{text}"
    );
    assert_eq!(bulkhead.json(&["template", "ls"]), serde_json::json!([]));
}
