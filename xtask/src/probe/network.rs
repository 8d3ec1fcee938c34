//! `cargo xtask probe network`: what root in a guest tries, against what comes
//! of it, in an internet of the probe's own.
//!
//! The rows are those of tests/network_guest.rs, network_flood.rs, names_guest.rs,
//! clients_guest.rs and bridge_guest.rs, which write each of them down where
//! `BULKHEAD_MATRIX` says: probe and test cannot differ. What is on the list of
//! tries below and in none of them is a failed row.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context as _, Result};
use serde::Deserialize;

use super::{Came, Row, Rows, Tried};
use crate::setup;

const AGAIN: &str = "cargo xtask probe network";

/// What has to be tried, and how the rows of it begin.
const LIST: [(&str, &str); 34] = [
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
        .output()
        .context("cannot run the tests")?;
    let rows = Rows::default();
    let text = fs::read_to_string(&file).unwrap_or_default();
    let lines = text.lines().map(serde_json::from_str);
    let lines: Vec<Line> = lines
        .collect::<Result<_, _>>()
        .context("a row of the test's")?;
    let wrong = lines.iter().filter(|line| line.expected != line.seen);
    let wrong = wrong.count();
    for (what, begin) in LIST {
        if !lines.iter().any(|line| line.case.starts_with(begin)) {
            let case = format!("{what} ({begin})");
            rows.add(row(case, Came::Failed, vec!["it was not tried".into()]));
        }
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
