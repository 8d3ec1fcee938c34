//! From a template to a machine that nobody takes for its sibling.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bulkhead_agent::{Configure, Life, Reply, Request};
use qapi::qmp::{
    MigrationCapability, MigrationCapabilityStatus, migrate_incoming, migrate_set_capabilities,
};
use serde_json::{Value, json};

use super::MachineError;
use super::machine::Live;
use crate::error::Explain;
use crate::guest::{Channel, GuestError};
use crate::host::fault;
use crate::qmp::Monitor;
use crate::snapshot::{Saved, SnapshotName};
use crate::template::Template;

/// How far a clone's clock may be off.
const CLOCK: Duration = Duration::from_millis(100);
/// How often it is set again while the host is too busy to tell.
const TRIES: u32 = 60;

/// What a machine goes on from, and whom it becomes.
#[derive(Debug)]
pub struct Origin {
    /// What it is called: `template ID`, or `snapshot NAME`.
    name: String,
    /// What the guest was when it was saved.
    life: Life,
    state: File,
    /// Bytes of the state.
    size: u64,
    /// The memory, where it is not in the state.
    pub(super) ram: Option<File>,
    /// The disk, where the machine has none yet.
    pub(super) disk: Option<File>,
    /// Host name and machine id; entropy and clock are taken when it is time.
    identity: Configure,
}

impl Origin {
    /// A template, for a machine that becomes this.
    pub fn template(template: Template, identity: Configure) -> Self {
        Self {
            name: format!("template {}", template.id),
            life: template.manifest.life,
            state: template.state,
            size: template.manifest.state.size,
            ram: Some(template.ram),
            disk: Some(template.disk),
            identity,
        }
    }

    /// The memory of a snapshot, for a machine that becomes this.
    pub(super) fn snapshot(
        name: &SnapshotName,
        saved: &Saved,
        state: File,
        identity: Configure,
    ) -> Self {
        Self {
            name: format!("snapshot {name}"),
            life: saved.life.clone(),
            state,
            size: saved.state.size,
            ram: None,
            disk: None,
            identity,
        }
    }
}

/// A clone that was not handed out.
#[derive(Debug, thiserror::Error)]
pub enum CloneError {
    /// QEMU could not take in the saved state.
    #[error("the state of {of} could not be restored: {reason}")]
    State {
        /// What it was to go on from.
        of: String,
        /// What QEMU said.
        reason: String,
    },
    /// Its agent is not the one that was saved.
    #[error("what answers is not {of} restored: {why}")]
    Stranger {
        /// What it was to go on from.
        of: String,
        /// What tells.
        why: String,
    },
    /// It could not be made unlike its siblings.
    #[error("what was restored from {of} is not unlike its siblings")]
    Same {
        /// What it was to go on from.
        of: String,
        /// What failed.
        #[source]
        source: GuestError,
    },
    /// Its clock could not be set right.
    #[error("the clock of what was restored from {of} may be {off_ms} ms off")]
    Clock {
        /// What it was to go on from.
        of: String,
        /// How much.
        off_ms: u128,
    },
}

impl Explain for CloneError {
    fn code(&self) -> &'static str {
        match self {
            Self::State { .. } => "restore-failed",
            Self::Stranger { .. } => "clone-unproven",
            Self::Same { .. } => "clone-not-unique",
            Self::Clock { .. } => "clone-clock",
        }
    }

    fn remedy(&self) -> String {
        match self {
            Self::State { of, .. } | Self::Stranger { of, .. } => {
                match of.strip_prefix("template ") {
                    Some(id) => format!(
                        "Nothing ran in it. Boot with --cold, and remove the template with \
                     `bulkhead template rm {id}`."
                    ),
                    None => {
                        "Nothing ran in it. Restore its disk alone: `bulkhead snapshot restore \
                         --disk-only`."
                            .into()
                    }
                }
            }
            Self::Same { .. } => format!(
                "Nothing ran in it. Look at the reason, and at the image's programs in {}; \
                 --cold does without a template, `snapshot restore --disk-only` without the memory.",
                bulkhead_agent::HOOKS
            ),
            Self::Clock { .. } => {
                "The host is too busy: try again later, or boot with --cold.".into()
            }
        }
    }
}

