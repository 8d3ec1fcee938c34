//! `template.json` of a template, in a store, under the id that its key gives.
#![no_main]

use std::fs;

use bulkhead::template::{Manifest, Store};
use bulkhead_fuzz::{check_error, temp};

/// Where nothing gives an id.
const NONE: &str = "00000000000000000000000000000000";

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let manifest = serde_json::from_slice::<Manifest>(data).ok();
    if let Some(manifest) = &manifest {
        let again = serde_json::to_vec(manifest).expect("it can be encoded");
        let again: Manifest = serde_json::from_slice(&again).expect("it was just encoded");
        assert_eq!(*manifest, again);
        assert!(manifest.key.differences(&again.key).is_empty());
    }
    let id = manifest.as_ref().map_or(NONE.into(), |one| one.key.id());
    let state = temp();
    let dir = state.path().join("templates").join(&id);
    fs::create_dir_all(&dir).expect("it is empty");
    fs::write(dir.join("template.json"), data).expect("it is empty");
    for file in ["ram", "state", "disk"] {
        fs::write(dir.join(file), "").expect("it is empty");
    }

    let store = Store::new(state.path());
    let (listed, broken) = store.list().expect("it can be read");
    assert_eq!(listed.len() + broken.len(), 1);
    broken.iter().for_each(|error| check_error(error));
    match store.get(&id) {
        Ok(template) => {
            assert_eq!(template.id, id);
            assert_eq!(Some(&template.manifest), manifest.as_ref());
            // What was checked is the same the next time.
            let again = store.find(&template.manifest.key);
            assert!(again.is_ok_and(|found| found.is_some()));
        }
        Err(error) => check_error(&error),
    }
    // Whatever is in it, it can be removed.
    assert_eq!(store.rm(&id).expect("nobody uses it"), id);
});
