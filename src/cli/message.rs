//! Errors as people and programs want to read them.

use std::io::{IsTerminal, Write};

use crate::error::{Explain, Failed, Report};
use crate::run::FAILED;
pub(super) use crate::text::visible;

/// A verb that failed.
#[derive(Debug)]
pub(super) struct Failure {
    report: Report,
    code: i32,
}

impl<E: Explain> From<E> for Failure {
    fn from(error: E) -> Self {
        Self {
            report: Report::of(&error),
            code: FAILED,
        }
    }
}

impl Failure {
    /// The same failure with another exit code.
    pub(super) fn with_code(self, code: i32) -> Self {
        Self { code, ..self }
    }

    /// Prints it and gives the exit code.
    pub(super) fn print(self, json: bool) -> i32 {
        print_report(&self.report, json);
        self.code
    }
}

/// Prints a report to stderr.
pub(super) fn print_report(report: &Report, json: bool) {
    if json {
        let error = report.clone();
        say(&serde_json::to_string(&Failed { error }).unwrap_or_default());
        return;
    }
    let Report {
        code,
        what,
        cause,
        remedy,
        ..
    } = report;
    let what = if cause.is_empty() {
        what.clone()
    } else {
        format!("{what}: {cause}")
    };
    let (what, remedy) = (visible(&what), visible(remedy));
    let (bold, plain) = if std::io::stderr().is_terminal() {
        ("\x1b[1;31m", "\x1b[0m")
    } else {
        ("", "")
    };
    say(&format!(
        "{bold}bulkhead: error [{code}]:{plain} {}\n  help: {remedy}",
        what.trim_end()
    ));
}

/// A line on stderr; nobody can be told when that fails.
pub(super) fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Prints a value as JSON to stdout.
pub(super) fn print_json(value: &impl serde::Serialize) {
    if let Ok(text) = serde_json::to_string_pretty(value) {
        print_text(&format!("{text}\n"));
    }
}

/// Prints text to stdout. A reader that went away is no failure of ours.
pub(super) fn print_text(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}
