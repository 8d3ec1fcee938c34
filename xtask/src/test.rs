//! `cargo xtask test`: everything CI checks, with one closing line.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};

use crate::count::{self, Check, Count};
use crate::probe::network;
use crate::{docs, fuzz, kernel, lab, qemu10, setup};

/// Options.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Where images are kept.
    #[arg(
        long,
        env = "BULKHEAD_STATE_DIR",
        default_value_os_t = setup::usual_state_dir(),
        value_name = "DIR"
    )]
    state_dir: PathBuf,
    /// Run only tests whose name contains this, and no static checks.
    filter: Option<String>,
}

/// Runs the task.
pub(crate) fn run(args: Args) -> Result<()> {
    let begin = Instant::now();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("xtask has a parent")?;
    std::env::set_current_dir(root)?;
    let ready = setup::ensure(&args.state_dir, true)?;
    kernel::ensure(&args.state_dir, true)?;
    let qemu10 = qemu10::ensure(&root.join("target"))?;
    let state = args.state_dir.canonicalize()?;
    // Nobody's any more, or another Bulkhead's: not what these tests leave.
    let mut earlier = cgroups();
    earlier.retain(|group| group.ends_with("/bulkhead"));
    let mut count = Count::default();
    if args.filter.is_none() {
        count.checks(static_checks());
    }
    let rows = tempfile::tempdir()?;
    let matrix = rows.path().join("rows");
    let tests = |wanted: &[&str], threads: &str| -> Result<(ExitStatus, String)> {
        let mut tests = Command::new("cargo");
        tests.args(["test", "--workspace", "--no-fail-fast", "--"]);
        tests.args(["--show-output", "--test-threads", threads]);
        tests.args(wanted);
        tests.env("BULKHEAD_TEST_STATE", &state);
        tests.env("BULKHEAD_MATRIX", &matrix);
        tests.env(
            "BULKHEAD_TEST_AGENT",
            ready.bulkhead.with_file_name("bulkhead-agent"),
        );
        if let Some(qemu10) = &qemu10 {
            tests.env("BULKHEAD_QEMU10", qemu10);
        }
        let output = tests.stdout(Stdio::piped()).spawn()?.wait_with_output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        print!("{text}");
        Ok((output.status, text))
    };
    let (status, text) = tests(args.filter.as_deref().as_slice(), "2")?;
    count.tests(&text);
    ensure!(
        status.success() || count.failed > 0,
        "the tests could not be built or run; see above"
    );
    if let Some(failed) = count::worth_a_second_try(&text) {
        let names = failed.iter().map(String::as_str);
        let wanted: Vec<&str> = ["--exact"].into_iter().chain(names).collect();
        let (status, text) = tests(&wanted, "1")?;
        count.second_try(&failed, status.success(), &text);
    }
    if args.filter.is_none() {
        // The tests fail where a row does; here, where one is left out.
        count.checks(vec![("network matrix", network::tried_by(&matrix))]);
        count.lab(lab::ci(&state));
    }
    // Before the probe, which kills whole machines and clears away after itself.
    let mut left: BTreeSet<String> = cgroups().into_iter().collect();
    left.retain(|group| !earlier.contains(group));
    left.extend(leaks(&state)?);
    if args.filter.is_none() {
        count.checks(programs(&state));
    }
    left.extend(leaks(&state)?);
    for leak in left {
        println!("left behind: {leak}");
        count.failed += 1;
    }
    let allowed = fs::read_to_string("tests/allowed-skips.txt")?;
    for skip in unexpected(&count.skipped, &allowed) {
        println!("skipped without being allowed in tests/allowed-skips.txt: {skip}");
        count.failed += 1;
    }
    println!("all of it took {} s", begin.elapsed().as_secs());
    print!("{}", count.closing());
    if count.failed > 0 {
        bail!("{} tests failed", count.failed);
    }
    Ok(())
}

