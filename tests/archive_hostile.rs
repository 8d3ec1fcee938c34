//! Archives a hostile guest may send: every hazard by name.

use std::fs;
use std::os::unix::fs::MetadataExt;

use bulkhead::error::Explain;
use bulkhead::guest::archive::Limits;
use raw::{archive, attack, dir, entry, file, link};
use tar::{EntryType, Header};

#[path = "support/raw.rs"]
#[allow(dead_code)]
mod raw;
#[path = "support/tree.rs"]
#[allow(dead_code)]
mod tree;

fn code(entries: &[Vec<u8>]) -> &'static str {
    let (_dir, result) = attack(&archive(entries), Limits::default());
    result.map_or_else(|error| error.code(), |_| "ok")
}

#[test]
fn absolute_and_climbing_names_are_refused() {
    for name in [
        "/etc/bh-canary",
        "../canary/x",
        "a/../../canary/x",
        "..",
        "a/..",
    ] {
        assert_eq!(code(&[file(name, b"x")]), "archive-hostile", "{name}");
    }
}

#[test]
fn writing_through_a_symlink_is_refused() {
    let door = link(EntryType::Symlink, "door", "room");
    assert_eq!(
        code(&[dir("room"), door.clone(), file("door/x", b"x")]),
        "archive-hostile"
    );
    assert_eq!(code(&[door.clone(), file("door", b"x")]), "archive-hostile");
    assert_eq!(code(&[door, dir("door")]), "archive-hostile");
}

#[test]
fn symlinks_that_leave_are_skipped() {
    let (dir, result) = attack(
        &archive(&[
            link(EntryType::Symlink, "abs", "/etc/passwd"),
            link(EntryType::Symlink, "up", "../canary"),
            link(EntryType::Symlink, "a/top", ".."),
            link(EntryType::Symlink, "a/trick", "top/../../canary"),
            link(EntryType::Symlink, "fine", "a/none"),
            // The skipped name is free: this becomes a directory of its own.
            file("up/x", b"x"),
        ]),
        Limits::default(),
    );
    let unpacked = result.unwrap();
    let skipped: Vec<_> = unpacked
        .warnings
        .list
        .iter()
        .map(|warning| &*warning.path)
        .collect();
    assert_eq!(skipped, ["abs", "up", "a/trick"]);
    assert!(
        fs::symlink_metadata(dir.path().join("target/fine"))
            .unwrap()
            .is_symlink()
    );
    assert!(dir.path().join("target/up/x").is_file());
}

#[test]
fn hard_links_reach_only_files_of_the_archive() {
    for target in [
        "/etc/passwd",
        "../canary/deep/file",
        "missing",
        "dir",
        "sym",
        "sym/x",
    ] {
        let sym = link(EntryType::Symlink, "sym", "dir");
        let hard = link(EntryType::Link, "hard", target);
        assert_eq!(
            code(&[dir("dir"), sym, hard]),
            "archive-hostile",
            "{target}"
        );
    }
    assert_eq!(
        code(&[file("f", b"x"), link(EntryType::Link, "hard", "f")]),
        "ok"
    );
}

#[test]
fn hard_links_count_as_copies() {
    let limits = Limits {
        bytes: 10_000,
        ..Limits::default()
    };
    let mut entries = vec![file("f", &[1; 4000])];
    entries.extend((0..3).map(|n| link(EntryType::Link, &format!("l{n}"), "f")));
    let (_dir, result) = attack(&archive(&entries), limits);
    assert_eq!(result.unwrap_err().code(), "archive-too-large");
}

