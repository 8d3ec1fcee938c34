//! Archives: round trips, limits of packing, and GNU tar on either side.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use bulkhead::error::Explain;
use bulkhead::guest::archive::{Options, PackLimits, pack, pack_file, unpack};
use tree::{open, sample, snapshot, temp};

#[path = "support/tree.rs"]
mod tree;

fn packed(dir: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    pack(&open(dir), &mut bytes, &PackLimits::default()).unwrap();
    bytes
}

#[test]
fn what_is_packed_is_unpacked_alike() {
    let (dir, out) = (temp(), temp());
    sample(dir.path());
    let bytes = packed(dir.path());
    assert!(
        bytes.len() < 1 << 20,
        "the sparse file was packed with its holes"
    );
    assert_eq!(bytes, packed(dir.path()), "not deterministic");
    let unpacked = unpack(&bytes[..], out.path(), &Options::default()).unwrap();
    assert!(unpacked.warnings.is_empty(), "{:?}", unpacked.warnings);
    assert_eq!(snapshot(dir.path()), snapshot(out.path()));
    let ino = |name| fs::metadata(out.path().join(name)).unwrap().ino();
    assert_eq!(ino("a/run.sh"), ino("z-hard"));
    let blocks = fs::metadata(out.path().join("sparse")).unwrap().blocks();
    assert!(blocks * 512 < 1 << 20, "the holes were filled");
}

#[test]
fn gnu_tar_reads_what_is_packed() {
    let (dir, out) = (temp(), temp());
    sample(dir.path());
    let mut tar = Command::new("tar")
        .arg("-xpf-")
        .arg("-C")
        .arg(out.path())
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    tar.stdin
        .take()
        .unwrap()
        .write_all(&packed(dir.path()))
        .unwrap();
    assert!(tar.wait().unwrap().success());
    assert_eq!(snapshot(dir.path()), snapshot(out.path()));
}

#[test]
fn the_tar_crate_reads_what_is_packed() {
    let (dir, out) = (temp(), temp());
    sample(dir.path());
    tar::Archive::new(&packed(dir.path())[..])
        .unpack(out.path())
        .unwrap();
    let names = |dir: &Path| snapshot(dir).into_keys().collect::<Vec<_>>();
    assert_eq!(names(dir.path()), names(out.path()));
    let read = |dir: &Path| fs::read(dir.join("sparse")).unwrap();
    assert!(read(dir.path()) == read(out.path()));
}

#[test]
fn what_the_tar_crate_packs_is_unpacked_alike() {
    let (dir, out) = (temp(), temp());
    sample(dir.path());
    let mut builder = tar::Builder::new(Vec::new());
    builder.follow_symlinks(false);
    builder.append_dir_all("", dir.path()).unwrap();
    let bytes = builder.into_inner().unwrap();
    unpack(&bytes[..], out.path(), &Options::default()).unwrap();
    assert_eq!(snapshot(dir.path()), snapshot(out.path()));
}

#[test]
fn what_gnu_tar_packs_is_unpacked_alike() {
    for options in [&["--format=gnu", "--sparse"][..], &["--format=posix"]] {
        let (dir, out) = (temp(), temp());
        sample(dir.path());
        let mut tar = Command::new("tar");
        let tar = tar
            .args(options)
            .args(["-cf-", "-C"])
            .arg(dir.path())
            .arg(".")
            .output()
            .unwrap();
        assert!(
            tar.status.success(),
            "{}",
            String::from_utf8_lossy(&tar.stderr)
        );
        unpack(&tar.stdout[..], out.path(), &Options::default()).unwrap();
        assert_eq!(snapshot(dir.path()), snapshot(out.path()));
    }
}

#[test]
fn one_file_is_packed_under_a_given_name() {
    let (dir, out) = (temp(), temp());
    fs::write(dir.path().join("real"), "x").unwrap();
    symlink("real", dir.path().join("link")).unwrap();
    let mut bytes = Vec::new();
    let limits = PackLimits::default();
    pack_file(
        &dir.path().join("link"),
        "new".as_ref(),
        &mut bytes,
        &limits,
    )
    .unwrap();
    unpack(&bytes[..], out.path(), &Options::default()).unwrap();
    assert_eq!(fs::read(out.path().join("new")).unwrap(), b"x");
    let refused = pack_file(dir.path(), "new".as_ref(), &mut bytes, &limits);
    assert_eq!(refused.unwrap_err().code(), "workspace-unreadable");
}

#[test]
fn what_cannot_be_read_is_named() {
    let dir = temp();
    let mut deep = dir.path().to_path_buf();
    for _ in 0..300 {
        deep.push("d");
    }
    fs::create_dir_all(&deep).unwrap();
    let error = pack(&open(dir.path()), std::io::sink(), &PackLimits::default()).unwrap_err();
    assert_eq!(error.code(), "workspace-unreadable");
    assert!(error.to_string().contains("d/d/d"), "{error}");
}

