use std::collections::BTreeMap;

use tar::Archive;

use super::*;

/// Builds a tar archive of (type, name, content or target).
fn tar(entries: &[(char, &str, &str)]) -> Vec<u8> {
    let mut writer = TarWriter::new(Vec::new());
    for (kind, name, data) in entries {
        let data = data.as_bytes();
        let body = match kind {
            'd' => Body::Dir,
            'l' => Body::Symlink(data),
            'h' => Body::Hardlink(data),
            'f' => Body::File(data.len() as u64, &mut &data[..]),
            _ => unreachable!(),
        };
        writer
            .entry(name.as_bytes(), Meta::root(0o755), None, body)
            .unwrap();
    }
    writer.finish().unwrap()
}

type Listing = BTreeMap<String, String>;

/// Merges layers, lowermost first, and lists what comes out.
fn merge(layers: &[Vec<u8>]) -> Result<Listing> {
    let mut out = Vec::new();
    let mut merge = Merge::new(&mut out, "test".into(), Limits::default(), false);
    for layer in layers.iter().rev() {
        let promotions = merge.promotions(&layer[..])?;
        merge.layer(&layer[..], &promotions)?;
    }
    merge.finish()?;
    let mut listing = Listing::new();
    for entry in Archive::new(&out[..]).entries().unwrap() {
        let mut entry = entry.unwrap();
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let value = match entry.link_name_bytes() {
            Some(target) => format!("-> {}", String::from_utf8_lossy(&target)),
            None => {
                let mut text = String::new();
                entry.read_to_string(&mut text).unwrap();
                text
            }
        };
        let before = listing.insert(name.clone(), value);
        assert_eq!(before, None, "{name} was written twice");
    }
    Ok(listing)
}

fn refused(entries: &[(char, &str, &str)]) -> String {
    merge(&[tar(entries)]).unwrap_err().to_string()
}

#[test]
fn names_cannot_leave_the_root() {
    assert!(refused(&[('f', "a/../../etc/passwd", "x")]).contains("leaves the root"));
    assert!(refused(&[('h', "a", "../../etc/passwd")]).contains("leaves the root"));
    let listing = merge(&[tar(&[('f', "/./srv//x", "1")])]).unwrap();
    assert_eq!(listing["srv/x"], "1");
}

#[test]
fn repeated_files_and_files_below_links_are_refused() {
    assert!(refused(&[('f', "a", "1"), ('f', "./a", "2")]).contains("twice"));
    assert!(refused(&[('l', "a", "/etc"), ('f', "a/passwd", "x")]).contains("no directory"));
    assert!(refused(&[('h', "b", "a"), ('f', "a", "x")]).contains("no file before it"));
    assert!(refused(&[('h', "b", "etc/passwd")]).contains("no file before it"));
}

#[test]
fn devices_and_machine_state_are_left_out() {
    let mut bytes = Vec::new();
    let mut builder = tar::Builder::new(&mut bytes);
    for (kind, name) in [
        (EntryType::Block, "disk"),
        (EntryType::Char, "dev/mem"),
        (EntryType::Fifo, "pipe"),
    ] {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(0);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        builder
            .append_data(&mut header, name, std::io::empty())
            .unwrap();
    }
    builder.finish().unwrap();
    drop(builder);
    let listing = merge(&[bytes, tar(&[('f', "etc/machine-id", "abc")])]).unwrap();
    assert!(!listing.contains_key("disk") && !listing.contains_key("pipe"));
    assert!(!listing.contains_key("dev/mem"));
    assert_eq!(listing["etc/machine-id"], "");
}

#[test]
fn the_guest_finds_its_user_and_directories() {
    let listing = merge(&[tar(&[('f', "etc/passwd", "root:x:0:0::/root:/bin/sh\n")])]).unwrap();
    assert!(listing["etc/passwd"].contains("agent:x:1000:1000"));
    assert!(listing["etc/group"].contains("agent:x:1000:"));
    for dir in ["workspace/input", "workspace/work", "home/agent", "proc"] {
        assert!(listing.contains_key(dir), "{dir} is missing");
    }
}

#[test]
fn upper_layers_win() {
    let listing = merge(&[
        tar(&[
            ('f', "a", "old"),
            ('d', "d", ""),
            ('f', "d/x", "old"),
            ('l', "s", "a"),
        ]),
        tar(&[
            ('f', "a", "new"),
            ('f', "d", "now a file"),
            ('f', "s/y", "now a directory"),
        ]),
    ])
    .unwrap();
    assert_eq!(listing["a"], "new");
    assert_eq!(listing["d"], "now a file");
    assert_eq!(listing["s/y"], "now a directory");
    assert!(!listing.contains_key("d/x") && !listing.contains_key("s"));
}

