//! Where and with what something was measured. No paths, no names of machines.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::config::{Bed, Config};

/// Host facts, versions and commit.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Facts {
    /// Model of the processors.
    pub(super) cpu: String,
    pub(super) cpus: usize,
    pub(super) memory_mib: u64,
    /// The host's kernel.
    pub(super) kernel: String,
    /// Load of the last minute before the bench: other work than this.
    pub(super) load: f64,
    pub(super) qemu: String,
    pub(super) guest_kernel: String,
    pub(super) machine: String,
    pub(super) accel: String,
    /// The guest's processors and memory.
    pub(super) guest: String,
    /// Whether files were in the page cache.
    pub(super) cache: String,
    pub(super) commit: String,
    pub(super) date: String,
    /// Versions of whoever else took part.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) versions: BTreeMap<String, String>,
}

/// The first line a program prints.
pub(super) fn first_line(program: &Path, words: &[&str]) -> Result<String> {
    let output = Command::new(program).args(words).output();
    let output = output.with_context(|| format!("cannot run {}", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

impl Facts {
    /// Looked up before the bench begins.
    pub(super) fn gather(bed: &Bed, config: &Config) -> Result<Self> {
        let (image, plan) = bed.plan(config)?;
        let cpus = fs::read_to_string("/proc/cpuinfo")?;
        let model = cpus
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let memory = fs::read_to_string("/proc/meminfo")?;
        let total = memory
            .lines()
            .find_map(|line| line.strip_prefix("MemTotal:"));
        let kib = total.and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok());
        let load = fs::read_to_string("/proc/loadavg")?;
        let load = load.split(' ').next().and_then(|text| text.parse().ok());
        let git = |words: &[&str]| first_line(Path::new("git"), words);
        let dirty = !git(&["status", "--porcelain", "--untracked-files=no"])?.is_empty();
        let commit = git(&["rev-parse", "--short", "HEAD"])?;
        Ok(Self {
            cpu: model.map_or("unknown", |(_, name)| name).to_owned(),
            cpus: std::thread::available_parallelism()?.get(),
            memory_mib: kib.unwrap_or(0) / 1024,
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?
                .trim()
                .to_owned(),
            load: load.unwrap_or(0.0),
            qemu: first_line(&plan.qemu, &["--version"])?,
            guest_kernel: config
                .kernel
                .clone()
                .unwrap_or(image.manifest.kernel.release),
            machine: config.machine.clone(),
            accel: config.accel.clone(),
            guest: format!("{} CPU, {} MiB", config.cpus, config.memory),
            cache: match config.cold {
                true => "cold",
                false => "warm",
            }
            .to_owned(),
            commit: match dirty {
                true => format!("{commit} with changes"),
                false => commit,
            },
            date: first_line(Path::new("date"), &["-u", "+%F"])?,
            versions: BTreeMap::new(),
        })
    }

    /// Two or three lines for people.
    pub(super) fn text(&self) -> String {
        let mut text = format!(
            "host: {} x {}, {} MiB, Linux {}, load {:.1} before it began\n\
             {}, {} {}, guest kernel {}, {}, {} page cache\n\
             commit {}, {}\n",
            self.cpus,
            self.cpu,
            self.memory_mib,
            self.kernel,
            self.load,
            self.qemu,
            self.machine,
            self.accel,
            self.guest_kernel,
            self.guest,
            self.cache,
            self.commit,
            self.date
        );
        for (name, version) in &self.versions {
            text += &format!("{name}: {version}\n");
        }
        text
    }
}
