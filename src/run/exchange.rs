//! What goes into the guest before the command and comes back after it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use bulkhead_agent::Request;

use super::outcome::Changes;
use super::runner::{ANSWER, Signals, unless_interrupted};
use super::transfer::{joined, receive, send};
use super::workspace;
use crate::error::{Explain, Report};
use crate::guest::archive::{self, HostDir, Limits, Manifest, PackLimits, Packed, Warnings};
use crate::guest::{Channel, GuestError};
use crate::plan::SHARE_TAG;
use crate::spec::{Script, Spec, Workspace, WorkspaceMode};

/// Where the workspace is in the guest; the command starts here.
pub(super) const WORK: &str = "/workspace/work";
/// Where scripts are in the guest.
pub(super) const INPUT: &str = "/workspace/input";
/// What the guest leaves here comes back as artifacts.
const OUTPUT: &str = "/workspace/output";

/// The workspace could not be exchanged.
#[derive(Debug, thiserror::Error)]
pub enum ExchangeError {
    /// The host directory is not one.
    #[error("cannot use {path} as {role}")]
    Dir {
        /// The directory.
        path: PathBuf,
        /// What for.
        role: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// An archive could not be made or unpacked.
    #[error(transparent)]
    Archive(#[from] archive::Error),
    /// Changes could not be brought back.
    #[error(transparent)]
    Workspace(#[from] workspace::Error),
}

impl Explain for ExchangeError {
    fn code(&self) -> &'static str {
        match self {
            Self::Dir { .. } => "workspace-unreadable",
            Self::Archive(error) => error.code(),
            Self::Workspace(error) => error.code(),
        }
    }

    fn remedy(&self) -> String {
        match self {
            Self::Dir { path, .. } => {
                format!(
                    "Name a directory that exists and that you may read and write, instead of {}.",
                    path.display()
                )
            }
            Self::Archive(error) => error.remedy(),
            Self::Workspace(error) => error.remedy(),
        }
    }
}

/// What came back.
#[derive(Debug, Default)]
pub(super) struct Fetched {
    /// What changed in the workspace, where that was asked for.
    pub(super) changes: Option<Changes>,
    /// Artifacts brought back.
    pub(super) artifacts: Option<Vec<String>>,
    /// What could not be brought into place, and where it is instead.
    pub(super) failed: Option<Report>,
}

/// The exchange of one run.
#[derive(Debug)]
pub(super) struct Exchange {
    workspace: Workspace,
    /// The workspace and the artifacts directory, opened before anything runs.
    dir: Option<HostDir>,
    artifacts: Option<HostDir>,
    packed: Packed,
}

impl Exchange {
    /// Checks the host directories before anything is started.
    ///
    /// # Errors
    /// One of them cannot be used.
    pub(super) fn prepare(workspace: &Workspace) -> Result<Self, ExchangeError> {
        let mut workspace = workspace.clone();
        let (mut opened, mut artifacts) = (None, None);
        if let Some(dir) = &mut workspace.dir {
            let bad = |source| ExchangeError::Dir {
                path: dir.clone(),
                role: "the workspace",
                source,
            };
            let full = dir.canonicalize().map_err(bad)?;
            if full.to_str().is_none() {
                let why = "its path is not UTF-8, which the record of a run must be";
                return Err(bad(io::Error::new(io::ErrorKind::InvalidInput, why)));
            }
            opened = Some(HostDir::open(&full).map_err(bad)?);
            *dir = full;
        }
        if let Some(dir) = &workspace.artifacts {
            let bad = |source| ExchangeError::Dir {
                path: dir.clone(),
                role: "the artifacts directory",
                source,
            };
            fs::create_dir_all(dir).map_err(bad)?;
            artifacts = Some(HostDir::open(dir).map_err(bad)?);
        }
        Ok(Self {
            workspace,
            dir: opened,
            artifacts,
            packed: Packed::default(),
        })
    }

    /// Whether anything is to come back.
    pub(super) fn wants_something(&self) -> bool {
        let workspace = &self.workspace;
        workspace.artifacts.is_some() || workspace.apply || workspace.diff
    }

    /// The workspace, its directory resolved.
    pub(super) fn workspace(&self) -> &Workspace {
        &self.workspace
    }

    /// The workspace on the host, held open.
    pub(super) fn dir(&self) -> Option<&HostDir> {
        self.dir.as_ref()
    }

    /// Owner of the workspace on the host.
    fn owner(&self) -> Option<u32> {
        self.dir.as_ref().map(|dir| dir.owner().0)
    }

    /// The user a command runs as: in a share the owner of the files, because
    /// nobody else could write them.
    pub(super) fn user(&self, spec: &Spec) -> Option<String> {
        let asked = spec.command.user.clone();
        match (self.workspace.mode, self.owner()) {
            (WorkspaceMode::Share, Some(uid @ 1..)) => asked.or(Some(uid.to_string())),
            _ => asked,
        }
    }

    /// Sends the workspace and the script in; gives warnings.
    ///
    /// # Errors
    /// The workspace cannot be read, or the guest cannot take it.
    pub(super) async fn send(
        &mut self,
        channel: &Channel,
        spec: &Spec,
    ) -> Result<Vec<String>, super::RunError> {
        let mut warnings = Vec::new();
        if let Some(script) = spec.command.script.clone() {
            let put = put(INPUT, spec, false);
            send(channel, &put, "take the script", move |writer| {
                pack_script(&script, writer)
            })
            .await?;
        }
        let Some(dir) = self.dir.clone() else {
            return Ok(warnings);
        };
        match self.workspace.mode {
            WorkspaceMode::Copy => {
                let track = self.workspace.apply || self.workspace.diff;
                let pack = move |writer| archive::pack(&dir, writer, &PackLimits::default());
                self.packed =
                    send(channel, &put(WORK, spec, track), "take the workspace", pack).await?;
                add_warnings(&mut warnings, &self.packed.warnings);
            }
            WorkspaceMode::Share => {
                let mount = Request::Mount9p {
                    tag: SHARE_TAG.into(),
                    path: WORK.into(),
                    read_only: self.workspace.read_only,
                };
                channel.ask("mount the workspace", &mount, ANSWER).await?;
                if !self.workspace.read_only {
                    warnings.push(format!(
                        "the guest could change everything in {}, hooks and configuration of \
                         repositories too: look at them before you use git there",
                        dir.path().display()
                    ));
                }
                if self.owner() == Some(0)
                    && spec.command.user.is_none()
                    && !self.workspace.read_only
                {
                    warnings.push(format!(
                        "{} belongs to root: the command can write there only with --user root",
                        dir.path().display()
                    ));
                }
            }
            WorkspaceMode::None => {}
        }
        Ok(warnings)
    }

    /// Fetches changes and artifacts. A signal ends the receiving, but not what
    /// brings into place: that is never left half done. `staging` is private and goes with the
    /// run; what cannot be brought into place is moved below `kept`.
    ///
    /// # Errors
    /// The guest's answer is unusable.
    pub(super) async fn fetch(
        &self,
        channel: &Channel,
        staging: &Path,
        kept: &Path,
        signals: &mut Signals,
        warnings: &mut Vec<String>,
    ) -> Result<Fetched, super::RunError> {
        let mut fetched = Fetched::default();
        let wanted = self.workspace.apply || self.workspace.diff;
        if let (true, Some(dir)) = (wanted, self.dir.clone()) {
            let ask = Request::Changes { path: WORK.into() };
            let (into, staging) = (dir.clone(), staging.to_owned());
            let stage = move |archive, removed| {
                workspace::Changes::stage(archive, removed, &staging, &into, &Limits::default())
            };
            let receive = receive(channel, &ask, "send what changed", stage);
            let changes = unless_interrupted(signals, receive).await?;
            let (wish, manifest) = (self.workspace.clone(), self.packed.manifest.clone());
            let kept = kept.join("workspace");
            let work = move || bring_back(&dir, changes, &wish, &manifest, &kept);
            let brought = joined(tokio::task::spawn_blocking(work).await);
            warnings.extend(brought.warnings);
            fetched.changes = Some(brought.changes);
            fetched.failed = brought.failed;
        }
        if let Some(dir) = self.artifacts.clone() {
            let staged = self.artifacts(channel, dir.clone(), staging, signals, warnings);
            fetched.artifacts = Some(match staged.await? {
                None => Vec::new(),
                Some(staged) => {
                    let brought = self.place_artifacts(dir, staged, kept).await;
                    warnings.extend(brought.warnings);
                    fetched.failed = fetched.failed.take().or(brought.failed);
                    brought.changes.changed
                }
            });
        }
        Ok(fetched)
    }

    /// Receives the artifacts; `None` when there are none.
    async fn artifacts(
        &self,
        channel: &Channel,
        into: HostDir,
        staging: &Path,
        signals: &mut Signals,
        warnings: &mut Vec<String>,
    ) -> Result<Option<workspace::Changes>, super::RunError> {
        let get = Request::Get {
            path: OUTPUT.into(),
        };
        let staging = staging.to_owned();
        let stage = move |archive, side| {
            // Nothing belongs there: a guest that writes to it is cut off.
            drop::<std::os::unix::net::UnixStream>(side);
            let nothing = io::empty();
            workspace::Changes::stage(archive, nothing, &staging, &into, &Limits::default())
        };
        let receive = receive(channel, &get, "send its artifacts", stage);
        match unless_interrupted(signals, receive).await {
            Ok(staged) => Ok(Some(staged)),
            // The command may have removed the directory.
            Err(super::RunError::Machine(super::MachineError::Guest(
                error @ GuestError::Refused { .. },
            ))) => {
                warnings.push(format!("there are no artifacts: {error}"));
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    async fn place_artifacts(
        &self,
        dir: HostDir,
        staged: workspace::Changes,
        kept: &Path,
    ) -> Brought {
        let wish = Workspace {
            apply: true,
            // Older artifacts of the same name are replaced.
            force: true,
            diff: false,
            ..self.workspace.clone()
        };
        let kept = kept.join("artifacts");
        let work = move || bring_back(&dir, staged, &wish, &Manifest::default(), &kept);
        joined(tokio::task::spawn_blocking(work).await)
    }
}

/// What came of bringing back.
struct Brought {
    changes: Changes,
    warnings: Vec<String>,
    failed: Option<Report>,
}

/// Shows and applies changes as wished. Whatever goes wrong, the guest's work
/// is not lost: it is moved to `kept`.
fn bring_back(
    dir: &HostDir,
    changes: workspace::Changes,
    wish: &Workspace,
    manifest: &Manifest,
    kept: &Path,
) -> Brought {
    let names = |names: &mut dyn Iterator<Item = &archive::Name>| {
        names.map(ToString::to_string).collect::<Vec<_>>()
    };
    let mut brought = Brought {
        changes: Changes {
            changed: names(&mut changes.changed()),
            removed: names(&mut changes.removed()),
            applied: false,
            diff: None,
        },
        warnings: Vec::new(),
        failed: None,
    };
    add_warnings(&mut brought.warnings, &changes.warnings);
    let mut work = || {
        if wish.diff {
            let mut text = Vec::new();
            workspace::diff(dir, &changes, &mut text, &workspace::DiffOptions::default())?;
            brought.changes.diff = Some(String::from_utf8_lossy(&text).into_owned());
        }
        if wish.apply {
            let options = workspace::ApplyOptions { force: wish.force };
            let applied = workspace::apply(dir, &changes, manifest, &options)?;
            add_warnings(&mut brought.warnings, &applied.warnings);
            brought.changes.applied = true;
        }
        Ok::<_, workspace::Error>(())
    };
    if let Err(error) = work() {
        let mut report = Report::of(&error);
        report.remedy = match changes.keep(kept) {
            Ok(place) => format!(
                "{} What the guest sent is kept, as it came, in {}.",
                report.remedy,
                place.display()
            ),
            Err(lost) => format!("{} It could not be kept: {lost}", report.remedy),
        };
        brought.failed = Some(report);
    }
    brought
}

/// Program and arguments of a command, its script in its place in the guest.
pub(super) fn argv(command: &crate::spec::Command) -> Vec<String> {
    let mut argv = Vec::new();
    if let Some(script) = &command.script {
        argv.extend(script.interpreter.iter().cloned());
        argv.push(format!("{INPUT}/{}", script.name));
    }
    argv.extend(command.argv.iter().cloned());
    argv
}

fn put(path: &str, spec: &Spec, track: bool) -> Request {
    Request::Put {
        path: path.into(),
        user: spec.command.user.clone(),
        track,
    }
}

fn add_warnings(to: &mut Vec<String>, warnings: &Warnings) {
    to.extend(warnings.list.iter().map(ToString::to_string));
    if warnings.more > 0 {
        to.push(format!("and {} more like these", warnings.more));
    }
}

/// The script as an archive of one executable file.
fn pack_script(script: &Script, writer: impl io::Write) -> Result<(), archive::Error> {
    let mut header = tar::Header::new_gnu();
    header.set_size(script.content.len() as u64);
    header.set_mode(0o755);
    let mut builder = tar::Builder::new(writer);
    builder
        .append_data(&mut header, &script.name, &script.content[..])
        .and_then(|()| builder.finish())
        .map_err(|source| archive::Error::Send {
            path: script.name.clone(),
            source,
        })
}