#[test]
fn devices_and_special_bits_do_not_come_in() {
    let (dir, result) = attack(
        &archive(&[
            entry(EntryType::Char, b"null", b"", 0o666, b""),
            entry(EntryType::Block, b"disk", b"", 0o666, b""),
            entry(EntryType::Fifo, b"fifo", b"", 0o666, b""),
            entry(EntryType::Regular, b"suid", b"", 0o6755, b"x"),
            entry(EntryType::Directory, b"sticky", b"", 0o1777, b""),
        ]),
        Limits::default(),
    );
    assert_eq!(result.unwrap().warnings.list.len(), 5);
    let target = dir.path().join("target");
    assert_eq!(fs::read_dir(&target).unwrap().count(), 2);
    assert_eq!(
        fs::metadata(target.join("suid")).unwrap().mode() & 0o7000,
        0
    );
    assert_eq!(
        fs::metadata(target.join("sticky")).unwrap().mode() & 0o7002,
        0,
        "umask"
    );
}

#[test]
fn names_that_come_twice_are_refused() {
    assert_eq!(code(&[file("a", b"1"), file("a", b"2")]), "archive-hostile");
    assert_eq!(
        code(&[file("a", b"1"), file("./a", b"2")]),
        "archive-hostile"
    );
    assert_eq!(
        code(&[file("a", b"1"), file("a/b", b"2")]),
        "archive-hostile"
    );
    assert_eq!(
        code(&[file("a/b", b"1"), file("a", b"2")]),
        "archive-hostile"
    );
    assert_eq!(code(&[dir("d/"), dir("d")]), "ok");
}

#[test]
fn limits_hold() {
    let small = Limits {
        bytes: 5000,
        entries: 3,
        name_bytes: 100,
        path_len: 50,
        depth: 4,
        file_size: 3000,
    };
    let refused = |entries: &[Vec<u8>]| attack(&archive(entries), small).1.unwrap_err().code();
    let too_large = "archive-too-large";
    assert_eq!(
        refused(&[file("a", &[0; 2900]), file("b", &[0; 2900])]),
        too_large
    );
    assert_eq!(refused(&[file("a", &[0; 3100])]), too_large);
    assert_eq!(
        refused(&["a", "b", "c", "d"].map(|name| file(name, b""))),
        too_large
    );
    assert_eq!(refused(&[file(&"x".repeat(60), b"")]), too_large);
    assert_eq!(refused(&[file("a/b/c/d/e", b"")]), too_large);
    let long = entry(EntryType::GNULongName, b"L", b"", 0, &[b'x'; 3000]);
    assert_eq!(refused(&[long.clone(), file("a", b"")]), too_large);
    let endless: Vec<_> = (0..20)
        .map(|_| entry(EntryType::GNULongName, b"L", b"", 0, b"x"))
        .collect();
    assert_eq!(refused(&endless), too_large);
}

#[test]
fn directories_nobody_sent_count() {
    let limits = Limits {
        entries: 10,
        ..Limits::default()
    };
    let (dir, result) = attack(
        &archive(&[file(&"d/".repeat(40), b""), file("x/y", b"")]),
        limits,
    );
    assert_eq!(result.unwrap_err().code(), "archive-too-large");
    let made = tree::snapshot(&dir.path().join("target")).len();
    assert!(made <= 10, "{made} directories made");
    let names = ["a/b/c/1", "a/b/c/2", "a/b/c/3"].map(|name| file(name, b""));
    let limits = Limits {
        entries: 6,
        ..Limits::default()
    };
    attack(&archive(&names), limits).1.unwrap();
}

#[test]
fn names_and_targets_have_a_budget() {
    let limits = Limits {
        name_bytes: 60,
        ..Limits::default()
    };
    let refused =
        |entries: &[Vec<u8>]| attack(&archive(entries), limits).1.unwrap_err().to_string();
    let name = "n".repeat(31);
    assert!(
        refused(&[file(&name, b""), file(&name.to_uppercase(), b"")]).contains("bytes of names")
    );
    let links = ["a", "b"].map(|link_name| link(EntryType::Symlink, link_name, &name));
    assert!(refused(&links).contains("bytes of names"));
    assert!(
        refused(&[file("aaaaaa/bbbbbb/cccccc/dddddd/eeeeee/f", b"")]).contains("bytes of names")
    );
}

