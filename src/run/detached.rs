//! Bringing up, and to its end, a machine that outlives its command.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_agent::{Exec, Request, Size};

use super::clone::Origin;
use super::connect::run_state;
use super::disk::{DiskState, DiskWatch};
use super::ends::Ends;
use super::exchange::{self, Exchange};
use super::host::Host;
use super::machine::{Machine, io_error};
use super::options::{Memory, StartOptions};
use super::publish::{self, Published};
use super::record::Record;
use super::runner::{ANSWER, identity};
use super::share;
use super::transfer::joined;
use super::{MachineError, RunError};
use crate::guest::GuestError;
use crate::guest::archive::HostDir;
use crate::host::fault;
use crate::net::Connections;
use crate::qmp::Monitor;
use crate::snapshot::SnapshotName;
use crate::spec::{Spec, Workspace, WorkspaceMode};

/// How long a running machine may take to answer its new supervisor.
const TAKE_OVER: Duration = Duration::from_secs(20);
/// How long a machine may take to go on once its disk has space.
const CURE: Duration = Duration::from_secs(2);

/// A detached machine that is up.
pub(crate) struct Detached {
    /// The machine.
    pub(crate) machine: Machine,
    /// What the user should know.
    pub(crate) warnings: Vec<String>,
    /// The shared workspace, to be settled when the machine is gone.
    share: Option<HostDir>,
    /// Ports of the host that lead to it.
    published: Published,
}

/// How a detached machine is started.
pub(crate) struct Start {
    /// Its first start: what is only sent once is sent then.
    pub(crate) first: bool,
    /// The snapshot whose memory it goes on from.
    pub(crate) restore: Option<SnapshotName>,
    /// What the guest knows it by.
    pub(crate) machine_id: String,
}

/// Starts the machine of `record`.
///
/// # Errors
/// See [`RunError`]. The record comes back, and with it the leases to release.
pub(crate) async fn boot(
    host: &Host,
    spec: &Spec,
    record: Record,
    start: Start,
    cancelled: impl Future<Output = ()>,
) -> Result<Detached, (RunError, Record)> {
    let Start {
        first,
        restore,
        machine_id,
    } = start;
    let mut configure = identity(spec);
    configure.machine_id = Some(machine_id);
    let prepared = async {
        // What was sent before is in the guest; the directory may be gone.
        let needed = first || spec.workspace.mode == WorkspaceMode::Share;
        let workspace = match needed {
            true => spec.workspace.clone(),
            false => Workspace::default(),
        };
        let exchange = Exchange::prepare(&workspace)?;
        let published = publish::bind(&spec.publish)?;
        let disk = record.dir().join("disk.img");
        if first && disk.exists() {
            // Of a start that came to nothing, or of what was reset.
            fault::at("remove disk.img")
                .and_then(|()| std::fs::remove_file(&disk))
                .map_err(io_error("remove", &disk))?;
        }
        // A template's memory goes with its own disk only.
        let (image, plan, origin) = match (&restore, disk.exists()) {
            (Some(name), _) => {
                let (image, plan, origin) =
                    super::snapshot::revive(host, spec, record.dir(), name, &configure)?;
                (image, plan, Some(origin))
            }
            (None, false) => {
                let (image, plan, template) = host.choose(spec)?;
                let origin = template.map(|one| Origin::template(one, configure.clone()));
                (image, plan, origin)
            }
            (None, true) => {
                let (image, plan) = host.plan(spec)?;
                (image, plan, None)
            }
        };
        host.prove(spec, &image, &plan).await?;
        let lock = image.lock()?;
        record.update_plan(&plan)?;
        Ok::<_, RunError>((exchange, published, plan, origin, lock))
    };
    let mut cancelled = std::pin::pin!(cancelled);
    let prepared = tokio::select! {
        prepared = prepared => prepared,
        () = &mut cancelled => Err(MachineError::Cancelled.into()),
    };
    let (mut exchange, published, plan, origin, lock) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => return Err((error, record)),
    };
    let booted = origin.is_none();
    let memory = match origin {
        None => Memory::Empty,
        Some(origin) => Memory::Cloned(Arc::new(origin)),
    };
    let options = StartOptions {
        share: exchange.dir().cloned(),
        memory,
        ..host.options(&plan, &record)
    };
    let mut machine = match Machine::launch(plan, record, &options, &mut cancelled).await {
        Ok(machine) => machine,
        Err((error, record)) => return Err((error.into(), record)),
    };
    machine.hold(lock);
    let settle = async {
        let channel = machine.channel().clone();
        passed("configure guest")?;
        // What was restored has its own already.
        if booted {
            let identity = Request::Configure(super::runner::fresh(&configure));
            channel.ask("take its identity", &identity, ANSWER).await?;
        }
        passed("send workspace")?;
        let warnings = match first || spec.workspace.mode == WorkspaceMode::Share {
            true => exchange.send(&channel, spec).await?,
            false => Vec::new(),
        };
        Ok::<_, RunError>((warnings, publish::serve(published, &channel)?))
    };
    let settled = tokio::select! {
        settled = settle => settled,
        () = &mut cancelled => Err(MachineError::Cancelled.into()),
    };
    match settled {
        Ok((warnings, published)) => Ok(Detached {
            warnings,
            published,
            share: shared(spec, &exchange),
            machine,
        }),
        Err(error) => {
            let detached = Detached {
                warnings: Vec::new(),
                published: Published::default(),
                share: shared(spec, &exchange),
                machine,
            };
            let (record, _) = detached.end().await;
            Err((error, record))
        }
    }
}

