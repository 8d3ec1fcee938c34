//! What a machine uses, as the host sees it: the guest is not asked.

use std::fs;
use std::path::{Path, PathBuf};

use qapi::qmp::{query_block, query_blockstats};
use serde::{Deserialize, Serialize};

use super::MachineError;
use super::machine::Machine;
use crate::host::process;
use crate::plan::SCRATCH_ID;
use crate::qmp::Monitor;

/// What a machine uses and has used. Times and counts are since its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// CPU time of QEMU, all threads, in milliseconds.
    pub cpu_ms: u64,
    /// The part of it that the virtual CPUs used.
    pub vcpu_ms: u64,
    /// Resident memory of QEMU in bytes.
    pub rss_bytes: u64,
    /// The same with shared pages counted in parts; absent where the kernel
    /// does not tell us.
    pub pss_bytes: Option<u64>,
    /// Memory the guest has, in bytes: without what the balloon holds.
    pub memory_bytes: u64,
    /// Bytes read from all disks.
    pub read_bytes: u64,
    /// Reads.
    pub read_operations: u64,
    /// Bytes written to all disks.
    pub written_bytes: u64,
    /// Writes.
    pub write_operations: u64,
    /// Size of the disk that takes what the guest writes.
    pub disk_bytes: u64,
    /// What this disk takes on the host, in bytes.
    pub disk_allocated_bytes: u64,
}

impl Machine {
    /// What the machine uses.
    ///
    /// # Errors
    /// It has ended, or its monitor does not answer.
    pub async fn stats(&self) -> Result<Stats, MachineError> {
        let pid = self.process().pid();
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let gone = |source| MachineError::Io {
            action: "read what is used of",
            path: proc.clone(),
            source,
        };
        let (cpu_ms, vcpu_ms) = cpu(&proc).map_err(gone)?;
        let rss_bytes = kib(&proc.join("status"), "VmRSS:")
            .map_err(gone)?
            .unwrap_or(0);
        // Only for who may trace QEMU.
        let pss_bytes = kib(&proc.join("smaps_rollup"), "Pss:").ok().flatten();
        let memory_bytes = match self.plan().balloon {
            true => self.memory_actual().await?.0,
            false => self.plan().memory.0,
        };
        let disk = scratch(self.monitor()).await?;
        let blocks: Vec<BlockStats> = self
            .monitor()
            .execute_into(query_blockstats { query_nodes: None })
            .await?;
        let sum = |member: fn(&Counts) -> u64| blocks.iter().map(|one| member(&one.stats)).sum();
        Ok(Stats {
            cpu_ms,
            vcpu_ms,
            rss_bytes,
            pss_bytes,
            memory_bytes,
            read_bytes: sum(|counts| counts.rd_bytes),
            read_operations: sum(|counts| counts.rd_operations),
            written_bytes: sum(|counts| counts.wr_bytes),
            write_operations: sum(|counts| counts.wr_operations),
            disk_bytes: disk.size,
            disk_allocated_bytes: disk.allocated,
        })
    }
}

/// CPU time of a process, and of its threads for virtual CPUs. QEMU names
/// those `CPU 0/KVM` or `CPU 0/TCG` (`debug-threads=on`).
fn cpu(proc: &Path) -> std::io::Result<(u64, u64)> {
    let mut vcpu = 0;
    for thread in fs::read_dir(proc.join("task"))? {
        let thread = thread?.path();
        // A worker thread may end meanwhile.
        let name = fs::read_to_string(thread.join("comm")).unwrap_or_default();
        if name.starts_with("CPU ") {
            vcpu += process::cpu_ms(&thread.join("stat"))?;
        }
    }
    Ok((process::cpu_ms(&proc.join("stat"))?, vcpu))
}

/// A line of a file in /proc that gives KiB, in bytes.
fn kib(file: &Path, name: &str) -> std::io::Result<Option<u64>> {
    let text = fs::read_to_string(file)?;
    Ok(text.lines().find_map(|line| {
        let value = line.strip_prefix(name)?.trim().strip_suffix(" kB")?;
        value.parse::<u64>().ok()?.checked_mul(1024)
    }))
}

/// The disk that takes what the guest writes.
pub(super) struct Disk {
    /// In bytes.
    pub(super) size: u64,
    /// Bytes it takes on the host.
    pub(super) allocated: u64,
}

/// Asks QEMU for the scratch disk.
pub(super) async fn scratch(monitor: &Monitor) -> Result<Disk, MachineError> {
    let blocks: Vec<Block> = monitor.execute_into(query_block {}).await?;
    // On microvm it is the path of the device's only child.
    let ours = |qdev: &str| qdev.split('/').any(|part| part == SCRATCH_ID);
    blocks
        .into_iter()
        .find(|block| block.qdev.as_deref().is_some_and(ours))
        .and_then(|block| block.inserted)
        .map(|inserted| Disk {
            size: inserted.image.virtual_size,
            allocated: inserted.image.actual_size,
        })
        .ok_or(MachineError::Missing {
            what: "the disk that takes what the guest writes",
        })
}

#[derive(Deserialize)]
struct Block {
    #[serde(default)]
    qdev: Option<String>,
    #[serde(default)]
    inserted: Option<Inserted>,
}

#[derive(Deserialize)]
struct Inserted {
    image: ImageInfo,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct ImageInfo {
    virtual_size: u64,
    #[serde(default)]
    actual_size: u64,
}

#[derive(Deserialize)]
struct BlockStats {
    stats: Counts,
}

#[derive(Deserialize)]
struct Counts {
    rd_bytes: u64,
    wr_bytes: u64,
    rd_operations: u64,
    wr_operations: u64,
}