#[test]
fn a_cut_archive_is_an_error() {
    let whole = archive(&[file("a", &[1; 700]), file("b", &[2; 700])]);
    for len in [0, 100, 512, 800, 1536, 2000, 3072] {
        let (_dir, result) = attack(&whole[..len], Limits::default());
        assert_eq!(result.unwrap_err().code(), "archive-truncated", "{len}");
    }
    let mut more = whole;
    more.extend_from_slice(&file("c", b"x"));
    let (_dir, result) = attack(&more, Limits::default());
    assert_eq!(result.unwrap_err().code(), "archive-hostile");
}

#[test]
fn headers_that_lie_are_refused() {
    let mut wrong = file("a", b"x");
    wrong[0] = b'b';
    assert_eq!(code(&[wrong]), "archive-hostile", "checksum");
    for records in [
        "15 path=/etc/x\n",
        "18 path=../canary\n",
        "99 path=x\n",
        "abc",
        "11 size=-1\n",
        "4 a\n",
        "0 a=b\n",
        "22 GNU.sparse.major=1\n",
    ] {
        let pax = entry(EntryType::XHeader, b"pax", b"", 0o644, records.as_bytes());
        assert_eq!(
            code(&[pax, file("a", b"x")]),
            "archive-hostile",
            "{records}"
        );
    }
    let pax = entry(EntryType::XHeader, b"pax", b"", 0o644, b"10 path=b\n");
    assert_eq!(code(&[pax, file("a", b"x")]), "ok");
}

/// A sparse entry with a map of its own making.
fn sparse(map: &[(u64, u64)], size: u64, data: &[u8]) -> Vec<u8> {
    let mut bytes = entry(EntryType::GNUSparse, b"s", b"", 0o644, data);
    let mut header = Header::from_byte_slice(&bytes[..512]).clone();
    let gnu = header.as_gnu_mut().unwrap();
    let octal = |field: &mut [u8; 12], value: u64| {
        field[..11].copy_from_slice(format!("{value:011o}").as_bytes());
    };
    for (slot, (offset, len)) in gnu.sparse.iter_mut().zip(map) {
        octal(&mut slot.offset, *offset);
        octal(&mut slot.numbytes, *len);
    }
    octal(&mut gnu.realsize, size);
    header.set_cksum();
    bytes[..512].copy_from_slice(header.as_bytes());
    bytes
}

#[test]
fn sparse_maps_that_lie_are_refused() {
    assert_eq!(
        code(&[sparse(&[(512, 512), (8192, 0)], 8192, &[1; 512])]),
        "ok"
    );
    assert_eq!(code(&[sparse(&[(0, 512)], 1 << 32, &[1; 512])]), "ok");
    for (map, why) in [
        (&[(512, 1024)][..], "more than stored"),
        (&[(512, 256)], "less than stored"),
        (&[(0, 256), (128, 256)], "overlapping"),
        (&[(4096, 256), (0, 256)], "backwards"),
        (&[(8000, 512)], "past the end"),
    ] {
        assert_eq!(
            code(&[sparse(map, 8192, &[1; 512])]),
            "archive-hostile",
            "{why}"
        );
    }
    let limits = Limits {
        file_size: 1 << 20,
        ..Limits::default()
    };
    let (_dir, result) = attack(&archive(&[sparse(&[(0, 512)], 1 << 32, &[1; 512])]), limits);
    assert_eq!(result.unwrap_err().code(), "archive-too-large");
}

#[test]
fn messages_carry_no_control_characters() {
    let (_dir, result) = attack(&archive(&[file("../\x1b[2J\n", b"x")]), Limits::default());
    let text = result.unwrap_err().to_string();
    assert!(!text.contains(char::is_control), "{text:?}");
    let (dir, result) = attack(&archive(&[file("\x1b[2J\n", b"x")]), Limits::default());
    result.unwrap();
    assert!(dir.path().join("target/\x1b[2J\n").is_file());
}
