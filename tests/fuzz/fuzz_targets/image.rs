//! `manifest.json` of an image, in a store, under the name of its digest.
#![no_main]

use std::fs;
use std::os::unix::fs::symlink;

use bulkhead::image::{Manifest, Store};
use bulkhead_fuzz::{check_error, temp};
use sha2::{Digest as _, Sha256};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Ok(manifest) = serde_json::from_slice::<Manifest>(data) {
        let again = serde_json::to_vec(&manifest).expect("it can be encoded");
        let again: Manifest = serde_json::from_slice(&again).expect("it was just encoded");
        assert_eq!(manifest, again);
    }
    let state = temp();
    let digest: String = Sha256::digest(data)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let id = format!("sha256-{digest}");
    let images = state.path().join("images");
    fs::create_dir_all(images.join(&id)).expect("it is empty");
    fs::create_dir(images.join("names")).expect("it is empty");
    fs::write(images.join(&id).join("manifest.json"), data).expect("it is empty");
    for file in ["root.squashfs", "kernel", "initramfs"] {
        fs::write(images.join(&id).join(file), "").expect("it is empty");
    }
    symlink(format!("../{id}"), images.join("names/it")).expect("it is empty");

    let store = Store::new(state.path().to_owned());
    let listed = store.list();
    match store.inspect("it") {
        Ok(image) => {
            assert_eq!(image.id, id);
            for path in [image.kernel(), image.initramfs(), image.root()] {
                assert_eq!(path.parent(), Some(image.dir.as_path()), "{path:?}");
            }
            assert_eq!(listed.expect("it can be read").len(), 1);
            let lock = image.lock().expect("it is there");
            assert!(store.rm("it").is_err(), "it is in use");
            drop(lock);
        }
        Err(error) => {
            check_error(&error);
            assert!(listed.is_err());
        }
    }
    if let Err(error) = store.get("it") {
        check_error(&error);
    }
    // Whatever is in it, it can be removed.
    assert_eq!(store.rm("it").expect("nobody uses it"), [id]);
});
