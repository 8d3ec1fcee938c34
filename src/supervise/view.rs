//! A machine as it is shown.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::run::{Ended, ImageUse, Owner, State, Status, Transition, Violation};
use crate::snapshot::SnapshotName;
use crate::spec::{
    Accel, Bytes, Exception, LabelName, Lifetime, Malformed, NetworkLimits, NetworkMode,
    ProfileName, Spec, Tuning, VmId,
};

/// Whether a machine outlives its command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Made with `bulkhead create`.
    Machine,
    /// That of a `bulkhead run`.
    Run,
}

/// A machine as it is shown. In JSON its fields stay; others may be added.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct View {
    /// Version of this schema.
    pub schema: u32,
    /// Its name.
    pub id: VmId,
    /// Whether it outlives its command.
    pub kind: Kind,
    /// Its state.
    pub state: State,
    /// Why it is in that state.
    pub reason: String,
    /// Since when, in milliseconds since 1970-01-01 UTC.
    pub since_ms: u64,
    /// When it was created, likewise.
    pub created_ms: u64,
    /// When it was last started, likewise.
    pub started_ms: Option<u64>,
    /// When its time is up, likewise.
    pub deadline_ms: Option<u64>,
    /// Its image.
    pub image: ImageUse,
    /// Its profile.
    pub profile: ProfileName,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Guest memory.
    pub memory: Bytes,
    /// Size of its writable disk.
    pub disk: Bytes,
    /// What executes the guest's instructions.
    pub accel: Accel,
    /// Its network.
    pub network: NetworkMode,
    /// What it may use of its network (of one on a bridge, only bandwidth is
    /// limited); absent without a network.
    #[serde(default)]
    pub network_limits: Option<NetworkLimits>,
    /// Exceptions from what no machine may reach that are made for it.
    #[serde(default)]
    pub exceptions: BTreeSet<Exception>,
    /// What ends it besides its user.
    pub lifetime: Lifetime,
    /// What it is held to besides its limits.
    pub tuning: Tuning,
    /// What the user calls it by, besides its name.
    pub labels: BTreeMap<LabelName, String>,
    /// Its main command; empty for none.
    pub command: Vec<String>,
    /// The snapshot it was saved as, or restored from, last; absent for none.
    #[serde(default)]
    pub snapshot: Option<SnapshotName>,
    /// The snapshot whose memory its next start goes on from; absent for none.
    #[serde(default)]
    pub restore: Option<SnapshotName>,
    /// Its supervisor.
    pub supervisor: Option<Owner>,
    /// What its supervisor says of it; absent when it does not run or the
    /// supervisor does not answer.
    pub live: Option<Live>,
    /// How its main command ended last.
    pub ended: Option<Ended>,
    /// Its last 100 changes of state, oldest first; earlier ones are forgotten.
    pub history: Vec<Transition>,
    /// System calls its VMMs were ended for, oldest first.
    #[serde(default)]
    pub violations: Vec<Violation>,
}

/// What the supervisor of a running machine says of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Live {
    /// State of the machine; it counts, should a full disk hold another.
    pub state: State,
    /// Why it is in it.
    pub reason: String,
    /// Since when, in milliseconds since 1970.
    pub since_ms: u64,
    /// QEMU's process id.
    pub vmm_pid: Option<i32>,
    /// QEMU's own word for its state (`query-status`): `running`, `paused`, `io-error`.
    pub vmm: Option<String>,
    /// Whether the guest agent answers.
    pub agent: bool,
    /// Commands and transfers under way.
    pub busy: usize,
    /// Milliseconds since anything happened in it.
    pub idle_ms: u64,
    /// CPU time of QEMU, in milliseconds.
    pub vmm_cpu_ms: u64,
    /// Resident memory of QEMU at the moment, in KiB.
    pub vmm_rss_kib: u64,
    /// Bytes on the host that its disk takes.
    pub disk_bytes: Option<u64>,
}

