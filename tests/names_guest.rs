//! Names in real guests: resolved under the machine's policy, let through for
//! their addresses only, read again in strict mode, and on record.

mod support;

#[path = "support/dns.rs"]
mod dns;
#[path = "support/internet.rs"]
mod internet;

use std::net::TcpListener;
use std::time::{Duration, Instant};

use bulkhead::net::{Code, Event, QueryResult, Summary, What};
use bulkhead::run::Machine;
use bulkhead::spec::{NetworkPolicy, Preset};
use internet::{GOOD, Internet, serve};
use nix::sys::signal::{Signal, kill};
use support::live::{Live, sh};
use support::net::{note, sh_in};

fn script(lines: &[&str]) -> String {
    let script = include_str!("support/try.pl");
    let lines = lines.join("\n");
    format!(
        "cat > /tmp/try.pl <<'PERL'\n{script}\nPERL\nperl /tmp/try.pl <<'TRIES'\n{lines}\nTRIES"
    )
}

/// Rows: what is tried, and what must come of it, in this order.
async fn matrix(machine: &Machine, rows: &[(&str, &str)]) {
    let lines: Vec<_> = rows.iter().map(|(line, _)| *line).collect();
    let seen = sh(machine, &script(&lines)).await;
    check(rows, &seen);
}

#[track_caller]
fn check(rows: &[(&str, &str)], seen: &str) {
    let seen: Vec<_> = seen.lines().collect();
    for ((line, expected), seen) in rows.iter().zip(&seen) {
        note(line, expected, seen);
    }
    let wanted: Vec<_> = rows
        .iter()
        .map(|(line, expected)| format!("{line}: {expected}"))
        .collect();
    let got: Vec<_> = rows
        .iter()
        .zip(&seen)
        .map(|((line, _), seen)| format!("{line}: {seen}"))
        .collect();
    assert_eq!(got, wanted, "{seen:?}");
}

fn policy(preset: Preset, allow: &[&str], deny: &[&str]) -> NetworkPolicy {
    let hosts = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
    NetworkPolicy {
        allow_hosts: hosts(allow),
        deny_hosts: hosts(deny),
        ..NetworkPolicy::of_preset(preset)
    }
}

