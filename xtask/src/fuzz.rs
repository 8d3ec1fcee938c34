//! `cargo xtask fuzz`: hostile bytes into everything that reads a guest's, an
//! image's or a user's words, steered by coverage (libFuzzer).
//!
//! cargo-fuzz is not needed, and finds what it expects in tests/fuzz. The
//! counters come from LLVM's own pass, so a stable compiler does.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};

use crate::setup;

/// Options.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The target, a file of tests/fuzz/fuzz_targets; all of them when absent.
    target: Option<String>,
    /// How long each target runs.
    #[arg(long, default_value_t = 60)]
    seconds: u32,
}

/// What rustc needs to know: `fuzzing` opens a few doors of the library;
/// counters at every edge, with what is compared; and every check of a debug
/// build.
const FLAGS: &[&str] = &[
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cllvm-args=-simplifycfg-branch-fold-threshold=0",
    "-Cdebug-assertions",
    "-Coverflow-checks",
];
/// The crate with the targets.
const CRATE: &str = "tests/fuzz";
/// An input that takes longer than so many seconds has found something.
const TIMEOUT: u32 = 20;
/// So has one that takes more than so many MiB.
const MEMORY: u32 = 1024;
/// Longest input, in bytes.
const LENGTH: u32 = 16 * 1024;

/// Runs the task.
pub(crate) fn run(args: Args) -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("xtask has a parent")?;
    std::env::set_current_dir(root)?;
    let failed = campaign(args.target.as_deref(), args.seconds)?;
    ensure!(failed == 0, "{failed} targets failed");
    Ok(())
}

/// Every target for a moment: that it still works, and holds on what is found soon.
pub(crate) fn briefly() -> Result<()> {
    let target = None;
    run(Args { target, seconds: 8 })
}

/// Builds and runs the targets; gives how many failed.
fn campaign(target: Option<&str>, seconds: u32) -> Result<usize> {
    let all = targets()?;
    let targets = match target {
        None => all,
        Some(name) => {
            let known = all.join(", ");
            ensure!(
                all.iter().any(|one| one == name),
                "no such target; there are {known}"
            );
            vec![name.to_owned()]
        }
    };
    let programs = build(target)?;
    let results: Vec<Result<String>> = all_at_once(&targets, |target| {
        run_target(&programs.join(target), target, seconds)
    });
    let mut failed = 0;
    for (target, result) in targets.iter().zip(results) {
        match result {
            Ok(summary) => println!("{target}: {summary}"),
            Err(error) => {
                println!("failed: {target}: {error:#}");
                failed += 1;
            }
        }
    }
    println!(
        "{} passed, {failed} failed, 0 skipped",
        targets.len() - failed
    );
    Ok(failed)
}

/// Formatter and clippy: the crate is in no workspace.
pub(crate) fn lint() -> Result<()> {
    let manifest = format!("--manifest-path={CRATE}/Cargo.toml");
    setup::call(Command::new("cargo").args(["fmt", &manifest, "--check"]))?;
    let mut clippy = Command::new("cargo");
    clippy.args([
        "clippy",
        &manifest,
        "--all-targets",
        "--target-dir=target/fuzz",
    ]);
    clippy.args(["--", "-D", "warnings"]);
    setup::call(clippy.env("CARGO_ENCODED_RUSTFLAGS", "--cfg=fuzzing"))
}

/// Names of the targets, sorted.
fn targets() -> Result<Vec<String>> {
    let mut names = Vec::new();
    for file in fs::read_dir(Path::new(CRATE).join("fuzz_targets"))? {
        let path = file?.path();
        let name = path.file_stem().and_then(|name| name.to_str());
        names.push(name.context("a target has a plain name")?.to_owned());
    }
    names.sort();
    Ok(names)
}

/// Builds one target or all; gives the directory with the programs.
fn build(target: Option<&str>) -> Result<PathBuf> {
    let host = host()?;
    let dir = std::path::absolute("target/fuzz")?;
    let mut cargo = Command::new("cargo");
    cargo.args(["build", "--release", "--locked"]);
    cargo.arg(format!("--manifest-path={CRATE}/Cargo.toml"));
    // With a target named, build scripts and macros go without the flags.
    cargo.args(["--target", &host, "--target-dir"]).arg(&dir);
    match target {
        Some(target) => cargo.args(["--bin", target]),
        None => cargo.arg("--bins"),
    };
    cargo.env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\x1f"));
    setup::call(&mut cargo)?;
    Ok(dir.join(host).join("release"))
}

