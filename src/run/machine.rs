//! A running VMM process with its leases, its monitor and its guest channel.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use bulkhead_agent::{Hello, Request};
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;

use super::clone;
use super::connect::{Parts, Witness};
use super::console::ConsoleLog;
use super::disk::DiskWatch;
use super::ends::{self, Ends};
use super::error::MachineError;
use super::jail;
use super::network::{Net, Rules};
use super::options::StartOptions;
use super::record::{Record, RecordError};
use super::verify::{self, Finding, Subject};
use super::violation::Audit;
use crate::guest::Channel;
use crate::host::cgroup::{Cgroup, CgroupError};
use crate::host::fault;
use crate::host::lease::Lease;
use crate::host::netns::Netns;
use crate::host::network::NetworkError;
use crate::image::Lock;
use crate::net::Traffic;
use crate::plan::{self, Plan};
use crate::qmp::Monitor;
use crate::spec::NetworkPolicy;
use crate::vmm::{Spawn, VmmProcess};

/// When the phases of a start were over, in microseconds since its beginning.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Phases {
    /// QEMU executes.
    pub spawned_us: u64,
    /// The monitor answers.
    pub qmp_us: u64,
    /// The guest agent answers.
    #[serde(default)]
    pub answer_us: u64,
    /// It does, and a clone's is unlike its siblings.
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
pub(super) struct Live {
    pub(super) plan: Plan,
    pub(super) process: VmmProcess,
    pub(super) monitor: Monitor,
    pub(super) channel: Channel,
    pub(super) hello: Hello,
    pub(super) console: ConsoleLog,
    /// What QEMU says.
    pub(super) words: ConsoleLog,
    pub(super) emergency: Option<UnixStream>,
    pub(super) qga: Option<UnixStream>,
    pub(super) disk: DiskWatch,
    /// What was seen of its layers when it was up.
    pub(super) proof: Vec<Finding>,
    /// Its control group, or why it has none.
    pub(super) cgroup: Result<Cgroup, CgroupError>,
    /// CPU time it is held to now, in percent of one core. Held while it changes.
    pub(super) cpu_quota: Arc<Mutex<Option<u32>>>,
    /// Its network, where it has one.
    pub(super) network: Option<Net>,
    pub(super) audit: Audit,
    pub(super) phases: Phases,
}

impl Machine {
    /// Starts the VMM and waits until the guest agent answers. On failure
    /// nothing is left behind but what the error says.
    ///
    /// # Errors
    /// See [`MachineError`].
    pub async fn start(
        plan: Plan,
        record: Record,
        options: &StartOptions,
    ) -> Result<Self, MachineError> {
        match Self::launch(plan, record, options, std::future::pending()).await {
            Ok(machine) => Ok(machine),
            Err((error, record)) => {
                for leak in record.close() {
                    tracing::warn!("{leak}");
                }
                Err(error)
            }
        }
    }

    /// As [`Machine::start`], unless `cancelled` comes first; on failure the
    /// record comes back, and with it the leases to be released.
    ///
    /// # Errors
    /// See [`MachineError`].
    pub async fn launch(
        plan: Plan,
        mut record: Record,
        options: &StartOptions,
        cancelled: impl Future<Output = ()>,
    ) -> Result<Self, (MachineError, Record)> {
        let live = tokio::select! {
            live = Self::bring_up(plan, &mut record, options) => live,
            () = cancelled => Err(MachineError::Cancelled),
        };
        match live {
            Ok(live) => Ok(Self {
                live,
                record,
                image: None,
            }),
            Err(error) => Err((error, record)),
        }
    }

