//! The record of real guests: which rule let each connection through, when it
//! begins and when it is over, and what exceptions were used for.

mod support;

#[path = "support/dns.rs"]
mod dns;
#[path = "support/internet.rs"]
mod internet;

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::process::Stdio;
use std::time::{Duration, Instant};

use bulkhead::net::{Event, Excepted, What};
use bulkhead::run::{ExceptedEvent, Machine, exceptions, failures};
use bulkhead::spec::{NetworkPolicy, Preset};
use internet::{GOOD, Internet, serve};
use support::live::{Live, sh};
use support::ran;

/// Somebody in the host's LAN, and what a rule says who makes an exception for it.
const LAN: &str = "10.77.0.9";
const EXCEPTION: &str = "10.77.0.9/32:5432";
const BY_EXCEPTION: &str = "allow-cidr:10.77.0.9/32:5432";

/// An internet, and a host in the LAN that listens.
fn internet() -> Internet {
    let internet = Internet::new();
    for port in [80, 5432] {
        let listen = || TcpListener::bind((LAN, port));
        serve(
            internet
                .world
                .internet
                .netns
                .run_in(listen)
                .unwrap()
                .unwrap(),
        );
    }
    internet
}

/// Tries each line in a guest, and holds what comes of it against what must.
async fn matrix(machine: &Machine, rows: &[(&str, &str)]) {
    let script = include_str!("support/try.pl");
    let lines: Vec<_> = rows.iter().map(|(line, _)| *line).collect();
    let lines = lines.join("\n");
    let script = format!(
        "cat > /tmp/try.pl <<'PERL'\n{script}\nPERL\nperl /tmp/try.pl <<'TRIES'\n{lines}\nTRIES"
    );
    let seen = sh(machine, &script).await;
    let expected: Vec<_> = rows.iter().map(|(_, expected)| *expected).collect();
    assert_eq!(seen.lines().collect::<Vec<_>>(), expected, "{lines}");
}

fn policy(preset: Preset, allow: &[&str], exceptions: &[&str]) -> NetworkPolicy {
    NetworkPolicy {
        allow_hosts: allow.iter().map(|text| text.parse().unwrap()).collect(),
        exceptions: exceptions
            .iter()
            .map(|text| text.parse().unwrap())
            .collect(),
        ..NetworkPolicy::of_preset(preset)
    }
}

