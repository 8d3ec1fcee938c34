//! `cargo xtask test`: everything CI checks, with one closing line.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};

use crate::{qemu10, setup};

/// Options.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Where images are kept.
    #[arg(
        long,
        env = "BULKHEAD_STATE_DIR",
        default_value = "/var/lib/bulkhead",
        value_name = "DIR"
    )]
    state_dir: PathBuf,
    /// Run only tests whose name contains this, and no static checks.
    filter: Option<String>,
}

/// Tests counted from the output of `cargo test`.
#[derive(Debug, Default, PartialEq, Eq)]
struct Count {
    passed: usize,
    failed: usize,
    /// `NAME: reason` of each.
    skipped: BTreeSet<String>,
}

/// Runs the task.
pub(crate) fn run(args: Args) -> Result<()> {
    let begin = Instant::now();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("xtask has a parent")?;
    std::env::set_current_dir(root)?;
    let ready = setup::ensure(&args.state_dir, true)?;
    let qemu10 = qemu10::ensure(&root.join("target"))?;
    if args.filter.is_none() {
        static_checks()?;
    }
    let mut tests = Command::new("cargo");
    tests.args(["test", "--workspace", "--no-fail-fast"]);
    tests.args(args.filter.as_deref());
    tests.args(["--", "--show-output", "--test-threads=2"]);
    tests.env("BULKHEAD_TEST_STATE", args.state_dir.canonicalize()?);
    tests.env(
        "BULKHEAD_TEST_AGENT",
        ready.bulkhead.with_file_name("bulkhead-agent"),
    );
    if let Some(qemu10) = qemu10 {
        tests.env("BULKHEAD_QEMU10", qemu10);
    }
    let output = tests.stdout(Stdio::piped()).spawn()?.wait_with_output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    print!("{text}");
    let mut count = count(&text);
    ensure!(
        output.status.success() || count.failed > 0,
        "the tests could not be built or run; see above"
    );
    for leak in leaks(&args.state_dir)? {
        println!("left behind: {leak}");
        count.failed += 1;
    }
    let allowed = fs::read_to_string("tests/allowed-skips.txt")?;
    for skip in unexpected(&count.skipped, &allowed) {
        println!("skipped without being allowed in tests/allowed-skips.txt: {skip}");
        count.failed += 1;
    }
    println!("all of it took {} s", begin.elapsed().as_secs());
    println!(
        "{} passed, {} failed, {} skipped",
        count.passed,
        count.failed,
        count.skipped.len()
    );
    if count.failed > 0 {
        bail!("{} tests failed", count.failed);
    }
    Ok(())
}

fn static_checks() -> Result<()> {
    let cargo = |words: &[&str]| {
        let mut command = Command::new("cargo");
        command.args(words);
        setup::call(&mut command)
    };
    cargo(&["fmt", "--all", "--check"])?;
    cargo(&[
        "clippy",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ])?;
    // The feature matrix; the default is above.
    for features in [
        &["--no-default-features"][..],
        &["--no-default-features", "--features", "service"],
    ] {
        let words = [
            &["clippy", "--package", "bulkhead-vm", "--lib", "--examples"],
            features,
            &["--", "-D", "warnings"],
        ];
        cargo(&words.concat())?;
    }
    let mut doc = Command::new("cargo");
    doc.args(["doc", "--workspace", "--no-deps"])
        .env("RUSTDOCFLAGS", "-D warnings");
    setup::call(&mut doc)
}

/// Reads `test result: ok. 8 passed; 0 failed; 0 ignored; ...` and
/// `skipped: NAME: reason` lines.
fn count(text: &str) -> Count {
    let mut count = Count::default();
    for line in text.lines().map(str::trim) {
        if let Some(skip) = line.strip_prefix("skipped: ") {
            count.skipped.insert(skip.to_owned());
        }
        if let Some(result) = line.strip_prefix("test result: ") {
            let figure = |what: &str| {
                let before = result.split(what).next()?;
                before.trim().rsplit([' ', '.']).next()?.parse().ok()
            };
            count.passed += figure("passed").unwrap_or(0usize);
            count.failed += figure("failed")
                .and_then(|_: usize| {
                    let (_, rest) = result.split_once("passed; ")?;
                    rest.split(' ').next()?.parse().ok()
                })
                .unwrap_or(0usize);
        }
    }
    // A skipped test returns early, and the harness counts it as passed.
    count.passed = count.passed.saturating_sub(count.skipped.len());
    count
}

/// Skips whose name is on no line of the list.
fn unexpected(skipped: &BTreeSet<String>, allowed: &str) -> Vec<String> {
    let names: BTreeSet<&str> = allowed
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split(':').next())
        .map(str::trim)
        .collect();
    let is_allowed = |skip: &&String| {
        skip.split(':')
            .next()
            .is_some_and(|name| names.contains(name))
    };
    skipped
        .iter()
        .filter(|skip| !is_allowed(skip))
        .cloned()
        .collect()
}

/// What the tests left on this host: runs, and QEMU processes of our machines.
fn leaks(state_dir: &Path) -> Result<Vec<String>> {
    let mut leaks = Vec::new();
    if let Ok(runs) = fs::read_dir(state_dir.join("runs")) {
        for run in runs {
            let run = run?;
            if run.file_type()?.is_dir() {
                leaks.push(run.path().display().to_string());
            }
        }
    }
    let state = state_dir.canonicalize()?;
    for process in fs::read_dir("/proc")?.flatten() {
        let line = fs::read(process.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.contains("qemu-system") && line.contains(&*state.to_string_lossy()) {
            leaks.push(format!(
                "process {}: {line}",
                process.file_name().to_string_lossy()
            ));
        }
    }
    Ok(leaks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_and_skips_are_counted() {
        let text = "test result: ok. 8 passed; 0 failed; 0 ignored; 0 measured\n\
                    skipped: qemu10: no such suite\n\
                    test result: FAILED. 3 passed; 2 failed; 0 ignored\n";
        let count = count(text);
        assert_eq!(
            (count.passed, count.failed, count.skipped.len()),
            (10, 2, 1)
        );
    }

    #[test]
    fn a_skip_must_be_allowed_by_name() {
        let skipped = BTreeSet::from(["a: why".to_owned(), "b: why".to_owned()]);
        assert_eq!(unexpected(&skipped, "# a comment\na: known\n"), ["b: why"]);
    }
}
