//! Watches the disks of a running machine: what the host cannot write stops
//! the machine (`werror=stop`), and space lets it go on.
//!
//! Events drive it; only while a machine is stopped for want of space is the
//! host's file system looked at now and then.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use qapi::qmp::{cont, query_block, query_status};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::qmp::{Event, Events, Monitor, QmpError};

/// First and longest pause between two looks for space.
const PAUSES: [Duration; 2] = [Duration::from_millis(200), Duration::from_secs(5)];
/// A machine that runs for so long has got over it: pauses start anew.
const CALM: Duration = Duration::from_secs(30);
/// Space that must be free before a machine goes on: a share of the file
/// system, within bounds. With less it would stop again at once.
const MARGIN_SHARE: u64 = 32;
const MARGIN: [u64; 2] = [1 << 20, 64 << 20];

/// How the disks of a machine are.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum DiskState {
    /// Nothing stands in the way of writes.
    #[default]
    Fine,
    /// The machine is stopped until the host has space again.
    Full {
        /// Where its disk is on the host.
        path: PathBuf,
        /// Bytes that are free there.
        free: u64,
    },
    /// The machine is stopped because the host could not write, and waiting
    /// does not help.
    Failed {
        /// Where its disk is on the host.
        path: PathBuf,
        /// What the host said.
        reason: String,
    },
}

impl fmt::Display for DiskState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fine => write!(f, "its disks are fine"),
            Self::Full { path, free } => write!(
                f,
                "paused: the host disk that holds its disk is full: {}, {free} bytes free",
                path.display()
            ),
            Self::Failed { path, reason } => write!(
                f,
                "paused: the host cannot write its disk in {}: {reason}",
                path.display()
            ),
        }
    }
}

/// Follows the disks of one machine until it is dropped or the monitor ends.
#[derive(Debug)]
pub struct DiskWatch {
    dir: PathBuf,
    state: watch::Receiver<DiskState>,
    held: watch::Sender<bool>,
    stalls: Arc<Mutex<Stalls>>,
    task: AbortHandle,
}

impl Drop for DiskWatch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// How often and how long a machine was stopped.
#[derive(Debug, Default)]
struct Stalls {
    count: u32,
    total: Duration,
    since: Option<Instant>,
}

impl DiskWatch {
    /// Watches the machine behind `monitor`, whose disk is in `dir`. It may
    /// have stopped already. Needs a runtime.
    pub fn start(monitor: &Monitor, dir: &Path) -> Self {
        let (held, holds) = watch::channel(false);
        let (sender, state) = watch::channel(DiskState::Fine);
        let stalls = Arc::default();
        let watcher = Watcher {
            // Subscribed before the first look: nothing falls in between.
            events: monitor.events(),
            monitor: monitor.clone(),
            dir: dir.to_owned(),
            state: sender,
            held: holds,
            stalls: Arc::clone(&stalls),
            pause: PAUSES[0],
            resumed: None,
        };
        Self {
            dir: dir.to_owned(),
            state,
            held,
            stalls,
            task: tokio::spawn(watcher.run()).abort_handle(),
        }
    }

    /// How the disks are, and when that changes.
    pub fn state(&self) -> watch::Receiver<DiskState> {
        self.state.clone()
    }

    /// What is wrong, if anything is.
    pub fn trouble(&self) -> Option<DiskState> {
        let state = self.state.borrow().clone();
        (state != DiskState::Fine).then_some(state)
    }

    /// While held, a stopped machine is not resumed: its user has paused it.
    pub fn hold(&self, held: bool) {
        self.held.send_replace(held);
    }

    /// What a user should know of the past: how often and for how long the
    /// machine stood still for want of space.
    pub fn stalls(&self) -> Option<String> {
        let stalls = lock(&self.stalls);
        let total = stalls.total + stalls.since.map_or(Duration::ZERO, |since| since.elapsed());
        (stalls.count > 0).then(|| {
            format!(
                "the machine was paused {} for {} ms{}: the host disk that holds its disk was full: {}",
                match stalls.count {
                    1 => "once".to_owned(),
                    count => format!("{count} times"),
                },
                total.as_millis(),
                match stalls.since {
                    Some(_) => ", to its end",
                    None => "",
                },
                self.dir.display()
            )
        })
    }
}

