//! `cargo xtask probe network`: what root in a guest tries, against what comes
//! of it, in an internet of the probe's own.
//!
//! The rows are those of tests/network_guest.rs, network_frames.rs, network_flood.rs,
//! names_guest.rs, clients_guest.rs and bridge_guest.rs, which write each of them
//! down where `BULKHEAD_MATRIX` says: probe and test cannot differ. What is on the list of
//! tries below and in none of them is a failed row.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

use super::{Came, Row, Rows, Tried};
use crate::setup;

const AGAIN: &str = "cargo xtask probe network";

/// What has to be tried, and how the rows of it begin.
const LIST: [(&str, &str); 73] = [
    ("allowed, by address", "tcp 203.0.113.1 80"),
    ("allowed, by name", "web good.org 80 good.org"),
    ("raw IP", "tcp 93.184.215.14 80"),
    ("wrong SNI", "tls shared.org other.org"),
    ("no SNI", "tls shared.org -"),
    ("SNI with another address", "tls 93.184.215.15 shared.org"),
    ("encrypted SNI", "tls shared.org shared.org ech"),
    ("wrong Host", "web shared.org 80 other.org"),
    ("DNS elsewhere", "udp 8.8.8.8 53"),
    ("DoT", "tcp 8.8.8.8 853"),
    ("DoH", "tls 8.8.8.8 dns.google"),
    ("QUIC", "udp 203.0.113.1 443"),
    ("ICMP", "ping 203.0.113.1"),
    ("IPv6", "tcp 2001:db8:2::1 80"),
    ("IPv6, a LAN", "tcp fd00::9 80"),
    ("IPv6, metadata", "tcp fd00:ec2::254 80"),
    ("IPv6, spoofed", "frame ipv6 as ip, with IPv6"),
    ("fragments", "pieces 203.0.113.1 81"),
    ("fragments that overlap", "overlap 203.0.113.1"),
    ("TCP options", "options 203.0.113.1 81"),
    ("source route", "detour 203.0.113.1"),
    ("DNS tunnel", "tunnel big.org"),
    ("TTL-0 rebinding", "name rebind.org"),
    ("metadata", "tcp 169.254.169.254 80"),
    ("metadata redirect", "follow good.org 80"),
    ("CONNECT relay", "relay shared.org 80 evil.org"),
    ("spoofed source", "frame source as ip"),
    ("ARP poisoning", "frame arp as arp"),
    ("VLAN tags", "frame vlan as type"),
    ("sniffing of neighbours", "sniff"),
    ("port scan", "scan 203.0.113.1"),
    ("SYN flood", "flood 203.0.113.1 80"),
    ("10,000 connections", "hold 203.0.113.1 443 10000"),
    ("inbound", "from the internet to the guest"),
    (
        "inbound, by hand",
        "from the internet to the guest's address: ",
    ),
    (
        "inbound, by hand, IPv6",
        "from the internet to the guest's IPv6 address: ",
    ),
    (
        "inbound, from the host",
        "from the host to the guest's address: ",
    ),
    (
        "inbound, from the host, IPv6",
        "from the host to the guest's IPv6 address: ",
    ),
    ("TCP flags", "ipv4: TCP XMAS"),
    ("TCP flags, IPv6", "ipv6: TCP XMAS"),
    ("ACK alone", "ipv4: TCP ACK alone to the LAN"),
    ("ACK alone, IPv6", "ipv6: TCP ACK alone to a private"),
    ("port 0", "ipv4: TCP to port 0"),
    ("port 0 of a name", "port 0 of 2001:db8:2::1"),
    ("GRE", "ipv4: GRE"),
    ("IP in IP", "ipv4: IPv4 (protocol 4)"),
    ("ESP", "ipv4: ESP"),
    ("SCTP", "ipv4: SCTP"),
    ("UDP-Lite", "ipv4: UDP-Lite"),
    ("other protocols, IPv6", "ipv6: GRE"),
    ("record route", "ipv4: a recorded route, to port 81"),
    ("DHCP offers", "ipv4: a DHCP offer"),
    ("DHCP offers on a bridge", "on a bridge: DHCP from another"),
    ("DHCP offers on a tap", "on a tap: DHCP with a length"),
    ("gratuitous ARP", "ipv4: ARP says all as the gateway"),
    ("tags in tags", "ipv4: two tags (802.1ad, 802.1Q)"),
    ("other types", "ipv4: LLDP"),
    ("IPv6, switched off", "without ipv6: TCP to port 80"),
    ("IPv6, pieces", "ipv6: two pieces to port 81"),
    ("IPv6, a piece alone", "ipv6: a piece that is all of it"),
    ("IPv6, tiny pieces", "ipv6: a first piece with half"),
    ("IPv6, pieces that overlap", "ipv6: pieces that overlap"),
    ("IPv6, options", "ipv6: hop-by-hop options, to port 81"),
    ("IPv6, routing headers", "ipv6: routing header 4 to"),
    ("IPv6, in disguise", "ipv6: TCP to ::ffff:10."),
    ("IPv6, a translator", "ipv6: TCP to 64:ff9b::10."),
    ("IPv6, 6to4 and Teredo", "ipv6: TCP to 2001:0:"),
    ("IPv6, link-local", "ipv6: TCP to fe80::1"),
    (
        "IPv6, router advertisements",
        "ipv6: a router advertisement",
    ),
    ("IPv6, redirect", "ipv6: a redirect"),
    ("IPv6, neighbours", "ipv6: it says to all that it is the"),
    ("IPv6, DHCP", "ipv6: a DHCPv6 advertisement"),
    ("IPv6, strict", "tls 2a00:1234::1 other.org"),
];