#[test]
fn a_file_without_read_permission_is_named() {
    // Root reads everything: pack as another user, through a helper process.
    const HELPER: &str = "BH_PACK_AS_NOBODY";
    if let Some(dir) = std::env::var_os(HELPER) {
        let error = pack(
            &open(Path::new(&dir)),
            std::io::sink(),
            &PackLimits::default(),
        )
        .unwrap_err();
        assert_eq!(error.code(), "workspace-unreadable");
        assert!(error.to_string().contains("secret"), "{error}");
        return;
    }
    let dir = temp();
    fs::set_permissions(
        dir.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    fs::write(dir.path().join("secret"), "x").unwrap();
    fs::set_permissions(
        dir.path().join("secret"),
        std::os::unix::fs::PermissionsExt::from_mode(0o000),
    )
    .unwrap();
    let mut helper = Command::new(std::env::current_exe().unwrap());
    helper
        .args(["--exact", "a_file_without_read_permission_is_named"])
        .env(HELPER, dir.path());
    // The test binary may lie where only root may look: run it from a copy.
    let copy = dir.path().join("helper");
    if nix::unistd::Uid::effective().is_root() {
        fs::copy(std::env::current_exe().unwrap(), &copy).unwrap();
        helper = Command::new(&copy);
        helper
            .args(["--exact", "a_file_without_read_permission_is_named"])
            .env(HELPER, dir.path());
        std::os::unix::process::CommandExt::gid(&mut helper, 65534);
        std::os::unix::process::CommandExt::uid(&mut helper, 65534);
    }
    let output = helper.output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
}

#[test]
fn special_files_are_left_out_with_a_warning() {
    let dir = temp();
    let fifo = dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("socket")).unwrap();
    let packed = pack(&open(dir.path()), std::io::sink(), &PackLimits::default()).unwrap();
    let names: Vec<_> = packed
        .warnings
        .list
        .iter()
        .map(|warning| &*warning.path)
        .collect();
    assert_eq!(names, ["fifo", "socket"]);
    assert!(packed.manifest.entries.is_empty());
}

#[test]
fn packing_stops_at_its_limits() {
    let dir = temp();
    sample(dir.path());
    for (bytes, entries) in [(10, 100), (1 << 30, 3)] {
        let limits = PackLimits { bytes, entries };
        let error = pack(&open(dir.path()), std::io::sink(), &limits).unwrap_err();
        assert_eq!(error.code(), "archive-too-large");
    }
}

/// Cuts a file short as soon as its header is written.
struct Shrink<'a>(&'a Path, Vec<u8>);

impl Write for Shrink<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        fs::File::options()
            .write(true)
            .open(self.0)?
            .set_len(1000)?;
        self.1.write(bytes)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_file_that_shrinks_while_packed_does_not_break_the_archive() {
    let (dir, out) = (temp(), temp());
    let path = dir.path().join("a-log");
    fs::write(&path, vec![b'x'; 1 << 20]).unwrap();
    fs::write(dir.path().join("b-next"), "whole").unwrap();
    let mut writer = Shrink(&path, Vec::new());
    let packed = pack(&open(dir.path()), &mut writer, &PackLimits::default()).unwrap();
    assert_eq!(packed.warnings.list[0].path, "a-log");
    unpack(&writer.1[..], out.path(), &Options::default()).unwrap();
    assert_eq!(
        fs::metadata(out.path().join("a-log")).unwrap().len(),
        1 << 20
    );
    assert_eq!(fs::read(out.path().join("b-next")).unwrap(), b"whole");
}

#[test]
fn ten_thousand_files_come_back_identical() {
    let (dir, out) = (temp(), temp());
    for n in 0..10_000 {
        let sub = dir.path().join(format!("d{}", n % 100));
        fs::create_dir_all(&sub).unwrap();
        fs::write(
            sub.join(format!("f{n}")),
            format!("content {n}\n").repeat(n % 50),
        )
        .unwrap();
    }
    let start = Instant::now();
    let bytes = packed(dir.path());
    let packing = start.elapsed();
    unpack(&bytes[..], out.path(), &Options::default()).unwrap();
    let unpacking = start.elapsed() - packing;
    println!("10,000 files: packed in {packing:?}, unpacked in {unpacking:?}");
    assert!(snapshot(dir.path()) == snapshot(out.path()));
}

#[test]
fn ten_gigabytes_of_holes_cost_nothing() {
    let (dir, out) = (temp(), temp());
    let disk = fs::File::create(dir.path().join("disk.img")).unwrap();
    disk.set_len(10 << 30).unwrap();
    disk.write_all_at(b"boot", 0).unwrap();
    disk.write_all_at(b"far away", 9 << 30).unwrap();
    let bytes = packed(dir.path());
    assert!(bytes.len() < 100_000, "{} bytes", bytes.len());
    unpack(&bytes[..], out.path(), &Options::default()).unwrap();
    let copy = fs::File::open(out.path().join("disk.img")).unwrap();
    assert_eq!(copy.metadata().unwrap().len(), 10 << 30);
    assert!(copy.metadata().unwrap().blocks() * 512 < 1 << 20);
    let mut word = [0; 8];
    copy.read_exact_at(&mut word, 9 << 30).unwrap();
    assert_eq!(&word, b"far away");
}