/// Has the kernel tell that all connections are over, and gives what is on record
/// when all of these are: `new` or `over`, port, rule.
async fn recorded(
    machine: &Machine,
    policy: &NetworkPolicy,
    wanted: &[(&str, Option<u16>, &str)],
) -> Vec<What> {
    machine.set_network(policy, true).unwrap();
    let begin = Instant::now();
    loop {
        let text = std::fs::read_to_string(machine.dir().join("network.jsonl")).unwrap();
        // The last line may be half written.
        let whole = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
        let all: Vec<What> = whole
            .lines()
            .map(|line| serde_json::from_str::<Event>(line).unwrap().what)
            .collect();
        let has = |&(kind, port, rule): &(&str, Option<u16>, &str)| {
            all.iter().any(|what| match what {
                What::Packet(packet) if kind == "new" => {
                    packet.rule.as_deref() == Some(rule)
                        && packet.destination.and_then(|to| to.port) == port
                }
                What::Flow(flow) if kind == "over" => {
                    flow.rule.as_deref() == Some(rule) && flow.destination.port == port
                }
                _ => false,
            })
        };
        let missing: Vec<_> = wanted.iter().filter(|wanted| !has(wanted)).collect();
        if missing.is_empty() {
            return all;
        }
        let waited = begin.elapsed();
        assert!(
            waited < Duration::from_secs(20),
            "{missing:?} are not on record: {all:#?}"
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Nothing was let through, or ended, of which no rule is told.
fn all_have_rules(all: &[What]) {
    let without: Vec<_> = all
        .iter()
        .filter(|what| match what {
            What::Packet(packet) => packet.rule.is_some() == packet.refusal.is_some(),
            What::Flow(flow) => flow.rule.is_none(),
            _ => false,
        })
        .collect();
    assert!(without.is_empty(), "{without:#?}");
}

async fn holds(machine: &Machine) {
    let failed = failures(&machine.verify().await.unwrap()).join("; ");
    assert!(failed.is_empty(), "{failed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_rule_is_named_when_a_connection_begins_and_when_it_is_over() {
    let internet = internet();
    let live = Live::with_site(internet.site());
    let mut open = policy(Preset::Dev, &[], &[EXCEPTION]);
    let ports = open.ports().into_iter().chain(["8443".parse().unwrap()]);
    open.ports = Some(ports.collect());
    let machine = live.start_in(open).await;
    matrix(
        &machine,
        &[
            ("ping 198.18.0.1", "reply"),
            ("name good.org", GOOD),
            (&format!("tcp {GOOD} 22"), "silent"),
            (&format!("tcp {GOOD} 8443"), "silent"),
            (&format!("tcp {LAN} 5432"), "silent"),
            (&format!("tcp {LAN} 80"), "refused"),
        ],
    )
    .await;
    holds(&machine).await;
    // None of what let them through is there any more when they are over.
    let closed = policy(Preset::Offline, &["good.org", "shared.org:8443"], &[]);
    let port_rules = [(22, "preset:dev:22"), (8443, "allow-port:8443")];
    let mut wanted: Vec<_> = ["new", "over"]
        .iter()
        .flat_map(|kind| port_rules.map(|(port, rule)| (*kind, Some(port), rule)))
        .collect();
    wanted.extend([
        ("over", Some(53), "built-in:resolver"),
        ("over", None, "built-in:ping"),
        ("new", Some(5432), BY_EXCEPTION),
        ("over", Some(5432), BY_EXCEPTION),
    ]);
    let all = recorded(&machine, &closed, &wanted).await;
    all_have_rules(&all);
    let said: Vec<_> = all
        .iter()
        .filter_map(|what| match what {
            What::Exception(Excepted { exception, allowed }) => {
                Some((exception.to_string(), *allowed))
            }
            _ => None,
        })
        .collect();
    let exception = EXCEPTION.to_owned();
    assert_eq!(said, [(exception.clone(), true), (exception, false)]);

    matrix(
        &machine,
        &[
            ("web good.org 80 good.org", "200 93.184.215.14"),
            ("web shared.org 8443 shared.org", "200 93.184.215.16"),
            (&format!("tcp {LAN} 5432"), "refused"),
        ],
    )
    .await;
    holds(&machine).await;
    let all = recorded(
        &machine,
        &closed,
        &[
            ("new", Some(80), "allow-host:good.org"),
            ("over", Some(80), "allow-host:good.org"),
            ("new", Some(8443), "allow-host:shared.org:8443"),
            ("over", Some(8443), "allow-host:shared.org:8443"),
        ],
    )
    .await;
    all_have_rules(&all);

    // How the exception was used outlives the machine.
    let (name, traffic) = (machine.plan().id.clone(), machine.traffic().unwrap());
    machine.kill().await.unwrap();
    let summary = traffic.summary();
    assert!(
        summary.exceptions[EXCEPTION].connections >= 1,
        "{summary:?}"
    );
    assert!(summary.line().contains(EXCEPTION), "{}", summary.line());
    let noted = exceptions(&live.host.dirs.exceptions());
    assert!(noted.iter().all(|one| one.machine == name));
    let noted: Vec<_> = noted
        .iter()
        .map(|one| (one.event, one.connections > Some(0)))
        .collect();
    assert_eq!(
        noted,
        [
            (ExceptedEvent::Allowed, false),
            (ExceptedEvent::Denied, true)
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn exceptions_of_a_machine_that_does_not_come_up_have_an_end() {
    let internet = internet();
    let mut live = Live::with_site(internet.site());
    live.host.boot_timeout = Duration::from_millis(200);
    let policy = policy(Preset::Dev, &[], &[EXCEPTION]);
    live.try_start_in(policy).await.unwrap_err();
    let noted = exceptions(&live.host.dirs.exceptions());
    let noted: Vec<_> = noted.iter().map(|one| one.event).collect();
    assert_eq!(noted, [ExceptedEvent::Allowed, ExceptedEvent::Ended]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_with_a_port_of_its_own_is_reached_where_any_host_is_at_others() {
    let internet = internet();
    let live = Live::with_site(internet.site());
    let policy = policy(Preset::Dev, &["shared.org:8443"], &[]);
    let machine = live.start_in(policy.clone()).await;
    matrix(
        &machine,
        &[
            ("web shared.org 8443 shared.org", "200 93.184.215.16"),
            ("web good.org 80 good.org", "200 93.184.215.14"),
            (&format!("tcp {GOOD} 8443"), "refused"),
        ],
    )
    .await;
    holds(&machine).await;
    let wanted = [
        ("new", Some(8443), "allow-host:shared.org:8443"),
        ("new", Some(80), "preset:dev:80"),
    ];
    let all = recorded(&machine, &policy, &wanted).await;
    all_have_rules(&all);
    machine.kill().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn strict_mode_names_the_proxy_and_what_it_went_by() {
    let internet = internet();
    let live = Live::with_site(internet.site());
    let web = format!("{LAN}/32:80");
    let strict = NetworkPolicy {
        strict: true,
        ..policy(Preset::Offline, &["shared.org"], &[&web])
    };
    let machine = live.start_in(strict.clone()).await;
    matrix(
        &machine,
        &[
            ("web shared.org 80 shared.org", "200 93.184.215.16"),
            // An exception by address is not the proxy's.
            (&format!("tcp {LAN} 80"), "silent"),
        ],
    )
    .await;
    holds(&machine).await;
    let by_exception = format!("allow-cidr:{web}");
    let all = recorded(
        &machine,
        &strict,
        &[
            ("new", Some(8443), "built-in:proxy"),
            ("over", Some(80), "built-in:proxy"),
            // The proxy's own, by the name that it read.
            ("new", Some(80), "allow-host:shared.org"),
            ("new", Some(80), &by_exception),
            ("over", Some(80), &by_exception),
        ],
    )
    .await;
    all_have_rules(&all);
    assert!(all.iter().any(|what| matches!(what, What::Proxied(one)
        if one.rule.as_deref() == Some("allow-host:shared.org") && one.refusal.is_none())));
    let traffic = machine.traffic().unwrap();
    machine.kill().await.unwrap();
    // The way to the proxy leads to no host.
    let summary = traffic.summary();
    let hosts: Vec<_> = summary.hosts.keys().map(String::as_str).collect();
    assert_eq!(hosts, ["10.77.0.9 (tcp 80)", "shared.org"]);
    // What was still open when it ended is written down at its end.
    let noted = exceptions(&live.host.dirs.exceptions());
    let last = noted.last().unwrap();
    assert_eq!(last.event, ExceptedEvent::Ended);
    assert!(last.connections > Some(0), "{noted:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_network_of_a_run_changes_while_it_runs() {
    let internet = internet();
    let bulkhead = internet.bulkhead();
    let script = include_str!("support/try.pl");
    let script = format!(
        "cat > /tmp/try.pl <<'PERL'\n{script}\nPERL\necho ready\nwhile read -r line; do echo \"$line\" | perl /tmp/try.pl; done"
    );
    let accel = support::accel();
    let words = ["run", "--accel", &accel, "--image", "base", "--kernel"];
    let words = [&words[..], &["tuned", "--name", "ran", "--memory", "256M"]].concat();
    let network = ["--network", "offline", "--allow-host", "good.org"];
    let command = ["--", "sh", "-c", &script];
    let mut command = bulkhead.command(&[&words[..], &network, &command].concat());
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = bulkhead.spawn(&mut command);
    let mut stdin = child.stdin.take().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = || {
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    };
    assert_eq!(line(), "ready");
    let mut tries = |asked: &str, expected: &str| {
        writeln!(stdin, "{asked}").unwrap();
        assert_eq!(line(), expected, "{asked}");
    };
    let verify = || {
        let seen = bulkhead.raw(&["verify", "ran"]);
        assert_eq!(seen.code, 0, "{seen:?}");
    };
    let (good, evil) = ("web good.org 80 good.org", "web evil.org 80 evil.org");
    let lan = format!("tcp {LAN} 5432");
    tries(good, "200 93.184.215.14");
    tries("name evil.org", "try again");
    tries(&lan, "refused");

    let both = ["--host", "evil.org", "--cidr", EXCEPTION];
    bulkhead.must(&[&["net", "allow", "ran"][..], &both].concat());
    tries(evil, "200 93.184.215.15");
    tries(&lan, "silent");
    tries(good, "200 93.184.215.14");
    verify();
    let shown = bulkhead.must(&["net", "show", "ran"]);
    for words in [
        "allowed      evil.org good.org",
        &format!("exceptions   {EXCEPTION}"),
        &format!("exception {EXCEPTION}"),
    ] {
        assert!(shown.contains(words), "{words}: {shown}");
    }
    let inspected = bulkhead.json(&["inspect", "ran"]);
    assert_eq!(inspected["exceptions"], serde_json::json!([EXCEPTION]));
    let log = bulkhead.must(&["net", "log", "ran"]);
    for words in [
        format!("allowed  exception {EXCEPTION}"),
        format!("new      tcp {LAN}:5432 [{BY_EXCEPTION}]"),
        "[allow-host:evil.org]".into(),
    ] {
        assert!(log.contains(&words), "{words}: {log}");
    }

    // What cannot be is refused, and changes nothing.
    bulkhead.must_fail(
        &["net", "deny", "ran", "--cidr", "10.1.2.3"],
        "value-invalid",
    );
    bulkhead.must_fail(&["set", "ran", "--ttl", "5m"], "machine-attached");
    tries(&lan, "silent");

    bulkhead.must(&[&["net", "deny", "ran"][..], &both].concat());
    tries("name evil.org", "try again");
    tries("tcp 93.184.215.15 80", "refused");
    tries(&lan, "refused");
    tries(good, "200 93.184.215.14");
    verify();

    drop(stdin);
    let over = ran(child.wait_with_output().unwrap());
    assert_eq!(over.code, 0, "{over:?}");
    let told = format!("exception {EXCEPTION} used");
    assert!(over.stderr.contains(&told), "{}", over.stderr);
    let noted = exceptions(&bulkhead.state().join("exceptions.jsonl"));
    let noted: Vec<_> = noted
        .iter()
        .map(|one| (one.event, one.connections))
        .collect();
    assert!(
        matches!(
            noted[..],
            [
                (ExceptedEvent::Allowed, None),
                (ExceptedEvent::Denied, Some(2..))
            ]
        ),
        "{noted:?}"
    );
}
