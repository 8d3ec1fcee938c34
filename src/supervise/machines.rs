//! The machines of one host: made, found, compared with what lives, removed.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use super::client::Client;
use super::error::SuperviseError;
use super::launch::Launcher;
use super::log::ExecLog;
use super::supervisor::{Start, save_spec};
use super::view::{Kind, View};
use super::wire::{ExecId, ExecInfo, Settings};
use crate::host::lease::Lease;
use crate::run::{
    ControlError, Controller, Dirs, Found, Host, ImageUse, Record, RecordError, State, StateFile,
    Violation, abandon, detached, look, recover, violations,
};
use crate::spec::{Spec, Timeout, VmId};

/// How long a supervisor may take to end its machine at once.
const FORCE: Duration = Duration::from_secs(15);
/// How long the end of a machine is waited for after its supervisor died.
const SETTLE: Duration = Duration::from_millis(100);

/// The machines of one host.
#[derive(Debug, Clone)]
pub struct Machines {
    host: Host,
}

impl Machines {
    /// Those of `host`.
    pub fn new(host: Host) -> Self {
        Self { host }
    }

    pub(super) fn host(&self) -> &Host {
        &self.host
    }

    pub(super) fn dirs(&self) -> &Dirs {
        &self.host.dirs
    }

    /// Reaches the supervisor of a machine.
    pub fn client(&self, id: &VmId) -> Client {
        Client::new(self.dirs(), id.clone())
    }

    /// Reaches the supervisor of a machine that runs.
    ///
    /// # Errors
    /// It does not run, or there is none of that name.
    pub async fn running(&self, id: &VmId) -> Result<Client, SuperviseError> {
        let dir = self.dirs().run(id);
        if !dir.exists() {
            return Err(RecordError::NotFound { id: id.clone() }.into());
        }
        // Without asking the supervisor: it is about to be asked anyway.
        let runs = StateFile::is_in(&dir)
            && look::is_owned(&dir)?
            && StateFile::open(&dir, id)?.status().state == State::Running;
        if !runs {
            let view = self.look(id).await?;
            return Err(match view.kind {
                Kind::Run => ControlError::Attached.into(),
                Kind::Machine => wrong_state(&view, "reached"),
            });
        }
        Ok(self.client(id))
    }

    /// Makes a running machine stand still.
    ///
    /// # Errors
    /// It does not run.
    pub async fn pause(&self, id: &VmId) -> Result<(), SuperviseError> {
        self.running(id).await?.pause().await
    }

    /// Makes a paused machine go on.
    ///
    /// # Errors
    /// It is not paused.
    pub async fn resume(&self, id: &VmId) -> Result<(), SuperviseError> {
        let view = self.look(id).await?;
        match view.state {
            State::Paused => self.client(id).resume().await,
            _ => Err(wrong_state(&view, "resumed")),
        }
    }

    /// Writes a machine down. Everything that can be checked before its start
    /// is checked; nothing runs yet.
    ///
    /// # Errors
    /// The name is taken, or something the machine needs is not there.
    pub async fn create(&self, spec: &Spec) -> Result<(), SuperviseError> {
        let name = spec.image.clone();
        let workspace = detached::resolve(&spec.workspace)?;
        let (image, plan) = self.host.plan(spec)?;
        self.host.prove(spec, &image, &plan).await?;
        let _lock = image.lock().map_err(crate::run::RunError::from)?;
        let spec = Spec {
            // Its disk fits no other image, whatever the name stands for later.
            image: image.id.clone(),
            // Its supervisor works elsewhere.
            kernel: spec.kernel.as_ref().map(|kernel| absolute(kernel)),
            workspace,
            ..spec.clone()
        };
        Ok(Record::keep(self.dirs(), &spec, &image, &name)?)
    }

    /// Starts a machine and waits until its guest agent answers.
    ///
    /// # Errors
    /// It is not in a state to be started, or it does not come up.
    pub async fn start(&self, id: &VmId, launcher: &Launcher) -> Result<(), SuperviseError> {
        self.clear(launcher, Some(id)).await;
        let view = self.look(id).await?;
        if !view.state.may_start() {
            return Err(wrong_state(&view, "started"));
        }
        launcher.launch(self.dirs(), id, Start::Boot).await
    }

    /// Releases what dead owners left, and gives `id`, should it run on without
    /// a supervisor, a new one. Failing at that stops nobody.
    async fn clear(&self, launcher: &Launcher, id: Option<&VmId>) {
        match recover(self.dirs(), false) {
            Ok(mut found) => {
                // Others may take long to answer: they are gc's.
                found.retain(|one| {
                    matches!(one, Found::Survivor { id: found } if Some(found.as_str()) == id.map(VmId::as_str))
                });
                self.adopt(&found, launcher).await;
            }
            Err(error) => tracing::debug!("recovery: {error}"),
        }
    }

