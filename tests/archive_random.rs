//! Archives a hostile guest may send, at random.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use bulkhead::guest::archive::{Limits, Manifest};
use bulkhead::run::workspace::{ApplyOptions, Changes, DiffOptions, Error, apply, diff};
use proptest::prelude::*;
use raw::{archive, attack, entry, outside};
use tar::EntryType;
use tree::{open, temp};

#[path = "support/raw.rs"]
#[allow(dead_code)]
mod raw;
#[path = "support/tree.rs"]
#[allow(dead_code)]
mod tree;

/// Names that collide, climb and pass through each other.
fn hostile_name() -> impl Strategy<Value = Vec<u8>> {
    let plain = proptest::sample::select(vec![&b"a"[..], b"b", b"c"]);
    let nasty =
        proptest::sample::select(vec![&b".."[..], b".", b"", b"canary", b".git", b"\xff\x1b"]);
    let part = prop_oneof![20 => plain, 1 => nasty];
    proptest::collection::vec(part, 1..4).prop_map(|parts| parts.join(&b'/'))
}

/// Targets that stay inside, leave, or leave only through another link.
fn hostile_target() -> impl Strategy<Value = Vec<u8>> {
    let up = vec![
        &b".."[..],
        b".",
        b"../..",
        b"../canary",
        b"a/../canary",
        b"b/../canary",
        b"../b/../../canary",
    ];
    prop_oneof![
        hostile_name(),
        proptest::sample::select(up).prop_map(<[u8]>::to_vec)
    ]
}

fn hostile_entry() -> impl Strategy<Value = Vec<u8>> {
    let common = proptest::sample::select(b"0052222221".to_vec());
    let rare = proptest::sample::select(b"36LKxS".to_vec());
    let kind = prop_oneof![30 => common, 2 => rare, 1 => any::<u8>()];
    (
        kind,
        hostile_name(),
        hostile_target(),
        0..0o10000u32,
        proptest::collection::vec(any::<u8>(), 0..600),
    )
        .prop_map(|(kind, name, link, mode, data)| {
            let with_data = !matches!(kind, b'1' | b'2' | b'5');
            entry(
                EntryType::new(kind),
                &name,
                &link,
                mode | 0o700,
                if with_data { &data } else { b"" },
            )
        })
}

/// No path through what was unpacked leads out of it, and nothing in it is
/// special.
fn check_inside(target: &Path) -> Result<(), TestCaseError> {
    let target = fs::canonicalize(target).unwrap();
    let mut left = vec![target.clone()];
    while let Some(path) = left.pop() {
        for item in fs::read_dir(path).unwrap() {
            let path = item.unwrap().path();
            let meta = fs::symlink_metadata(&path).unwrap();
            if meta.is_dir() {
                left.push(path);
            } else if !meta.is_symlink() {
                prop_assert!(meta.is_file() && meta.mode() & 0o7000 == 0);
            } else if let Ok(real) = fs::canonicalize(&path) {
                prop_assert!(real.starts_with(&target), "{path:?} leads to {real:?}");
            }
        }
    }
    Ok(())
}

proptest! {
    // 256 cases; PROPTEST_CASES asks for more.
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn hostile_archives_stay_inside(entries in proptest::collection::vec(hostile_entry(), 1..12), cut in 0usize..9000) {
        let whole = archive(&entries);
        for bytes in [&whole[..], &whole[..cut.min(whole.len())]] {
            let (dir, _result) = attack(bytes, Limits::default());
            check_inside(&dir.path().join("target"))?;
        }
    }

    /// Links that are harmless one by one must not lead out together.
    #[test]
    fn chains_of_symlinks_stay_inside(targets in proptest::collection::vec(hostile_target(), 6)) {
        let names = [&b"a/a"[..], b"a/b", b"a/c", b"b/a", b"b", b"c"];
        let links = names.iter().zip(&targets);
        let links: Vec<_> = links.map(|(name, target)| entry(EntryType::Symlink, name, target, 0o777, b"")).collect();
        let (dir, _result) = attack(&archive(&links), Limits::default());
        check_inside(&dir.path().join("target"))?;
    }

    /// Nothing outside changes on the whole way back, with a symlink of the host in the way.
    #[test]
    fn hostile_changes_stay_inside(entries in proptest::collection::vec(hostile_entry(), 1..8), names in proptest::collection::vec(hostile_name(), 0..4)) {
        let top = temp();
        for dir in ["canary/a", "canary/c", "staging", "target/b"] {
            fs::create_dir_all(top.path().join(dir)).unwrap();
        }
        fs::write(top.path().join("canary/b"), "safe").unwrap();
        std::os::unix::fs::symlink("../canary", top.path().join("target/a")).unwrap();
        let before = outside(top.path());
        let target = top.path().join("target");
        let mut removed = names.join(&0);
        removed.push(0);
        let staging = top.path().join("staging");
        let staged = Changes::stage(&archive(&entries)[..], &removed[..], &staging, &open(&target), &Limits::default());
        if let Ok(changes) = staged {
            diff(&open(&target), &changes, std::io::sink(), &DiffOptions::default()).unwrap();
            let applied = apply(&open(&target), &changes, &Manifest::default(), &ApplyOptions { force: true });
            if let Err(Error::Partial { kept: Some(hidden), .. }) = applied {
                fs::remove_dir_all(target.join(hidden)).unwrap();
            }
        }
        prop_assert_eq!(before, outside(top.path()));
        for item in fs::read_dir(&target).unwrap() {
            let name = item.unwrap().file_name();
            prop_assert!(!name.as_encoded_bytes().starts_with(b".bulkhead"), "left behind: {:?}", name);
        }
    }

    #[test]
    fn noise_is_refused(bytes in proptest::collection::vec(any::<u8>(), 0..3000)) {
        let (_dir, result) = attack(&bytes, Limits::default());
        prop_assert!(result.is_err());
    }
}
