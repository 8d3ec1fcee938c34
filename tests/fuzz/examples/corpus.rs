//! Writes the seeds in corpus/ again: `cargo run --example corpus`.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use bulkhead::guest::archive::{HostDir, PackLimits, pack};
use bulkhead::image::{Agent, File, Kernel, KernelFormat, Manifest, Package};
use bulkhead_agent::{Exit, Failure, FailureKind, Header, Info, Kind, Process, Reply, VERSION};
use sha2::{Digest as _, Sha256};
use tar::{EntryType, Header as TarHeader};

fn main() {
    guest();
    qmp();
    archive();
    changes();
    image();
    layers();
    spec();
}

fn seed(target: &str, name: &str, parts: &[&[u8]]) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(target);
    fs::create_dir_all(&dir).expect("the corpus can be made");
    fs::write(dir.join(name), parts.concat()).expect("a seed can be written");
}

/// One step of the script in fuzz_targets/guest.rs.
fn step(kind: Kind, stream: u8, payload: &[u8]) -> Vec<u8> {
    let len = u8::try_from(payload.len()).expect("payloads of a script are short");
    [&[(kind as u8) << 4 | stream, len], payload].concat()
}

/// What the host does with a stream: 0 reads, 1 waits for the reply, 2 sends,
/// 3 controls, 4 drops it.
fn host(stream: u8, what: u8) -> Vec<u8> {
    vec![0xe0 | stream, what]
}

/// A whole frame, for the raw beginning of a connection.
fn frame(stream: u32, kind: Kind, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).expect("frames are short");
    [&Header { len, stream, kind }.encode()[..], payload].concat()
}

fn guest() {
    let started = serde_json::to_vec(&Reply::Started { pid: 7 }).expect("it can be encoded");
    let exit = Exit {
        code: Some(3),
        ..Exit::default()
    };
    let exit = serde_json::to_vec(&exit).expect("it can be encoded");
    let run = [
        step(Kind::Reply, 1, &started),
        host(1, 1),
        step(Kind::Out, 1, b"hello\n"),
        step(Kind::Err, 1, b"oh\n"),
        host(1, 0),
        host(1, 2),
        step(Kind::Credit, 1, &100_u32.to_le_bytes()),
        step(Kind::Exit, 1, &exit),
        host(1, 0),
    ];
    seed("guest", "run", &[&[1], &run.concat()]);
    let refused = Reply::Refused(Failure {
        kind: FailureKind::NotFound,
        message: "cannot find x".into(),
    });
    let refused = serde_json::to_vec(&refused).expect("it can be encoded");
    let refusal = [
        step(Kind::Reply, 2, &refused),
        host(2, 1),
        vec![0xc2, 0],
        host(2, 0),
    ];
    seed("guest", "refusal", &[&[1], &refusal.concat()]);
    let info = Reply::Info(Info {
        os: "Debian".into(),
        processes: vec![Process::default()],
        ..Info::default()
    });
    let info = serde_json::to_vec(&info).expect("it can be encoded");
    // As raw bytes, because it is longer than a step can hold.
    let mut told = vec![];
    for part in frame(1, Kind::Reply, &info).chunks(250) {
        told.extend([0xa0, u8::try_from(part.len()).expect("at most 250")]);
        told.extend(part);
    }
    seed("guest", "info", &[&[1], &told, &host(1, 1)]);
    let flood = [
        vec![0xb1, 0, 0xb2, 0, 0xb3, 0],
        vec![0xd1, 0, 0xd1, 1, 0xd2, 0],
        host(1, 0),
        host(2, 4),
        vec![0xd2, 0, 0xd2, 0, 0xf0, 0, 0xb4, 0],
        host(3, 3),
        vec![0xc1, 0, 0xc2, 0, 0xc3, 0],
    ];
    seed("guest", "flood", &[&[1], &flood.concat()]);
    let hello = format!("{{\"version\":{VERSION},\"program\":\"x\"}}");
    seed(
        "guest",
        "hello",
        &[&[0], &frame(0, Kind::Hello, hello.as_bytes())],
    );
}

