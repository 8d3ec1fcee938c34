//! The real agent as a service: files in, files out, and what changed.
#![allow(unsafe_code, missing_docs)] // handing a descriptor to a child

mod support;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::Read;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::time::Instant;

use bulkhead_agent::*;
use support::{Agent, Seen};

fn put(agent: &mut Agent, path: &Path, archive: &[u8], track: bool) -> Seen {
    let stream = agent.open(&Request::Put {
        path: path.to_str().unwrap().into(),
        user: Some("54321".into()),
        track,
    });
    agent.feed(stream, archive);
    agent.finish(stream)
}

fn get(agent: &mut Agent, path: &Path) -> Seen {
    let path = path.to_str().unwrap().into();
    let stream = agent.open(&Request::Get { path });
    agent.finish(stream)
}

fn changes(agent: &mut Agent, path: &Path) -> Seen {
    let path = path.to_str().unwrap().into();
    let stream = agent.open(&Request::Changes { path });
    agent.finish(stream)
}

fn ok(seen: &Seen) {
    assert_eq!(
        seen.reply,
        Some(Reply::Started { pid: 0 }),
        "{:?}",
        seen.exit
    );
    assert_eq!(seen.exit.as_ref().unwrap().code, Some(0), "{:?}", seen.exit);
}

fn failure(seen: &Seen) -> &Failure {
    seen.exit.as_ref().unwrap().failure.as_ref().unwrap()
}

fn pack(dir: &Path) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    builder.follow_symlinks(false);
    builder.append_dir_all("", dir).unwrap();
    builder.into_inner().unwrap()
}

/// Type, mode, size or target of each entry.
fn listing(archive: &[u8]) -> BTreeMap<Vec<u8>, (tar::EntryType, u32, Vec<u8>)> {
    let mut archive = tar::Archive::new(archive);
    let entries = archive.entries().unwrap().map(|entry| {
        let mut entry = entry.unwrap();
        let path = entry.path_bytes().into_owned();
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        if let Some(link) = entry.link_name_bytes() {
            content = link.into_owned();
        }
        let header = entry.header();
        let mode = header.mode().unwrap() & 0o7777;
        (path, (header.entry_type(), mode, content))
    });
    entries.collect()
}

fn names(archive: &[u8]) -> Vec<String> {
    let name = |path: &Vec<u8>| String::from_utf8_lossy(path).into_owned();
    listing(archive).keys().map(name).collect()
}

#[test]
fn nasty_names_go_in_and_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let (source, target) = (dir.path().join("source"), dir.path().join("a/b/target"));
    let deep = source.join("d".repeat(200)).join("e".repeat(200));
    fs::create_dir_all(&deep).unwrap();
    let odd = OsString::from_vec(b"\xff\n \"'*-\\".to_vec());
    fs::write(source.join(&odd), "odd").unwrap();
    fs::write(deep.join("-rf"), "deep").unwrap();
    fs::write(source.join("tool"), "#!/bin/sh\n").unwrap();
    fs::set_permissions(source.join("tool"), fs::Permissions::from_mode(0o4755)).unwrap();
    fs::write(source.join("open"), "").unwrap();
    fs::set_permissions(source.join("open"), fs::Permissions::from_mode(0o666)).unwrap();
    symlink("/etc/passwd", source.join("link")).unwrap();
    symlink("x".repeat(300), source.join("long link")).unwrap();
    let mut agent = Agent::start();
    ok(&put(&mut agent, &target, &pack(&source), false));
    let seen = get(&mut agent, &target);
    ok(&seen);
    let (mut came, mut went) = (listing(&seen.out), listing(&pack(&source)));
    went.remove(&b""[..]);
    went.remove(&b"./"[..]);
    let norm = |all: &mut BTreeMap<Vec<u8>, _>| {
        let old = std::mem::take(all);
        for (path, value) in old {
            let path = path.strip_suffix(b"/").unwrap_or(&path).to_vec();
            all.insert(path, value);
        }
    };
    norm(&mut came);
    norm(&mut went);
    went.retain(|path, _| !path.is_empty());
    assert_eq!(came, went);
    assert_eq!(came.len(), 8);
    let meta = fs::metadata(target.join(&odd)).unwrap();
    assert_eq!((meta.uid(), meta.gid()), (54321, 54321));
    assert_eq!(
        meta.mtime(),
        fs::metadata(source.join(&odd)).unwrap().mtime()
    );
    assert_eq!(fs::metadata(target.parent().unwrap()).unwrap().uid(), 54321);
    assert_eq!(
        fs::symlink_metadata(target.join("link")).unwrap().uid(),
        54321
    );
}

