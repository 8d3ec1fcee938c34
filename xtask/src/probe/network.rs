//! `cargo xtask probe network`: what root in a guest tries, against what comes
//! of it, in an internet of the probe's own.
//!
//! The rows are those of tests/network_guest.rs, network_flood.rs, names_guest.rs,
//! clients_guest.rs and bridge_guest.rs, which write each of them down where `BULKHEAD_MATRIX` says: probe and test cannot
//! differ.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context as _, Result};
use serde::Deserialize;

use super::{Came, Row, Rows};
use crate::setup;

const AGAIN: &str = "cargo xtask probe network";

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
struct Tried {
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
    let mut wrong = 0;
    for line in text.lines() {
        let tried: Tried = serde_json::from_str(line).context("a row of the test's")?;
        let passed = tried.expected == tried.seen;
        wrong += usize::from(!passed);
        let why = format!("expected {}, seen {}", tried.expected, tried.seen);
        rows.add(Row {
            case: tried.case,
            came: if passed { Came::Passed } else { Came::Failed },
            why: if passed { Vec::new() } else { vec![why] },
            again: AGAIN.into(),
            ms: 0,
        });
    }
    // What is no row: that nothing is left, that it ran at all.
    let ended = output.status.success() || wrong > 0;
    let said = String::from_utf8_lossy(&output.stdout);
    let said = said.lines().filter(|line| !line.trim().is_empty());
    rows.add(Row {
        case: "the tests around the rows".into(),
        came: if ended { Came::Passed } else { Came::Failed },
        why: if ended {
            Vec::new()
        } else {
            said.map(str::to_owned).collect()
        },
        again: AGAIN.into(),
        ms: begin.elapsed().as_millis(),
    });
    rows.close(args.json)
}