fn lock(stalls: &Mutex<Stalls>) -> std::sync::MutexGuard<'_, Stalls> {
    stalls.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits until writing has failed for good, and gives the state.
pub(super) async fn failed(mut state: watch::Receiver<DiskState>) -> DiskState {
    match state
        .wait_for(|state| matches!(state, DiskState::Failed { .. }))
        .await
    {
        Ok(state) => state.clone(),
        // The watch is over; whoever waits has other things to wait for.
        Err(_) => std::future::pending().await,
    }
}

/// Why the machine stopped.
struct Stop {
    full: bool,
    reason: String,
}

/// The part of `BLOCK_IO_ERROR` that matters here.
#[derive(Deserialize)]
struct IoError {
    action: String,
    #[serde(default)]
    nospace: bool,
    reason: String,
}

/// The part of `query-status`.
#[derive(Deserialize)]
struct Status {
    status: String,
}

/// The part of `query-block`.
#[derive(Deserialize)]
struct Block {
    #[serde(rename = "io-status", default)]
    io_status: Option<String>,
}

impl Stop {
    /// The event that stops a machine; others only report.
    fn of_event(event: &Event) -> Option<Self> {
        if event.name != "BLOCK_IO_ERROR" {
            return None;
        }
        let error: IoError = event.decode().ok()?;
        // QEMU counts ENOSPC only. It runs without a locale: the words are fixed.
        let quota = error.reason.to_ascii_lowercase().contains("quota exceeded");
        (error.action == "stop").then_some(Self {
            full: error.nospace || quota,
            reason: error.reason,
        })
    }
}

struct Watcher {
    monitor: Monitor,
    events: Events,
    dir: PathBuf,
    state: watch::Sender<DiskState>,
    held: watch::Receiver<bool>,
    stalls: Arc<Mutex<Stalls>>,
    pause: Duration,
    resumed: Option<Instant>,
}

impl Watcher {
    async fn run(mut self) {
        // Ends with the monitor: what the machine is doing then is told elsewhere.
        let Err(error) = self.follow().await;
        tracing::debug!(
            "no longer watching the disk in {}: {error}",
            self.dir.display()
        );
    }

    async fn follow(&mut self) -> Result<std::convert::Infallible, QmpError> {
        let mut stop = self.look().await?;
        loop {
            let Some(found) = stop.take() else {
                stop = match self.events.next().await {
                    Ok(event) => Stop::of_event(&event),
                    Err(QmpError::EventsLost { .. }) => self.look().await?,
                    Err(error) => return Err(error),
                };
                continue;
            };
            if found.full {
                self.wait_for_space().await?;
            } else {
                self.tell(DiskState::Failed {
                    path: self.dir.clone(),
                    reason: found.reason,
                });
                while !self.resumed().await? {}
            }
            self.resumed = Some(Instant::now());
            self.state.send_replace(DiskState::Fine);
        }
    }

    /// Whether it stands still now, for events that were not seen.
    async fn look(&self) -> Result<Option<Stop>, QmpError> {
        if self.status().await? != "io-error" {
            return Ok(None);
        }
        let blocks: Vec<Block> = self.monitor.execute_into(query_block {}).await?;
        let has = |status: &str| {
            let mut all = blocks.iter().filter_map(|block| block.io_status.as_deref());
            all.any(|one| one == status)
        };
        Ok(Some(Stop {
            full: has("nospace"),
            reason: "an error it reported earlier".into(),
        }))
    }

    async fn status(&self) -> Result<String, QmpError> {
        let status: Status = self.monitor.execute_into(query_status {}).await?;
        Ok(status.status)
    }

    /// Waits for the next event, and says whether the machine runs on.
    async fn resumed(&mut self) -> Result<bool, QmpError> {
        match self.events.next().await {
            Ok(event) => Ok(event.name == "RESUME"),
            Err(QmpError::EventsLost { .. }) => Ok(self.status().await? == "running"),
            Err(error) => Err(error),
        }
    }