#[test]
fn ten_thousand_small_files_come_back_identical() {
    let dir = tempfile::tempdir().unwrap();
    let mut builder = tar::Builder::new(Vec::new());
    for n in 0..10_000 {
        let content = format!("content of {n}");
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(1_000_000 + n);
        let path = format!("{}/{n}", n / 100);
        builder
            .append_data(&mut header, path, content.as_bytes())
            .unwrap();
    }
    let archive = builder.into_inner().unwrap();
    let mut agent = Agent::start();
    let start = Instant::now();
    ok(&put(&mut agent, dir.path(), &archive, true));
    eprintln!("put 10,000 files: {:?}", start.elapsed());
    let start = Instant::now();
    let seen = get(&mut agent, dir.path());
    eprintln!("get 10,000 files: {:?}", start.elapsed());
    let mut came = listing(&seen.out);
    came.retain(|path, _| !path.ends_with(b"/"));
    assert_eq!(came, listing(&archive));
    let seen = changes(&mut agent, dir.path());
    ok(&seen);
    assert_eq!((names(&seen.out), &seen.err[..]), (Vec::new(), &b""[..]));
}

#[test]
fn every_kind_of_change_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let (source, target) = (dir.path().join("source"), dir.path().join("target"));
    fs::create_dir_all(source.join("gone")).unwrap();
    fs::create_dir_all(source.join("kept")).unwrap();
    for name in [
        "same",
        "edited",
        "stealth",
        "mode",
        "file-to-dir",
        "gone/a",
        "gone/b",
        "socket",
    ] {
        fs::write(source.join(name), "one").unwrap();
    }
    symlink("a", source.join("link")).unwrap();
    let mut agent = Agent::start();
    ok(&put(&mut agent, &target, &pack(&source), true));
    fs::write(target.join("edited"), "more than one").unwrap();
    let old = fs::metadata(target.join("stealth"))
        .unwrap()
        .modified()
        .unwrap();
    fs::write(target.join("stealth"), "two").unwrap();
    let file = fs::File::options()
        .write(true)
        .open(target.join("stealth"))
        .unwrap();
    file.set_modified(old).unwrap();
    fs::set_permissions(target.join("mode"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::remove_file(target.join("file-to-dir")).unwrap();
    fs::create_dir(target.join("file-to-dir")).unwrap();
    fs::remove_dir_all(target.join("gone")).unwrap();
    fs::remove_file(target.join("link")).unwrap();
    symlink("b", target.join("link")).unwrap();
    fs::create_dir(target.join("new")).unwrap();
    fs::write(target.join("new/file"), "x").unwrap();
    fs::write(target.join("kept/file"), "x").unwrap();
    symlink("/etc", target.join("new/link")).unwrap();
    fs::remove_file(target.join("socket")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(target.join("socket")).unwrap();
    let seen = changes(&mut agent, &target);
    ok(&seen);
    let expected = [
        "edited",
        "file-to-dir/",
        "kept/file",
        "link",
        "mode",
        "new/",
        "new/file",
        "new/link",
        "stealth",
    ];
    assert_eq!(names(&seen.out), expected);
    assert_eq!(
        String::from_utf8_lossy(&seen.err),
        "socket\0gone/b\0gone/a\0gone\0"
    );
}

#[test]
fn nothing_is_written_outside() {
    let dir = tempfile::tempdir().unwrap();
    let outside = dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    let entry = |name: &[u8], kind, link: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o644);
        header.set_size(0);
        let gnu = header.as_gnu_mut().unwrap();
        gnu.name[..name.len()].copy_from_slice(name);
        gnu.linkname[..link.len()].copy_from_slice(link);
        header.set_cksum();
        header.as_bytes().to_vec()
    };
    use tar::EntryType::{Link, Regular, Symlink};
    let outside_name = outside.as_os_str().as_bytes();
    let attacks = [
        entry(b"../outside/x", Regular, b""),
        [
            entry(b"l", Symlink, outside_name),
            entry(b"l/x", Regular, b""),
        ]
        .concat(),
        [
            entry(b"l", Symlink, b"../outside"),
            entry(b"l/x", Regular, b""),
        ]
        .concat(),
        entry(b"x", Link, b"../outside/x"),
        [
            entry(b"l", Symlink, outside_name),
            entry(b"y", Link, b"l/x"),
        ]
        .concat(),
    ];
    let mut agent = Agent::start();
    for (n, attack) in attacks.iter().enumerate() {
        let target = dir.path().join(n.to_string());
        let seen = put(&mut agent, &target, attack, false);
        assert!(!failure(&seen).message.is_empty());
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0, "attack {n}");
    }
    // An absolute name is taken as relative, as tar does.
    let seen = put(
        &mut agent,
        &dir.path().join("abs"),
        &entry(b"/abs", Regular, b""),
        false,
    );
    ok(&seen);
    assert!(dir.path().join("abs/abs").is_file());
}

