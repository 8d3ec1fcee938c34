//! `cargo xtask coverage`: which lines of the library the tests reach, those
//! in machines included.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::{kernel, qemu10, setup};

/// Options.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Fail below this many percent of lines.
    #[arg(long, default_value_t = 80.0)]
    min: f64,
    /// Where images are kept.
    #[arg(
        long,
        env = "BULKHEAD_STATE_DIR",
        default_value_os_t = setup::usual_state_dir(),
        value_name = "DIR"
    )]
    state_dir: PathBuf,
}

/// Lines there are, and lines reached.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
struct Lines {
    count: u64,
    covered: u64,
}

/// Runs the task.
pub(crate) fn run(args: Args) -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("xtask has a parent")?;
    std::env::set_current_dir(root)?;
    let tools = llvm()?;
    let ready = setup::ensure(&args.state_dir, true)?;
    kernel::ensure(&args.state_dir, true)?;
    let qemu10 = qemu10::ensure(&root.join("target"))?;
    let state = args.state_dir.canonicalize()?;
    // Apart from other builds, because everything is compiled differently.
    let target = root.join("target/coverage");
    let profiles = tempfile::tempdir_in(root.join("target"))?;
    let tests = || {
        let mut command = Command::new("cargo");
        command
            .args(["test", "--package", "bulkhead-vm"])
            .env("CARGO_TARGET_DIR", &target)
            .env("RUSTFLAGS", "-Cinstrument-coverage")
            .env("LLVM_PROFILE_FILE", profiles.path().join("%p-%m.profraw"))
            .env("BULKHEAD_TEST_STATE", &state)
            .env(
                "BULKHEAD_TEST_AGENT",
                ready.bulkhead.with_file_name("bulkhead-agent"),
            );
        if let Some(qemu10) = &qemu10 {
            command.env("BULKHEAD_QEMU10", qemu10);
        }
        command
    };
    let built = tests()
        .args(["--no-run", "--message-format=json"])
        .stderr(Stdio::inherit())
        .output()?;
    ensure!(built.status.success(), "the tests could not be built");
    let programs = executables(&String::from_utf8_lossy(&built.stdout));
    setup::call(tests().args(["--no-fail-fast", "--", "--test-threads=2"]))?;

    let merged = profiles.path().join("merged.profdata");
    let mut merge = Command::new(tools.join("llvm-profdata"));
    merge.args(["merge", "--sparse", "--output"]).arg(&merged);
    for profile in fs::read_dir(profiles.path())? {
        merge.arg(profile?.path());
    }
    setup::call(&mut merge)?;
    let mut export = Command::new(tools.join("llvm-cov"));
    export.args(["export", "--summary-only", "--instr-profile"]);
    export.arg(&merged);
    for program in &programs {
        export.arg("--object").arg(program);
    }
    let output = export.stderr(Stdio::inherit()).output()?;
    ensure!(output.status.success(), "llvm-cov failed");
    let report: Value = serde_json::from_slice(&output.stdout)?;
    let modules = modules(&report, &root.join("src"));
    let mut all = Lines::default();
    for (module, lines) in &modules {
        println!(
            "{module:12} {:6.1} % of {:5} lines",
            lines.percent(),
            lines.count
        );
        all.add(*lines);
    }
    println!(
        "{:12} {:6.1} % of {:5} lines",
        "all",
        all.percent(),
        all.count
    );
    if all.percent() < args.min {
        bail!("less than {} %", args.min);
    }
    Ok(())
}

impl Lines {
    fn percent(self) -> f64 {
        100.0 * self.covered as f64 / self.count.max(1) as f64
    }

    fn add(&mut self, other: Self) {
        self.count += other.count;
        self.covered += other.covered;
    }
}

/// LLVM's tools of the version rustc is built with: no other reads its files.
fn llvm() -> Result<PathBuf> {
    let output = Command::new("rustc").arg("-vV").output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = text
        .lines()
        .find_map(|line| line.strip_prefix("LLVM version: ")?.split('.').next())
        .context("rustc does not tell its LLVM version")?;
    let tools = Path::new("/usr/lib").join(format!("llvm-{version}/bin"));
    ensure!(
        tools.join("llvm-cov").exists(),
        "LLVM {version}'s tools are missing: apt-get install llvm-{version}"
    );
    Ok(tools)
}

/// Programs in cargo's messages.
fn executables(messages: &str) -> Vec<PathBuf> {
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter_map(|message| message["executable"].as_str().map(PathBuf::from))
        .collect()
}

/// Lines by the first name below `src`.
fn modules(report: &Value, src: &Path) -> BTreeMap<String, Lines> {
    let mut modules: BTreeMap<String, Lines> = BTreeMap::new();
    for file in report["data"][0]["files"].as_array().into_iter().flatten() {
        let path = file["filename"].as_str().map(Path::new);
        let Some(name) = path.and_then(|path| path.strip_prefix(src).ok()) else {
            continue;
        };
        let module = name.components().next().map(|part| part.as_os_str());
        let module = module.unwrap_or_default().to_string_lossy().into_owned();
        let lines = &file["summary"]["lines"];
        let figure = |key: &str| lines[key].as_u64().unwrap_or_default();
        modules.entry(module).or_default().add(Lines {
            count: figure("count"),
            covered: figure("covered"),
        });
    }
    modules
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_summed_up_by_module_and_others_left_out() {
        let file = |name: &str, count: u64, covered: u64| {
            let lines = serde_json::json!({ "count": count, "covered": covered });
            serde_json::json!({ "filename": name, "summary": { "lines": lines } })
        };
        let files = [
            file("/p/src/run/a.rs", 10, 9),
            file("/p/src/run/b/c.rs", 10, 7),
            file("/p/src/lib.rs", 1, 1),
            file("/elsewhere/x.rs", 100, 0),
        ];
        let report = serde_json::json!({ "data": [{ "files": files }] });
        let modules = modules(&report, Path::new("/p/src"));
        assert_eq!(modules.len(), 2);
        assert_eq!(modules["run"].percent(), 80.0);
    }
}
