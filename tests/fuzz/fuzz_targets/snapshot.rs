//! `snapshot.json` of a snapshot, in a store, under the name that it has.
#![no_main]

use std::fs;

use bulkhead::snapshot::{Manifest, SnapshotName, Store};
use bulkhead::spec::VmId;
use bulkhead_fuzz::{check_error, temp};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let manifest = serde_json::from_slice::<Manifest>(data).ok();
    if let Some(manifest) = &manifest {
        let again = serde_json::to_vec(manifest).expect("it can be encoded");
        let again: Manifest = serde_json::from_slice(&again).expect("it was just encoded");
        assert_eq!(*manifest, again);
    }
    let none = || "none".parse::<SnapshotName>().expect("it is a name");
    let name = manifest.as_ref().map_or_else(none, |one| one.name.clone());
    let record = temp();
    let dir = record.path().join("snapshots").join(name.as_str());
    fs::create_dir_all(&dir).expect("it is empty");
    fs::write(dir.join("snapshot.json"), data).expect("it is empty");
    for file in ["state", "disk"] {
        fs::write(dir.join(file), "").expect("it is empty");
    }

    let vm: VmId = "vm".parse().expect("it is a name");
    let store = Store::new(record.path(), &vm);
    let (listed, broken) = store.list().expect("it can be read");
    assert_eq!(listed.len() + broken.len(), 1);
    broken.iter().for_each(|error| check_error(error));
    match store.get(&name) {
        Ok(snapshot) => assert_eq!(Some(&snapshot.manifest), manifest.as_ref()),
        Err(error) => check_error(&error),
    }
    // Whatever is in it, it can be removed, and nothing else is.
    store.rm(&name).expect("nobody uses it");
    assert!(store.list().expect("it can be read").0.is_empty());
});