    /// Waits until the machine runs on, and makes it as soon as there is space.
    async fn wait_for_space(&mut self) -> Result<(), QmpError> {
        if self.resumed.is_none_or(|at| at.elapsed() > CALM) {
            self.pause = PAUSES[0];
        }
        {
            let mut stalls = lock(&self.stalls);
            stalls.count += 1;
            stalls.since = Some(Instant::now());
        }
        self.tell(self.full());
        let mut next = tokio::time::Instant::now() + self.pause;
        loop {
            // Of the three, only reading an event may be cut short anywhere.
            let mut held = self.held.clone();
            tokio::select! {
                resumed = self.resumed() => {
                    if resumed? {
                        break;
                    }
                    continue;
                }
                _ = held.changed() => self.held = held,
                () = tokio::time::sleep_until(next) => {}
            }
            let full = self.full();
            let enough = matches!(full, DiskState::Full { free, .. } if free >= self.margin());
            self.state.send_if_modified(|state| {
                let new = *state != full;
                *state = full;
                new
            });
            let held = *self.held.borrow_and_update();
            match self.status().await?.as_str() {
                // Its RESUME was among the events that got lost.
                "running" => break,
                // RESUME comes, and perhaps the next error right behind it.
                // Where somebody paused the machine besides, it is theirs.
                "io-error" if enough && !held => match self.monitor.execute(cont {}).await {
                    Err(error) if error.is_closed() => return Err(error),
                    Err(error) => tracing::warn!("cannot resume the machine: {error}"),
                    Ok(_) => {}
                },
                _ => {}
            }
            self.pause = (self.pause * 2).min(PAUSES[1]);
            next = tokio::time::Instant::now() + self.pause;
        }
        let mut stalls = lock(&self.stalls);
        if let Some(since) = stalls.since.take() {
            stalls.total += since.elapsed();
        }
        Ok(())
    }

    fn tell(&self, state: DiskState) {
        tracing::warn!("{state}");
        self.state.send_replace(state);
    }

    fn full(&self) -> DiskState {
        DiskState::Full {
            path: self.dir.clone(),
            free: space(&self.dir).map_or(0, |space| space.free),
        }
    }

    fn margin(&self) -> u64 {
        let total = space(&self.dir).map_or(0, |space| space.total);
        (total / MARGIN_SHARE).clamp(MARGIN[0], MARGIN[1])
    }
}

/// The size of a file system, in bytes.
pub(super) struct Space {
    /// What anybody may still use.
    pub(super) free: u64,
    total: u64,
}

/// Asks a file system for its space.
pub(super) fn space(dir: &Path) -> std::io::Result<Space> {
    let found = rustix::fs::statvfs(dir)?;
    Ok(Space {
        free: found.f_bavail.saturating_mul(found.f_frsize),
        total: found.f_blocks.saturating_mul(found.f_frsize),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn event(name: &str, data: serde_json::Value) -> Event {
        Event {
            name: name.into(),
            data,
            timestamp: None,
        }
    }

    #[test]
    fn only_an_error_that_stops_counts() {
        let error = |action: &str, nospace: bool, reason: &str| {
            let data = json!({
                "device": "", "node-name": "scratch", "operation": "write",
                "action": action, "nospace": nospace, "reason": reason,
            });
            Stop::of_event(&event("BLOCK_IO_ERROR", data)).map(|stop| stop.full)
        };
        assert_eq!(error("stop", true, "No space left on device"), Some(true));
        assert_eq!(error("stop", false, "Disk quota exceeded"), Some(true));
        assert_eq!(error("stop", false, "Input/output error"), Some(false));
        assert_eq!(error("report", true, "No space left on device"), None);
        assert!(Stop::of_event(&event("STOP", json!({}))).is_none());
        assert!(Stop::of_event(&event("BLOCK_IO_ERROR", json!([]))).is_none());
    }

    #[test]
    fn states_say_what_to_look_at() {
        let full = DiskState::Full {
            path: "/var/lib/x".into(),
            free: 4096,
        };
        assert_eq!(
            full.to_string(),
            "paused: the host disk that holds its disk is full: /var/lib/x, 4096 bytes free"
        );
        let text = serde_json::to_string(&full).unwrap();
        assert_eq!(text, r#"{"state":"full","path":"/var/lib/x","free":4096}"#);
    }
}
