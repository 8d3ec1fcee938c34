//! What a machine may use, changed while it runs and restored at its next start.

use std::time::Duration;

use super::wire::{Limit, Settings};
use crate::run::{Machine, MachineError};
use crate::spec::{Bytes, Spec, SpecError, Tuning};

/// How long a change of memory is waited for: the guest may take its time, and
/// goes on afterwards.
const MEMORY: Duration = Duration::from_millis(500);

/// Gives a machine that was just started what it was tuned to.
pub(super) async fn all(machine: &Machine, tuning: &Tuning) -> Result<(), MachineError> {
    if tuning.cpu_quota.is_some() {
        machine.set_cpu_quota(tuning.cpu_quota)?;
    }
    if tuning.io != Default::default() {
        machine.set_io_limits(tuning.io).await?;
    }
    if let Some(memory) = tuning.memory {
        machine.set_memory_target(memory, MEMORY).await?;
    }
    Ok(())
}

/// Holds a machine that was taken over to its CPU quota again.
pub(super) fn quota_again(machine: &Machine, tuning: &Tuning) -> Result<(), MachineError> {
    match machine.cgroup() {
        Ok(_) => machine.set_cpu_quota(tuning.cpu_quota),
        // Then it never had one.
        Err(_) => Ok(()),
    }
}

/// Changes a running machine from what it is to `spec`, as far as `settings`
/// ask for it.
pub(super) async fn change(
    machine: &Machine,
    settings: &Settings,
    spec: &Spec,
) -> Result<(), MachineError> {
    let tuning = &spec.tuning;
    let without = |limits: &[Limit]| limits.iter().any(|limit| settings.without.contains(limit));
    if settings.cpu_quota.is_some() || without(&[Limit::CpuQuota]) {
        machine.set_cpu_quota(tuning.cpu_quota)?;
    }
    if settings.io != Default::default() || without(&[Limit::Io]) {
        machine.set_io_limits(tuning.io).await?;
    }
    let unlimited = without(&[Limit::Upload, Limit::Download, Limit::Total]);
    if settings.network != Default::default() || unlimited {
        machine.set_network(&spec.network, settings.network.denies())?;
    }
    if settings.memory.is_some() || without(&[Limit::Memory]) {
        let target = tuning.memory.unwrap_or(spec.limits.memory);
        machine.set_memory_target(target, MEMORY).await?;
    }
    if let Some(disk) = settings.disk {
        let grown = machine.grow_disk(disk).await?;
        if let Some(warning) = grown.warning {
            tracing::warn!("{warning}");
        }
    }
    Ok(())
}

impl Settings {
    /// Refuses what could not be at the next start either.
    pub(super) fn check(&self, spec: &Spec) -> Result<(), SpecError> {
        self.network.check(&spec.network)?;
        let value = |what, value: String, why| Err(SpecError::Value { what, value, why });
        match (self.cpu_quota, self.memory) {
            (Some(percent), _) if !(1..=6400).contains(&percent) => {
                let why = "1 to 6400 percent of one core are possible";
                value("cpu-quota", percent.to_string(), why)
            }
            (_, Some(memory)) if !(Bytes::mib(64)..=spec.limits.memory).contains(&memory) => {
                let why = "64M up to what the machine was made with are possible";
                value("memory", memory.to_string(), why)
            }
            _ => Ok(()),
        }
    }

    /// Changes a spec accordingly.
    pub(super) fn apply(&self, spec: &mut Spec) {
        spec.limits.disk = self.disk.unwrap_or(spec.limits.disk);
        let tuning = &mut spec.tuning;
        for limit in &self.without {
            match limit {
                Limit::Ttl => spec.lifetime.ttl = None,
                Limit::IdleTimeout => spec.lifetime.idle = None,
                Limit::CpuQuota => tuning.cpu_quota = None,
                Limit::Memory => tuning.memory = None,
                Limit::Io => tuning.io = Default::default(),
                Limit::Upload => spec.network.limits.upload = None,
                Limit::Download => spec.network.limits.download = None,
                Limit::Total => spec.network.limits.total = None,
            }
        }
        self.network.apply(&mut spec.network);
        spec.lifetime.ttl = self.ttl.or(spec.lifetime.ttl);
        spec.lifetime.idle = self.idle_timeout.or(spec.lifetime.idle);
        tuning.cpu_quota = self.cpu_quota.or(tuning.cpu_quota);
        tuning.memory = self.memory.or(tuning.memory);
        let (io, asked) = (&mut tuning.io, self.io);
        io.read_bytes = asked.read_bytes.or(io.read_bytes);
        io.write_bytes = asked.write_bytes.or(io.write_bytes);
        io.read_operations = asked.read_operations.or(io.read_operations);
        io.write_operations = asked.write_operations.or(io.write_operations);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{Catalog, IoLimits, Request};

    #[test]
    fn what_is_absent_stays_and_what_is_taken_away_goes() {
        let mut spec = Request::default()
            .resolve_machine(&Catalog::default())
            .unwrap();
        let io = IoLimits {
            read_bytes: Some(Bytes::mib(1)),
            ..IoLimits::default()
        };
        let settings = Settings {
            cpu_quota: Some(50),
            io,
            ..Settings::default()
        };
        settings.apply(&mut spec);
        let more = Settings {
            io: IoLimits {
                write_operations: Some(7),
                ..IoLimits::default()
            },
            memory: Some(Bytes::mib(128)),
            ..Settings::default()
        };
        more.apply(&mut spec);
        assert_eq!(spec.tuning.cpu_quota, Some(50));
        assert_eq!(spec.tuning.io.read_bytes, Some(Bytes::mib(1)));
        assert_eq!(spec.tuning.io.write_operations, Some(7));
        let without = Settings {
            without: vec![Limit::CpuQuota, Limit::Io, Limit::Memory],
            ..Settings::default()
        };
        without.apply(&mut spec);
        assert_eq!(spec.tuning, Tuning::default());
    }
}