/// What the compiler and its friends can tell.
fn static_checks() -> Vec<Check> {
    let cargo = |words: &[&str]| {
        let mut command = Command::new("cargo");
        command.args(words).env("RUSTDOCFLAGS", "-D warnings");
        setup::call(&mut command)
    };
    let clippy = |words: &[&str]| cargo(&[&["clippy"], words, &["--", "-D", "warnings"]].concat());
    // The default features are in the workspace's check.
    let alone = [
        "--package",
        "bulkhead-vm",
        "--lib",
        "--examples",
        "--no-default-features",
    ];
    let service = [&alone[..], &["--features", "service"]].concat();
    vec![
        ("rustfmt", cargo(&["fmt", "--all", "--check"])),
        ("clippy", clippy(&["--workspace", "--all-targets"])),
        ("clippy without default features", clippy(&alone)),
        ("clippy with the service only", clippy(&service)),
        ("documentation", cargo(&["doc", "--workspace", "--no-deps"])),
        ("reference", docs::check()),
        ("rustfmt and clippy of tests/fuzz", fuzz::lint()),
    ]
}

/// What is not run by `cargo test`.
fn programs(state: &Path) -> Vec<Check> {
    vec![
        ("examples/embed", embed(state)),
        ("xtask bench", bench(state)),
        ("xtask soak --pool", soak(state)),
        ("xtask probe faults", faults(state)),
        ("xtask probe vmm", jail(state, &["vmm"])),
        (
            "xtask probe qmp",
            jail(state, &["qmp", "--kernel", "tuned"]),
        ),
        (
            "xtask probe guest",
            jail(state, &["guest", "--kernel", "tuned"]),
        ),
        ("xtask fuzz", fuzz::briefly()),
    ]
}

/// Clones with networks out of a pool, shortly.
fn soak(state: &Path) -> Result<()> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["soak", "--pool", "--runs", "30", "--callers", "5"]);
    command.args(["--accel", "tcg"]);
    setup::call(command.arg("--state-dir").arg(state))
}

/// A sample of the steps at which processes die and calls fail.
fn faults(state: &Path) -> Result<()> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["probe", "faults", "--accel", "tcg", "--kernel", "tuned"]);
    // Two at a time on two processors.
    command.args(["--within", "30s"]);
    setup::call(command.arg("--state-dir").arg(state))
}

/// What tries to get out of its jail.
fn jail(state: &Path, probe: &[&str]) -> Result<()> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("probe").args(probe);
    setup::call(command.arg("--state-dir").arg(state))
}

/// The library in somebody else's program, without the command line's dependencies.
fn embed(state: &Path) -> Result<()> {
    let runtime = tempfile::tempdir()?;
    let mut command = Command::new("cargo");
    command.args([
        "run",
        "--quiet",
        "--package",
        "bulkhead-vm",
        "--no-default-features",
    ]);
    command.args(["--example", "embed", "--"]);
    command
        .args([state, runtime.path()])
        .args(["tcg", "echo", "hello"]);
    let output = command.stderr(Stdio::inherit()).output()?;
    ensure!(
        output.status.success() && output.stdout == b"hello\n",
        "it printed {:?} and gave {}",
        String::from_utf8_lossy(&output.stdout),
        output.status
    );
    Ok(())
}

