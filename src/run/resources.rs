//! What a running machine may use, changed while it runs.

use std::time::Duration;

use qapi::qmp::{balloon, query_balloon};
use serde::Deserialize;
use serde_json::json;

use super::MachineError;
use super::machine::Machine;
use crate::host::cgroup::{CgroupError, device_of};
use crate::plan::{ROOT_ID, SCRATCH_ID};
use crate::spec::{Bytes, IoLimits};

/// A guest needs that much to go on working.
const LEAST_MEMORY: Bytes = Bytes::mib(64);
/// The most that can be asked for: every virtual CPU that a machine may have.
const MOST_PERCENT: u32 = 6400;
/// QEMU throttles both disks of a machine together under this name.
const THROTTLE_GROUP: &str = "machine";
/// The guest is looked at so often for memory it gave up without an event.
const LOOK: Duration = Duration::from_secs(1);

/// The part of `query-balloon`.
#[derive(Deserialize)]
struct BalloonInfo {
    actual: u64,
}

impl Machine {
    /// Takes memory from the guest, or gives it back, up to what it was
    /// started with. Waits up to `deadline` and gives what the guest has then:
    /// more than `target` if it cannot spare that much, or has no driver.
    ///
    /// # Errors
    /// No balloon in this machine, less than 64M or more than its memory.
    pub async fn set_memory_target(
        &self,
        target: Bytes,
        deadline: Duration,
    ) -> Result<Bytes, MachineError> {
        if !self.plan().balloon {
            return Err(MachineError::NoBalloon);
        }
        let most = self.plan().memory;
        if !(LEAST_MEMORY..=most).contains(&target) {
            return Err(MachineError::Value {
                what: "the memory of the machine",
                value: target.to_string(),
                why: format!("{LEAST_MEMORY} to {most} are possible"),
            });
        }
        let mut events = self.monitor().events();
        let command = balloon {
            // At most 2^40, as specs are.
            value: i64::try_from(target.0).unwrap_or(i64::MAX),
        };
        self.monitor().execute(command).await?;
        let reached = async {
            // QEMU tells of changes at most once a second, of the last one too.
            while self.memory_actual().await? != target {
                let change = events.wait_for("BALLOON_CHANGE", LOOK, |_| true).await;
                if let Err(error) = change
                    && error.is_closed()
                {
                    return Err(error.into());
                }
            }
            Ok(target)
        };
        match tokio::time::timeout(deadline, reached).await {
            Ok(reached) => reached,
            Err(_) => self.memory_actual().await,
        }
    }

    /// Memory the guest has: what it was started with, less what the balloon holds.
    ///
    /// # Errors
    /// No balloon in this machine.
    pub async fn memory_actual(&self) -> Result<Bytes, MachineError> {
        if !self.plan().balloon {
            return Err(MachineError::NoBalloon);
        }
        let info: BalloonInfo = self.monitor().execute_into(query_balloon {}).await?;
        Ok(Bytes(info.actual))
    }

    /// Limits the CPU time of the whole VMM to `percent` of one core, or lifts
    /// the limit.
    ///
    /// # Errors
    /// The host gave the machine no control group, or 0 or more than 6400 percent.
    pub fn set_cpu_quota(&self, percent: Option<u32>) -> Result<(), MachineError> {
        if let Some(percent) = percent
            && !(1..=MOST_PERCENT).contains(&percent)
        {
            return Err(MachineError::Value {
                what: "the CPU quota",
                value: format!("{percent} %"),
                why: format!("1 % to {MOST_PERCENT} % of one core are possible"),
            });
        }
        let group = self.cgroup().map_err(Clone::clone)?;
        let mut quota = self.cpu_quota();
        group.set_cpu_quota(percent)?;
        *quota = percent;
        Ok(())
    }

    /// Limits what the machine reads and writes; what is absent in `limits` is
    /// not limited any more.
    ///
    /// # Errors
    /// A limit of zero, or QEMU's refusal.
    pub async fn set_io_limits(&self, limits: IoLimits) -> Result<(), MachineError> {
        limits.check()?;
        let bytes = |limit: Option<Bytes>| limit.map_or(0, |bytes| bytes.0);
        let (read, write) = (bytes(limits.read_bytes), bytes(limits.write_bytes));
        let (reads, writes) = (
            limits.read_operations.unwrap_or(0),
            limits.write_operations.unwrap_or(0),
        );
        for id in [ROOT_ID, SCRATCH_ID] {
            // qapi's type has a deprecated member, which cannot be left out.
            let arguments = json!({
                "id": id,
                "group": THROTTLE_GROUP,
                "bps": 0, "bps_rd": read, "bps_wr": write,
                "iops": 0, "iops_rd": reads, "iops_wr": writes,
            });
            self.monitor()
                .execute_raw("block_set_io_throttle", arguments)
                .await?;
        }
        self.hold_to(limits)
    }

    /// The same for whatever QEMU becomes, where the disks' file systems and the
    /// host's control groups allow.
    fn hold_to(&self, limits: IoLimits) -> Result<(), MachineError> {
        let Ok(group) = self.cgroup() else {
            return Ok(());
        };
        let devices = [self.plan().root.as_path(), self.dir()];
        let devices = devices.into_iter().filter_map(device_of).collect();
        match group.set_io(&devices, limits) {
            Err(CgroupError::Unavailable { why }) => {
                tracing::warn!("QEMU alone holds to the limits of reads and writes: {why}");
                Ok(())
            }
            set => Ok(set?),
        }
    }
}