impl Live {
    /// Of a machine of which nothing more is known.
    pub(super) fn of(status: &Status) -> Self {
        Self {
            state: status.state,
            reason: status.reason.clone(),
            since_ms: status.since_ms,
            vmm_pid: None,
            vmm: None,
            agent: false,
            busy: 0,
            idle_ms: 0,
            vmm_cpu_ms: 0,
            vmm_rss_kib: 0,
            disk_bytes: None,
        }
    }
}

impl View {
    /// The parts that the spec tells.
    pub(super) fn of(spec: &Spec, kind: Kind, state: State, image: ImageUse) -> Self {
        let command = &spec.command;
        let script = command.script.iter().map(|script| script.name.clone());
        Self {
            schema: 1,
            id: spec.id.clone(),
            kind,
            state,
            reason: String::new(),
            since_ms: 0,
            created_ms: 0,
            started_ms: None,
            deadline_ms: None,
            image,
            profile: spec.profile.clone(),
            vcpus: spec.limits.vcpus,
            memory: spec.limits.memory,
            disk: spec.limits.disk,
            accel: spec.accel,
            network: spec.network.mode,
            network_limits: match spec.network.mode {
                NetworkMode::Isolated => None,
                NetworkMode::NatFiltered | NetworkMode::Bridge => Some(spec.network.limits),
            },
            exceptions: spec.network.exceptions.clone(),
            lifetime: spec.lifetime,
            tuning: spec.tuning,
            labels: spec.labels.clone(),
            command: script.chain(command.argv.iter().cloned()).collect(),
            snapshot: None,
            restore: None,
            supervisor: None,
            live: None,
            ended: None,
            history: Vec::new(),
            violations: Vec::new(),
        }
    }
}

/// Which machines are wanted: all of the filters hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Filter {
    /// In this state.
    State(State),
    /// With this label, or with this value of it.
    Label(LabelName, Option<String>),
    /// Whose name contains this.
    Name(String),
    /// Of this image, by name or id.
    Image(String),
    /// Of this kind.
    Kind(Kind),
}

impl std::str::FromStr for Filter {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<Self, Malformed> {
        let malformed = || Malformed {
            value: text.to_owned(),
            expected: "a filter: state=STATE, label=NAME[=VALUE], name=PART, image=IMAGE or \
                       kind=machine|run",
        };
        let (key, value) = text.split_once('=').ok_or_else(malformed)?;
        match key {
            "state" => State::ALL
                .into_iter()
                .find(|state| state.as_str() == value)
                .map(Self::State)
                .ok_or_else(malformed),
            "label" => {
                let (name, value) = match value.split_once('=') {
                    Some((name, value)) => (name, Some(value.to_owned())),
                    None => (value, None),
                };
                Ok(Self::Label(name.parse()?, value))
            }
            "name" => Ok(Self::Name(value.to_owned())),
            "image" => Ok(Self::Image(value.to_owned())),
            "kind" if value == "machine" => Ok(Self::Kind(Kind::Machine)),
            "kind" if value == "run" => Ok(Self::Kind(Kind::Run)),
            _ => Err(malformed()),
        }
    }
}

impl Filter {
    /// Whether a machine is wanted.
    pub fn matches(&self, view: &View) -> bool {
        match self {
            Self::State(state) => view.state == *state,
            Self::Label(name, value) => view
                .labels
                .get(name)
                .is_some_and(|has| value.as_ref().is_none_or(|wanted| wanted == has)),
            Self::Name(part) => view.id.as_str().contains(part.as_str()),
            Self::Image(image) => view.image.name == *image || view.image.id == *image,
            Self::Kind(kind) => view.kind == *kind,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_read_and_bad_ones_named() {
        assert_eq!("state=running".parse(), Ok(Filter::State(State::Running)));
        let team = "team".parse::<LabelName>().unwrap();
        assert_eq!(
            "label=team=x=y".parse(),
            Ok(Filter::Label(team.clone(), Some("x=y".into())))
        );
        assert_eq!("label=team".parse(), Ok(Filter::Label(team, None)));
        for bad in ["", "state", "state=up", "label=", "colour=red", "kind=x"] {
            assert!(bad.parse::<Filter>().is_err(), "{bad}");
        }
    }
}
