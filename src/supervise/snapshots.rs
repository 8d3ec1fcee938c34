//! Snapshots of machines, and machines that branch off from one.

use super::error::SuperviseError;
use super::launch::Launcher;
use super::machines::Machines;
use super::supervisor::{Supervisor, save_spec};
use crate::host::fault;
use crate::run::{
    Beginning, Machine, Record, RecordError, RunError, Saving, check, copy_disk, save_disk,
};
use crate::snapshot::{SnapshotError, SnapshotName, Store, Wish};
use crate::spec::{Bytes, Spec, VmId};

/// Forks that are started at once.
const AT_ONCE: usize = 8;

impl Supervisor<'_> {
    /// Begins to save the machine; what QEMU tells of it meanwhile is no news.
    pub(super) fn save<'a>(
        &mut self,
        machine: &'a Machine,
        wish: Wish,
    ) -> impl Future<Output = Result<(), RunError>> + use<'a> {
        self.saving = true;
        let (host, spec) = (self.host.clone(), self.spec.clone());
        let saving = Saving {
            wish,
            parent: self.state.status().snapshot.clone(),
        };
        async move { crate::run::save(&host, &spec, machine, saving).await }
    }
}

impl Machines {
    /// The snapshots of a machine.
    ///
    /// # Errors
    /// There is no such machine.
    pub fn snapshots(&self, id: &VmId) -> Result<Store, SuperviseError> {
        let dir = self.dirs().run(id);
        match dir.exists() {
            true => Ok(Store::new(&dir, id)),
            false => Err(RecordError::NotFound { id: id.clone() }.into()),
        }
    }