/// Options.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Print the rows as JSON; the closing line is on stderr then.
    #[arg(long)]
    json: bool,
    /// Where images are kept.
    #[arg(long, env = "BULKHEAD_STATE_DIR", default_value_os_t = setup::usual_state_dir())]
    state_dir: PathBuf,
}

/// A row as the test writes it.
#[derive(Deserialize)]
struct Line {
    case: String,
    expected: String,
    seen: String,
}

/// Runs the task; gives whether no row failed.
pub(crate) fn run(args: &Args) -> Result<bool> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("rows");
    let state = std::path::absolute(&args.state_dir)?;
    let begin = Instant::now();
    let mut tests = setup::cargo(&[
        "test",
        "--package",
        "bulkhead-vm",
        "--test",
        "network_guest",
        "--test",
        "network_frames",
        "--test",
        "names_guest",
        "--test",
        "network_flood",
        "--test",
        "clients_guest",
        "--test",
        "bridge_guest",
    ])?;
    let output = tests
        .args(["--no-fail-fast", "--", "--test-threads=1"])
        .env("BULKHEAD_TEST_STATE", &state)
        .env("BULKHEAD_MATRIX", &file)
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run the tests")?;
    let rows = Rows::default();
    let lines = read(&file)?;
    let wrong = lines.iter().filter(|line| line.expected != line.seen);
    let wrong = wrong.count();
    for case in untried(&lines) {
        rows.add(row(case, Came::Failed, vec!["it was not tried".into()]));
    }
    for line in lines {
        rows.add(told(line, args.json));
    }
    // What is no row: that nothing is left, that it ran at all.
    let ended = output.status.success() || wrong > 0;
    let said = String::from_utf8_lossy(&output.stdout);
    let said = said.lines().filter(|line| !line.trim().is_empty());
    let (came, why) = match ended {
        true => (Came::Passed, Vec::new()),
        false => (Came::Failed, said.map(str::to_owned).collect()),
    };
    rows.add(Row {
        ms: begin.elapsed().as_millis(),
        ..row("the tests around the rows".into(), came, why)
    });
    rows.close(args.json)
}

/// The rows that tests have written down; none where they have not.
fn read(file: &Path) -> Result<Vec<Line>> {
    let text = fs::read_to_string(file).unwrap_or_default();
    let lines = text.lines().map(serde_json::from_str);
    lines
        .collect::<Result<_, _>>()
        .context("a row of the test's")
}

/// What is on the list and in none of these rows.
fn untried(lines: &[Line]) -> Vec<String> {
    let tried = |begin| lines.iter().any(|line| line.case.starts_with(begin));
    let missing = LIST.iter().filter(|(_, begin)| !tried(begin));
    missing
        .map(|(what, begin)| format!("{what} ({begin})"))
        .collect()
}

/// That tests which wrote their rows to this file have tried all of the list.
///
/// # Errors
/// They have not; what is missing is named.
pub(crate) fn tried_by(file: &Path) -> Result<()> {
    let missing = untried(&read(file)?);
    ensure!(missing.is_empty(), "not tried: {}", missing.join(", "));
    Ok(())
}

fn row(case: String, came: Came, why: Vec<String>) -> Row {
    Row {
        case,
        came,
        why,
        again: AGAIN.into(),
        ms: 0,
        tried: None,
    }
}

/// A row of the tests', by what it is on the list; without `json` it is printed.
fn told(line: Line, json: bool) -> Row {
    let Line {
        case,
        expected,
        seen,
    } = line;
    let named = LIST.iter().rfind(|(_, begin)| case.starts_with(begin));
    let case = match named {
        Some((what, _)) => format!("{what}: {case}"),
        None => case,
    };
    let (came, why) = match expected == seen {
        true => (Came::Passed, Vec::new()),
        false => (
            Came::Failed,
            vec![format!("expected {expected}, seen {seen}")],
        ),
    };
    if !json {
        println!("{case}: expected {expected}, seen {seen}");
    }
    Row {
        tried: Some(Tried { expected, seen }),
        ..row(case, came, why)
    }
}