    async fn bring_up(
        mut plan: Plan,
        record: &mut Record,
        options: &StartOptions,
    ) -> Result<Live, MachineError> {
        let begin = Instant::now();
        let mut ends = Ends::default();
        let jail = jail::make(&plan, record, options)?;
        if let Some(dir) = &options.sockets {
            let lease = Lease::Dir { path: dir.clone() };
            record.lease(lease).map_err(RecordError::from)?;
            super::dirs::make_private(dir).map_err(io_error("make", dir))?;
        }
        let network = match &plan.network {
            Some(network) => {
                let (network, tap) = Net::make(network, &plan, record, options)?;
                ends.tap = Some(tap);
                Some(network)
            }
            None if options.given.tap.is_some() => return Err(NetworkError::NotThatTap.into()),
            None => None,
        };
        let descriptors = ends::descriptors(&plan, record.dir(), options, &mut ends)?;
        plan.cid = ends.cid;
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
        let log = ends::pair(&mut words).map_err(io_error("make a socket for", &plan.qemu))?;
        let words = words.ok_or(MachineError::Missing { what: "QEMU's log" })?;
        let words =
            ConsoleLog::start(words, &log_path).map_err(io_error("make QEMU's log", &log_path))?;
        let mut cgroup = jail::cgroup(&plan, record)?;
        let group = jail::entrance(&plan, &mut cgroup)?;
        let spawn = Spawn {
            program: plan.qemu.clone(),
            args: plan.args.clone(),
            descriptors,
            log,
            die_with_thread: options.die_with_thread,
            jail,
            ram: options
                .memory
                .file()
                .map_err(io_error("open the memory of", &plan.qemu))?,
            group,
            group_optional: !jail::needs_cgroup(&plan),
        };
        let process = spawn.run(|process| record.lease(process.lease()))?;
        jail::entered(&plan, &mut cgroup, process.pid());
        fault::at("spawned").map_err(io_error("start", &plan.qemu))?;
        let console_path = record.dir().join("console.log");
        let serial = ends.serial.take().ok_or(missing("the serial port"))?;
        let console = ConsoleLog::start(serial, &console_path)
            .map_err(io_error("make the console's log", &console_path))?;
        let spawned_us = since(begin);
        let parts = Parts {
            plan,
            process,
            console,
            words,
            cgroup,
            network,
            audit: Audit::new(options.violations.clone()),
        };
        let dir = record.dir().to_owned();
        let live = parts
            .connect(ends, options, &dir, begin, spawned_us)
            .await?;
        let mut live = proven(live, record).await?;
        if let Some(origin) = options.memory.origin() {
            clone::settle(&live, origin, options.boot_timeout).await?;
            // Before that it was nobody's to use.
            live.phases.agent_us = since(begin);
        }
        Ok(live)
    }

    /// Takes over a running machine whose owner died.
    ///
    /// # Errors
    /// Its VMM is gone, or monitor or guest agent do not answer. The record
    /// comes back with its leases as they are: they are the caller's to release.
    pub async fn take_over(
        plan: Plan,
        record: Record,
        options: &StartOptions,
    ) -> Result<Self, (MachineError, Record)> {
        match Self::find(plan, &record, options).await {
            Ok(live) => Ok(Self {
                live,
                record,
                image: None,
            }),
            Err(error) => Err((error, record)),
        }
    }

    async fn find(
        plan: Plan,
        record: &Record,
        options: &StartOptions,
    ) -> Result<Live, MachineError> {
        let begin = Instant::now();
        let qemu = plan.qemu.clone();
        let process = record.leases().iter().find_map(|lease| match lease {
            Lease::Process {
                pid, start_time, ..
            } if lease.is_live_process() => Some((*pid, *start_time)),
            _ => None,
        });
        let (pid, start_time) = process.ok_or(missing("a living VMM"))?;
        let process = VmmProcess::take_over(pid, start_time).map_err(io_error("watch", &qemu))?;
        let sockets = options.sockets.as_ref();
        let sockets = sockets.ok_or(missing("sockets that can be taken over"))?;
        let mut ends = Ends::reconnect(&plan, sockets)
            .await
            .map_err(io_error("connect to the sockets in", sockets))?;
        let console_path = record.dir().join("console.log");
        let serial = ends.serial.take().ok_or(missing("the serial port"))?;
        let console = ConsoleLog::resume(serial, &console_path)
            .map_err(io_error("open the console's log", &console_path))?;
        // What QEMU says went to its first owner.
        let mut words = None;
        drop(ends::pair(&mut words).map_err(io_error("make a socket for", &qemu))?);
        let log_path = record.dir().join("qemu.log");
        let words = words.ok_or(missing("QEMU's log"))?;
        let words =
            ConsoleLog::resume(words, &log_path).map_err(io_error("open QEMU's log", &log_path))?;
        let parts = Parts {
            network: match &plan.network {
                Some(network) => Some(Net::take_over(network, &plan, record, options)?),
                None => None,
            },
            plan,
            process,
            console,
            words,
            cgroup: Cgroup::of_leases(record.leases()).ok_or_else(|| {
                let why = "its first supervisor made none".to_owned();
                CgroupError::Unavailable { why }
            }),
            audit: Audit::new(options.violations.clone()),
        };
        let live = parts.connect(ends, options, record.dir(), begin, 0).await?;
        proven(live, record).await
    }