#[test]
fn links_replace_and_do_not_lead() {
    let dir = tempfile::tempdir().unwrap();
    let (source, target) = (dir.path().join("source"), dir.path().join("target"));
    fs::create_dir_all(source.join("d")).unwrap();
    fs::write(source.join("f"), "new").unwrap();
    fs::create_dir_all(&target).unwrap();
    fs::write(dir.path().join("victim"), "old").unwrap();
    fs::create_dir(dir.path().join("victims")).unwrap();
    symlink("../victim", target.join("f")).unwrap();
    symlink("../victims", target.join("d")).unwrap();
    let mut agent = Agent::start();
    ok(&put(&mut agent, &target, &pack(&source), false));
    assert_eq!(
        fs::read_to_string(dir.path().join("victim")).unwrap(),
        "old"
    );
    assert!(fs::symlink_metadata(target.join("d")).unwrap().is_dir());
    assert_eq!(fs::read_to_string(target.join("f")).unwrap(), "new");
}

#[test]
fn sparse_files_stay_small() {
    let dir = tempfile::tempdir().unwrap();
    let (source, target) = (dir.path().join("source"), dir.path().join("target"));
    fs::create_dir(&source).unwrap();
    use std::os::unix::fs::FileExt;
    let file = fs::File::create(source.join("sparse")).unwrap();
    for n in 0..50 {
        file.write_all_at(format!("data {n}").as_bytes(), n << 20)
            .unwrap();
    }
    file.set_len(500 << 20).unwrap();
    let mut agent = Agent::start();
    let seen = get(&mut agent, &source);
    ok(&seen);
    assert!(seen.out.len() < 2 << 20, "{} bytes", seen.out.len());
    ok(&put(&mut agent, &target, &seen.out, false));
    let meta = fs::metadata(target.join("sparse")).unwrap();
    assert_eq!(meta.len(), 500 << 20);
    assert!(meta.blocks() * 512 < 8 << 20, "{} blocks", meta.blocks());
    let (a, b) = (
        fs::read(source.join("sparse")),
        fs::read(target.join("sparse")),
    );
    assert!(a.unwrap() == b.unwrap());
}

#[test]
fn single_files_and_missing_ones() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("one"), "content").unwrap();
    let mut agent = Agent::start();
    let seen = get(&mut agent, &dir.path().join("one"));
    assert_eq!(names(&seen.out), ["one"]);
    for seen in [
        get(&mut agent, &dir.path().join("none")),
        changes(&mut agent, dir.path()),
        put(&mut agent, &dir.path().join("one"), b"", false),
    ] {
        assert_eq!(seen.reply, Some(Reply::Refused(failure(&seen).clone())));
    }
    let cut = put(
        &mut agent,
        &dir.path().join("cut"),
        &pack(dir.path())[..600],
        false,
    );
    assert_eq!(failure(&cut).kind, FailureKind::Invalid);
    let path = dir.path().join("made/dir").to_str().unwrap().to_owned();
    let user = Some("54321".to_owned());
    let stream = agent.open(&Request::Mkdir { path, user });
    assert_eq!(agent.finish(stream).reply, Some(Reply::Done));
    assert_eq!(fs::metadata(dir.path().join("made")).unwrap().uid(), 54321);
}

#[test]
fn a_transfer_can_be_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = Agent::start();
    let path = dir.path().to_str().unwrap().to_owned();
    let stream = agent.open(&Request::Put {
        path,
        user: Some("0".into()),
        track: false,
    });
    agent.until(stream, |seen| seen.reply.is_some());
    agent.control(stream, &Control::Kill);
    assert!(failure(&agent.finish(stream)).message.contains("given up"));
}

#[test]
fn a_full_disk_is_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let flags = nix::mount::MsFlags::empty();
    nix::mount::mount(
        Some("t"),
        dir.path(),
        Some("tmpfs"),
        flags,
        Some("size=64k"),
    )
    .unwrap();
    let mut header = tar::Header::new_gnu();
    header.set_size(1 << 20);
    header.set_mode(0o644);
    let mut builder = tar::Builder::new(Vec::new());
    builder
        .append_data(&mut header, "big", &vec![1; 1 << 20][..])
        .unwrap();
    let mut agent = Agent::start();
    let seen = put(
        &mut agent,
        dir.path(),
        &builder.into_inner().unwrap(),
        false,
    );
    drop(agent);
    nix::mount::umount(dir.path()).unwrap();
    assert_eq!(failure(&seen).kind, FailureKind::NoSpace);
}

#[test]
fn the_machine_describes_itself() {
    let mut agent = Agent::start();
    let stream = agent.open(&Request::Info);
    let Some(Reply::Info(info)) = agent.finish(stream).reply else {
        panic!("no information");
    };
    assert!(
        info.processes
            .iter()
            .any(|process| process.pid == agent.child.id())
    );
}
