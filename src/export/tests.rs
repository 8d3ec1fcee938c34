//! Exports are made, damaged and forged; nothing but whole ones is taken in.

use std::fs;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;

use tempfile::TempDir;

use super::fuzz::{seal, seal_frame};
use super::header::Header;
use super::*;
use crate::error::{Explain as _, Report};
use crate::snapshot::{self, SnapshotName, Wish};
use crate::spec::{Catalog, Request};
use crate::template::{self, Described, Piece};

/// Size of the disk of every snapshot here.
const DISK: u64 = 8 << 20;

struct Made {
    dir: TempDir,
    store: snapshot::Store,
    name: SnapshotName,
}

/// A store with one snapshot: of a disk with data at both ends, and a hole.
fn made() -> Made {
    let dir = tempfile::tempdir().unwrap();
    let store = snapshot::Store::new(dir.path(), &"vm".parse().unwrap());
    let staged = store.stage().unwrap();
    let disk = fs::File::create(staged.path().join(snapshot::DISK)).unwrap();
    disk.write_all_at(b"first", 0).unwrap();
    disk.write_all_at(b"last", DISK - 4).unwrap();
    let name: SnapshotName = "one".parse().unwrap();
    let wish = Wish {
        name: name.clone(),
        description: Some("why".into()),
        tags: [("k".into(), "v".into())].into(),
        disk_only: true,
        transient: true,
    };
    let piece = snapshot::Store::piece(staged.path(), snapshot::DISK).unwrap();
    let parent = Some("zero".parse().unwrap());
    let manifest = snapshot::Manifest::new(&wish, parent, "image".into(), None, piece, 1);
    store.commit(staged, &manifest).unwrap();
    Made { dir, store, name }
}

fn machine() -> Machine {
    let spec = Request::default().resolve_machine(&Catalog::default());
    Machine::of(&spec.unwrap(), "base")
}

fn exported(made: &Made) -> Vec<u8> {
    let mut out = Vec::new();
    let of = Path::new("x");
    let bytes = snapshot(&made.store, &made.name, machine(), 7, &mut out, of).unwrap();
    assert_eq!(bytes, out.len() as u64);
    out
}

/// Takes a snapshot in where there is none; gives the code of what is wrong.
/// Nothing may be left then.
fn taken(bytes: &[u8]) -> Result<(TempDir, snapshot::Manifest), (&'static str, String)> {
    let dir = tempfile::tempdir().unwrap();
    let store = snapshot::Store::new(dir.path(), &"other".parse().unwrap());
    let kept = Import::open(bytes, "x").and_then(|import| import.keep_snapshot(&store, false));
    match kept {
        Ok(manifest) => {
            store.get(&manifest.name).unwrap();
            Ok((dir, manifest))
        }
        Err(error) => {
            let entries = fs::read_dir(dir.path().join("snapshots"));
            let names = entries.into_iter().flatten().flatten();
            let left: Vec<_> = names.map(|entry| entry.file_name()).collect();
            assert!(left.is_empty() || left == [".lock"], "{left:?}");
            Err((error.code(), Report::of(&error).what))
        }
    }
}

fn code(bytes: &[u8]) -> &'static str {
    taken(bytes).map(|_| ()).unwrap_err().0
}

#[test]
fn a_snapshot_comes_back_as_it_was_and_as_small() {
    let made = made();
    let bytes = exported(&made);
    assert!(bytes.len() < 2000, "{} bytes", bytes.len());
    let (dir, manifest) = taken(&bytes).unwrap();
    assert_eq!((manifest.parent, manifest.image.as_str()), (None, "image"));
    assert!(!manifest.transient, "gc would remove it");
    assert_eq!(manifest.tags["k"], "v");
    let file = |dir: &TempDir| dir.path().join("snapshots/one").join(snapshot::DISK);
    assert_eq!(
        fs::read(file(&dir)).unwrap(),
        fs::read(file(&made.dir)).unwrap()
    );
    let meta = fs::metadata(file(&dir)).unwrap();
    assert!(meta.blocks() * 512 < 64 << 10, "{} blocks", meta.blocks());
    assert_eq!(meta.mode() & 0o777, 0o400);
}