    /// Removes what interrupted saves left.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn sweep_snapshots(&self) -> Result<(), SuperviseError> {
        for entry in std::fs::read_dir(self.dirs().runs())
            .into_iter()
            .flatten()
            .flatten()
        {
            if let Some(id) = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok())
            {
                Store::new(&entry.path(), &id).sweep()?;
            }
        }
        Ok(())
    }

    /// Saves a machine: one that runs goes on after it.
    ///
    /// # Errors
    /// It cannot be saved, or there is a snapshot of that name.
    pub async fn save(&self, id: &VmId, wish: Wish) -> Result<(), SuperviseError> {
        let state = self.look(id).await?.state;
        if !state.may_start() {
            return self.client(id).save(wish).await;
        }
        if !wish.disk_only {
            return Err(SnapshotError::NoMemory { vm: id.clone() }.into());
        }
        let (record, spec, mut state) = Record::open(self.dirs(), id)?;
        let parent = state.status().snapshot.clone();
        save_disk(record.dir(), &spec, &wish, parent)?;
        let name = wish.name.clone();
        let written = state.update(|status| status.snapshot = Some(name));
        if written.is_err() {
            // Whoever is told that it failed does not find it.
            Store::new(record.dir(), id).rm(&wish.name)?;
        }
        Ok(written?)
    }

    /// Makes a machine what it was when it was saved. It keeps its name, its
    /// machine id, its labels and its logs. With its memory it runs on from
    /// there; with its disk alone it is started again, where it ran.
    ///
    /// # Errors
    /// There is no such snapshot, it is damaged, or it does not fit: nothing has
    /// changed then. Or the machine does not come up again.
    pub async fn restore(
        &self,
        id: &VmId,
        name: &SnapshotName,
        disk_only: bool,
        launcher: &Launcher,
    ) -> Result<(), SuperviseError> {
        // Before anything is ended for it.
        let snapshot = self.snapshots(id)?.get(name)?;
        let disk_only = disk_only || snapshot.manifest.saved.is_none();
        let size = Bytes(snapshot.manifest.disk.size);
        if !disk_only {
            check(self.host(), &with_disk(self.spec(id)?, size), &snapshot)?;
        }
        let live = self.look(id).await?.state.is_live();
        if live {
            match self.stop(id, None, true).await {
                // It ended by itself meanwhile.
                Err(SuperviseError::WrongState { .. }) => {}
                other => other?,
            }
        }
        let (record, spec, mut state) = Record::open(self.dirs(), id)?;
        fault::at("restore snapshot").map_err(SnapshotError::io("restore", record.dir()))?;
        save_spec(record.dir(), &with_disk(spec, size))?;
        if disk_only {
            copy_disk(&snapshot, record.dir())?;
        }
        // From here on its next start goes on from there, whoever starts it.
        state.update(|status| {
            status.restore = (!disk_only).then(|| name.clone());
            status.snapshot = Some(name.clone());
            status.provisioned = true;
        })?;
        drop((record, state));
        match live || !disk_only {
            true => self.start(id, launcher).await,
            false => Ok(()),
        }
    }

    /// Branches a running machine: `names` go on from where it is, each with
    /// its memory and its disk, and with a name, an id and a network of its own.
    ///
    /// # Errors
    /// It cannot be saved, a name is taken, or one does not come up. Those that
    /// did stay.
    pub async fn fork(
        &self,
        id: &VmId,
        names: &[VmId],
        launcher: &Launcher,
    ) -> Result<(), SuperviseError> {
        for name in names {
            if self.dirs().run(name).exists() {
                return Err(RecordError::Exists { id: name.clone() }.into());
            }
        }
        let view = self.look(id).await?;
        if view.state.may_start() {
            return Err(SnapshotError::NoMemory { vm: id.clone() }.into());
        }
        let wish = Wish {
            name: SnapshotName::fork(),
            description: Some(format!("{id} as it was forked")),
            tags: [("fork".to_owned(), id.to_string())].into(),
            disk_only: false,
            transient: true,
        };
        let store = self.snapshots(id)?;
        // Should this process die, the next who looks finds nobody here.
        let _forking = store.forking()?;
        self.client(id).save(wish.clone()).await?;
        let forked = async {
            let spec = self.spec(id)?;
            let (image, _) = self.host().plan(&spec).map_err(SuperviseError::Run)?;
            for some in names.chunks(AT_ONCE) {
                let lock = image.lock().map_err(crate::run::RunError::from)?;
                for name in some {
                    let child = child(&spec, name);
                    Record::keep_with(self.dirs(), &child, &image, &view.image.name, |dir| {
                        let adopted = Store::new(dir, name).adopt(&store, &wish.name);
                        adopted.map_err(SuperviseError::from)?;
                        Ok::<_, SuperviseError>(Beginning::Memory(wish.name.clone()))
                    })?;
                }
                drop(lock);
                self.start_all(some, launcher).await?;
            }
            Ok::<_, SuperviseError>(())
        };
        let forked = forked.await;
        // The forks have it; nobody asked for it here.
        let removed = store.rm(&wish.name);
        forked?;
        Ok(removed?)
    }

    /// Starts machines at once; all that can are up when one could not be.
    async fn start_all(&self, names: &[VmId], launcher: &Launcher) -> Result<(), SuperviseError> {
        let mut starts = tokio::task::JoinSet::new();
        for name in names {
            let (machines, name, launcher) = (self.clone(), name.clone(), launcher.clone());
            starts.spawn(async move { machines.start(&name, &launcher).await });
        }
        let all = starts.join_all().await;
        all.into_iter().collect()
    }

    pub(super) fn spec(&self, id: &VmId) -> Result<Spec, SuperviseError> {
        Ok(Record::spec(self.dirs(), id)?)
    }
}

fn with_disk(mut spec: Spec, size: Bytes) -> Spec {
    spec.limits.disk = size;
    spec
}

/// A machine like another, under a name of its own. Ports of the host can lead
/// to one machine only.
fn child(spec: &Spec, name: &VmId) -> Spec {
    Spec {
        id: name.clone(),
        publish: Vec::new(),
        ..spec.clone()
    }
}