    /// Gives those among `found` that run on without a supervisor a new one;
    /// gives for each whether that could be.
    pub async fn adopt(
        &self,
        found: &[Found],
        launcher: &Launcher,
    ) -> Vec<(VmId, Result<(), SuperviseError>)> {
        let mut adopted = Vec::new();
        for one in found {
            let Found::Survivor { id } = one else {
                continue;
            };
            let Ok(id) = id.parse::<VmId>() else { continue };
            match launcher.launch(self.dirs(), &id, Start::TakeOver).await {
                // Somebody else gave it one meanwhile, and that is at it.
                Err(SuperviseError::Told(report)) if report.code == "machine-busy" => {}
                launched => adopted.push((id, launched)),
            }
        }
        adopted
    }

    /// Stops a machine and waits until it has ended.
    ///
    /// # Errors
    /// It does not run, or could not be stopped.
    pub async fn stop(
        &self,
        id: &VmId,
        grace: Option<Timeout>,
        force: bool,
    ) -> Result<(), SuperviseError> {
        if !self.is_supervised(id)? {
            let view = self.look(id).await?;
            return Err(wrong_state(&view, "stopped"));
        }
        let client = self.client(id);
        let stop = client.stop(grace, force);
        let stopped = match force {
            false => stop.await,
            true => match tokio::time::timeout(FORCE, stop).await {
                Ok(stopped) => stopped,
                // It hangs itself: its machine goes with it.
                Err(_) => return self.kill_supervisor(id),
            },
        };
        self.unless_over(id, stopped).await
    }

    /// Whether a detached machine has a supervisor, without asking it.
    fn is_supervised(&self, id: &VmId) -> Result<bool, SuperviseError> {
        let dir = self.dirs().run(id);
        Ok(StateFile::is_in(&dir)
            && look::is_owned(&dir)?
            && StateFile::open(&dir, id)?.status().state.is_live())
    }

    /// Ends a supervisor that does not answer, and what it held.
    fn kill_supervisor(&self, id: &VmId) -> Result<(), SuperviseError> {
        let state = StateFile::open(&self.dirs().run(id), id)?;
        if let Some(owner) = &state.status().supervisor {
            let lease = Lease::Process {
                pid: owner.pid,
                start_time: owner.start_time,
                boot_id: owner.boot_id.clone(),
            };
            lease.release().map_err(RecordError::from)?;
        }
        // Also one that could live on: it was to be stopped.
        look::note_loss(&self.dirs().run(id), id)?;
        let (mut record, ..) = Record::open(self.dirs(), id)?;
        let errors = record.release();
        if !errors.is_empty() {
            return Err(leaked(id, &errors));
        }
        drop(record);
        recover(self.dirs(), false)?;
        Ok(())
    }

    /// Waits until a machine has ended, and gives what it is then.
    ///
    /// # Errors
    /// There is none.
    pub async fn wait(&self, id: &VmId) -> Result<View, SuperviseError> {
        let view = self.look(id).await?;
        if view.state.is_live() {
            let waited = self.client(id).wait().await;
            self.unless_over(id, waited).await?;
            return self.look(id).await;
        }
        Ok(view)
    }

    /// A supervisor that dies while it is waited for has ended its machine too.
    async fn unless_over(
        &self,
        id: &VmId,
        result: Result<(), SuperviseError>,
    ) -> Result<(), SuperviseError> {
        match result {
            Err(SuperviseError::Control(error)) => {
                tokio::time::sleep(SETTLE).await;
                let view = self.look(id).await?;
                match view.state.is_live() || look::has_vmm(&self.dirs().run(id)) {
                    true => Err(error.into()),
                    false => Ok(()),
                }
            }
            other => other,
        }
    }

