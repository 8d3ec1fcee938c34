//! What a machine may use, changed while it runs and restored at its next start.

use std::time::Duration;

use super::error::SuperviseError;
use super::supervisor::save_spec;
use super::wire::{Limit, Settings};
use crate::host::fault;
use crate::qmp::QmpError;
use crate::run::{Machine, MachineError, RunError, look};
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

/// What a change consists of, in the order in which it is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    CpuQuota,
    Io,
    Network,
    Memory,
    /// What is written down of it.
    Record,
    /// Last, for it cannot be made smaller again.
    Disk,
}

impl Part {
    const ALL: [Self; 6] = [
        Self::CpuQuota,
        Self::Io,
        Self::Network,
        Self::Memory,
        Self::Record,
        Self::Disk,
    ];

    const fn as_str(self) -> &'static str {
        match self {
            Self::CpuQuota => "the CPU quota",
            Self::Io => "the limits of reads and writes",
            Self::Network => "the network",
            Self::Memory => "the memory",
            Self::Record => "the record",
            Self::Disk => "the disk",
        }
    }

    fn is_asked(self, settings: &Settings) -> bool {
        let without =
            |limits: &[Limit]| limits.iter().any(|limit| settings.without.contains(limit));
        match self {
            Self::CpuQuota => settings.cpu_quota.is_some() || without(&[Limit::CpuQuota]),
            Self::Io => settings.io != Default::default() || without(&[Limit::Io]),
            Self::Network => {
                settings.network != Default::default()
                    || without(&[Limit::Upload, Limit::Download, Limit::Total])
            }
            Self::Memory => settings.memory.is_some() || without(&[Limit::Memory]),
            Self::Record => true,
            Self::Disk => settings.disk.is_some(),
        }
    }

    /// Whether it may be half made where it failed like this. A quota is one
    /// write, and a network takes itself back.
    fn is_half_made(self, error: &SuperviseError) -> bool {
        let refused = matches!(
            error,
            SuperviseError::Run(RunError::Machine(
                MachineError::Value { .. } | MachineError::NoBalloon
            ))
        );
        matches!(self, Self::Io | Self::Memory | Self::Record) && !refused
    }

    /// Makes this part of the machine what `spec` says.
    async fn make(self, machine: &Machine, spec: &Spec, deny: bool) -> Result<(), SuperviseError> {
        let point = format!("set {}", self.as_str());
        fault::at(&point).map_err(|source| MachineError::Io {
            action: "set limits of the machine in",
            path: machine.dir().to_owned(),
            source,
        })?;
        let tuning = &spec.tuning;
        match self {
            Self::CpuQuota => machine.set_cpu_quota(tuning.cpu_quota)?,
            Self::Io => machine.set_io_limits(tuning.io).await?,
            Self::Network => machine.set_network(&spec.network, deny)?,
            Self::Memory => {
                let target = tuning.memory.unwrap_or(spec.limits.memory);
                machine.set_memory_target(target, MEMORY).await?;
            }
            Self::Record => save_spec(machine.dir(), spec)?,
            Self::Disk => {
                let grown = machine.grow_disk(spec.limits.disk).await?;
                if let Some(warning) = grown.warning {
                    tracing::warn!("{warning}");
                }
            }
        }
        Ok(())
    }

    /// Makes it again what it was before.
    async fn take_back(self, machine: &Machine, before: &Spec) -> Result<(), SuperviseError> {
        match self {
            // Where nothing could be written, nothing has to be.
            Self::Record if look::spec(machine.dir()).is_ok_and(|spec| spec == *before) => Ok(()),
            // What was let through meanwhile has to pass the rules, too.
            _ => self.make(machine, before, true).await,
        }
    }
}

/// What came of a change.
pub(super) struct Changed {
    /// What the machine is held to now.
    pub(super) spec: Spec,
    /// Whether that is what was asked for.
    pub(super) result: Result<(), SuperviseError>,
}