#[test]
fn whiteouts_hide_lower_layers_only() {
    let listing = merge(&[
        tar(&[
            ('f', "a", "1"),
            ('f', "d/x", "1"),
            ('f', "d/y", "1"),
            ('f', "e/z", "1"),
        ]),
        tar(&[
            ('f', ".wh.a", ""),
            ('f', "d/new", "2"),
            ('f', "d/.wh..wh..opq", ""),
            ('f', ".wh.e", ""),
        ]),
        tar(&[('f', "e/z", "3")]),
    ])
    .unwrap();
    assert!(!listing.contains_key("a") && !listing.contains_key("d/x"));
    assert_eq!(listing["d/new"], "2");
    assert_eq!(listing["e/z"], "3");
    assert!(!listing.keys().any(|name| name.contains(".wh.")));
}

#[test]
fn a_hard_link_keeps_a_hidden_file() {
    let listing = merge(&[
        tar(&[('f', "a", "kept"), ('h', "b", "a"), ('h', "c", "a")]),
        tar(&[('f', "a", "new")]),
    ])
    .unwrap();
    assert_eq!(listing["a"], "new");
    assert_eq!(listing["b"], "kept");
    assert_eq!(listing["c"], "-> b");
}

#[test]
fn limits_hold() {
    let bytes = tar(&[('f', "a", "12345"), ('f', "b", "12345")]);
    for (limits, reason) in [
        (
            Limits {
                entries: 1,
                ..Limits::default()
            },
            "too many entries",
        ),
        (
            Limits {
                bytes: 9,
                ..Limits::default()
            },
            "too large",
        ),
    ] {
        let mut merge = Merge::new(Vec::new(), "test".into(), limits, false);
        let error = merge.layer(&bytes[..], &HashMap::new()).unwrap_err();
        assert!(error.to_string().contains(reason), "{error}");
    }
}

/// One raw entry with data.
fn raw(kind: EntryType, data: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(data.len() as u64);
    header.set_cksum();
    let mut bytes = [header.as_bytes(), data].concat();
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

#[test]
fn large_headers_are_not_taken_into_memory() {
    let rest = tar(&[('f', "a", &"x".repeat(3 << 20)), ('f', "b", "y")]);
    for kind in [
        EntryType::GNULongName,
        EntryType::GNULongLink,
        EntryType::XHeader,
    ] {
        let long = [raw(kind, &vec![b'n'; 2 << 20]), rest.clone()].concat();
        let error = merge(&[long]).unwrap_err().to_string();
        assert!(error.contains("larger than 1 MiB"), "{error}");
    }
    let global = |len| {
        [
            raw(EntryType::XGlobalHeader, &vec![b'n'; len]),
            rest.clone(),
        ]
        .concat()
    };
    let error = merge(&[global(2 << 20)]).unwrap_err().to_string();
    assert!(error.contains("larger than 1 MiB"), "{error}");
    // Files may be larger.
    assert_eq!(merge(&[global(1000)]).unwrap()["b"], "y");
}

#[test]
fn sparse_files_count_with_their_holes() {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(EntryType::GNUSparse);
    header.as_old_mut().name[..5].copy_from_slice(b"dev/a");
    header.set_size(0);
    let gnu = header.as_gnu_mut().unwrap();
    gnu.realsize.copy_from_slice(b"77777777777\0");
    gnu.sparse[0].offset.copy_from_slice(b"77777777777\0");
    gnu.sparse[0].numbytes.copy_from_slice(b"00000000000\0");
    header.set_cksum();
    let bytes = header.as_bytes().repeat(9);
    let error = merge(&[bytes]).unwrap_err().to_string();
    assert!(error.contains("too large"), "{error}");
}

#[test]
fn names_have_a_depth_and_their_directories_count() {
    let error = refused(&[('f', &"d/".repeat(257), "x")]);
    assert!(error.contains("256 components"), "{error}");
    let limits = Limits {
        entries: 9,
        ..Limits::default()
    };
    let bytes = tar(&[('f', "1/2/3/4/5/6/7/8/9/x", "")]);
    let mut merge = Merge::new(Vec::new(), "test".into(), limits, false);
    let error = merge.layer(&bytes[..], &HashMap::new()).unwrap_err();
    assert!(error.to_string().contains("too many entries"), "{error}");
}

#[test]
fn databases_have_a_budget_together() {
    let bytes = tar(&[('f', "etc/passwd", "12345"), ('f', "etc/group", "12345")]);
    let limits = Limits {
        kept: 9,
        ..Limits::default()
    };
    let mut merge = Merge::new(Vec::new(), "test".into(), limits, false);
    let error = merge.layer(&bytes[..], &HashMap::new()).unwrap_err();
    assert!(error.to_string().contains("too large together"), "{error}");
}

#[test]
fn a_truncated_archive_is_refused() {
    let bytes = tar(&[('f', "a", &"x".repeat(2000))]);
    assert!(merge(&[bytes[..1024].to_vec()]).is_err());
}
