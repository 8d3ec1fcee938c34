//! A running VMM process with its leases, its monitor and its guest channel.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use bulkhead_agent::{Hello, Request, VSOCK_PORT};
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;

use super::console::ConsoleLog;
use super::disk::DiskWatch;
use super::error::MachineError;
use super::record::{Record, RecordError};
use crate::guest::archive::HostDir;
use crate::guest::{Channel, GuestError, connect_vsock};
use crate::host::cgroup::{Cgroup, CgroupError};
use crate::host::{probe, sys};
use crate::image::{Lock, scratch};
use crate::plan::{self, Descriptor, Plan};
use crate::qmp::Monitor;
use crate::spec::fill_random;
use crate::vmm::{ExitStatus, Spawn, VmmProcess};

/// What starting a machine needs besides its plan.
#[derive(Debug, Clone)]
pub struct StartOptions {
    /// Where empty disks are kept for copying.
    pub cache: PathBuf,
    /// How long the guest may take until its agent answers.
    pub boot_timeout: Duration,
    /// End the machine when the thread that starts it ends. Only right where
    /// that thread lives as long as the machine should.
    pub die_with_thread: bool,
    /// The plan's share, already open; opened by its path when absent. Whoever
    /// may rename it must not choose what the guest sees.
    pub share: Option<HostDir>,
}

/// When the phases of a start were over, in microseconds since its beginning.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Phases {
    /// QEMU executes.
    pub spawned_us: u64,
    /// The monitor answers.
    pub qmp_us: u64,
    /// The guest agent answers.
    pub agent_us: u64,
}

/// A running machine. Dropping it kills the VMM and leaves its other leases to
/// recovery; [`Machine::stop`] and [`Machine::kill`] release them.
#[derive(Debug)]
pub struct Machine {
    live: Live,
    record: Record,
    /// Keeps its image from being removed.
    image: Option<Lock>,
}

/// What a start gives.
#[derive(Debug)]
struct Live {
    plan: Plan,
    process: VmmProcess,
    monitor: Monitor,
    channel: Channel,
    hello: Hello,
    console: ConsoleLog,
    /// What QEMU says.
    words: ConsoleLog,
    emergency: Option<UnixStream>,
    qga: Option<UnixStream>,
    disk: DiskWatch,
    /// Its control group, or why it has none.
    cgroup: Result<Cgroup, CgroupError>,
    phases: Phases,
}

/// Our ends of the descriptors QEMU is given.
#[derive(Debug, Default)]
struct Ends {
    qmp: Option<UnixStream>,
    serial: Option<UnixStream>,
    console: Option<UnixStream>,
    qga: Option<UnixStream>,
    agent: Option<UnixStream>,
    cid: Option<u32>,
}

impl Machine {
    /// Starts the VMM and waits until the guest agent answers. On failure
    /// nothing is left behind but what the error says.
    ///
    /// # Errors
    /// See [`MachineError`].
    pub async fn start(
        plan: Plan,
        mut record: Record,
        options: &StartOptions,
    ) -> Result<Self, MachineError> {
        match Self::bring_up(plan, &mut record, options).await {
            Ok(live) => Ok(Self {
                live,
                record,
                image: None,
            }),
            Err(error) => {
                for leak in record.close() {
                    tracing::warn!("{leak}");
                }
                Err(error)
            }
        }
    }

