//! What a hostile guest says has changed in a workspace with a repository in
//! it: staged, shown and brought back.
#![no_main]

use std::fs;
use std::path::Path;

use bulkhead::guest::archive::{HostDir, Limits, Manifest, PackLimits, pack};
use bulkhead::run::workspace::{ApplyOptions, Changes, DiffOptions, apply, diff};
use bulkhead_fuzz::{Node, check_error, check_text, right_checksums, temp, tree};

const LIMITS: Limits = Limits {
    bytes: 64 * 1024,
    file_size: 1 << 20,
    entries: 64,
    name_bytes: 4096,
    path_len: 200,
    depth: 8,
};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let [how, removed, rest @ ..] = data else {
        return;
    };
    let (removed, archive) = rest.split_at(rest.len().min(usize::from(*removed)));
    let mut archive = archive.to_vec();
    right_checksums(&mut archive);
    let top = temp();
    let [host, staging] = ["host", "staging"].map(|name| top.path().join(name));
    fs::create_dir(&staging).expect("it is empty");
    let manifest = workspace(&host);
    fs::write(top.path().join("canary"), "safe").expect("it is empty");
    let dir = HostDir::open(&host).expect("it is there");

    let changes = match Changes::stage(&archive[..], removed, &staging, &dir, &LIMITS) {
        Ok(changes) => changes,
        Err(error) => {
            check_error(&error);
            assert_eq!(fs::read_dir(&staging).expect("it is there").count(), 0);
            return;
        }
    };
    let mut text = Vec::new();
    if let Err(error) = diff(&dir, &changes, &mut text, &DiffOptions::default()) {
        check_error(&error);
    }
    let force = how & 1 == 1;
    match apply(&dir, &changes, &manifest, &ApplyOptions { force }) {
        Ok(applied) => {
            for warning in changes.warnings.list.iter().chain(&applied.warnings.list) {
                check_text(&warning.to_string());
            }
        }
        Err(error) => check_error(&error),
    }
    drop(changes);

    assert_eq!(
        fs::read(top.path().join("canary")).expect("it is there"),
        b"safe"
    );
    assert_eq!(fs::read_dir(top.path()).expect("it is there").count(), 3);
    assert_eq!(fs::read_dir(&staging).expect("it is there").count(), 0);
    for (name, node) in tree(&host) {
        let dirs = name.split(|&byte| byte == b'/').count();
        let in_repository = name.starts_with(b".git/");
        match node {
            Node::Special(mode) => panic!("{name:?} has mode {mode:o}"),
            Node::Link(target) => {
                assert!(!in_repository, "{name:?} is a link");
                assert_ne!(target.first(), Some(&b'/'), "{name:?} leads out");
                let up = target
                    .split(|&byte| byte == b'/')
                    .filter(|&part| part == b"..");
                assert!(up.count() < dirs, "{name:?} leads out");
            }
            Node::File { mode, .. } => assert_eq!(mode & 0o7000, 0, "{name:?}"),
            Node::Dir => {}
        }
        assert!(!name.starts_with(b".git/hooks/"), "{name:?} came in");
        assert!(!name.starts_with(b".bulkhead-apply-"), "{name:?} was left");
    }
});

/// A small project under version control, and what the guest was sent of it.
fn workspace(dir: &Path) -> Manifest {
    for name in [".git/objects/ab", ".git/refs/heads", "src"] {
        fs::create_dir_all(dir.join(name)).expect("it is empty");
    }
    for (name, text) in [
        (".git/HEAD", "ref: refs/heads/main\n"),
        (
            ".git/config",
            "[core]\n\tbare = false\n\thooksPath = hooks\n",
        ),
        (".git/objects/ab/cd", "object"),
        ("README", "one\ntwo\nthree\n"),
        ("src/main.rs", "fn main() {}\n"),
    ] {
        fs::write(dir.join(name), text).expect("it is empty");
    }
    let dir = HostDir::open(dir).expect("it is there");
    let packed = pack(&dir, std::io::sink(), &PackLimits::default());
    packed.expect("it can be read").manifest
}