#[test]
fn every_flipped_bit_and_every_other_end_is_refused() {
    let whole = exported(&made());
    for at in 0..whole.len() {
        let mut bad = whole.clone();
        bad[at] ^= 1 << (at % 8);
        let code = code(&bad);
        assert!(code.starts_with("export-"), "byte {at}: {code}");
        assert!(
            Import::open(&whole[..at], "x").is_err()
                || self::code(&whole[..at]) == "export-truncated"
        );
    }
    assert_eq!(code(&[&whole[..], b"x"].concat()), "export-trailing");
    let middle = whole.len() / 2;
    let mut bad = whole.clone();
    bad[middle] ^= 0x80;
    assert_eq!(code(&bad), "export-corrupt");
    assert_eq!(code(&whole[..middle]), "export-truncated");
    assert_eq!(code(b"#!/bin/sh\necho no export\n"), "export-unknown");
    let mut newer = whole;
    newer[8] = 9;
    assert_eq!(code(&newer), "export-format");
}

/// What is in an export of a snapshot whose manifest and runs are given.
fn forged(change: impl FnOnce(&mut Header), runs: &[(u64, u32, &[u8])]) -> Vec<u8> {
    let bytes = exported(&made());
    let mut header = Import::open(&bytes[..], "x").unwrap().header().clone();
    change(&mut header);
    let mut content = super::pack::encoded(&header).unwrap();
    for (at, len, bytes) in runs {
        content.extend(at.to_le_bytes());
        content.extend(len.to_le_bytes());
        content.extend(*bytes);
    }
    content
}

/// What is in an export, decompressed.
fn inside(export: &[u8]) -> Vec<u8> {
    let mut chain = super::seal::Sealed::new(export).unwrap();
    let mut frame = Vec::new();
    std::io::Read::read_to_end(&mut chain, &mut frame).unwrap();
    zstd::decode_all(&frame[..]).unwrap()
}

const END: (u64, u32, &[u8]) = (DISK, 0, b"");
const BLOCK: &[u8] = &[b'x'; 4096];

#[test]
fn forged_runs_are_refused_by_name() {
    let none = |_: &mut Header| {};
    let corrupt: [&[(u64, u32, &[u8])]; 8] = [
        // Not what the digest says.
        &[(0, 4096, BLOCK), END],
        // Beyond the end, or far beyond.
        &[(DISK, 4096, BLOCK), END],
        &[(u64::MAX - 4095, 4096, BLOCK), END],
        // Backwards, and twice.
        &[(8192, 4096, BLOCK), (4096, 4096, BLOCK), END],
        &[(0, 4096, BLOCK), (0, 4096, BLOCK), END],
        // No whole blocks.
        &[(1, 4096, BLOCK), END],
        &[(0, 5, b"first"), END],
        // Another end.
        &[(4096, 0, b"")],
    ];
    // Zeroes fill a disk as anything does, and no digest says that they are there.
    let zeroes = forged(none, &[(0, 4096, &[0; 4096]), END]);
    let (code_of, told) = taken(&seal(&zeroes)).map(|_| ()).unwrap_err();
    assert_eq!(code_of, "export-corrupt");
    assert!(told.contains("a block of zeroes"), "{told}");
    for runs in corrupt {
        assert_eq!(
            code(&seal(&forged(none, runs))),
            "export-corrupt",
            "{runs:?}"
        );
    }
    // Too long for one.
    let long = [(0, 1 << 30, BLOCK)];
    assert_eq!(code(&seal(&forged(none, &long))), "export-corrupt");
    // Not all of it, and more than all of it.
    assert_eq!(
        code(&seal(&forged(none, &[(0, 4096, BLOCK)]))),
        "export-corrupt"
    );
    let whole = inside(&exported(&made()));
    assert!(taken(&seal(&whole)).is_ok());
    assert_eq!(code(&seal(&[&whole[..], b"x"].concat())), "export-corrupt");
    let frame = zstd::encode_all(&whole[..], 1).unwrap();
    assert_eq!(
        code(&seal_frame(&[&frame[..], &frame].concat())),
        "export-corrupt"
    );
    assert_eq!(
        code(&seal_frame(&frame[..frame.len() - 1])),
        "export-corrupt"
    );
    assert_eq!(code(&seal_frame(b"no frame at all")), "export-corrupt");
}