    async fn bring_up(
        mut plan: Plan,
        record: &mut Record,
        options: &StartOptions,
    ) -> Result<Live, MachineError> {
        let begin = Instant::now();
        let mut ends = Ends::default();
        let descriptors = descriptors(&plan, record.dir(), options, &mut ends)?;
        if let Some(cid) = ends.cid {
            for word in &mut plan.args {
                if word.starts_with("vhost-vsock") {
                    *word = word.replace(plan::CID, &cid.to_string());
                }
            }
            record.update_plan(&plan)?;
        }
        // Through us, because a guest can make QEMU complain without end.
        let log_path = record.dir().join("qemu.log");
        let mut words = None;
        let log = socket(&mut words, &plan.qemu)?;
        let words = words.ok_or(MachineError::Missing { what: "QEMU's log" })?;
        let words =
            ConsoleLog::start(words, &log_path).map_err(io_error("make QEMU's log", &log_path))?;
        let spawn = Spawn {
            program: plan.qemu.clone(),
            args: plan.args.clone(),
            descriptors,
            log,
            die_with_thread: options.die_with_thread,
        };
        let mut cgroup = cgroup(&plan, record)?;
        let process = spawn.run(|process| {
            record.lease(process.lease())?;
            // Before it executes: no thread of it is ever outside.
            if let Ok(group) = &cgroup
                && let Err(error) = group.add(process.pid())
            {
                cgroup = Err(error);
            }
            Ok(())
        })?;
        let mut phases = Phases {
            spawned_us: since(begin),
            ..Phases::default()
        };

        let missing = |what| MachineError::Missing { what };
        let serial = ends.serial.take().ok_or(missing("the serial port"))?;
        let console_path = record.dir().join("console.log");
        let console = ConsoleLog::start(serial, &console_path)
            .map_err(io_error("make the console's log", &console_path))?;
        let qmp = ends.qmp.take().ok_or(missing("the monitor"))?;
        let disk = OnceLock::new();
        let monitor = async {
            let monitor = Monitor::connect(qmp, options.boot_timeout).await?;
            // A boot writes, too.
            disk.get_or_init(|| DiskWatch::start(&monitor, record.dir()));
            Ok::<_, MachineError>((monitor, since(begin)))
        };
        let agent = ends.agent.take();
        let channel = async {
            let connected = match (agent, ends.cid) {
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
        let ready = async { tokio::try_join!(monitor, channel) };
        let ready = tokio::select! {
            // An end of QEMU explains a lost monitor or channel better than they do.
            biased;
            status = process.wait() => Err(Ended::Process(status)),
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
                return Err(explain_end(ended, &plan, &process, &console, &words, options).await);
            }
        };
        let disk = disk.into_inner().ok_or(missing("its disk"))?;
        phases.qmp_us = qmp_us;
        phases.agent_us = agent_us;
        tracing::debug!(id = %plan.id, agent = hello.program, ?phases, "machine is up");
        Ok(Live {
            plan,
            process,
            monitor,
            channel,
            hello,
            console,
            words,
            emergency: ends.console,
            qga: ends.qga,
            disk,
            cgroup,
            phases,
        })
    }

    /// Its plan, with everything that was leased at start filled in.
    pub fn plan(&self) -> &Plan {
        &self.live.plan
    }

    /// Directory of its record.
    pub fn dir(&self) -> &Path {
        self.record.dir()
    }

    /// Its monitor.
    pub fn monitor(&self) -> &Monitor {
        &self.live.monitor
    }

    /// The channel to its guest agent.
    pub fn channel(&self) -> &Channel {
        &self.live.channel
    }

    /// What the guest agent said of itself.
    pub fn hello(&self) -> &Hello {
        &self.live.hello
    }

    /// The VMM process.
    pub fn process(&self) -> &VmmProcess {
        &self.live.process
    }

    /// How its disks are.
    pub fn disk(&self) -> &DiskWatch {
        &self.live.disk
    }

    /// Its control group, or why it has none.
    ///
    /// # Errors
    /// The host gave it none.
    pub fn cgroup(&self) -> Result<&Cgroup, &CgroupError> {
        self.live.cgroup.as_ref()
    }

    /// The serial console.
    pub fn console(&self) -> &ConsoleLog {
        &self.live.console
    }

    /// The emergency console: a root shell on the virtio console. Given once.
    pub fn take_emergency_console(&mut self) -> Option<UnixStream> {
        self.live.emergency.take()
    }

    /// The port of qemu-guest-agent, for images that run one. Given once.
    pub fn take_qga(&mut self) -> Option<UnixStream> {
        self.live.qga.take()
    }

    /// How long the phases of the start took.
    pub fn phases(&self) -> Phases {
        self.live.phases
    }

    /// Keeps `image` from being removed while the machine lives.
    pub fn hold(&mut self, image: Lock) {
        self.image = Some(image);
    }

    /// Why the machine ended, if it has: the kernel's panic, or QEMU's words.
    pub async fn end_reason(&self) -> Option<MachineError> {
        let status = self.live.process.try_wait().ok().flatten()?;
        Some(
            explain_status(
                status,
                &self.live.plan,
                &self.live.console,
                &self.live.words,
            )
            .await,
        )
    }

    /// Writes a lease of this machine down.
    ///
    /// # Errors
    /// The journal cannot be written; the resource must not be made.
    pub fn lease(&mut self, lease: crate::host::lease::Lease) -> Result<(), RecordError> {
        Ok(self.record.lease(lease)?)
    }

    /// Powers the guest off, kills the VMM if that takes longer than `grace`,
    /// and releases every lease.
    ///
    /// # Errors
    /// The leases that could not be released; they stay for `bulkhead gc`.
    pub async fn stop(self, grace: Duration) -> Result<(), Vec<RecordError>> {
        let powered_off = async {
            let ask = self
                .live
                .channel
                .ask("power off", &Request::PowerOff, grace);
            // The channel may go down before the answer gets through.
            let _ = ask.await;
            self.live.process.wait().await
        };
        let _ = tokio::time::timeout(grace, powered_off).await;
        self.kill().await
    }

    /// Ends the VMM at once and releases every lease.
    ///
    /// # Errors
    /// The leases that could not be released; they stay for `bulkhead gc`.
    pub async fn kill(self) -> Result<(), Vec<RecordError>> {
        let _ = self.live.process.kill();
        let _ = self.live.process.wait().await;
        let errors = self.record.close();
        if errors.is_empty() {
            Ok(())
        } else {
            Err(errors)
        }
    }
}

/// Why a start came to nothing.
enum Ended {
    Process(io::Result<ExitStatus>),
    Setup(MachineError),
    Silent,
}

fn since(begin: Instant) -> u64 {
    u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX)
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> MachineError {
    let path = path.to_owned();
    move |source| MachineError::Io {
        action,
        path,
        source,
    }
}

/// Opens what QEMU is given, in the plan's order.
fn descriptors(
    plan: &Plan,
    dir: &Path,
    options: &StartOptions,
    ends: &mut Ends,
) -> Result<Vec<OwnedFd>, MachineError> {
    let socket = |end: &mut Option<UnixStream>| socket(end, &plan.qemu);
    plan.descriptors
        .iter()
        .map(|descriptor| match descriptor {
            Descriptor::Qmp => socket(&mut ends.qmp),
            Descriptor::Serial => socket(&mut ends.serial),
            Descriptor::Console => socket(&mut ends.console),
            Descriptor::Qga => socket(&mut ends.qga),
            Descriptor::Agent => socket(&mut ends.agent),
            Descriptor::Root => Ok(File::open(&plan.root)
                .map_err(io_error("open", &plan.root))?
                .into()),
            Descriptor::Share => share(plan, dir, options),
            Descriptor::Scratch => scratch_disk(plan, dir, options),
            Descriptor::Vsock => {
                let (vhost, cid) = claim_cid()?;
                ends.cid = Some(cid);
                Ok(vhost)
            }
        })
        .collect()
}

/// Makes the machine's control group. A host that has none is no reason not
/// to start: only limits need it, and say so when they are asked for.
fn cgroup(plan: &Plan, record: &mut Record) -> Result<Result<Cgroup, CgroupError>, MachineError> {
    let group = match Cgroup::choose(&plan.id) {
        Ok(group) => group,
        Err(error) => return Ok(Err(error)),
    };
    for lease in group.leases() {
        record.lease(lease).map_err(RecordError::from)?;
    }
    Ok(group.make().map(|()| group))
}

/// A pair of sockets: one end for us, the other for QEMU.
fn socket(end: &mut Option<UnixStream>, qemu: &Path) -> Result<OwnedFd, MachineError> {
    let mut pair = || {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        *end = Some(UnixStream::from_std(ours)?);
        Ok(OwnedFd::from(theirs))
    };
    pair().map_err(io_error("make a socket for", qemu))
}

/// The shared workspace.
fn share(plan: &Plan, dir: &Path, options: &StartOptions) -> Result<OwnedFd, MachineError> {
    let missing = MachineError::Missing {
        what: "the shared workspace",
    };
    let path = &plan.share.as_ref().ok_or(missing)?.dir;
    let open = || {
        let share = match &options.share {
            Some(share) => share.clone(),
            None => HostDir::open(path)?,
        };
        super::share::record(dir, &share)?;
        share.as_fd().try_clone_to_owned()
    };
    open().map_err(io_error("share", path))
}

/// A fresh disk that exists only for as long as QEMU holds it.
fn scratch_disk(plan: &Plan, dir: &Path, options: &StartOptions) -> Result<OwnedFd, MachineError> {
    let template = scratch::template(&options.cache, plan.scratch.0)?;
    let path = dir.join("scratch.img");
    scratch::copy(&template, &path)?;
    let disk = File::options()
        .read(true)
        .write(true)
        .open(&path)
        .map_err(io_error("open", &path))?;
    fs::remove_file(&path).map_err(io_error("unlink", &path))?;
    Ok(disk.into())
}

/// Claims a free vsock address. It is free again when the descriptor closes.
fn claim_cid() -> Result<(OwnedFd, u32), MachineError> {
    let path = Path::new("/dev/vhost-vsock");
    let vhost = probe::vhost_vsock().map_err(io_error("open", path))?;
    for _ in 0..64 {
        let mut bytes = [0; 4];
        fill_random(&mut bytes);
        // 0 to 2 are the hypervisor, this host and its loopback; the last is "any".
        let cid = u32::from_le_bytes(bytes).clamp(3, u32::MAX - 1);
        match sys::set_guest_cid(vhost.as_fd(), u64::from(cid)) {
            Ok(()) => return Ok((vhost.into(), cid)),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            Err(error) => return Err(io_error("claim a vsock address on", path)(error)),
        }
    }
    Err(io_error("claim a vsock address on", path)(
        io::ErrorKind::AddrInUse.into(),
    ))
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

async fn explain_status(
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
