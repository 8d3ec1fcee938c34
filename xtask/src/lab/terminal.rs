//! The developer's own terminal, raw while the lab's shell has it.

use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use bulkhead_agent::Size;

/// Raw mode for as long as it lives.
pub(super) struct RawMode {
    before: String,
    pub(super) size: Size,
    pub(super) term: String,
}

impl RawMode {
    pub(super) fn enter() -> Result<Self> {
        let before = stty(&["-g"]).context("a shell needs a terminal")?;
        let text = stty(&["size"])?;
        let mut words = text.split(' ').map(str::parse);
        let (Some(Ok(rows)), Some(Ok(cols))) = (words.next(), words.next()) else {
            anyhow::bail!("stty says {text:?} of this terminal's size");
        };
        stty(&["raw", "-echo"])?;
        let term = std::env::var("TERM").unwrap_or_else(|_| "linux".into());
        let size = Size { rows, cols };
        Ok(Self { before, size, term })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        let _ = stty(&[&self.before]);
    }
}

fn stty(words: &[&str]) -> Result<String> {
    let mut command = Command::new("stty");
    let output = command.args(words).stdin(Stdio::inherit()).output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "stty: {}", stderr.trim());
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}
