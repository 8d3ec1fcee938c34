//! Reads every layer of a running machine back, from the kernel and from QEMU:
//! what is planned is one thing, what holds is another.

mod network;
mod process;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use super::MachineError;
use crate::host::lease::Lease;
use crate::plan::Plan;
use crate::qmp::Monitor;
use crate::spec::{Accel, JailLayer, NetworkPolicy};

/// What came of looking at one thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It holds.
    Pass,
    /// It does not: the machine is not confined as planned.
    Fail,
    /// It holds less than with root, as was to be expected.
    Weaker,
    /// The user did without this layer.
    Waived,
    /// The kernel does not show it, or does not have it.
    Unseen,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Finding {
    /// The layer it belongs to.
    pub layer: String,
    /// What was looked at.
    pub what: String,
    /// What came of it.
    pub verdict: Verdict,
    /// What was seen.
    pub measured: String,
    /// What should have been seen, where it was not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected: Option<String>,
}

/// What is looked at.
#[derive(Debug, Clone)]
pub(crate) struct Subject {
    /// What was planned.
    pub(super) plan: Plan,
    /// What was leased.
    pub(super) leases: Vec<Lease>,
    /// The directory of the record, where its disk is.
    pub(super) dir: PathBuf,
    /// The VMM.
    pub(super) pid: i32,
    /// CPU time it is held to now, in percent of one core.
    pub(super) cpu_quota: Arc<Mutex<Option<u32>>>,
    /// What its network is held to now, where it has one.
    pub(super) policy: Option<Arc<Mutex<NetworkPolicy>>>,
    /// Its monitor.
    pub(super) monitor: Monitor,
}

impl Subject {
    /// Looks at everything.
    ///
    /// # Errors
    /// The VMM or its monitor is gone.
    pub(crate) async fn verify(&self) -> Result<Vec<Finding>, MachineError> {
        let mut findings = process::look(self).map_err(|source| MachineError::Io {
            action: "look at the process of",
            path: self.plan.qemu.clone(),
            source,
        })?;
        let network = network::look(self).map_err(|source| MachineError::Io {
            action: "read back the rules of",
            path: self.dir.clone(),
            source,
        })?;
        findings.extend(network);
        findings.extend(self.machine().await?);
        Ok(findings)
    }

    /// What QEMU says: the accelerator and the devices.
    async fn machine(&self) -> Result<Vec<Finding>, MachineError> {
        let mut findings = Vec::new();
        let kvm = self.monitor.execute(qapi::qmp::query_kvm {}).await?.enabled;
        let name = |kvm| if kvm { "kvm" } else { "tcg" };
        let planned = self.plan.accel == Accel::Kvm;
        findings.push(expect("hardware", "accelerator", name(kvm), name(planned)));
        let mut seen = BTreeMap::<String, u32>::new();
        for path in ["/machine/peripheral", "/machine/peripheral-anon"] {
            let path = path.to_owned();
            for one in self.monitor.execute(qapi::qmp::qom_list { path }).await? {
                let kind = one.type_.strip_prefix("child<");
                if let Some(kind) = kind.and_then(|kind| kind.strip_suffix('>')) {
                    *seen.entry(kind.to_owned()).or_default() += 1;
                }
            }
        }
        let mut planned = BTreeMap::<String, u32>::new();
        for pair in self
            .plan
            .args
            .windows(2)
            .filter(|pair| pair[0] == "-device")
        {
            let kind = pair[1].split(',').next().unwrap_or_default();
            *planned.entry(kind.to_owned()).or_default() += 1;
        }
        findings.push(expect("hardware", "devices", &list(&seen), &list(&planned)));
        Ok(findings)
    }
}

fn list(devices: &BTreeMap<String, u32>) -> String {
    let text = devices.iter().map(|(kind, count)| match count {
        1 => kind.clone(),
        count => format!("{count} {kind}"),
    });
    text.collect::<Vec<_>>().join(", ")
}

fn finding(layer: &str, what: &str, verdict: Verdict, measured: impl Into<String>) -> Finding {
    Finding {
        layer: layer.to_owned(),
        what: what.to_owned(),
        verdict,
        measured: measured.into(),
        expected: None,
    }
}

/// Passes where what was seen is what should be.
fn expect(layer: &str, what: &str, measured: &str, expected: &str) -> Finding {
    let verdict = match measured == expected {
        true => Verdict::Pass,
        false => Verdict::Fail,
    };
    Finding {
        expected: (verdict == Verdict::Fail).then(|| expected.to_owned()),
        ..finding(layer, what, verdict, measured)
    }
}

/// `finding` as it counts in this plan: a waived layer cannot fail.
fn counted(plan: &Plan, layer: JailLayer, found: Finding) -> Finding {
    match found.verdict {
        Verdict::Fail if !plan.jail.has(layer) => Finding {
            verdict: Verdict::Waived,
            ..found
        },
        _ => found,
    }
}

/// What does not hold, in one line each.
pub fn failures(findings: &[Finding]) -> Vec<String> {
    let failed = findings.iter().filter(|one| one.verdict == Verdict::Fail);
    let line = |one: &Finding| {
        let expected = one.expected.as_deref().unwrap_or("something else");
        format!(
            "{} ({}): {} instead of {expected}",
            one.what, one.layer, one.measured
        )
    };
    failed.map(line).collect()
}