    /// Its plan, with everything that was leased at start filled in.
    pub fn plan(&self) -> &Plan {
        &self.live.plan
    }

    /// Id of the template it was cloned from at its start.
    pub fn template(&self) -> Option<&str> {
        self.live.plan.ram.template()
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

    /// What was seen of its layers when it was up.
    pub fn proof(&self) -> &[Finding] {
        &self.live.proof
    }

    /// Reads every layer back, as `bulkhead verify` does.
    ///
    /// # Errors
    /// The VMM or its monitor is gone, or the kernel does not answer.
    pub async fn verify(&self) -> Result<Vec<Finding>, MachineError> {
        self.subject().verify().await
    }

    /// What can be looked at again at any time.
    pub(crate) fn subject(&self) -> Subject {
        subject(&self.live, &self.record)
    }

    /// Its control group, or why it has none.
    ///
    /// # Errors
    /// The host gave it none.
    pub fn cgroup(&self) -> Result<&Cgroup, &CgroupError> {
        self.live.cgroup.as_ref()
    }

    /// CPU time it is held to now, in percent of one core: whoever changes it
    /// holds this.
    pub(super) fn cpu_quota(&self) -> MutexGuard<'_, Option<u32>> {
        let quota = self.live.cpu_quota.lock();
        quota.unwrap_or_else(PoisonError::into_inner)
    }

    /// Its network namespace: sockets made in it are the machine's gateway's.
    pub fn netns(&self) -> Option<&Netns> {
        self.live.network.as_ref().map(Net::netns)
    }

    /// Bytes that its link has carried, both ways, where it has one of its own.
    pub fn carried(&self) -> Option<u64> {
        crate::host::network::carried(self.netns()?).ok()?
    }

    /// What its network comes to, where it has one; complete when it has ended.
    pub fn traffic(&self) -> Option<Traffic> {
        self.live.network.as_ref().map(|net| net.traffic().clone())
    }

    /// Waits until its network is not filtered any more as it should be: then it
    /// has to be stopped.
    pub fn unfiltered(&self) -> impl Future<Output = MachineError> + Send + use<> {
        let broken = self.live.network.as_ref().map(Net::broken);
        async move {
            match broken {
                Some(broken) => broken.await,
                None => std::future::pending().await,
            }
            MachineError::Unfiltered
        }
    }

    /// Changes what it may reach and use of its network. With `deny`,
    /// connections there are have to pass the new rules, too.
    ///
    /// # Errors
    /// It has no network, or the kernel refuses.
    pub fn set_network(&self, policy: &NetworkPolicy, deny: bool) -> Result<(), MachineError> {
        let network = self.live.network.as_ref();
        network.ok_or(missing("a network"))?.change(policy, deny)
    }

    /// What changes its network, where it has one, for as long as it lives.
    pub(super) fn rules(&self) -> Option<Weak<Rules>> {
        self.live.network.as_ref().map(Net::rules)
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
        let live = &self.live;
        let witness = Witness {
            plan: &live.plan,
            process: &live.process,
            console: &live.console,
            words: &live.words,
            cgroup: live.cgroup.as_ref().ok(),
            audit: &live.audit,
        };
        Some(witness.explain(status).await)
    }