    /// Changes limits: of the running machine, or of its next start.
    ///
    /// # Errors
    /// There is no such machine, or it cannot be so.
    pub async fn set(&self, id: &VmId, settings: Settings) -> Result<(), SuperviseError> {
        let view = self.look(id).await?;
        if view.state.is_live() {
            return match view.kind {
                Kind::Machine => self.client(id).set(settings).await,
                Kind::Run => self.set_run(id, settings).await,
            };
        }
        let (record, mut spec, _) = Record::open(self.dirs(), id)?;
        settings.check(&spec).map_err(crate::run::RunError::from)?;
        // One that was never started has none yet.
        let disk = record.dir().join("disk.img");
        let size = settings.disk.filter(|_| disk.exists());
        let grown = size.map(|size| crate::run::lengthen(&disk, size));
        let grown = grown.transpose()?;
        settings.apply(&mut spec);
        let Err(error) = save_spec(record.dir(), &spec) else {
            return Ok(());
        };
        let back = grown.map_or(Ok(()), |grown| grown.take_back(&disk));
        Err(SuperviseError::NotChanged {
            id: id.clone(),
            what: "the record",
            rest: match &back {
                Ok(()) => "nothing was changed".into(),
                Err(error) => format!("what could not be taken back: the disk: {error}"),
            },
            is_torn: false,
            source: error.into(),
        })
    }

    /// Of the machine of a `bulkhead run`, only its network can change.
    async fn set_run(&self, id: &VmId, settings: Settings) -> Result<(), SuperviseError> {
        let network = Settings {
            network: settings.network.clone(),
            ..Settings::default()
        };
        if settings != network {
            return Err(ControlError::Attached.into());
        }
        let controller = Controller::new(self.dirs(), id.clone());
        Ok(controller.set_network(&settings.network).await?)
    }

    /// Removes a machine, its disk and its logs; with `force` also one that
    /// runs, or whose record is damaged.
    ///
    /// # Errors
    /// There is none, it runs, or something of it stays.
    pub async fn remove(&self, id: &VmId, force: bool) -> Result<(), SuperviseError> {
        let view = match self.look(id).await {
            // Somebody else was quicker.
            Err(_) if !self.dirs().run(id).exists() => {
                return Err(RecordError::NotFound { id: id.clone() }.into());
            }
            Err(error) if force && is_damage(&error) => return self.remove_damaged(id).await,
            other => other?,
        };
        if view.kind == Kind::Run {
            return Err(wrong_state(
                &view,
                "removed: it is that of a `bulkhead run`",
            ));
        }
        // One that survived its supervisor runs too.
        if !force && (view.state.is_live() || look::has_vmm(&self.dirs().run(id))) {
            return Err(wrong_state(&view, "removed"));
        }
        if view.state.is_live() {
            match self.stop(id, None, true).await {
                // It ended by itself meanwhile.
                Err(SuperviseError::WrongState { .. }) => {}
                other => other?,
            }
        }
        let (record, ..) = Record::open(self.dirs(), id)?;
        let errors = record.destroy();
        match errors[..] {
            [] => Ok(()),
            _ => Err(leaked(id, &errors)),
        }
    }

    /// Removes what cannot be read.
    async fn remove_damaged(&self, id: &VmId) -> Result<(), SuperviseError> {
        if look::is_owned(&self.dirs().run(id))? {
            // Its supervisor knows more than the disk; where it does not answer,
            // the machine stays in use.
            let _ = tokio::time::timeout(FORCE, self.client(id).stop(None, true)).await;
        }
        match abandon(self.dirs(), id)?.into_iter().next() {
            Some(error) => Err(SuperviseError::Told(error)),
            None => Ok(()),
        }
    }

    /// A machine as it is now: what is on disk, compared with what lives.
    ///
    /// # Errors
    /// There is none of that name, or its record cannot be read.
    pub async fn look(&self, id: &VmId) -> Result<View, SuperviseError> {
        let dir = self.dirs().run(id);
        if !dir.exists() {
            return Err(RecordError::NotFound { id: id.clone() }.into());
        }
        let owned = look::is_owned(&dir)?;
        let spec: Spec = look::spec(&dir)?;
        if !StateFile::is_in(&dir) {
            return Ok(of_run(&dir, &spec, owned));
        }
        let status = match owned {
            true => StateFile::open(&dir, id)?.status().clone(),
            false => look::note_loss(&dir, id)?,
        };
        let mut view = View {
            reason: status.reason,
            since_ms: status.since_ms,
            created_ms: status.created_ms,
            started_ms: status.started_ms,
            deadline_ms: status.deadline_ms,
            snapshot: status.snapshot,
            restore: status.restore,
            supervisor: status.supervisor,
            ended: status.ended,
            history: status.history,
            violations: self.violations(id, status.created_ms),
            ..View::of(&spec, Kind::Machine, status.state, status.image)
        };
        if owned && view.state.is_live() {
            view.live = self.client(id).status().await.ok();
        }
        // On a full disk the supervisor knows better.
        if let Some(live) = view.live.as_ref().filter(|live| live.state != view.state) {
            view.state = live.state;
            view.reason = live.reason.clone();
            view.since_ms = live.since_ms;
        }
        Ok(view)
    }

