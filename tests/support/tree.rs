//! Directory trees for tests: making, describing, packing.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use bulkhead::guest::archive::HostDir;
use tempfile::TempDir;

/// A directory that goes away at the end of the test.
pub(crate) fn temp() -> TempDir {
    tempfile::Builder::new()
        .prefix("bh-workspace-")
        .tempdir()
        .unwrap()
}

pub(crate) fn open(dir: &Path) -> HostDir {
    HostDir::open(dir).unwrap()
}

/// Name to kind, mode, time, content or target of everything below `dir`.
pub(crate) fn snapshot(dir: &Path) -> BTreeMap<OsString, String> {
    fn walk(top: &Path, dir: &Path, all: &mut BTreeMap<OsString, String>) {
        for item in fs::read_dir(dir).unwrap() {
            let path = item.unwrap().path();
            let meta = fs::symlink_metadata(&path).unwrap();
            let what = if meta.is_symlink() {
                format!("link {:?}", fs::read_link(&path).unwrap())
            } else if meta.is_dir() {
                walk(top, &path, all);
                format!("dir {:o}", meta.mode())
            } else {
                let small = (meta.len() < 1 << 24).then(|| fs::read(&path).unwrap());
                format!(
                    "file {:o} {} {} {small:?}",
                    meta.mode(),
                    meta.mtime(),
                    meta.len()
                )
            };
            let name = path.strip_prefix(top).unwrap();
            all.insert(name.as_os_str().to_owned(), what);
        }
    }
    let mut all = BTreeMap::new();
    walk(dir, dir, &mut all);
    all
}

/// A tree with every kind of thing that is packed.
pub(crate) fn sample(dir: &Path) {
    fs::create_dir_all(dir.join("a/b/c")).unwrap();
    fs::create_dir(dir.join("empty")).unwrap();
    fs::write(dir.join("a/run.sh"), "#!/bin/sh\n").unwrap();
    fs::set_permissions(dir.join("a/run.sh"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(dir.join("a/none"), "").unwrap();
    fs::hard_link(dir.join("a/run.sh"), dir.join("z-hard")).unwrap();
    symlink("../run.sh", dir.join("a/b/link")).unwrap();
    let long = format!("{}/{}", "d".repeat(200), "f".repeat(250));
    fs::create_dir(dir.join("d".repeat(200))).unwrap();
    fs::write(dir.join(&long), "long").unwrap();
    symlink(&long, dir.join("to-long")).unwrap();
    fs::write(
        dir.join(std::ffi::OsStr::from_bytes(b"odd \xff\n\x1b[31m")),
        "odd",
    )
    .unwrap();
    fs::write(dir.join("n".repeat(100)), "exactly the field").unwrap();
    // Enough extents to need blocks after the header, and a hole at the end.
    let sparse = fs::File::create(dir.join("sparse")).unwrap();
    for n in 0..60 {
        sparse.write_all_at(b"data", n * 131_072).unwrap();
    }
    sparse.set_len(60 * 131_072 + 777).unwrap();
}