/// Changes a running machine, and its record, from what they are (`before`), as
/// far as `settings` ask for it: all of it or, where a part fails, nothing.
pub(super) async fn change(machine: &Machine, settings: &Settings, before: Spec) -> Changed {
    if let Err(error) = settings.check(&before) {
        return Changed {
            spec: before,
            result: Err(RunError::from(error).into()),
        };
    }
    let mut spec = before.clone();
    settings.apply(&mut spec);
    let mut parts = Part::ALL.to_vec();
    parts.retain(|part| part.is_asked(settings));
    let deny = settings.network.denies();
    let changed = all_or_none(
        &parts,
        async |part| part.make(machine, &spec, deny).await,
        |part, error| part.is_half_made(error),
        async |part| part.take_back(machine, &before).await,
    );
    let Err(Failed {
        part,
        error,
        mut left,
    }) = changed.await
    else {
        return Changed {
            spec,
            result: Ok(()),
        };
    };
    let mut kept = before;
    let mut rest = "nothing was changed";
    let machine_error = match &error {
        SuperviseError::Run(RunError::Machine(error)) => Some(error),
        _ => None,
    };
    match machine_error {
        Some(MachineError::NotFilled { .. }) => {
            rest = "nothing else was changed";
            kept.limits.disk = spec.limits.disk;
            if let Err(error) = save_spec(machine.dir(), &kept) {
                left.push((Part::Record, error));
            }
        }
        Some(MachineError::Qmp(QmpError::Timeout { .. })) if part == Part::Disk => {
            rest = "nothing else was changed; QEMU may still make it larger";
        }
        // It says so itself.
        Some(MachineError::NetworkAstray { .. }) => rest = "nothing else was changed",
        _ => {}
    }
    let failed = SuperviseError::NotChanged {
        id: kept.id.clone(),
        what: part.as_str(),
        rest: told(rest, &left),
        is_torn: !left.is_empty(),
        source: error.into(),
    };
    Changed {
        spec: kept,
        result: Err(failed),
    }
}

/// What became of the rest of a change, of which `left` could not be taken back.
fn told(rest: &str, left: &[(Part, SuperviseError)]) -> String {
    if left.is_empty() {
        return rest.to_owned();
    }
    let one = |(part, error): &(Part, SuperviseError)| {
        let report = crate::error::Report::of(error);
        match report.cause.as_str() {
            "" => format!("{}: {}", part.as_str(), report.what),
            cause => format!("{}: {}: {cause}", part.as_str(), report.what),
        }
    };
    let left: Vec<String> = left.iter().map(one).collect();
    format!("what could not be taken back: {}", left.join("; "))
}

/// A part of a change that failed.
#[derive(Debug)]
struct Failed<P, E> {
    part: P,
    error: E,
    /// What was changed and could not be taken back, and why not.
    left: Vec<(P, E)>,
}