/// A bench, shortly: its subjects and phases, and options that keep it short.
type Brief = (&'static str, &'static [&'static str], usize);

/// That each measures every phase and that the results are read back, not how
/// long anything takes.
const BRIEF: [Brief; 9] = [
    ("boot", &["-n", "1"], 19),
    ("exec", &["-n", "1"], 10),
    ("files", &["-n", "1", "--files", "50"], 10),
    ("memory", &["-n", "1", "--settle", "0"], 7),
    ("density", &["--most", "2"], 2),
    (
        "net",
        &[
            "-n",
            "1",
            "--present",
            "1,2",
            "--cycles",
            "10",
            "--mib",
            "1",
        ],
        20,
    ),
    ("clone", &["-n", "1", "--burst", "2"], 29),
    ("pool", &["-n", "1", "--idle", "1", "--burst", "2"], 6),
    ("reset", &["-n", "1"], 2),
];

fn bench(state: &Path) -> Result<()> {
    let results = tempfile::tempdir()?;
    let this = std::env::current_exe()?;
    for (name, options, rows) in BRIEF {
        let mut command = Command::new(&this);
        command.args(["bench", "--as-built", name, "--json"]);
        command.args(options);
        command.args(["--accel", "tcg", "--kernel", "tuned", "--state-dir"]);
        command.arg(state).arg("--save").arg(results.path());
        let output = command.stderr(Stdio::inherit()).output()?;
        ensure!(output.status.success(), "bench {name}: {}", output.status);
        let report: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        ensure!(
            report["bench"] == name,
            "it calls itself {}",
            report["bench"]
        );
        let found = report["rows"].as_array().context("it has no rows")?;
        ensure!(
            found.len() == rows,
            "bench {name} has {} rows, not {rows}: {report:#}",
            found.len()
        );
        for row in found {
            let fields = row.as_object().context("a row has no fields")?;
            let median = fields.iter().find(|(name, _)| name.starts_with("p50_"));
            let median = median.and_then(|(_, value)| value.as_f64());
            ensure!(
                // Differences may be nothing, or lost in the noise.
                median.is_some_and(|value| {
                    value > 0.0 || row["phase"] == "own-pss" || row["phase"] == "first-extra"
                }) && row["n"].as_u64() >= Some(1),
                "bench {name} did not measure {row}"
            );
        }
        let result = results.path().join(format!("{name}.json"));
        let mut compare = Command::new(&this);
        compare.args(["bench", "compare", "--strict"]);
        let output = compare.args([&result, &result]).output()?;
        ensure!(
            output.status.success(),
            "bench {name} differs from itself: {}",
            String::from_utf8_lossy(&output.stdout)
        );
        let picture = fs::read_to_string(results.path().join(format!("{name}.svg")))?;
        ensure!(picture.ends_with("</svg>\n"), "it drew no picture");
    }
    Ok(())
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

/// What the tests left on this host: runs, half-made images, QEMU processes,
/// and mounts below our directories.
fn leaks(state: &Path) -> Result<Vec<String>> {
    let mut leaks = Vec::new();
    let entries = |dir: &str| {
        fs::read_dir(state.join(dir))
            .into_iter()
            .flatten()
            .flatten()
    };
    for run in entries("runs") {
        if run.file_type()?.is_dir() {
            leaks.push(run.path().display().to_string());
        }
    }
    for image in entries("images") {
        if image.file_name().to_string_lossy().starts_with(".staging") {
            leaks.push(image.path().display().to_string());
        }
    }
    let target = std::env::current_dir()?.join("target");
    let ours = |text: &str| {
        [state, &target]
            .iter()
            .any(|dir| text.contains(&*dir.to_string_lossy()))
    };
    for process in fs::read_dir("/proc")?.flatten() {
        let line = fs::read(process.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let program = ["qemu-system", "mmdebstrap", "tar2sqfs", " supervise "]
            .iter()
            .any(|name| line.contains(name));
        if program && ours(&line) {
            let pid = process.file_name();
            leaks.push(format!("process {}: {line}", pid.to_string_lossy()));
        }
    }
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let places = mounts.lines().filter_map(|line| line.split(' ').nth(1));
    leaks.extend(
        places
            .filter(|place| ours(place))
            .map(|place| format!("mount {place}")),
    );
    Ok(leaks)
}

/// Control groups of machines: in a group `bulkhead`, wherever that is; and such
/// a group that is empty, as it goes with the last machine.
fn cgroups() -> Vec<String> {
    let mut left = vec![PathBuf::from("/sys/fs/cgroup")];
    let mut found = Vec::new();
    while let Some(dir) = left.pop() {
        let entries = fs::read_dir(&dir).into_iter().flatten().flatten();
        let below = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        let below: Vec<PathBuf> = below.map(|entry| entry.path()).collect();
        match dir.ends_with("bulkhead") {
            true if below.is_empty() => found.push(format!("control group {}", dir.display())),
            // Each a machine's.
            true => found.extend(
                below
                    .iter()
                    .map(|dir| format!("control group {}", dir.display())),
            ),
            false => left.extend(below),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_skip_must_be_allowed_by_name() {
        let skipped = BTreeSet::from(["a: why".to_owned(), "b: why".to_owned()]);
        assert_eq!(unexpected(&skipped, "# a comment\na: known\n"), ["b: why"]);
    }
}