#[test]
fn what_claims_too_much_is_refused_before_it_is_made() {
    let piece = |size| {
        move |header: &mut Header| {
            let Content::Snapshot { manifest, .. } = &mut header.content else {
                panic!("it is a snapshot");
            };
            manifest.disk = Piece {
                size,
                sha256: String::new(),
            };
        }
    };
    let huge = forged(piece(u64::MAX), &[END]);
    assert_eq!(code(&seal(&huge)), "export-too-large");
    let more = forged(|header| header.data = u64::MAX, &[END]);
    assert_eq!(code(&seal(&more)), "export-too-large");
    // More than it says itself.
    let less = forged(|header| header.data = 4096, &[(0, 8192, &[1; 8192]), END]);
    assert_eq!(code(&seal(&less)), "export-too-large");
    // A header of 4 GiB.
    assert_eq!(code(&seal(&[0xff; 64])), "export-too-large");
    // A manifest that nobody would read again.
    let long = forged(
        |header| {
            let Content::Snapshot { manifest, .. } = &mut header.content else {
                panic!("it is a snapshot");
            };
            manifest.description = Some("x".repeat(1 << 20));
        },
        &[END],
    );
    assert_eq!(code(&seal(&long)), "export-too-large");
    // More than the host has room for.
    let full = forged(
        |header| {
            piece(16 << 40)(header);
            header.data = 16 << 40;
        },
        &[END],
    );
    assert_eq!(code(&seal(&full)), "no-space");
    // A window of so many MiB.
    let whole = inside(&exported(&made()));
    let window = |log| {
        let mut zstd = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
        zstd.window_log(log).unwrap();
        std::io::Write::write_all(&mut zstd, &whole).unwrap();
        seal_frame(&zstd.finish().unwrap())
    };
    assert!(taken(&window(23)).is_ok());
    let (code, told) = taken(&window(24)).map(|_| ()).unwrap_err();
    assert_eq!(code, "export-corrupt");
    assert!(told.contains("memory"), "{told}");
}

#[test]
fn a_header_is_known_or_refused() {
    let text = |text: &str| {
        let len = u32::try_from(text.len()).unwrap();
        seal(&[&len.to_le_bytes()[..], text.as_bytes()].concat())
    };
    assert_eq!(code(&text("{}")), "export-corrupt");
    assert_eq!(code(&text("")), "export-corrupt");
    assert_eq!(code(&seal(b"\x10\0\0\0{")), "export-corrupt");
    let newer = forged(|header| header.schema = 2, &[END]);
    assert_eq!(code(&seal(&newer)), "export-corrupt");
    let unknown = forged(|_| {}, &[END]);
    let unknown = String::from_utf8_lossy(&unknown).replace("\"schema\":1,", "\"Schema\":1,");
    assert_eq!(code(&seal(unknown.as_bytes())), "export-corrupt");
}