fn events(text: &str) -> Vec<What> {
    let event = |line| serde_json::from_str::<Event>(line).unwrap().what;
    text.lines().map(event).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_policy_lets_through_what_its_names_stand_for() {
    let internet = Internet::new();
    let live = Live::with_site(internet.site());
    let allow = [
        "good.org",
        "alias.org",
        "rebind.org",
        "lan.org",
        "shared.org:8443",
    ];
    let closed = policy(Preset::Offline, &allow, &[]);
    let machine = live.start_in(closed.clone()).await;
    matrix(
        &machine,
        &[
            // Before it is asked for, an address is nobody's.
            ("tcp 93.184.215.14 80", "refused"),
            ("name good.org", GOOD),
            ("web good.org 80 good.org", "200 93.184.215.14"),
            ("web alias.org 80 alias.org", "200 93.184.215.14"),
            ("tcp 93.184.215.14 22", "refused"),
            ("tcp 93.184.215.14 8443", "refused"),
            // At a port of its own, and no other.
            ("web shared.org 8443 shared.org", "200 93.184.215.16"),
            ("tcp 93.184.215.16 80", "refused"),
            // Refused, not unknown.
            ("name evil.org", "try again"),
            ("tcp 93.184.215.15 80", "refused"),
            // Rebinding: what no machine may reach is left out.
            ("name rebind.org", "try again"),
            ("name lan.org", GOOD),
            ("tcp 169.254.169.254 80", "refused"),
            ("tcp 10.77.0.9 80", "refused"),
            // An allowed host sends it there.
            ("follow good.org 80", "refused"),
            // No other resolver.
            ("udp 8.8.8.8 53", "prohibited"),
        ],
    )
    .await;
    let asked = internet.dns.asked_names();
    assert!(!asked.contains(&"evil.org".to_owned()), "{asked:?}");

    // Changed while it runs: at once, for what was looked up before, too.
    let mut other = policy(Preset::Offline, &["evil.org", "alias.org"], &["good.org"]);
    machine.set_network(&other, true).unwrap();
    matrix(
        &machine,
        &[
            ("name good.org", "try again"),
            ("web evil.org 80 evil.org", "200 93.184.215.15"),
            // The same address by a name that stays.
            ("tcp 93.184.215.14 22", "refused"),
            ("web alias.org 80 alias.org", "200 93.184.215.14"),
            ("tcp 93.184.215.16 8443", "refused"),
        ],
    )
    .await;
    other.allow_hosts.clear();
    machine.set_network(&other, true).unwrap();
    matrix(
        &machine,
        &[
            ("tcp 93.184.215.14 80", "refused"),
            ("tcp 93.184.215.15 80", "refused"),
            ("name evil.org", "try again"),
        ],
    )
    .await;

    let record = machine.dir().join("network.jsonl");
    let traffic = machine.traffic().unwrap();
    let all = events(&std::fs::read_to_string(record).unwrap());
    let query = |name: &str, result| {
        all.iter().find_map(|what| match what {
            What::Query(query) if query.name == name && query.result == result => Some(query),
            _ => None,
        })
    };
    let refusal = query("evil.org", QueryResult::Refused)
        .unwrap()
        .refusal
        .clone()
        .unwrap();
    assert_eq!(
        (refusal.code, refusal.rule.as_str()),
        (Code::HostNotAllowed, "default:offline")
    );
    let nameless = all.iter().find_map(|what| match what {
        What::Packet(packet) => packet.refusal.as_ref(),
        _ => None,
    });
    let nameless = nameless.unwrap();
    assert!(
        nameless.rule == "packet:name" && nameless.remedy.contains("--allow-host"),
        "{nameless:?}"
    );
    let remedy = &refusal.remedy;
    assert!(remedy.contains("--allow-host evil.org"), "{remedy}");
    let good = query("good.org", QueryResult::Answered).unwrap();
    assert_eq!(good.rule.as_deref(), Some("allow-host:good.org"));
    let denied = query("good.org", QueryResult::Refused).unwrap();
    assert_eq!(denied.refusal.as_ref().unwrap().code, Code::HostDenied);
    let lan = query("lan.org", QueryResult::Answered).unwrap();
    assert_eq!(lan.refusal.as_ref().unwrap().code, Code::AnswerPrivate);
    assert!(
        all.iter().any(|what| matches!(
            what,
            What::Packet(packet) if packet.refusal.is_none() && packet.name.is_some()
        )),
        "{all:#?}"
    );
    machine.kill().await.unwrap();
    let summary = traffic.summary();
    assert!(summary.hosts.contains_key("evil.org"), "{summary:?}");
    assert_eq!(summary.refused["evil.org"].code, Code::HostNotAllowed);
    // Of connections that were open, or just over, when it ended.
    assert!(summary.sent > 0 && summary.received > 0, "{summary:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_policy_resolves_what_is_not_denied() {
    let internet = Internet::new();
    let live = Live::with_site(internet.site());
    let machine = live.start_in(policy(Preset::Dev, &[], &["evil.org"])).await;
    matrix(
        &machine,
        &[
            ("name good.org", GOOD),
            ("name evil.org", "try again"),
            ("name nas.lan", "try again"),
            // 6,400 characters, of which some 2,000 get out.
            ("tunnel big.org 160", "held"),
            ("tcp 93.184.215.14 22", "silent"),
            ("web good.org 80 good.org", "200 93.184.215.14"),
            ("tcp 93.184.215.14 8443", "refused"),
        ],
    )
    .await;
    machine.kill().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn names_lead_over_ipv6_where_it_is_asked_for() {
    let internet = Internet::new();
    let world = &internet.world;
    sh_in(
        &world.internet.netns,
        "ip -6 addr add 2a00:1234::1/128 dev lo nodad",
    );
    sh_in(
        &world.host.netns,
        "sysctl -qw net.ipv6.conf.all.forwarding=1",
    );
    let listen = || TcpListener::bind("[2a00:1234::1]:80");
    serve(world.internet.netns.run_in(listen).unwrap().unwrap());
    let live = Live::with_site(internet.site());
    let six = NetworkPolicy {
        ipv6: true,
        ..policy(Preset::Offline, &["six.org", "good.org"], &[])
    };
    let machine = live.start_in(six).await;
    matrix(
        &machine,
        &[
            ("tcp 2a00:1234::1 80", "refused"),
            ("name6 six.org", "2a00:1234::1"),
            ("tcp 2a00:1234::1 80", "silent"),
            ("tcp 2a00:1234::1 443", "refused"),
            ("name6 good.org", "none"),
            // The resolver is at the gateway's other address, too.
            ("tcp fd62:756c:6b68::1 53", "silent"),
            ("web good.org 80 good.org", "200 93.184.215.14"),
        ],
    )
    .await;
    machine.kill().await.unwrap();
    // Without it, there are no such addresses.
    let machine = live
        .start_in(policy(Preset::Offline, &["six.org"], &[]))
        .await;
    matrix(&machine, &[("name6 six.org", "none")]).await;
    machine.kill().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn strict_mode_reads_the_name_at_a_shared_address() {
    let internet = Internet::new();
    let live = Live::with_site(internet.site());
    let strict = NetworkPolicy {
        strict: true,
        ..policy(Preset::Offline, &["shared.org", "good.org:22"], &[])
    };
    let machine = live.start_in(strict).await;
    matrix(
        &machine,
        &[
            ("web shared.org 80 shared.org", "200 93.184.215.16"),
            // The same address by another name, and by none.
            ("web shared.org 80 other.org", "403 host-not-allowed"),
            ("web shared.org 80 93.184.215.16", "403 host-missing"),
            // The same in TLS: 49 is access_denied.
            ("tls shared.org shared.org", "reached 93.184.215.16"),
            ("tls shared.org other.org", "alert 49"),
            ("tls shared.org -", "alert 49"),
            ("tls shared.org shared.org ech", "alert 49"),
            ("tls 93.184.215.15 shared.org", "reached 93.184.215.16"),
            ("tls 93.184.215.15 evil.org", "alert 49"),
            ("tls 8.8.8.8 dns.google", "alert 49"),
            // Through an allowed host, to another.
            ("relay shared.org 80 evil.org:443", "403 request-kind"),
            ("relay shared.org 80 shared.org:443", "403 request-kind"),
            ("follow shared.org 80", "refused"),
            // An allowed name leads to its own address.
            ("web x 80 shared.org 93.184.215.15", "200 93.184.215.16"),
            ("web x 80 evil.org 93.184.215.15", "403 host-not-allowed"),
            // What no machine may reach is refused before anybody reads.
            ("tcp 169.254.169.254 80", "refused"),
            ("tcp 10.77.0.9 80", "refused"),
            ("tcp 192.0.2.1 80", "refused"),
            // Other ports by address, at once.
            ("name good.org", GOOD),
            ("tcp 93.184.215.14 22", "silent"),
            ("tcp 93.184.215.16 22", "refused"),
        ],
    )
    .await;
    let traffic = machine.traffic().unwrap();
    machine.kill().await.unwrap();
    let summary: Summary = traffic.summary();
    assert_eq!(summary.refused["other.org"].code, Code::HostNotAllowed);
    assert!(summary.hosts["shared.org"].connections >= 2, "{summary:?}");
    let metadata = &summary.refused["169.254.169.254 (tcp 80)"];
    assert_eq!(metadata.rule, "packet:metadata");
}

#[tokio::test(flavor = "multi_thread")]
async fn strict_mode_reads_the_name_over_ipv6_as_well() {
    let internet = Internet::new();
    let world = &internet.world;
    sh_in(
        &world.host.netns,
        "sysctl -qw net.ipv6.conf.all.forwarding=1",
    );
    for address in ["2a00:1234::1", "2a00:1234::2"] {
        let add = format!("ip -6 addr add {address}/128 dev lo nodad");
        sh_in(&world.internet.netns, &add);
        for port in [22, 80, 443, 8443] {
            let listen = || TcpListener::bind(format!("[{address}]:{port}"));
            serve(world.internet.netns.run_in(listen).unwrap().unwrap());
        }
    }
    let live = Live::with_site(internet.site());
    let strict = NetworkPolicy {
        ipv6: true,
        strict: true,
        ..policy(Preset::Offline, &["six.org"], &[])
    };
    let machine = live.start_in(strict).await;
    matrix(
        &machine,
        &[
            ("name6 six.org", "2a00:1234::1"),
            ("tls 2a00:1234::1 six.org", "reached 2a00:1234::1"),
            ("tls 2a00:1234::1 other.org", "alert 49"),
            ("tls 2a00:1234::1 -", "alert 49"),
            ("tls 2a00:1234::1 six.org ech", "alert 49"),
            // The name leads to its own address.
            ("tls 2a00:1234::2 six.org", "reached 2a00:1234::1"),
            ("web x 80 six.org 2a00:1234::2", "200 2a00:1234::1"),
            ("web x 80 evil.org 2a00:1234::2", "403 host-not-allowed"),
            ("tcp 2a00:1234::1 22", "refused"),
            ("tcp 2a00:1234::1 8443", "refused"),
            ("udp 2a00:1234::1 443", "prohibited"),
            // Where the proxy listens, unless it was led there.
            ("tcp fd62:756c:6b68::1 8443", "refused"),
            ("tcp fd62:756c:6b68::1 443", "refused"),
            ("tcp fd00:ec2::254 80", "refused"),
            ("tcp 2001:db8:1::1 443", "refused"),
            ("tcp 64:ff9b::a4d:9 443", "refused"),
        ],
    )
    .await;
    machine.kill().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_says_what_it_reached_and_what_was_refused() {
    let internet = Internet::new();
    let bulkhead = internet.bulkhead();
    let tries = script(&["web good.org 80 good.org", "name evil.org"]);
    let words = ["run", "--accel", &support::accel(), "--image", "base"];
    let words = [&words[..], &["--kernel", "tuned", "--network", "offline"]].concat();
    let words = [
        &words[..],
        &["--allow-host", "*.org", "--deny-host", "evil.org"],
    ]
    .concat();
    let learn = [&words[..], &["--learn"]].concat();
    let command = ["--", "sh", "-c", &tries];
    let ran = bulkhead.raw(&[&learn[..], &command].concat());
    assert_eq!(ran.code, 0, "{ran:?}");
    assert_eq!(ran.stdout, "200 93.184.215.14\ntry again\n");
    let told = "bulkhead: network: 1 host, 1 refused: evil.org (host-denied, deny-host:evil.org)";
    assert!(ran.stderr.contains(told), "{}", ran.stderr);

    // What is denied is no proposal.
    let (_, learned) = ran.stderr.split_once("[network.learned]").unwrap();
    assert!(learned.contains("\"good.org\","), "{learned}");
    assert!(!learned.contains("evil.org"), "{learned}");

    // Where nobody answers, that is said soon, and the machine goes on.
    let nobody = ["--json", "--resolvers", "203.0.113.99"];
    let command = [
        "--",
        "sh",
        "-c",
        &script(&["name good.org", "name good.org"]),
    ];
    let begin = Instant::now();
    let ran = bulkhead.raw(&[&nobody[..], &words, &command].concat());
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(begin.elapsed() < Duration::from_secs(60));
    let outcome: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(outcome["stdout"]["text"], "try again\ntry again\n");
    assert!(
        outcome["traffic"]["queries"].as_u64() >= Some(2),
        "{outcome}"
    );
    assert_eq!(outcome["traffic"]["hosts"], serde_json::json!({}));

    // Hosts that cannot be are refused before anything starts.
    let bad = [&words[..], &["--deny-host", "a.org:80", "--", "true"]].concat();
    bulkhead.must_fail(&bad, "value-invalid");
    let ran = bulkhead.raw(&[&words[..], &["--allow-host", "10.0.0.1", "--", "true"]].concat());
    assert!(
        ran.code == 125 && ran.stderr.contains("10.0.0.1"),
        "{ran:?}"
    );
}

/// What QEMU itself would send after a restore must not be told as the guest's.
#[tokio::test(flavor = "multi_thread")]
async fn a_clone_reaches_and_is_refused_what_a_booted_machine_is() {
    let internet = Internet::new();
    let bulkhead = internet.bulkhead();
    let accel = support::accel();
    let machine = ["--accel", &accel, "--image", "base", "--kernel", "tuned"];
    let machine = [&machine[..], &["--network", "offline"]].concat();
    let id = bulkhead.must(&[&["template", "build"], &machine[..]].concat());
    let tries = script(&["web good.org 80 good.org", "name evil.org"]) + "\nsleep 1";
    let policy = ["--allow-host", "*.org", "--deny-host", "evil.org"];
    let command = ["--", "sh", "-c", &tries];
    let words = [&["--json", "run"], &machine[..], &policy, &command].concat();
    let ran = bulkhead.raw(&words);
    let outcome: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(outcome["template"], id.trim_end(), "{outcome}");
    assert_eq!(
        outcome["stdout"]["text"], "200 93.184.215.14\ntry again\n",
        "{outcome}"
    );
    let of = |what: &str| {
        let table = outcome["traffic"][what].as_object().unwrap();
        table.keys().map(String::as_str).collect::<Vec<_>>()
    };
    assert_eq!(
        (of("hosts"), of("refused")),
        (vec!["good.org"], vec!["evil.org"])
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_detached_machine_keeps_its_names_with_each_supervisor() {
    let internet = Internet::new();
    let bulkhead = internet.bulkhead();
    let host = &internet.world.host.netns;
    let before = sh_in(
        host,
        "ip -o link | sed 's/^[0-9]*//'; ip route; nft list tables",
    );
    let options = ["--network", "offline", "--allow-host", "good.org"];
    let options = [&options[..], &["--survivors", "adopt", "--start"]].concat();
    let vm = bulkhead.create("named", &options);
    let tries = |rows: &[(&str, &str)]| {
        let lines: Vec<_> = rows.iter().map(|(line, _)| *line).collect();
        let ran = bulkhead.exec(&["-u", "root", "named", "sh", "-c", &script(&lines)]);
        assert_eq!(ran.code, 0, "{ran:?}");
        check(rows, &ran.stdout);
    };
    let good = ("web good.org 80 good.org", "200 93.184.215.14");
    let evil = ("web evil.org 80 evil.org", "200 93.184.215.15");
    let no_evil = ("name evil.org", "try again");
    tries(&[good, no_evil]);
    bulkhead.must(&["net", "allow", "named", "--host", "evil.org"]);
    tries(&[good, evil]);
    bulkhead.must(&["net", "deny", "named", "--host", "good.org"]);
    tries(&[
        evil,
        ("name good.org", "try again"),
        ("tcp 93.184.215.14 80", "refused"),
    ]);
    let shown = bulkhead.must(&["net", "show", "named"]);
    assert!(
        shown.contains("allowed      evil.org") && shown.contains("denied       good.org"),
        "{shown}"
    );
    let shown = bulkhead.json(&["net", "show", "named"]);
    assert!(
        shown["counters"]["new"]["packets"].as_u64() > Some(0),
        "{shown}"
    );
    let log = bulkhead.must(&["net", "log", "named"]);
    for words in [
        "refused  evil.org A",
        "asked    good.org A: 93.184.215.14",
        "new      tcp good.org",
    ] {
        assert!(log.contains(words), "{words}: {log}");
    }
    let refused = bulkhead.must(&["--json", "net", "log", "named", "--refused"]);
    let refused = events(&refused);
    assert!(refused.iter().all(|what| what.refusal().is_some()));
    assert!(refused.len() >= 3, "{refused:#?}");

    // What it tried is enough to go on, and nothing else.
    let learned = bulkhead.must(&["net", "learn", "named"]);
    for host in ["good.org", "evil.org"] {
        assert!(learned.contains(&format!("    \"{host}\",")), "{learned}");
    }
    assert!(learned.contains("preset = \"offline\""), "{learned}");
    assert_eq!(
        bulkhead.json(&["net", "learn", "named"])["learned"],
        learned.as_str()
    );
    bulkhead.must_fail(&["net", "learn", "nobody"], "machine-not-found");

    // Its rules are read back.
    let verify = || bulkhead.raw(&["verify", "named"]);
    let held = verify();
    assert_eq!(held.code, 0, "{held:?}");
    for what in ["filter", "host's gate"] {
        let said = format!(" {what}: ");
        let line = held.stdout.lines().find(|line| line.contains(&said));
        assert!(
            line.is_some_and(|line| line.contains("rules in")),
            "{held:?}"
        );
    }

    // Nobody resolves, and nothing more is open, while nobody watches.
    kill(vm.supervisor(), Signal::SIGKILL).unwrap();
    vm.becomes("lost");
    let inside = bulkhead::host::netns::Netns::open(&bulkhead.runtime().join("named.netns"));
    let inside = inside.unwrap();
    let sockets = sh_in(&inside, "cat /proc/self/net/udp /proc/self/net/tcp");
    assert!(!sockets.contains(":0035 "), "{sockets}");
    drop(inside);
    assert!(bulkhead.must(&["gc"]).contains("took over named"));
    // What was let through before is not: its name is not known any more.
    tries(&[
        ("tcp 93.184.215.15 80", "refused"),
        evil,
        ("name good.org", "try again"),
    ]);

    // A change that fails after its rules are made, here for a link that is gone, is
    // taken back.
    let inside = bulkhead::host::netns::Netns::open(&bulkhead.runtime().join("named.netns"));
    let inside = inside.unwrap();
    sh_in(&inside, "ip link set out down; ip link set out name gone");
    let changed = bulkhead.raw(&["net", "allow", "named", "--cidr", "10.1.2.3/32:5432"]);
    assert!(changed.code != 0, "{changed:?}");
    assert_eq!(verify().code, 0, "{:?}", verify());
    sh_in(&inside, "ip link set gone name out");

    // Somebody changes its rules, until it is started again: one address in one of
    // them; what no machine may reach; all of a chain; a port; a whole table.
    let handle = "nft -a list chain netdev bulkhead ip4 | grep ' # handle ' | grep -v '{' | sed -n '4s/.* //p'";
    let handle = sh_in(&inside, handle);
    let other = format!("handle {} @nh,96,32 0xc6120003 accept", handle.trim());
    for (change, named) in [
        (
            format!("replace rule netdev bulkhead ip4 {other}"),
            "ip4 (rule 4, ip saddr 198.18.0.2 accept)",
        ),
        (
            "delete element inet bulkhead never4 '{ 192.168.0.0/16 : goto refuse-private }'".into(),
            "never4: 192.168.0.0 leads to nothing",
        ),
        (
            "flush chain inet bulkhead refuse-cgnat".into(),
            "refuse-cgnat (0 rules instead of 2",
        ),
        (
            "add element inet bulkhead ports-tcp '{ 8000 }'".into(),
            "ports-tcp: other ports",
        ),
        (
            "add table netdev bulkhead '{ flags dormant; }'".into(),
            "ip4 (0 rules instead of",
        ),
    ] {
        sh_in(&inside, &format!("nft {change}"));
        let open = verify();
        assert!(open.code != 0 && open.stdout.contains(named), "{open:?}");
    }
    drop(inside);

    let follow = ["--json", "net", "log", "-f", "named"];
    let mut follow = bulkhead.command(&follow);
    let follow = follow.stdout(std::process::Stdio::piped()).spawn().unwrap();
    bulkhead.must(&["restart", "named"]);
    assert_eq!(verify().code, 0);
    tries(&[evil, ("name good.org", "try again")]);
    bulkhead.must(&["stop", "--force", "named"]);
    let followed = follow.wait_with_output().unwrap();
    assert!(followed.status.success());
    let followed = String::from_utf8(followed.stdout).unwrap();
    assert!(events(&followed).len() > refused.len());
    let line = vm.inspect()["ended"]["network"]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(line.starts_with("1 host, 1 refused"), "{line}");
    bulkhead.must(&["rm", "named"]);
    internet.world.settle();
    let after = sh_in(
        host,
        "ip -o link | sed 's/^[0-9]*//'; ip route; nft list tables",
    );
    assert_eq!(after, before);
    assert_eq!(support::entries(bulkhead.runtime()), [""; 0]);
}
