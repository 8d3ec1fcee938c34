//! `cargo xtask probe`: what goes wrong on purpose, and what is left then.

mod case;
mod faults;
mod guest;
mod monitor;
pub(crate) mod network;
pub(crate) mod place;
mod points;
pub(crate) mod verdict;
pub(crate) mod vmm;

use std::sync::{Mutex, PoisonError};

use anyhow::Result;
use clap::Subcommand;
use serde::Serialize;

/// Options.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    probe: Probe,
}

#[derive(Subcommand)]
enum Probe {
    /// Kill each of our processes, and fail each call, at every step of every verb.
    Faults(faults::Args),
    /// Look at a machine from inside: only what was planned is there.
    Guest(guest::Args),
    /// Tell QEMU over its monitor to reach out of its jail.
    Qmp(monitor::Args),
    /// Start a program in QEMU's place that tries to get out of its jail.
    Vmm(vmm::Args),
    /// Try everything a guest may not do to the network, and what it may.
    Network(network::Args),
}

/// Runs the task.
pub(crate) fn run(args: Args) -> Result<()> {
    let passed = match args.probe {
        Probe::Faults(args) => faults::run(args)?,
        Probe::Guest(args) => guest::run(&args)?,
        Probe::Qmp(args) => monitor::run(&args)?,
        Probe::Vmm(args) => vmm::run(&args)?,
        Probe::Network(args) => network::run(&args)?,
    };
    if !passed {
        // Without a word: the closing line is the last.
        std::process::exit(1);
    }
    Ok(())
}

/// What came of one case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Came {
    Passed,
    Failed,
    Skipped,
}

/// One case.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    /// What was tried.
    pub(crate) case: String,
    /// What came of it.
    pub(crate) came: Came,
    /// What was wrong, or why it was skipped.
    pub(crate) why: Vec<String>,
    /// How to try it again.
    pub(crate) again: String,
    /// How long it took.
    pub(crate) ms: u128,
    /// What should have been seen, and what was, where that is all there is.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub(crate) tried: Option<Tried>,
}

/// What should come of a try, and what came.
#[derive(Debug, Serialize)]
pub(crate) struct Tried {
    pub(crate) expected: String,
    pub(crate) seen: String,
}

/// The cases so far. What fails is said at once.
#[derive(Debug, Default)]
pub(crate) struct Rows {
    all: Mutex<Vec<Row>>,
    /// What passes is said, too.
    each: bool,
}

impl Rows {
    /// Rows of which each is said.
    pub(crate) fn said() -> Self {
        Self {
            each: true,
            ..Self::default()
        }
    }

    /// Takes one in.
    pub(crate) fn add(&self, row: Row) {
        if self.each && row.came == Came::Passed {
            eprintln!("passed: {}", row.case);
        }
        if row.came != Came::Passed {
            let why = row.why.join("\n    ");
            let came = format!("{:?}", row.came).to_lowercase();
            eprintln!("{came}: {}\n    {why}\n    again: {}", row.case, row.again);
        }
        let mut rows = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        rows.push(row);
    }

    /// Prints the rows as JSON where that is wanted, and the closing line: last
    /// on stdout, or on stderr beside JSON. Gives whether none failed.
    ///
    /// # Errors
    /// They cannot be printed.
    pub(crate) fn close(self, json: bool) -> Result<bool> {
        let rows = self
            .all
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        let line = closing(&rows);
        match json {
            true => {
                println!("{}", serde_json::to_string_pretty(&rows)?);
                eprintln!("{line}");
            }
            false => println!("{line}"),
        }
        Ok(rows.iter().all(|row| row.came != Came::Failed))
    }
}

fn closing(rows: &[Row]) -> String {
    let count = |came| rows.iter().filter(|row| row.came == came).count();
    format!(
        "{} passed, {} failed, {} skipped",
        count(Came::Passed),
        count(Came::Failed),
        count(Came::Skipped)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_closing_line_counts_each_kind() {
        let row = |came| Row {
            case: String::new(),
            came,
            why: Vec::new(),
            again: String::new(),
            ms: 0,
            tried: None,
        };
        let rows = [Came::Passed, Came::Failed, Came::Passed, Came::Skipped].map(row);
        assert_eq!(closing(&rows), "2 passed, 1 failed, 1 skipped");
    }
}
