//! Real clients in a real guest, over names, under a strict policy: curl, git
//! over HTTPS and SSH, pip, and Node's client at an npm registry.

mod support;

#[path = "support/dns.rs"]
mod dns;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use bulkhead::host::netns::Netns;
use bulkhead::net::Code;
use bulkhead::run::Machine;
use bulkhead::spec::{Bytes, Catalog, NetworkPolicy, Preset, Request as Wish};
use dns::{Says, Upstream, a};
use hickory_proto::rr::RecordType;
use support::live::{Live, sh};
use support::net::{World, note, sh_in};

const RESOLVER: &str = "8.8.8.8:53";
/// Hosts of the internet here: where git is, and where the registries are. Both
/// answer at both; at ports but 80 and 443 it is the address that counts.
const GIT: &str = "93.184.215.14";
const REGISTRIES: &str = "93.184.215.15";

/// A server, ended when dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a program in a namespace, and waits for its first line of output.
fn serve(netns: &Netns, words: &[&str]) -> Server {
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).stdin(Stdio::null());
    let spawn = || command.stdout(Stdio::piped()).spawn();
    let mut child = netns.run_in(spawn).unwrap().unwrap();
    let mut line = String::new();
    let output = child.stdout.take().unwrap();
    BufReader::new(output).read_line(&mut line).unwrap();
    let server = Server(child);
    assert_eq!(line, "ready\n", "{words:?}");
    server
}

/// Keys, a certificate for the hosts, and a repository by both ways to it.
const PREPARE: &str = "
    openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 2 -subj /CN=test \
        -addext subjectAltName=DNS:git.example.org,DNS:pypi.example.org,DNS:registry.example.org 2>/dev/null
    ssh-keygen -q -t ed25519 -N '' -f id
    dropbearkey -t ed25519 -f host.key >/dev/null 2>&1
    mkdir git.example.org
    git init -q --bare git.example.org/demo.git
    git init -q work
    echo 'from the repository' > work/file
    git -C work add file
    git -C work -c user.name=t -c user.email=t@example.org commit -q -m one
    git -C work push -q ../git.example.org/demo.git HEAD:refs/heads/main
    git -C git.example.org/demo.git symbolic-ref HEAD refs/heads/main
    git -C git.example.org/demo.git update-server-info";

/// An SSH server, for which root's home is an empty one with a key.
fn ssh_server(netns: &Netns, dir: &Path) -> Server {
    let script =
        "mount -t tmpfs -o mode=700 tmpfs /root; mkdir -m 700 /root/.ssh; cp id.pub /root/.ssh/authorized_keys
        echo ready; exec dropbear -F -E -p 22 -s -r host.key 2>dropbear.log";
    let script = format!("cd {}; {script}", dir.display());
    serve(netns, &["unshare", "-m", "sh", "-ec", &script])
}

/// Each client, what it does, and what it says then.
const CLIENTS: [(&str, &str, &str); 8] = [
    (
        "curl",
        "curl -sS --cacert ca.pem https://git.example.org/demo.git/HEAD",
        "ref: refs/heads/main",
    ),
    (
        "git over https",
        "git -c http.sslCAInfo=$PWD/ca.pem clone -q https://git.example.org/demo.git a && cat a/file",
        "from the repository",
    ),
    (
        "git over ssh",
        "git clone -q ssh://root@git.example.org$DIR/git.example.org/demo.git b && cat b/file",
        "from the repository",
    ),
    (
        "pip",
        "pip install -q --disable-pip-version-check --root-user-action ignore --no-cache-dir --cert ca.pem \
            --index-url https://pypi.example.org/simple --target t demo && python3 t/demo.py",
        "from the registry",
    ),
    (
        "node, as npm does",
        "NODE_EXTRA_CA_CERTS=ca.pem node npm.js",
        "demo 1.0.0 as it was published",
    ),
    (
        "curl, a host that is not allowed",
        "curl -sS https://evil.example.org/ 2>&1 || true",
        "curl: (6) Could not resolve host: evil.example.org",
    ),
    (
        "curl, another name at the same address",
        "curl -sS -k --connect-to evil.example.org:443:git.example.org:443 https://evil.example.org/ 2>&1 | grep -o 'access denied'",
        "access denied",
    ),
    (
        "git, a host that is not allowed at that port",
        "git clone -q ssh://root@pypi.example.org/x c 2>&1 | grep -o 'Connection refused'",
        "Connection refused",
    ),
];