/// The compiler's own target.
fn host() -> Result<String> {
    let output = Command::new("rustc").arg("-vV").output()?;
    let text = String::from_utf8(output.stdout)?;
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc tells its host")?.to_owned())
}

/// Runs `work` on each item, as many at a time as there are processors.
fn all_at_once<T: Send>(
    items: &[String],
    work: impl Fn(&str) -> Result<T> + Sync,
) -> Vec<Result<T>> {
    let width = std::thread::available_parallelism().map_or(1, usize::from);
    let mut results = Vec::new();
    for batch in items.chunks(width) {
        std::thread::scope(|scope| {
            let threads: Vec<_> = batch
                .iter()
                .map(|item| scope.spawn(|| work(item)))
                .collect();
            for thread in threads {
                let result = thread.join();
                results.push(result.unwrap_or_else(|_| bail!("its thread panicked")));
            }
        });
    }
    results
}

/// Runs one target from its corpus on; gives what was reached.
fn run_target(program: &Path, target: &str, seconds: u32) -> Result<String> {
    let corpus = Path::new(CRATE).join("corpus").join(target);
    let seeds = fs::read_dir(&corpus).map_or(0, Iterator::count);
    ensure!(seeds > 0, "{} has no seeds", corpus.display());
    let crashes = Path::new("target/fuzz/crashes").join(target);
    fs::create_dir_all(&crashes)?;
    // What is found is written to the first directory: the corpus stays as it is.
    let found = tempfile::tempdir()?;
    let mut fuzzer = Command::new(program);
    fuzzer.arg(found.path()).arg(&corpus);
    fuzzer.arg(format!("-max_total_time={seconds}"));
    fuzzer.arg(format!("-timeout={TIMEOUT}"));
    fuzzer.arg(format!("-rss_limit_mb={MEMORY}"));
    fuzzer.arg(format!("-max_len={LENGTH}"));
    fuzzer.arg(format!("-artifact_prefix={}/", crashes.display()));
    fuzzer.arg("-print_final_stats=1");
    // Of the library's frames there would be hardly any in it.
    fuzzer.env("RUST_BACKTRACE", "0");
    let output = fuzzer.stdout(Stdio::null()).output();
    let output = output.with_context(|| format!("cannot run {}", program.display()))?;
    let log = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        let again = reproduce(program, &log);
        bail!("{}\n{}{again}", output.status, tail(&log));
    }
    summary(&log).context("libFuzzer told no figures")
}

/// `Test unit written to PATH` becomes a command to run.
fn reproduce(program: &Path, log: &str) -> String {
    let input = log
        .lines()
        .find_map(|line| Some(line.split_once("Test unit written to ")?.1));
    match input {
        Some(input) => format!("run it again with:\n  {} {input}", program.display()),
        None => String::new(),
    }
}

/// The last lines of a log, without the long dump of the input.
fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().filter(|line| line.len() < 400).collect();
    let mut text = lines[lines.len().saturating_sub(40)..].join("\n");
    text.push('\n');
    text
}

/// Runs, and coverage at the start and at the end, in edges of the program.
fn summary(log: &str) -> Option<String> {
    let figure = |line: &str| line.split_once("cov: ")?.1.split(' ').next()?.parse().ok();
    let reached: Vec<u32> = log.lines().filter_map(figure).collect();
    let runs = log
        .lines()
        .find_map(|line| line.strip_prefix("stat::number_of_executed_units:"))?;
    let memory = log
        .lines()
        .find_map(|line| line.strip_prefix("stat::peak_rss_mb:"))?;
    Some(format!(
        "{} runs, coverage {} -> {}, {} MiB",
        runs.trim(),
        reached.first()?,
        reached.last()?,
        memory.trim()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_come_out_of_the_log() {
        let log = "#5\tINITED cov: 112 ft: 113 corp: 2/3b exec/s: 0 rss: 30Mb\n\
                   #9\tNEW    cov: 120 ft: 130 corp: 3/9b\n\
                   stat::number_of_executed_units: 4096\n\
                   stat::peak_rss_mb:              31\n";
        let expected = "4096 runs, coverage 112 -> 120, 31 MiB";
        assert_eq!(summary(log).as_deref(), Some(expected));
        assert_eq!(summary("nothing"), None);
    }

    #[test]
    fn a_crash_names_its_input() {
        let log = "==1== ERROR\nartifact_prefix='x/'; Test unit written to x/crash-1\nBase64: \n";
        let again = reproduce(Path::new("/t/guest"), log);
        assert!(again.ends_with("/t/guest x/crash-1"), "{again}");
        assert_eq!(reproduce(Path::new("/t/guest"), "killed"), "");
    }
}
