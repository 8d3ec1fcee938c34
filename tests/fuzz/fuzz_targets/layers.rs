//! OCI layouts and the layers in them, from whoever made the image.
#![no_main]

use std::fs;

use bulkhead::image::fuzz;
use bulkhead_fuzz::{check_error, right_checksums, temp};
use sha2::{Digest as _, Sha256};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    match data {
        [0, len, rest @ ..] => layout(rest, usize::from(*len)),
        [layers, rest @ ..] => merge(rest, usize::from(layers % 3)),
        [] => {}
    }
});

/// An index, and what it may name as a manifest, under its digest.
fn layout(data: &[u8], len: usize) {
    let (index, manifest) = data.split_at(data.len().min(len));
    let dir = temp();
    let blobs = dir.path().join("blobs/sha256");
    fs::create_dir_all(&blobs).expect("it is empty");
    let digest: String = Sha256::digest(manifest)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    // No input can hold the digest of its other half.
    let index = String::from_utf8_lossy(index).replace("DIGEST", &digest);
    fs::write(dir.path().join("index.json"), index).expect("it is empty");
    fs::write(blobs.join(&digest), manifest).expect("it is empty");
    match fuzz::oci_layers(dir.path()) {
        Ok(paths) => assert!(paths.iter().all(|path| path.starts_with(&blobs))),
        Err(error) => check_error(&error),
    }
}

/// Archives on top of each other become one that is plain.
fn merge(data: &[u8], below: usize) {
    let part = (data.len() / (below + 1)).next_multiple_of(512).max(512);
    let mut layers: Vec<Vec<u8>> = data.chunks(part).map(<[u8]>::to_vec).collect();
    layers.iter_mut().for_each(|layer| right_checksums(layer));
    let merged = match fuzz::merge(&layers) {
        Ok(merged) => merged,
        Err(error) => return check_error(&error),
    };
    let mut archive = tar::Archive::new(&merged[..]);
    for entry in archive.entries().expect("it was just written") {
        let entry = entry.expect("it was just written");
        let path = entry.path_bytes();
        assert_ne!(path.first(), Some(&b'/'), "an absolute name");
        for part in path.split(|&byte| byte == b'/') {
            assert_ne!(part, b"..", "a name that climbs");
        }
        let kind = entry.header().entry_type();
        let plain = kind.is_dir() || kind.is_file() || kind.is_symlink() || kind.is_hard_link();
        assert!(plain, "{kind:?} came through");
    }
}