/// What QEMU has to be told of its memory before it saves or restores: that of
/// a template (`apart`) is not in the stream.
pub(super) async fn tell_memory(monitor: &Monitor, apart: bool) -> Result<(), MachineError> {
    let set = |capability, state| MigrationCapabilityStatus { capability, state };
    let capabilities = vec![
        set(MigrationCapability::x_ignore_shared, apart),
        set(MigrationCapability::events, true),
    ];
    monitor
        .execute(migrate_set_capabilities { capabilities })
        .await?;
    Ok(())
}

/// Has QEMU not announce a restored guest's address (RARP): its network knows
/// it, and would have these frames as ones that the guest may not send.
async fn announce_nothing(monitor: &Monitor) -> Result<(), MachineError> {
    let arguments = json!({ "announce-rounds": 0 });
    monitor
        .execute_raw("migrate-set-parameters", arguments)
        .await?;
    Ok(())
}

/// Waits for the end of a save or a restore; gives what it was.
pub(super) async fn migrated(
    events: &mut crate::qmp::Events,
    within: Duration,
) -> Result<String, MachineError> {
    let over = |data: &Value| {
        let status = data["status"].as_str().unwrap_or_default();
        ["completed", "failed", "cancelled"].contains(&status)
    };
    let event = events.wait_for("MIGRATION", within, over).await?;
    Ok(event.data["status"].as_str().unwrap_or_default().to_owned())
}

/// Takes the saved state in; the machine goes on from there.
pub(super) async fn restore(
    monitor: &Monitor,
    origin: &Origin,
    within: Duration,
) -> Result<(), MachineError> {
    let mut events = monitor.events();
    let failed = |reason: String| CloneError::State {
        of: origin.name.clone(),
        reason,
    };
    let (ours, theirs) = fault::at("restore state")
        .and_then(|()| UnixStream::pair())
        .map_err(|error| failed(error.to_string()))?;
    let feed = feed(origin, ours);
    let name = "state".to_owned();
    let incoming = migrate_incoming {
        uri: Some(format!("fd:{name}")),
        channels: None,
        exit_on_error: None,
    };
    // QEMU takes them in this order, and nobody waits in between.
    let ready = async {
        tokio::try_join!(
            async { Ok::<_, MachineError>(monitor.send_fd(&name, theirs.into()).await?) },
            tell_memory(monitor, origin.ram.is_some()),
            announce_nothing(monitor),
            async { Ok(monitor.execute(incoming).await?) },
        )
    };
    ready.await?;
    let status = migrated(&mut events, within).await?;
    let fed = feed.await;
    match (status.as_str(), fed) {
        ("completed", Ok(Ok(()))) => {}
        ("completed", Ok(Err(error))) => return Err(failed(error.to_string()).into()),
        (status, _) => return Err(failed(format!("it {status}")).into()),
    }
    fault::at("restored state").map_err(|error| failed(error.to_string()))?;
    if origin.ram.is_none() {
        // It may have been made to stand still to be saved at all.
        monitor.execute(qapi::qmp::cont {}).await?;
    }
    Ok(())
}

/// Writes the saved state to QEMU.
fn feed(origin: &Origin, mut to: UnixStream) -> tokio::task::JoinHandle<io::Result<()>> {
    let file = origin.state.try_clone();
    let size = origin.size;
    tokio::task::spawn_blocking(move || {
        use std::os::unix::fs::FileExt;
        // Never through the position that all copies of the descriptor share.
        let (file, mut at, mut part) = (file?, 0, vec![0; 64 << 10]);
        while at < size {
            let count = file.read_at(&mut part, at)?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            to.write_all(&part[..count])?;
            at += count as u64;
        }
        Ok(())
    })
}

