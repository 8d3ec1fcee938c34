//! From a VMM that executes to a machine whose monitor and agent answer.

use std::cell::Cell;
use std::io;
use std::path::Path;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use bulkhead_agent::VSOCK_PORT;
use serde::Deserialize;

use super::console::ConsoleLog;
use super::disk::DiskWatch;
use super::ends::Ends;
use super::error::MachineError;
use super::machine::{Live, Phases, StartOptions, io_error, missing, since};
use crate::guest::{Channel, GuestError, connect_vsock};
use crate::host::cgroup::{Cgroup, CgroupError};
use crate::host::fault;
use crate::plan::Plan;
use crate::qmp::Monitor;
use crate::vmm::{ExitStatus, VmmProcess};

/// What a machine has before its monitor and its agent answer.
pub(super) struct Parts {
    pub(super) plan: Plan,
    pub(super) process: VmmProcess,
    pub(super) console: ConsoleLog,
    pub(super) words: ConsoleLog,
    pub(super) cgroup: Result<Cgroup, CgroupError>,
}

impl Parts {
    /// Waits until monitor and agent answer.
    pub(super) async fn connect(
        self,
        mut ends: Ends,
        options: &StartOptions,
        dir: &Path,
        begin: Instant,
        spawned_us: u64,
    ) -> Result<Live, MachineError> {
        let disk = OnceLock::new();
        let paused = Cell::new(false);
        let qemu = self.plan.qemu.clone();
        fault::at("wait for agent").map_err(io_error("wait for", &qemu))?;
        let qmp = ends.qmp.take().ok_or(missing("the monitor"))?;
        let monitor = async {
            let monitor = Monitor::connect(qmp, options.boot_timeout).await?;
            // A boot writes, too.
            disk.get_or_init(|| DiskWatch::start(&monitor, dir));
            // Standing still, the agent could not answer: it does so again after.
            if spawned_us == 0 && run_state(&monitor).await? == "paused" {
                paused.set(true);
                monitor.execute(qapi::qmp::cont {}).await?;
            }
            Ok::<_, MachineError>((monitor, since(begin)))
        };
        let (agent, cid) = (ends.agent.take(), self.plan.cid);
        let channel = async {
            let connected = match (agent, cid) {
                // It may have stood still while the connection changed.
                (Some(stream), _) if spawned_us == 0 => Channel::connect_again(stream).await,
                (Some(stream), _) => Channel::connect(stream).await,
                (None, Some(cid)) => match connect_vsock(cid, VSOCK_PORT).await {
                    Ok(stream) => Channel::connect(stream).await,
                    Err(source) => Err(GuestError::Io {
                        action: "connecting over vsock",
                        source: source.into(),
                    }),
                },
                (None, None) => return Err(missing("a channel to the guest agent")),
            };
            let (channel, hello) = connected?;
            Ok::<_, MachineError>((channel, hello, since(begin)))
        };
        let ready = async {
            match spawned_us {
                // Taken over: the monitor tells how to speak to the agent.
                0 => Ok((monitor.await?, channel.await?)),
                _ => tokio::try_join!(monitor, channel),
            }
        };
        let ready = tokio::select! {
            // An end of QEMU explains a lost monitor or channel better than they do.
            biased;
            status = self.process.wait() => Err(Ended::Process(status)),
            ready = ready => ready.map_err(Ended::Setup),
            () = tokio::time::sleep(options.boot_timeout) => Err(Ended::Silent),
        };
        let ((monitor, qmp_us), (channel, hello, agent_us)) = match ready {
            Ok(ready) => ready,
            Err(ended) => {
                // A machine that stands still is silent, too.
                if let (Ended::Silent, Some(state)) =
                    (&ended, disk.get().and_then(DiskWatch::trouble))
                {
                    return Err(MachineError::DiskFailed(state));
                }
                let Self {
                    plan,
                    process,
                    console,
                    words,
                    ..
                } = &self;
                return Err(explain_end(ended, plan, process, console, words, options).await);
            }
        };
        if paused.get() {
            if let Some(disk) = disk.get() {
                disk.hold(true);
            }
            monitor.execute(qapi::qmp::stop {}).await?;
        }
        fault::at("agent answers").map_err(io_error("wait for", &qemu))?;
        let phases = Phases {
            spawned_us,
            qmp_us,
            agent_us,
        };
        tracing::debug!(id = %self.plan.id, agent = hello.program, ?phases, "machine is up");
        Ok(Live {
            plan: self.plan,
            process: self.process,
            monitor,
            channel,
            hello,
            console: self.console,
            words: self.words,
            emergency: ends.console,
            qga: ends.qga,
            disk: disk.into_inner().ok_or(missing("its disk"))?,
            cgroup: self.cgroup,
            phases,
        })
    }
}

/// What QEMU says the machine does, such as `running`, `paused` or `io-error`.
pub(super) async fn run_state(monitor: &Monitor) -> Result<String, MachineError> {
    #[derive(Deserialize)]
    struct RunState {
        status: String,
    }
    let found: RunState = monitor.execute_into(qapi::qmp::query_status {}).await?;
    Ok(found.status)
}

/// Why a start came to nothing.
enum Ended {
    Process(io::Result<ExitStatus>),
    Setup(MachineError),
    Silent,
}

async fn explain_end(
    ended: Ended,
    plan: &Plan,
    process: &VmmProcess,
    console: &ConsoleLog,
    words: &ConsoleLog,
    options: &StartOptions,
) -> MachineError {
    match ended {
        Ended::Process(Ok(status)) => explain_status(status, plan, console, words).await,
        Ended::Process(Err(source)) => io_error("wait for", &plan.qemu)(source),
        Ended::Silent => MachineError::AgentSilent {
            after: options.boot_timeout,
            console: console.last_lines(20),
        },
        // The monitor or the channel broke: mostly QEMU is about to be gone.
        Ended::Setup(error) => {
            match tokio::time::timeout(Duration::from_millis(500), process.wait()).await {
                Ok(Ok(status)) => explain_status(status, plan, console, words).await,
                _ => error,
            }
        }
    }
}

pub(super) async fn explain_status(
    status: ExitStatus,
    plan: &Plan,
    console: &ConsoleLog,
    words: &ConsoleLog,
) -> MachineError {
    // The last bytes may still be on their way to us.
    console.ended(Duration::from_millis(500)).await;
    words.ended(Duration::from_millis(500)).await;
    let words = words.last_lines(20);
    if let Some(console) = console.panic_lines(20) {
        MachineError::GuestPanic { console }
    } else if status.code == Some(0) {
        MachineError::GuestEnded {
            console: console.last_lines(20),
        }
    } else {
        MachineError::VmmEnded {
            qemu: plan.qemu.clone(),
            status,
            words,
        }
    }
}