fn described() -> Described {
    Described {
        key: serde_json::from_str(r#"{"image": "a", "memory": "64M", "disk": "4"}"#).unwrap(),
        life: bulkhead_agent::Life::default(),
        created_ms: 1,
        image: "base".into(),
        profile: crate::spec::ProfileName::default(),
        warm: Some("true".into()),
        behind: false,
        qemu: serde_json::from_str(r#"{"major":7,"minor":2,"micro":0,"package":""}"#).unwrap(),
        kernel: Some("/boot/vmlinux".into()),
    }
}

#[test]
fn a_template_comes_back_once() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let store = template::Store::new(here.path());
    let staged = store.stage().unwrap();
    let ram = fs::File::create(staged.path().join(template::RAM)).unwrap();
    ram.set_len(64 << 20).unwrap();
    ram.write_all_at(&[7; 100_000], 1 << 20).unwrap();
    for name in [template::STATE, template::DISK] {
        fs::write(staged.path().join(name), name).unwrap();
    }
    let kept = store.commit(staged, described()).unwrap();
    // A path stays behind.
    let manifest = template::Manifest {
        kernel: None,
        ..kept.manifest.clone()
    };
    let mut bytes = Vec::new();
    template(kept, 7, &mut bytes, Path::new("x")).unwrap();
    assert_eq!(code(&bytes), "export-kind");
    let other = template::Store::new(there.path());
    let import = || Import::open(&bytes[..], "x").unwrap().keep_template(&other);
    let taken = import().unwrap();
    assert_eq!(taken.manifest, manifest);
    assert!(other.find(&manifest.key).unwrap().is_some());
    assert_eq!(import().unwrap_err().code(), "template-exists");
    let blocks = fs::metadata(other.ram(&taken.id)).unwrap().blocks();
    assert!(blocks * 512 < 1 << 20, "{blocks} blocks");
    // A damaged one is replaced.
    fs::remove_file(other.ram(&taken.id)).unwrap();
    import().unwrap();
    assert!(other.get(&taken.id).is_ok());
}

#[test]
fn a_template_that_appears_meanwhile_stays() {
    let dir = tempfile::tempdir().unwrap();
    let store = template::Store::new(dir.path());
    let stage = || {
        let staged = store.stage().unwrap();
        let ram = fs::File::create(staged.path().join(template::RAM)).unwrap();
        ram.set_len(64 << 20).unwrap();
        // More than one link of the chain, whatever compresses it.
        let mut state = 1_u64;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .take(3 << 20)
        .collect();
        ram.write_all_at(&noise, 0).unwrap();
        for name in [template::STATE, template::DISK] {
            fs::write(staged.path().join(name), name).unwrap();
        }
        staged
    };
    let kept = store.commit(stage(), described()).unwrap();
    let mut bytes = Vec::new();
    let id = kept.id.clone();
    template(kept, 7, &mut bytes, Path::new("x")).unwrap();
    store.rm(&id).unwrap();
    // It is built while the last of the export is on its way.
    struct Late<'a>(&'a [u8], Option<Box<dyn FnOnce() + 'a>>);
    impl std::io::Read for Late<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            if self.0.len() < 40
                && let Some(meanwhile) = self.1.take()
            {
                meanwhile();
            }
            let most = buffer.len().min(32);
            self.0.read(&mut buffer[..most])
        }
    }
    let mut built = described();
    built.created_ms = 99;
    let meanwhile = || drop(store.commit(stage(), built).unwrap());
    let late = Late(&bytes, Some(Box::new(meanwhile)));
    let import = Import::open(late, "x").unwrap();
    assert!(store.is_empty(), "it is too early");
    let told = import.keep_template(&store).unwrap_err();
    assert_eq!(told.code(), "template-exists");
    assert_eq!(store.get(&id).unwrap().manifest.created_ms, 99);
}

#[test]
fn a_template_is_as_large_as_its_key_says() {
    for (key, part) in [
        (r#"{"memory": "64M", "disk": "1G"}"#, "disk"),
        (r#"{"memory": "32M", "disk": "4"}"#, "memory"),
        (r#"{"image": "a"}"#, "memory"),
    ] {
        let piece = |size| Piece {
            size,
            sha256: String::new(),
        };
        let of = described();
        let manifest = template::Manifest {
            schema: template::SCHEMA,
            key: serde_json::from_str(key).unwrap(),
            life: of.life,
            ram: piece(64 << 20),
            state: piece(5),
            disk: piece(4),
            created_ms: 1,
            image: of.image,
            profile: of.profile,
            warm: None,
            behind: false,
            qemu: of.qemu,
            kernel: None,
        };
        let header = Header {
            schema: 1,
            bulkhead: "0".into(),
            exported_ms: 1,
            data: 0,
            content: Content::Template(Box::new(manifest)),
        };
        let text = serde_json::to_vec(&header).unwrap();
        let len = u32::try_from(text.len()).unwrap().to_le_bytes();
        let sealed = seal(&[&len[..], &text].concat());
        let Err(told) = Import::open(&sealed[..], "x") else {
            panic!("{key} was taken");
        };
        let told = Report::of(&told);
        assert_eq!(told.code, "export-corrupt");
        assert!(
            told.what.contains(&format!("its {part} is not")),
            "{told:?}"
        );
    }
}

#[test]
fn a_source_that_changes_is_not_exported() {
    let made = made();
    let path = made.dir.path().join("snapshots/one").join(snapshot::DISK);
    fs::remove_file(&path).unwrap();
    fs::write(&path, vec![1; usize::try_from(DISK).unwrap()]).unwrap();
    let told = snapshot(
        &made.store,
        &made.name,
        machine(),
        7,
        Vec::new(),
        Path::new("x"),
    );
    assert_eq!(told.unwrap_err().code(), "snapshot-corrupt");
}
