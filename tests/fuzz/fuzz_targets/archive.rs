//! A workspace archive of a hostile guest, unpacked beside a canary.
#![no_main]

use std::fs;

use bulkhead::guest::archive::{Kind, Limits, Modes, Options, unpack};
use bulkhead_fuzz::{Node, check_error, check_text, right_checksums, temp, tree};

/// Small enough to be reached.
const LIMITS: Limits = Limits {
    bytes: 64 * 1024,
    file_size: 1 << 20,
    entries: 64,
    name_bytes: 4096,
    path_len: 200,
    depth: 8,
};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let [how, archive @ ..] = data else { return };
    let mut archive = archive.to_vec();
    if how & 1 == 0 {
        right_checksums(&mut archive);
    }
    let top = temp();
    let target = top.path().join("target");
    fs::create_dir(&target).expect("it is empty");
    fs::write(top.path().join("canary"), "safe").expect("it is empty");
    let options = Options {
        limits: LIMITS,
        owner: None,
        modes: [Modes::Archive, Modes::Private][usize::from(how >> 1 & 1)],
    };
    let result = unpack(&archive[..], &target, &options);

    let canary = fs::read(top.path().join("canary")).expect("it is there");
    assert_eq!(canary, b"safe");
    let outside = fs::read_dir(top.path()).expect("it is there").count();
    assert_eq!(outside, 2, "something was made beside the target");
    let tree = tree(&target);
    let mut stored = 0;
    for (name, node) in &tree {
        assert!(name.len() <= LIMITS.path_len, "{name:?} is too long");
        let depth = name.split(|&byte| byte == b'/').count();
        assert!(depth <= LIMITS.depth, "{name:?} is too deep");
        match node {
            Node::Dir => {}
            Node::File {
                size,
                stored: on_disk,
                mode,
            } => {
                assert!(*size <= LIMITS.file_size, "{name:?} has {size} bytes");
                assert_eq!(mode & 0o7000, 0, "{name:?} has mode {mode:o}");
                stored += on_disk;
            }
            Node::Link(target) => {
                assert_ne!(target.first(), Some(&b'/'), "{name:?} leads out");
                let up = target
                    .split(|&byte| byte == b'/')
                    .filter(|&part| part == b"..");
                assert!(up.count() < depth, "{name:?} leads out");
            }
            Node::Special(mode) => panic!("{name:?} has mode {mode:o}"),
        }
    }
    assert!(
        tree.len() as u64 <= LIMITS.entries,
        "{} entries",
        tree.len()
    );
    // A page for each extent's edges, and hard links show their file again.
    let edges = LIMITS.entries * 4 * 8192;
    assert!(stored <= 2 * LIMITS.bytes + edges, "{stored} bytes on disk");
    match result {
        Err(error) => check_error(&error),
        Ok(unpacked) => {
            assert!(unpacked.bytes <= LIMITS.bytes);
            for (name, entry) in &unpacked.entries {
                let found = tree.get(name.as_bytes());
                let same = match (entry.kind, found) {
                    (Kind::Dir, Some(Node::Dir)) => true,
                    (Kind::File, Some(Node::File { size, .. })) => *size == entry.size,
                    (Kind::Symlink, Some(Node::Link(target))) => entry
                        .link
                        .as_ref()
                        .is_some_and(|link| link.as_encoded_bytes() == target),
                    _ => false,
                };
                assert!(same, "{entry:?} is {found:?}");
            }
            for warning in &unpacked.warnings.list {
                check_text(&warning.to_string());
            }
        }
    }
});