fn qmp() {
    let greeting = br#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "capabilities": ["oob"]}}
{"return": {}, "id": 0}
"#;
    seed("qmp", "greeting", &[&[0], greeting]);
    let replies = br#"{"return": {"status": "running", "singlestep": false, "running": true}, "id": 1}
{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}}
{"error": {"class": "CommandNotFound", "desc": "no such command"}, "id": 2}
{"return": [{"name": "quit", "meta-type": "command", "arg-type": "0", "ret-type": "0"}, {"name": "0", "meta-type": "object", "members": [{"name": "a", "type": "str"}]}], "id": 3}
{"return": [], "id": 4}
"#;
    seed("qmp", "replies", &[&[2], replies]);
    let agent = br#"{"return": 5}
{"return": {"version": "7.2", "supported_commands": [{"name": "guest-ping", "enabled": true, "success-response": true}]}, "id": 0}
{"return": [{"name": "lo", "ip-addresses": [{"ip-address": "127.0.0.1", "ip-address-type": "ipv4", "prefix": 8}]}], "id": 1}
"#;
    seed("qmp", "guest-agent", &[&[1], agent]);
}

/// A raw entry of a tar archive.
fn entry(kind: EntryType, name: &str, link: &str, data: &[u8]) -> Vec<u8> {
    let mut header = TarHeader::new_gnu();
    header.set_entry_type(kind);
    header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
    header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_mode(0o644);
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

/// Records of an extended header.
fn pax(records: &[(&str, &str)]) -> Vec<u8> {
    let mut text = String::new();
    for (key, value) in records {
        let rest = format!(" {key}={value}\n");
        // All seeds have two digits.
        text.push_str(&format!("{}{rest}", rest.len() + 2));
    }
    entry(EntryType::XHeader, "pax", "", text.as_bytes())
}

/// What [`pack`] makes of a directory.
fn packed(fill: impl FnOnce(&Path)) -> Vec<u8> {
    let dir = tempfile::tempdir().expect("a directory can be made");
    fill(dir.path());
    // The same bytes whenever they are made, links included.
    let mut touch = Command::new("find");
    touch.arg(dir.path());
    touch.args(["-exec", "touch", "--no-dereference", "--date=@1", "{}", "+"]);
    assert!(touch.status().expect("find can be run").success());
    let dir = HostDir::open(dir.path()).expect("it is there");
    let mut bytes = Vec::new();
    pack(&dir, &mut bytes, &PackLimits::default()).expect("it can be read");
    bytes
}

fn archive() {
    let tree = packed(|dir| {
        fs::create_dir(dir.join("a")).expect("it is empty");
        fs::write(dir.join("a/file"), "content").expect("it is empty");
        symlink("file", dir.join("a/link")).expect("it is empty");
    });
    seed("archive", "tree", &[&[0], &tree]);
    let long = packed(|dir| fs::write(dir.join("n".repeat(120)), "").expect("it is empty"));
    seed("archive", "long-name", &[&[2], &long]);
    let sparse = packed(|dir| {
        let mut file = fs::File::create(dir.join("sparse")).expect("it is empty");
        file.set_len(64 * 1024).expect("it can be sparse");
        file.write_all(b"start").expect("there is room");
    });
    seed("archive", "sparse", &[&[0], &sparse]);
    let odd = [
        pax(&[("path", "renamed"), ("mtime", "12.5")]),
        entry(EntryType::Regular, "x", "", b"data"),
        entry(EntryType::Link, "hard", "renamed", b""),
        entry(EntryType::Fifo, "fifo", "", b""),
        entry(EntryType::Symlink, "out", "../../etc", b""),
    ];
    seed("archive", "odd", &[&[0], &odd.concat()[..], &[0; 1024]]);
}

fn changes() {
    let changed = packed(|dir| {
        fs::write(dir.join("README"), "one\n2\nthree\n").expect("it is empty");
        fs::create_dir_all(dir.join(".git/refs/heads")).expect("it is empty");
        fs::write(dir.join(".git/refs/heads/main"), "0\n").expect("it is empty");
    });
    seed("changes", "edit", &[&[0, 12], b"src/main.rs\0", &changed]);
    let repository = [
        entry(
            EntryType::Regular,
            ".git/config",
            "",
            b"[core]\n\tfsmonitor = evil\n[user]\n\tname = a\n",
        ),
        entry(
            EntryType::Regular,
            ".git/hooks/pre-commit",
            "",
            b"#!/bin/sh\n",
        ),
        entry(EntryType::Regular, ".GIT/HEAD", "", b"ref: x\n"),
    ];
    seed(
        "changes",
        "repository",
        &[&[1, 0], &repository.concat()[..], &[0; 1024]],
    );
}

fn image() {
    let file = |name: &str| File {
        file: name.into(),
        size: 0,
        sha256: Sha256::digest(b"")
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect(),
    };
    let manifest = Manifest {
        schema: 1,
        name: "base".into(),
        from: None,
        root: file("root.squashfs"),
        kernel: Kernel {
            image: file("kernel"),
            release: "6.12.0".into(),
            format: KernelFormat::Vmlinux,
        },
        initramfs: file("initramfs"),
        agent: Agent {
            version: "0.1.0".into(),
            protocol: VERSION,
            sha256: file("agent").sha256,
        },
        packages: vec![Package {
            name: "dash".into(),
            version: "1".into(),
        }],
    };
    let text = serde_json::to_vec_pretty(&manifest).expect("it can be encoded");
    seed("image", "manifest.json", &[&text]);
    let mut vast = manifest;
    vast.root.size = u64::MAX;
    vast.initramfs.size = u64::MAX;
    let text = serde_json::to_vec(&vast).expect("it can be encoded");
    seed("image", "vast", &[&text]);
}

fn layers() {
    let manifest = br#"{"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"sha256:DIGEST","size":1}]}"#;
    let index = br#"{"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:DIGEST","size":1,"platform":{"architecture":"amd64","os":"linux"}}]}"#;
    let len = u8::try_from(index.len()).expect("it is short");
    seed("layers", "layout", &[&[0, len], index, manifest]);
    let dirs = |names: &[&str]| {
        let entries = names
            .iter()
            .map(|name| entry(EntryType::Directory, name, "", b""));
        entries.collect::<Vec<_>>().concat()
    };
    let root = [
        dirs(&["etc/", "home/"]),
        entry(
            EntryType::Regular,
            "etc/passwd",
            "",
            b"root:x:0:0::/root:/bin/sh\n",
        ),
        entry(EntryType::Symlink, "bin", "usr/bin", b""),
    ];
    seed("layers", "root", &[&[3], &root.concat()[..], &[0; 1024]]);
    let upper = [
        entry(EntryType::Regular, "a/.wh.file", "", b""),
        entry(EntryType::Regular, "b/.wh..wh..opq", "", b""),
    ];
    let lower = [
        entry(EntryType::Regular, "a/file", "", b"x"),
        entry(EntryType::Link, "a/link", "a/file", b""),
    ];
    let layers = [&upper.concat()[..], &[0; 1024], &lower.concat(), &[0; 512]].concat();
    seed("layers", "whiteouts", &[&[1], &layers]);
}

fn spec() {
    let all = r#"name = "build-7"
image = "base"
kernel = "tuned"
profile = "light"
cpus = 2
memory = "512M"
disk = "1G"
timeout = "90s"
ttl = "2h"
idle_timeout = "5m"
survivors = "adopt"
stop_grace = "500ms"
network = "isolated"
accel = "tcg"
machine = "q35"
channel = "serial"
workspace = "/src"
workspace_mode = "copy"
artifacts = "out,put"
apply = true
workdir = "/tmp"
user = "root"
terminal = true
command = ["echo", "hi"]
[env]
A = "b"
[labels]
team = "x"
"#;
    seed("spec", "all", &[all.as_bytes()]);
    let share = "workspace = \"/a,b\"\nworkspace_mode = \"share\"\nread_only = true\n";
    seed("spec", "share", &[share.as_bytes()]);
}