    /// Of an earlier machine of that name there may be some, too.
    fn violations(&self, id: &VmId, created_ms: u64) -> Vec<Violation> {
        let mut found = violations(&self.dirs().violations());
        found.retain(|one| one.machine == *id && one.at_ms >= created_ms);
        found
    }

    /// All machines, by name. Those that cannot be read are told apart.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub async fn list(&self) -> Result<(Vec<View>, Vec<SuperviseError>), SuperviseError> {
        let runs = self.dirs().runs();
        let mut names: Vec<VmId> = match fs::read_dir(&runs) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(source) => {
                return Err(RecordError::Io {
                    action: "read",
                    path: runs,
                    source,
                }
                .into());
            }
            Ok(entries) => entries
                .flatten()
                .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
                .collect(),
        };
        names.sort();
        let mut tasks = tokio::task::JoinSet::new();
        for id in names {
            let machines = self.clone();
            // A supervisor that does not answer holds the others up no longer
            // than itself.
            tasks.spawn(async move {
                let looked = machines.look(&id).await;
                (id, looked)
            });
        }
        let (mut views, mut errors) = (Vec::new(), Vec::new());
        for (id, looked) in tasks.join_all().await {
            match looked {
                Ok(view) => views.push(view),
                // Removed meanwhile.
                Err(_) if !self.dirs().run(&id).exists() => {}
                Err(error) => errors.push(error),
            }
        }
        views.sort_by(|a, b| a.id.cmp(&b.id));
        Ok((views, errors))
    }

    /// Directory with the logs of a machine's commands.
    pub fn logs(&self, id: &VmId) -> PathBuf {
        detached::logs(&self.dirs().run(id))
    }

    /// The serial console's log of a machine.
    pub fn console_log(&self, id: &VmId) -> PathBuf {
        self.dirs().run(id).join("console.log")
    }

    /// Commands of a machine that have logs, oldest first.
    pub fn execs(&self, id: &VmId) -> Vec<ExecInfo> {
        ExecLog::list(&self.logs(id))
    }

    /// One of them.
    ///
    /// # Errors
    /// There was none of that number.
    pub fn exec(&self, id: &VmId, exec: ExecId) -> Result<ExecInfo, SuperviseError> {
        let mut execs = self.execs(id).into_iter();
        execs
            .find(|info| info.id == exec)
            .ok_or_else(|| SuperviseError::NoExec {
                id: id.clone(),
                exec,
            })
    }
}

/// A path as it is from anywhere; the name of an installed kernel stays.
pub(super) fn absolute(kernel: &str) -> String {
    match kernel.contains('/').then(|| std::path::absolute(kernel)) {
        Some(Ok(path)) => path.to_string_lossy().into_owned(),
        _ => kernel.to_owned(),
    }
}

/// The machine of a `bulkhead run`.
fn of_run(dir: &Path, spec: &Spec, owned: bool) -> View {
    let image = ImageUse {
        name: spec.image.clone(),
        id: String::new(),
    };
    let state = match owned {
        true => State::Running,
        false => State::Lost,
    };
    let made = fs::metadata(dir).and_then(|meta| meta.modified()).ok();
    let made = made.and_then(|at| at.duration_since(UNIX_EPOCH).ok());
    let made = made.map_or(0, |at| u64::try_from(at.as_millis()).unwrap_or(0));
    View {
        reason: match owned {
            true => "a `bulkhead run`".into(),
            false => "its `bulkhead run` died".into(),
        },
        since_ms: made,
        created_ms: made,
        started_ms: Some(made),
        ..View::of(spec, Kind::Run, state, image)
    }
}

/// Whether what is on disk cannot be read.
fn is_damage(error: &SuperviseError) -> bool {
    match error {
        SuperviseError::State(error) => matches!(error, crate::run::StateError::Read { .. }),
        SuperviseError::Run(crate::run::RunError::Record(RecordError::Io { source, .. })) => {
            matches!(
                source.kind(),
                std::io::ErrorKind::InvalidData
                    | std::io::ErrorKind::UnexpectedEof
                    | std::io::ErrorKind::NotFound
            )
        }
        _ => false,
    }
}

fn wrong_state(view: &View, what: &'static str) -> SuperviseError {
    SuperviseError::WrongState {
        id: view.id.clone(),
        state: view.state,
        reason: view.reason.clone(),
        what,
    }
}

fn leaked(id: &VmId, errors: &[RecordError]) -> SuperviseError {
    let told: Vec<String> = errors.iter().map(ToString::to_string).collect();
    SuperviseError::Leaked {
        id: id.clone(),
        why: told.join("; "),
    }
}
