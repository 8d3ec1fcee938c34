//! From a VMM that executes to a machine whose monitor and agent answer.

use std::cell::Cell;
use std::io;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bulkhead_agent::VSOCK_PORT;
use nix::libc;
use serde::Deserialize;

use super::clone;
use super::console::ConsoleLog;
use super::disk::DiskWatch;
use super::ends::Ends;
use super::error::MachineError;
use super::machine::{Live, Phases, io_error, missing, since};
use super::network::Net;
use super::options::StartOptions;
use super::violation::Audit;
use crate::guest::{Channel, GuestError, connect_vsock};
use crate::host::cgroup::{Cgroup, CgroupError, Shortage};
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
    pub(super) network: Option<Net>,
    pub(super) audit: Audit,
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
        let origin = options.memory.origin();
        // Its agent has spoken to somebody else before.
        let again = spawned_us == 0 || origin.is_some();
        let qemu = self.plan.qemu.clone();
        fault::at("wait for agent").map_err(io_error("wait for", &qemu))?;
        let qmp = ends.qmp.take().ok_or(missing("the monitor"))?;
        let monitor = async {
            let monitor = Monitor::connect(qmp, options.boot_timeout).await?;
            // A boot writes, too.
            disk.get_or_init(|| DiskWatch::start(&monitor, dir));
            if let Some(origin) = origin {
                clone::restore(&monitor, origin, options.boot_timeout).await?;
            }
            // Standing still, the agent could not answer: it does so again after.
            if spawned_us == 0
                && ["paused", "postmigrate"].contains(&run_state(&monitor).await?.as_str())
            {
                paused.set(options.paused);
                monitor.execute(qapi::qmp::cont {}).await?;
            }
            Ok::<_, MachineError>((monitor, since(begin)))
        };
        let (agent, cid) = (ends.agent.take(), self.plan.cid);
        let channel = async {
            let connected = match (agent, cid) {
                // It may have stood still while the connection changed.
                (Some(stream), _) if again => Channel::connect_again(stream).await,
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
            match again {
                // The monitor brings it to where it can be spoken to.
                true => Ok((monitor.await?, channel.await?)),
                false => tokio::try_join!(monitor, channel),
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
                return Err(explain_end(ended, &self, options).await);
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
            answer_us: agent_us,
            agent_us,
        };
        tracing::debug!(id = %self.plan.id, agent = hello.program, ?phases, "machine is up");
        Ok(Live {
            cpu_quota: Arc::default(),
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
            proof: Vec::new(),
            network: self.network,
            audit: self.audit,
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

async fn explain_end(ended: Ended, parts: &Parts, options: &StartOptions) -> MachineError {
    let witness = Witness {
        plan: &parts.plan,
        process: &parts.process,
        console: &parts.console,
        words: &parts.words,
        cgroup: parts.cgroup.as_ref().ok(),
        audit: &parts.audit,
    };
    match ended {
        Ended::Process(Ok(status)) => witness.explain(status).await,
        Ended::Process(Err(source)) => io_error("wait for", &parts.plan.qemu)(source),
        Ended::Silent => MachineError::AgentSilent {
            after: options.boot_timeout,
            console: parts.console.last_lines(20),
        },
        // The monitor or the channel broke: mostly QEMU is about to be gone.
        Ended::Setup(error) => {
            match tokio::time::timeout(Duration::from_secs(5), parts.process.wait()).await {
                Ok(Ok(status)) => witness.explain(status).await,
                _ => error,
            }
        }
    }
}

/// Whoever can say why a machine ended.
pub(super) struct Witness<'a> {
    pub(super) plan: &'a Plan,
    pub(super) process: &'a VmmProcess,
    pub(super) console: &'a ConsoleLog,
    pub(super) words: &'a ConsoleLog,
    pub(super) cgroup: Option<&'a Cgroup>,
    pub(super) audit: &'a Audit,
}

impl Witness<'_> {
    /// Why it ended with this status.
    pub(super) async fn explain(&self, status: ExitStatus) -> MachineError {
        // The last bytes may still be on their way to us.
        self.console.ended(Duration::from_millis(500)).await;
        self.words.ended(Duration::from_millis(500)).await;
        let qemu = self.plan.qemu.clone();
        if status.signal == Some(libc::SIGSYS)
            // Somebody else's child leaves no status, but its end is in the log.
            || status == ExitStatus::UNKNOWN && Audit::is_violation(self.process).await
        {
            let audit = self.audit;
            let call = audit.system_call(&self.plan.id, &qemu, self.process).await;
            return MachineError::SystemCall { qemu, call };
        }
        // Of somebody else's child nothing but its group tells.
        if (status.signal == Some(libc::SIGKILL) || status == ExitStatus::UNKNOWN)
            && let Some(shortage) = self.cgroup.and_then(Cgroup::shortage)
        {
            return match shortage {
                Shortage::Group(limit) => MachineError::VmmOutOfMemory { qemu, limit },
                Shortage::Host => MachineError::HostOutOfMemory { qemu },
            };
        }
        let words = self.words.last_lines(20);
        if let Some(console) = self.console.panic_lines(20) {
            MachineError::GuestPanic { console }
        } else if status.code == Some(0) {
            MachineError::GuestEnded {
                console: self.console.last_lines(20),
            }
        } else {
            MachineError::VmmEnded {
                qemu,
                status,
                words,
            }
        }
    }
}