/// What npm does with a package, without npm: Debian's brings hundreds of others.
const NPM: &str = "
    const https = require('https'), crypto = require('crypto');
    const get = (url, then) => https.get(url, (answer) => {
        const all = []; answer.on('data', (part) => all.push(part)); answer.on('end', () => then(Buffer.concat(all)));
    });
    get('https://registry.example.org/demo', (text) => {
        const known = JSON.parse(text), { dist, version } = known.versions[known['dist-tags'].latest];
        get(dist.tarball, (packed) => {
            const same = 'sha512-' + crypto.createHash('sha512').update(packed).digest('base64') === dist.integrity;
            console.log(known.name, version, same ? 'as it was published' : 'changed');
        });
    });";

async fn put(machine: &Machine, name: &str, text: &str) {
    sh(machine, &format!("cat > {name} <<'END'\n{text}\nEND")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn curl_git_pip_and_node_reach_what_is_allowed_by_name() {
    let world = World::new();
    let netns = &world.internet.netns;
    for address in [GIT, REGISTRIES] {
        sh_in(netns, &format!("ip addr add {address}/32 dev lo"));
    }
    let dir = world.dir.path().join("web");
    std::fs::create_dir(&dir).unwrap();
    sh_in(netns, &format!("cd {}; {PREPARE}", dir.display()));
    let web = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/web.py");
    let _web = serve(netns, &["python3", web, dir.to_str().unwrap()]);
    let _ssh = ssh_server(netns, &dir);
    let sockets = netns.run_in(|| dns::sockets(RESOLVER)).unwrap();
    let _dns = Upstream::on(sockets, |name, kind, _| match kind {
        RecordType::A if name == "git.example.org" => Says::Records(vec![a(name, GIT, 60)]),
        RecordType::A => Says::Records(vec![a(name, REGISTRIES, 60)]),
        _ => Says::Records(vec![]),
    });

    let mut site = world.site();
    site.resolvers = vec![RESOLVER.parse().unwrap()];
    let live = Live::with_site(site);
    let hosts = [
        "git.example.org",
        "git.example.org:22",
        "pypi.example.org",
        "registry.example.org",
    ];
    let strict = NetworkPolicy {
        strict: true,
        allow_hosts: hosts.map(|host| host.parse().unwrap()).into(),
        ..NetworkPolicy::of_preset(Preset::Offline)
    };
    let mut catalog = Catalog::default();
    catalog.add_network("own".parse().unwrap(), strict).unwrap();
    let wish = Wish {
        image: Some("default".into()),
        network: Some("own".parse().unwrap()),
        memory: Some(Bytes::mib(512)),
        ..Wish::default()
    };
    let machine = live.start_from(wish, &catalog).await;
    let read = |name: &str| std::fs::read_to_string(dir.join(name)).unwrap();
    put(&machine, "ca.pem", &read("cert.pem")).await;
    put(&machine, "id", &read("id")).await;
    put(&machine, "npm.js", NPM).await;
    let before = format!(
        "chmod 600 id; export HOME=/root DIR={} GIT_TERMINAL_PROMPT=0 \
         GIT_SSH_COMMAND='ssh -i /root/id -o BatchMode=yes -o StrictHostKeyChecking=no -o LogLevel=ERROR -o UserKnownHostsFile=/dev/null'",
        dir.display()
    );
    for (client, script, expected) in CLIENTS {
        let seen = sh(&machine, &format!("{before}\n{script}")).await;
        note(client, expected, &seen);
        assert_eq!(seen, expected, "{client}");
    }
    let traffic = machine.traffic().unwrap();
    machine.kill().await.unwrap();
    let summary = traffic.summary();
    for host in [
        "git.example.org",
        "pypi.example.org",
        "registry.example.org",
    ] {
        assert!(summary.hosts.contains_key(host), "{summary:?}");
    }
    assert_eq!(
        summary.refused["evil.example.org"].code,
        Code::HostNotAllowed
    );
}
