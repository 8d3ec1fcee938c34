//! Writes the seeds in corpus/ again: `cargo run --example corpus`.

mod saved;

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use bulkhead::guest::archive::{HostDir, PackLimits, pack};
use bulkhead::image::{Agent, File, Kernel, KernelFormat, Manifest, Package};
use bulkhead_agent::{Exit, Failure, FailureKind, Header, Info, Kind, Process, Reply, VERSION};
use hickory_proto::op::{Edns, Message, OpCode, Query};
use hickory_proto::rr::rdata::svcb::{IpHint, SvcParamKey, SvcParamValue};
use hickory_proto::rr::rdata::{A, AAAA, CNAME, HTTPS, SVCB, TXT};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use sha2::{Digest as _, Sha256};
use tar::{EntryType, Header as TarHeader};

fn main() {
    guest();
    qmp();
    archive();
    changes();
    image();
    saved::template();
    saved::snapshot();
    saved::export();
    layers();
    spec();
    config();
    dns();
    tls();
    http();
    netlink();
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

fn config() {
    let all = r#"boot_timeout = "2m"
state_dir = "/s"
runtime_dir = "/r"
qemu = "/q"
network_pool = "10.96.0.0/16"
uids = "100000-165535"
[machine]
image = "base"
profile = "big"
network = "work"
env = { "A.b" = "1" }
labels = { team = "x" }
[profile.big]
base = "light"
memory = "3G"
cpus = 2
network = "dev"
[network.work]
mode = "nat-filtered"
preset = "packages"
allow_hosts = ["git.example.org:22", "*.example.net"]
deny_hosts = ["telemetry.example.net"]
ports = ["80", "443", "123/udp"]
strict = true
exceptions = ["10.1.2.3/32:5432"]
limits = { download = "10M", total = "2G" }
[network.off]
mode = "isolated"
[network.lan]
mode = "bridge"
bridge = "br0:192.0.2.50/24@192.0.2.1"
"#;
    seed("config", "all", &[all.as_bytes()]);
    let bad = "[machine]\nmemory = \"1\"\nnetwork = \"none\"\n[profile.x]\nbase = \"x\"\n";
    seed("config", "bad", &[bad.as_bytes()]);
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

/// A question for records of a type, or an answer with them.
fn message(kind: RecordType, answers: Vec<Record>) -> Vec<u8> {
    let mut message = match answers.is_empty() {
        true => Message::query(),
        false => Message::response(7, OpCode::Query),
    };
    message.metadata.id = 7;
    message.add_query(Query::query(dns_name("example.org."), kind));
    message.insert_answers(answers);
    message.set_edns(Edns::new());
    message.to_vec().expect("it can be encoded")
}

fn dns_name(text: &str) -> Name {
    Name::from_ascii(text).expect("it is one")
}

fn dns() {
    let record = |name: &str, data| Record::from_rdata(dns_name(name), 60, data);
    seed("dns", "a", &[&[0], &message(RecordType::A, vec![])]);
    seed("dns", "any", &[&[0], &message(RecordType::ANY, vec![])]);
    let answers = vec![
        record(
            "example.org.",
            RData::CNAME(CNAME(dns_name("www.example.net."))),
        ),
        record("www.example.net.", RData::A(A::new(93, 184, 215, 14))),
        record("www.example.net.", RData::A(A::new(10, 0, 0, 1))),
    ];
    seed(
        "dns",
        "chain",
        &[&[2, 0, 1], &message(RecordType::A, answers)],
    );
    let six = vec![
        record(
            "example.org.",
            RData::AAAA(AAAA::new(0x2606, 1, 0, 0, 0, 0, 0, 1)),
        ),
        record(
            "example.org.",
            RData::AAAA(AAAA::new(0, 0, 0, 0, 0, 0xffff, 0x0a00, 1)),
        ),
    ];
    seed(
        "dns",
        "six",
        &[&[3, 0, 28], &message(RecordType::AAAA, six)],
    );
    let params = vec![
        (SvcParamKey::Port, SvcParamValue::Port(443)),
        (
            SvcParamKey::Ipv4Hint,
            SvcParamValue::Ipv4Hint(IpHint(vec![A::new(10, 0, 0, 1)])),
        ),
    ];
    let https = RData::HTTPS(HTTPS(SVCB::new(1, dns_name("."), params)));
    let https = vec![record("example.org.", https)];
    seed(
        "dns",
        "https",
        &[&[2, 0, 65], &message(RecordType::HTTPS, https)],
    );
    let text = RData::TXT(TXT::new(vec!["v=spf1 -all".into()]));
    let text = vec![record("example.org.", text)];
    seed(
        "dns",
        "txt",
        &[&[2, 0, 16], &message(RecordType::TXT, text)],
    );
}

fn tls() {
    let name = b"example.org";
    let length = |length: usize| u16::try_from(length).expect("it is short").to_be_bytes();
    let entry = [&[0][..], &length(name.len()), name].concat();
    let list = [&length(entry.len())[..], &entry].concat();
    let sni = [&[0, 0][..], &length(list.len()), &list].concat();
    let groups = [0, 10, 0, 4, 0, 2, 0, 29];
    let hello = |extensions: &[u8]| {
        let head = [&[3, 3][..], &[7; 32], &[0, 0, 2, 0x13, 1, 1, 0]].concat();
        let body = [&head[..], &length(extensions.len()), extensions].concat();
        [&[1, 0][..], &length(body.len()), &body].concat()
    };
    let records = |message: &[u8], each: usize| {
        let record = |part: &[u8]| [&[22, 3, 1][..], &length(part.len()), part].concat();
        message.chunks(each).flat_map(record).collect::<Vec<u8>>()
    };
    let plain = hello(&[&groups[..], &sni].concat());
    seed("hello", "plain", &[&[0, 9], &records(&plain, 500)]);
    seed("hello", "pieces", &[&[0, 40], &records(&plain, 11)]);
    seed(
        "hello",
        "nameless",
        &[&[0, 9], &records(&hello(&groups), 500)],
    );
    let ech = [&sni[..], &[0xfe, 0x0d, 0, 2, 0, 0]].concat();
    seed("hello", "ech", &[&[0, 9], &records(&hello(&ech), 500)]);
}

fn http() {
    for (name, text) in [
        (
            "get",
            "GET /x HTTP/1.1\r\nHost: example.org\r\nAccept: */*\r\n\r\n",
        ),
        (
            "post",
            "POST / HTTP/1.1\r\nHost: a.org:80\r\nContent-Length: 2\r\n\r\nhi",
        ),
        (
            "chunked",
            "PUT / HTTP/1.1\r\nHost: a.org\r\nTransfer-Encoding: chunked\r\n\r\n",
        ),
        (
            "absolute",
            "GET http://a.org/ HTTP/1.1\r\nHost: a.org\r\n\r\n",
        ),
        (
            "connect",
            "CONNECT a.org:443 HTTP/1.1\r\nHost: a.org:443\r\n\r\n",
        ),
        (
            "twice",
            "GET / HTTP/1.1\r\nHost: a.org\r\nhost: b.org\r\nUpgrade: h2c\r\n\r\n",
        ),
    ] {
        seed("http", name, &[&[1, 20], text.as_bytes()]);
    }
    let chunks = b"5\r\nhello\r\n1a;x=y\r\nabcdefghijklmnopqrstuvwxyz\r\n0\r\nT: v\r\n\r\nmore";
    seed("http", "chunks", &[&[0, 7], chunks]);
}

/// Attributes of netlink, one behind the other.
fn attributes(all: &[(u16, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (kind, data) in all {
        let length = u16::try_from(4 + data.len()).expect("it is short");
        bytes.extend(length.to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(*data);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

fn netlink() {
    let message = |kind: u16, attributes: &[u8]| {
        let length = u32::try_from(20 + attributes.len()).expect("it is short");
        let head = [
            &length.to_ne_bytes()[..],
            &kind.to_ne_bytes(),
            &[0; 10],
            &[2, 0, 0, 1],
        ];
        [&head.concat()[..], attributes].concat()
    };
    let mut packet = vec![0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0, 198, 18, 0, 2];
    packet.extend([1, 2, 3, 4, 0x9c, 0x40, 1, 0xbb]);
    let logged = |prefix: &[u8], number: u8| {
        let number = [0, 0, 0, number];
        let all = [
            (1, &[8, 0, 2, 0][..]),
            (10, prefix),
            (12, &number),
            (9, &packet),
        ];
        message(4 << 8, &attributes(&all))
    };
    let mut six = vec![0x60, 0, 0, 0, 0, 12, 0, 64];
    six.extend([0x20; 32]);
    six.extend([17, 0, 0, 0, 0, 0, 0, 0, 0, 53, 0, 53]);
    let refused6 = attributes(&[
        (1, &[0x86, 0xdd, 2, 0][..]),
        (10, b"refused:dns\0"),
        (9, &six),
    ]);
    let ip = attributes(&[(1, &[198, 18, 0, 2]), (2, &[1, 2, 3, 4])]);
    let proto = attributes(&[(1, &[6]), (2, &[0x9c, 0x40]), (3, &[1, 0xbb])]);
    let tuple = attributes(&[(0x8001, &ip), (0x8002, &proto)]);
    let counter = attributes(&[(2, &[0, 0, 0, 0, 0, 0, 2, 0])]);
    let flow = attributes(&[(0x8001, &tuple), (0x8009, &counter), (0x800a, &counter)]);
    seed(
        "netlink",
        "new",
        &[&logged(b"new:\0", 1), &logged(b"refused:private\0", 3)],
    );
    seed("netlink", "six", &[&message(4 << 8, &refused6)]);
    seed("netlink", "over", &[&message(1 << 8 | 2, &flow)]);
}
