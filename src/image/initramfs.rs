//! The initramfs: the guest agent as /init, and kernel modules.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use bulkhead_agent::MODULES_DIR;

use super::cpio::Cpio;
use super::error::{Error, Result};
use super::kernel::Kernel;
use super::{Agent, digest};

/// The guest agent's binary, checked and in memory.
pub struct AgentBinary {
    data: Vec<u8>,
    /// What the manifest says about it.
    pub(super) record: Agent,
}

impl AgentBinary {
    /// Reads a binary.
    ///
    /// # Errors
    /// It is missing, or is not a static x86-64 program.
    pub fn read(path: &Path) -> Result<Self> {
        let data = match fs::read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(Error::AgentMissing {
                    path: path.to_owned(),
                });
            }
            other => other.map_err(|source| Error::io("read", path, source))?,
        };
        if let Err(reason) = check(&data) {
            return Err(Error::AgentUnfit {
                path: path.to_owned(),
                reason,
            });
        }
        let record = Agent {
            // One workspace, one version.
            version: env!("CARGO_PKG_VERSION").to_owned(),
            protocol: bulkhead_agent::VERSION,
            sha256: digest::of_bytes(&data),
        };
        Ok(Self { data, record })
    }

    /// Finds the binary: the file asked for, else `BULKHEAD_AGENT`, else
    /// `bulkhead-agent` beside the running program.
    pub fn locate(asked: Option<&Path>) -> PathBuf {
        if let Some(path) = asked {
            return path.to_owned();
        }
        if let Some(path) = std::env::var_os("BULKHEAD_AGENT") {
            return path.into();
        }
        let beside = std::env::current_exe().unwrap_or_default();
        beside.with_file_name("bulkhead-agent")
    }

    /// SHA-256 of the binary.
    pub fn sha256(&self) -> &str {
        &self.record.sha256
    }
}

/// Whether a file is a static x86-64 ELF: nothing could load its libraries.
fn check(data: &[u8]) -> std::result::Result<(), &'static str> {
    let short = "it is not an x86-64 program";
    let number = |at: usize, len: usize| -> std::result::Result<usize, &'static str> {
        let bytes = data.get(at..at.saturating_add(len)).ok_or(short)?;
        let value = bytes.iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b));
        usize::try_from(value).map_err(|_| short)
    };
    if !data.starts_with(b"\x7fELF\x02\x01") || number(18, 2)? != 62 {
        return Err(short);
    }
    let (table, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
    for index in 0..count {
        const PT_INTERP: usize = 3;
        if number(table.saturating_add(index * size), 4)? == PT_INTERP {
            return Err("it is not linked statically");
        }
    }
    Ok(())
}

/// Writes an initramfs.
pub(super) fn write(out: impl Write, agent: &AgentBinary, kernel: &Kernel) -> io::Result<()> {
    let mut cpio = Cpio::new(out);
    for dir in ["/dev", "/proc", "/sys", "/run", "/tmp", "/newroot"] {
        cpio.dir(dir)?;
    }
    // The kernel opens it for the agent before devtmpfs is mounted.
    cpio.char("/dev/console", 5, 1)?;
    cpio.file("/init", 0o755, &agent.data)?;
    if !kernel.modules.is_empty() {
        cpio.dir(MODULES_DIR)?;
        let dir = format!("{MODULES_DIR}/{}", kernel.release);
        cpio.dir(&dir)?;
        let mut order = String::new();
        for module in &kernel.modules {
            cpio.file(&format!("{dir}/{}", module.file), 0o644, &module.data)?;
            order.push_str(&module.file);
            order.push('\n');
        }
        cpio.file(&format!("{dir}/order"), 0o644, order.as_bytes())?;
    }
    cpio.finish()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dynamic_program_is_refused() {
        // Test programs are linked dynamically.
        let program = fs::read(std::env::current_exe().unwrap()).unwrap();
        assert_eq!(check(&program), Err("it is not linked statically"));
        assert_eq!(check(b"#!/bin/sh\n"), Err("it is not an x86-64 program"));
        assert!(check(&program[..40]).is_err());
    }
}