/// Makes a restored machine unlike its siblings, and has it prove that it was
/// restored and not booted. For each step the guest may take as long as for a boot.
///
/// # Errors
/// One of the steps failed; the machine must not be handed out.
pub(super) async fn settle(
    live: &Live,
    origin: &Origin,
    within: Duration,
) -> Result<Life, MachineError> {
    let same = |source| CloneError::Same {
        of: origin.name.clone(),
        source,
    };
    let saved = &origin.life;
    fault::at("make clone unique").map_err(|source| {
        same(GuestError::Io {
            action: "making a clone unique",
            source: source.into(),
        })
    })?;
    let request = Request::Restored {
        generation: saved.generation.saturating_add(1),
        identity: super::runner::fresh(&origin.identity),
    };
    let what = "become unlike its siblings";
    let sent = now();
    let reply = live.channel.ask(what, &request, within).await;
    let received = now();
    let life = told(reply.map_err(same)?).map_err(same)?;
    prove(origin, saved, &life)?;
    // It was set already, and is right unless the rest took long.
    if off(&life, sent, received) <= CLOCK {
        return Ok(life);
    }
    right_clock(&live.channel, &origin.name, within).await
}

/// Sets the guest's clock until it is right; each answer may take `within`.
///
/// # Errors
/// The agent does not answer, or the host is too busy to tell.
pub(super) async fn right_clock(
    channel: &Channel,
    of: &str,
    within: Duration,
) -> Result<Life, MachineError> {
    let mut off = Duration::MAX;
    for _ in 0..TRIES {
        let same = |source| CloneError::Same {
            of: of.to_owned(),
            source,
        };
        let (now, read) = set_clock(channel, within).await.map_err(same)?;
        off = now;
        if off <= CLOCK {
            tracing::debug!(?off, session = read.session, "a clone's clock is right");
            return Ok(read);
        }
    }
    let of = of.to_owned();
    let off_ms = off.as_millis();
    Err(CloneError::Clock { of, off_ms }.into())
}

pub(super) fn told(reply: Reply) -> Result<Life, GuestError> {
    match reply {
        Reply::Life(life) => Ok(life),
        other => Err(GuestError::Protocol(format!(
            "{other:?} instead of its life"
        ))),
    }
}

fn prove(origin: &Origin, saved: &Life, life: &Life) -> Result<(), CloneError> {
    let stranger = |why: String| CloneError::Stranger {
        of: origin.name.clone(),
        why,
    };
    if life.boot_id != saved.boot_id {
        let why = format!("its boot is {}, not {}", life.boot_id, saved.boot_id);
        return Err(stranger(why));
    }
    if life.generation != saved.generation.saturating_add(1) || life.uptime_ms < saved.uptime_ms {
        return Err(stranger(format!(
            "generation {} after {} ms, and it was saved in {} after {} ms",
            life.generation, life.uptime_ms, saved.generation, saved.uptime_ms
        )));
    }
    if life.session == saved.session || life.session.len() != 32 {
        return Err(stranger("its session is the one that was saved".into()));
    }
    Ok(())
}

/// The most that a clock can be off that was read between these.
fn off(read: &Life, sent: Duration, received: Duration) -> Duration {
    let read = Duration::from_nanos(read.unix_ns);
    received.abs_diff(read).max(read.abs_diff(sent))
}

/// Sets the guest's clock, and gives the most that it can be off.
async fn set_clock(channel: &Channel, within: Duration) -> Result<(Duration, Life), GuestError> {
    let sent = now();
    let request = Request::Clock {
        unix_ns: u64::try_from(sent.as_nanos()).unwrap_or(u64::MAX),
    };
    let reply = channel.ask("set its clock", &request, within).await?;
    let received = now();
    let life = told(reply)?;
    Ok((off(&life, sent, received), life))
}

fn now() -> Duration {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default()
}