    /// Writes a lease of this machine down.
    ///
    /// # Errors
    /// The journal cannot be written; the resource must not be made.
    pub fn lease(&mut self, lease: Lease) -> Result<(), RecordError> {
        Ok(self.record.lease(lease)?)
    }

    /// Stands still: no processor runs until [`Machine::resume`].
    ///
    /// # Errors
    /// QEMU refuses.
    pub async fn pause(&self) -> Result<(), MachineError> {
        self.live.monitor.execute(qapi::qmp::stop {}).await?;
        Ok(())
    }

    /// Goes on after [`Machine::pause`].
    ///
    /// # Errors
    /// QEMU refuses.
    pub async fn resume(&self) -> Result<(), MachineError> {
        self.live.monitor.execute(qapi::qmp::cont {}).await?;
        Ok(())
    }

    /// Powers the guest off, kills the VMM if that takes longer than `grace`,
    /// and releases every lease.
    ///
    /// # Errors
    /// The leases that could not be released; they stay for `bulkhead gc`.
    pub async fn stop(self, grace: Duration) -> Result<(), Vec<RecordError>> {
        self.power_off(grace).await;
        self.kill().await
    }

    /// Asks the guest to power off, and waits until it has or `grace` is over.
    /// Gives whether it has.
    pub async fn power_off(&self, grace: Duration) -> bool {
        let powered_off = async {
            let ask = self
                .live
                .channel
                .ask("power off", &Request::PowerOff, grace);
            // The channel may go down before the answer gets through.
            let _ = ask.await;
            self.live.process.wait().await
        };
        matches!(tokio::time::timeout(grace, powered_off).await, Ok(Ok(_)))
    }

    /// Ends the VMM at once and releases every lease.
    ///
    /// # Errors
    /// The leases that could not be released; they stay for `bulkhead gc`.
    pub async fn kill(self) -> Result<(), Vec<RecordError>> {
        let (record, mut errors) = self.end().await;
        if errors.is_empty() {
            errors = record.close();
        }
        if errors.is_empty() {
            Ok(())
        } else {
            Err(errors)
        }
    }

    /// Ends the VMM at once and releases every lease, but keeps the record,
    /// still locked. The errors are the leases that could not be released.
    pub async fn end(mut self) -> (Record, Vec<RecordError>) {
        let _ = fault::at("end VMM");
        let _ = self.live.process.kill();
        let _ = self.live.process.wait().await;
        if let Some(network) = self.live.network.take() {
            network.end().await;
        }
        let errors = self.record.release();
        (self.record, errors)
    }
}

fn subject(live: &Live, record: &Record) -> Subject {
    Subject {
        plan: live.plan.clone(),
        leases: record.leases().to_vec(),
        dir: record.dir().to_owned(),
        pid: live.process.pid(),
        cpu_quota: Arc::clone(&live.cpu_quota),
        policy: live.network.as_ref().map(Net::held),
        monitor: live.monitor.clone(),
    }
}

/// A machine that is up, once its layers were seen to hold.
async fn proven(mut live: Live, record: &Record) -> Result<Live, MachineError> {
    live.proof = subject(&live, record).verify().await?;
    match verify::failures(&live.proof)[..] {
        [] => Ok(live),
        ref failed => Err(MachineError::NotConfined {
            failed: failed.join("; "),
        }),
    }
}

pub(super) fn missing(what: &'static str) -> MachineError {
    MachineError::Missing { what }
}

pub(super) fn since(begin: Instant) -> u64 {
    u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX)
}

pub(super) fn io_error(
    action: &'static str,
    path: &Path,
) -> impl FnOnce(io::Error) -> MachineError {
    let path = path.to_owned();
    move |source| MachineError::Io {
        action,
        path,
        source,
    }
}
