//! Archives made entry by entry, and a target with a canary beside it.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::Path;

use bulkhead::guest::archive::{Error, Limits, Options, Unpacked, unpack};
use tar::{EntryType, Header};
use tempfile::TempDir;

use super::tree::{snapshot, temp};

/// One raw entry; nothing is checked or corrected.
pub(crate) fn entry(kind: EntryType, name: &[u8], link: &[u8], mode: u32, data: &[u8]) -> Vec<u8> {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    let len = name.len().min(100);
    header.as_old_mut().name[..len].copy_from_slice(&name[..len]);
    let len = link.len().min(100);
    header.as_old_mut().linkname[..len].copy_from_slice(&link[..len]);
    header.set_mode(mode);
    header.set_mtime(1);
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(data.len() as u64);
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(data);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

pub(crate) fn file(name: &str, data: &[u8]) -> Vec<u8> {
    entry(EntryType::Regular, name.as_bytes(), b"", 0o644, data)
}

pub(crate) fn dir(name: &str) -> Vec<u8> {
    entry(EntryType::Directory, name.as_bytes(), b"", 0o755, b"")
}

pub(crate) fn link(kind: EntryType, name: &str, target: &str) -> Vec<u8> {
    entry(kind, name.as_bytes(), target.as_bytes(), 0o777, b"")
}

pub(crate) fn archive(entries: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = entries.concat();
    bytes.extend_from_slice(&[0; 1024]);
    bytes
}

/// Unpacks into `target/` beside a canary, which must stay as it is.
pub(crate) fn attack(bytes: &[u8], limits: Limits) -> (TempDir, Result<Unpacked, Error>) {
    let dir = temp();
    fs::create_dir_all(dir.path().join("canary/deep")).unwrap();
    fs::write(dir.path().join("canary/deep/file"), "safe").unwrap();
    fs::create_dir(dir.path().join("target")).unwrap();
    let before = outside(dir.path());
    let options = Options {
        limits,
        ..Options::default()
    };
    let result = unpack(bytes, &dir.path().join("target"), &options);
    assert_eq!(
        before,
        outside(dir.path()),
        "something outside the target changed"
    );
    (dir, result)
}

/// Everything in `dir` but what is below `target`.
pub(crate) fn outside(dir: &Path) -> BTreeMap<OsString, String> {
    let mut all = snapshot(dir);
    all.retain(|name, _| !name.as_encoded_bytes().starts_with(b"target/"));
    all
}