/// Makes all parts in turn or, where one fails, none: what was made, and the one
/// that failed where it may be half made, is taken back, the last first.
async fn all_or_none<P: Copy, E>(
    parts: &[P],
    make: impl AsyncFn(P) -> Result<(), E>,
    is_half_made: impl Fn(P, &E) -> bool,
    take_back: impl AsyncFn(P) -> Result<(), E>,
) -> Result<(), Failed<P, E>> {
    for (made, part) in parts.iter().enumerate() {
        let Err(error) = make(*part).await else {
            continue;
        };
        let mut left = Vec::new();
        let made = made + usize::from(is_half_made(*part, &error));
        for made in parts.iter().take(made).rev() {
            if let Err(error) = take_back(*made).await {
                left.push((*made, error));
            }
        }
        return Err(Failed {
            part: *part,
            error,
            left,
        });
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
            _ => self.io.check(),
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
    fn what_no_start_could_give_is_refused() {
        let spec = Request::default()
            .resolve_machine(&Catalog::default())
            .unwrap();
        let written = |write_operations| Settings {
            io: IoLimits {
                write_operations,
                ..IoLimits::default()
            },
            ..Settings::default()
        };
        written(Some(1)).check(&spec).unwrap();
        let error = written(Some(0)).check(&spec).unwrap_err();
        assert!(error.to_string().contains("reads or writes"), "{error}");
    }

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

    /// Changes made of `parts`, of which one cannot be, and some cannot be taken
    /// back: what was done, and what came of it.
    async fn tried(
        parts: &[u8],
        fails: u8,
        half: bool,
        stays: &[u8],
    ) -> (Vec<String>, Option<(u8, Vec<u8>)>) {
        let done = std::cell::RefCell::new(Vec::new());
        let result = all_or_none(
            parts,
            async |part| {
                done.borrow_mut().push(format!("make {part}"));
                tokio::task::yield_now().await;
                if part == fails { Err(()) } else { Ok(()) }
            },
            |_, _| half,
            async |part| {
                done.borrow_mut().push(format!("back {part}"));
                if stays.contains(&part) {
                    Err(())
                } else {
                    Ok(())
                }
            },
        );
        let failed = result.await.err().map(|failed| {
            let left = failed.left.iter().map(|(part, ())| *part);
            (failed.part, left.collect())
        });
        (done.into_inner(), failed)
    }

    #[tokio::test]
    async fn what_was_changed_before_a_failure_is_taken_back_in_turn() {
        let parts = [1, 2, 3, 4];
        let (done, failed) = tried(&parts, 0, false, &[]).await;
        assert_eq!(done, ["make 1", "make 2", "make 3", "make 4"]);
        assert_eq!(failed, None);
        let (done, failed) = tried(&parts, 3, false, &[]).await;
        assert_eq!(done, ["make 1", "make 2", "make 3", "back 2", "back 1"]);
        assert_eq!(failed, Some((3, vec![])));
        // What may be half made is taken back as well, and what cannot be keeps
        // nothing else.
        let (done, failed) = tried(&parts, 3, true, &[2]).await;
        let back = ["back 3", "back 2", "back 1"];
        assert_eq!(done[3..], back);
        assert_eq!(failed, Some((3, vec![2])));
        let (done, failed) = tried(&parts, 1, false, &[]).await;
        assert_eq!(done, ["make 1"]);
        assert_eq!(failed, Some((1, vec![])));
    }

    #[test]
    fn only_what_was_begun_is_half_made() {
        let refused = SuperviseError::from(MachineError::NoBalloon);
        let broken = SuperviseError::from(MachineError::Cancelled);
        for part in Part::ALL {
            assert!(!part.is_half_made(&refused), "{part:?}");
            let half = [Part::Io, Part::Memory, Part::Record].contains(&part);
            assert_eq!(part.is_half_made(&broken), half, "{part:?}");
        }
    }

    #[test]
    fn a_failed_change_says_what_failed_and_what_stays() {
        use crate::error::{Explain, Report};
        let value = || MachineError::Value {
            what: "the size of the disk",
            value: "1M".into(),
            why: "it has 2M".into(),
        };
        let failed = |left: &[(Part, SuperviseError)]| SuperviseError::NotChanged {
            id: "vm1".parse().unwrap(),
            what: Part::Disk.as_str(),
            rest: told("nothing was changed", left),
            is_torn: !left.is_empty(),
            source: Box::new(value().into()),
        };
        let report = Report::of(&failed(&[]));
        assert_eq!(
            (report.code.as_str(), report.what.as_str()),
            (
                "value-invalid",
                "cannot change the disk of vm1 (nothing was changed)"
            )
        );
        assert_eq!(report.cause, "the size of the disk cannot be 1M: it has 2M");
        let torn = failed(&[(Part::CpuQuota, MachineError::Cancelled.into())]);
        assert_eq!(
            torn.to_string(),
            "cannot change the disk of vm1 (what could not be taken back: the CPU quota: \
             the machine was stopped before it was up)"
        );
        assert_eq!(
            torn.remedy(),
            "See what it is held to with `bulkhead inspect vm1`, and set it again."
        );
    }
}
