//! A detached machine of the program's own, as users make it.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use super::config::{Bed, Config};
use crate::setup;

/// A machine that outlives its verbs; removed when the bench says so.
pub(super) struct Kept<'a> {
    bed: &'a Bed,
    program: PathBuf,
    pub(super) name: String,
}

impl<'a> Kept<'a> {
    /// For one that the bench of this name makes; nothing is made yet.
    pub(super) fn new(bed: &'a Bed, bench: &str) -> Result<Self> {
        Ok(Self {
            bed,
            program: setup::bulkhead()?,
            name: format!("bench-{bench}-{}", std::process::id()),
        })
    }

    /// Makes and starts a machine of this name.
    pub(super) fn create(&self, name: &str, config: &Config) -> Result<()> {
        let (cpus, memory) = (config.cpus.to_string(), format!("{}M", config.memory));
        let mut words = vec!["create", "--name", name, "--image", &config.image];
        words.extend([
            "--start",
            "--machine",
            &config.machine,
            "--accel",
            &config.accel,
        ]);
        words.extend(["--cpus", &cpus, "--memory", &memory, "--channel", "serial"]);
        words.extend(["--network", "isolated", "--domain", "bench"]);
        if let Some(kernel) = &config.kernel {
            words.extend(["--kernel", kernel]);
        }
        let qemu = config.qemu.as_ref().and_then(|path| path.to_str());
        words.extend(qemu.into_iter().flat_map(|path| ["--qemu", path]));
        if !config.clone {
            words.push("--cold");
        }
        self.verb(&words)
    }

    /// Runs a verb that must succeed.
    pub(super) fn verb(&self, words: &[&str]) -> Result<()> {
        setup::call(self.command(words).stdout(Stdio::null()))
    }

    /// What a verb says as JSON.
    pub(super) fn told(&self, words: &[&str]) -> Result<serde_json::Value> {
        let output = self.command(&[&["--json"], words].concat()).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "bulkhead {words:?}: {said}");
        serde_json::from_slice(&output.stdout).context("it gave no JSON")
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(words)
            .env("BULKHEAD_CONFIG", "none")
            .env("BULKHEAD_STATE_DIR", &self.bed.dirs().state)
            .env("BULKHEAD_RUNTIME_DIR", &self.bed.dirs().runtime);
        command
    }
}