/// Passes a point between two requests to the guest.
fn passed(point: &str) -> Result<(), GuestError> {
    fault::at(point).map_err(|source| GuestError::Io {
        action: "preparing the guest",
        source: source.into(),
    })
}

/// What the running machine of `record` waits for, where it cannot answer: to
/// take it over would only end it.
pub(crate) async fn standing_still(host: &Host, record: &Record) -> Option<DiskState> {
    let plan = record.plan().ok()?;
    let sockets = host.options(&plan, record).sockets?;
    let monitor = Ends::monitor(&sockets).await.ok()?;
    let monitor = Monitor::connect(monitor, TAKE_OVER).await.ok()?;
    if run_state(&monitor).await.ok()? != "io-error" {
        return None;
    }
    let watch = DiskWatch::start(&monitor, record.dir());
    let mut state = watch.state();
    // It lets the machine go on where there is space by now.
    let trouble = state.wait_for(|state| *state != DiskState::Fine);
    tokio::time::timeout(CURE, trouble).await.ok()?.ok()?;
    let cured = state.wait_for(|state| *state == DiskState::Fine);
    match tokio::time::timeout(CURE, cured).await {
        Ok(_) => None,
        Err(_) => watch.trouble(),
    }
}

/// Takes over the running machine of `record`, whose supervisor died; one that its
/// user has `paused` stands still on.
///
/// # Errors
/// It is gone or does not answer. The record comes back.
pub(crate) async fn take_over(
    host: &Host,
    spec: &Spec,
    record: Record,
    paused: bool,
) -> Result<Detached, (RunError, Record)> {
    let prepared = || {
        let mut plan = record.plan()?;
        if let Some(network) = &mut plan.network {
            // It may have been changed since.
            network.policy = spec.network.clone();
        }
        let image = host.images().inspect(&spec.image)?;
        // Its directory may be gone: no reason to end the machine.
        let share = Exchange::prepare(&spec.workspace).ok();
        let share = share.and_then(|share| shared(spec, &share));
        Ok::<_, RunError>((plan, image.lock()?, share))
    };
    let (plan, lock, share) = match prepared() {
        Ok(prepared) => prepared,
        Err(error) => return Err((error, record)),
    };
    let options = StartOptions {
        boot_timeout: host.boot_timeout.min(TAKE_OVER.max(host.boot_timeout / 4)),
        paused,
        ..host.options(&plan, &record)
    };
    match Machine::take_over(plan, record, &options).await {
        Ok(mut machine) => {
            machine.hold(lock);
            let mut warnings = Vec::new();
            if !paused {
                // Whoever died may have been saving it.
                let woken = super::snapshot::wake_after_loss(&machine).await;
                // It says why to whoever asks it for something.
                warnings.extend(woken.err().map(|error| error.to_string()));
            }
            let bound = publish::bind(&spec.publish);
            let published = bound.and_then(|bound| publish::serve(bound, machine.channel()));
            // No reason to end the machine.
            let published = published.unwrap_or_else(|error| {
                warnings.push(error.to_string());
                Published::default()
            });
            Ok(Detached {
                machine,
                warnings,
                share,
                published,
            })
        }
        Err((error, record)) => Err((error.into(), record)),
    }
}

/// Checks the host directories of a workspace, and gives it with their full paths.
///
/// # Errors
/// One of them cannot be used.
pub(crate) fn resolve(workspace: &Workspace) -> Result<Workspace, RunError> {
    Ok(Exchange::prepare(workspace)?.workspace().clone())
}

fn shared(spec: &Spec, exchange: &Exchange) -> Option<HostDir> {
    let writable = spec.workspace.mode == WorkspaceMode::Share && !spec.workspace.read_only;
    exchange.dir().filter(|_| writable).cloned()
}

impl Detached {
    /// Connections to its published ports.
    pub(crate) fn connections(&self) -> &Connections {
        self.published.connections()
    }

    /// Ends the VMM and releases every lease. Gives the record, still locked,
    /// and what was left behind.
    pub(crate) async fn end(self) -> (Record, Vec<String>) {
        let (record, errors) = self.machine.end().await;
        let mut left: Vec<String> = errors.iter().map(ToString::to_string).collect();
        if let Some(dir) = self.share {
            let settle = tokio::task::spawn_blocking(move || share::settle(&dir));
            if let Err(error) = joined(settle.await) {
                left.push(format!("the shared workspace keeps QEMU's owners: {error}"));
            }
        }
        (record, left)
    }
}

/// The main command of a detached machine; `None` for none.
pub(crate) fn main_command(spec: &Spec, size: Size) -> Option<Exec> {
    let argv = exchange::argv(&spec.command);
    (!argv.is_empty()).then(|| Exec {
        argv,
        env: spec.command.env.clone(),
        cwd: Some(
            spec.command
                .workdir
                .clone()
                .unwrap_or_else(|| exchange::WORK.into()),
        ),
        user: spec.command.user.clone(),
        terminal: spec.command.terminal.then_some(size),
        stdin: false,
    })
}

/// Directory with the logs of a machine's commands.
pub(crate) fn logs(record: &std::path::Path) -> PathBuf {
    record.join("logs")
}
