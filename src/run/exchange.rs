//! What goes into the guest before the command and comes back after it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use bulkhead_agent::Request;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::outcome::Changes;
use super::runner::ANSWER;
use super::workspace;
use crate::error::Explain;
use crate::guest::archive::{self, HostDir, Limits, PackLimits, Packed, Warnings};
use crate::guest::{Channel, GuestError, Output};
use crate::plan::SHARE_TAG;
use crate::spec::{Script, Spec, Workspace, WorkspaceMode};

/// Where the workspace is in the guest; the command starts here.
pub(super) const WORK: &str = "/workspace/work";
/// Where scripts are in the guest.
pub(super) const INPUT: &str = "/workspace/input";
/// What the guest leaves here comes back as artifacts.
const OUTPUT: &str = "/workspace/output";

/// How long the guest may take to take, or give, the next bytes.
const STALLED: std::time::Duration = std::time::Duration::from_secs(60);

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
                if !self.workspace.read_only && dir.beneath().has(".git") {
                    warnings.push(format!(
                        "the guest can change hooks and configuration of the repository in {}: \
                         look at them before you use git there, or use workspace mode `copy`",
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

    /// Fetches artifacts and changes. `staging` is private and goes with the run.
    ///
    /// # Errors
    /// The guest's answer is unusable, or it cannot be brought into place.
    pub(super) async fn fetch(
        &self,
        channel: &Channel,
        staging: &Path,
        warnings: &mut Vec<String>,
    ) -> Result<Fetched, super::RunError> {
        let mut fetched = Fetched::default();
        let staging = staging.to_owned();
        if let Some(dir) = self.artifacts.clone() {
            let (get, staging) = (
                Request::Get {
                    path: OUTPUT.into(),
                },
                staging.clone(),
            );
            let applied = receive(channel, &get, "send its artifacts", move |archive, _| {
                workspace::artifacts(archive, &staging, &dir, &Limits::default())
            })
            .await?;
            add_warnings(warnings, &applied.warnings);
            fetched.artifacts = Some(applied.written.iter().map(ToString::to_string).collect());
        }
        let wanted = self.workspace.apply || self.workspace.diff;
        if let (true, Some(dir)) = (wanted, self.dir.clone()) {
            let ask = Request::Changes { path: WORK.into() };
            let into = dir.clone();
            let changes = receive(
                channel,
                &ask,
                "send what changed",
                move |archive, removed| {
                    workspace::Changes::stage(archive, removed, &staging, &into, &Limits::default())
                },
            )
            .await?;
            add_warnings(warnings, &changes.warnings);
            let result = self.bring_back(&dir, &changes, warnings);
            fetched.changes = Some(result.map_err(super::RunError::Workspace)?);
        }
        Ok(fetched)
    }

    fn bring_back(
        &self,
        dir: &HostDir,
        changes: &workspace::Changes,
        warnings: &mut Vec<String>,
    ) -> Result<Changes, ExchangeError> {
        let names = |names: &mut dyn Iterator<Item = &archive::Name>| {
            names.map(ToString::to_string).collect::<Vec<_>>()
        };
        let mut result = Changes {
            changed: names(&mut changes.changed()),
            removed: names(&mut changes.removed()),
            applied: false,
            diff: None,
        };
        if self.workspace.diff {
            let mut text = Vec::new();
            workspace::diff(dir, changes, &mut text, &workspace::DiffOptions::default())?;
            result.diff = Some(String::from_utf8_lossy(&text).into_owned());
        }
        if self.workspace.apply {
            let options = workspace::ApplyOptions {
                force: self.workspace.force,
            };
            let applied = workspace::apply(dir, changes, &self.packed.manifest, &options)?;
            add_warnings(warnings, &applied.warnings);
            result.applied = true;
        }
        Ok(result)
    }
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

/// A pipe between a thread that blocks and the runtime.
pub(super) fn pipe() -> Result<(UnixStream, std::os::unix::net::UnixStream), super::RunError> {
    let pair = || {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        Ok((UnixStream::from_std(ours)?, theirs))
    };
    pair().map_err(|source| {
        let path = PathBuf::from("(a socket pair)");
        super::MachineError::Io {
            action: "make",
            path,
            source,
        }
        .into()
    })
}

/// Bounds the time in which the guest must take or give the next bytes.
pub(super) async fn in_time<T>(
    what: &str,
    work: impl Future<Output = Result<T, GuestError>>,
) -> Result<T, GuestError> {
    let silent = |_| GuestError::Timeout {
        what: what.to_owned(),
        after: STALLED,
    };
    tokio::time::timeout(STALLED, work).await.map_err(silent)?
}

/// Sends what `produce` writes, from a thread of its own, as the input of a request.
async fn send<T: Send + 'static>(
    channel: &Channel,
    request: &Request,
    what: &str,
    produce: impl FnOnce(std::os::unix::net::UnixStream) -> Result<T, archive::Error> + Send + 'static,
) -> Result<T, super::RunError> {
    let mut stream = channel.open(request).await?;
    in_time(what, stream.started(what)).await?;
    let (mut ours, theirs) = pipe()?;
    let producer = tokio::task::spawn_blocking(move || produce(theirs));
    let input = stream.input();
    let mut buffer = vec![0; 64 * 1024];
    // A broken pipe is the producer's failure, which it reports itself.
    while let Ok(count @ 1..) = ours.read(&mut buffer).await {
        if !in_time(what, input.send(&buffer[..count])).await? {
            break;
        }
    }
    drop(ours);
    let produced = joined(producer.await);
    match produced {
        Ok(produced) => {
            input.end().await?;
            in_time(what, stream.finished(what)).await?;
            Ok(produced)
        }
        // The guest stopped taking it, and says why.
        Err(error @ archive::Error::Send { .. }) => {
            in_time(what, stream.finished(what)).await?;
            Err(ExchangeError::from(error).into())
        }
        Err(error) => Err(ExchangeError::from(error).into()),
    }
}

/// Gives the output of a request to `consume`, which runs in a thread of its own.
async fn receive<T: Send + 'static>(
    channel: &Channel,
    request: &Request,
    what: &str,
    consume: impl FnOnce(
        std::os::unix::net::UnixStream,
        std::os::unix::net::UnixStream,
    ) -> Result<T, workspace::Error>
    + Send
    + 'static,
) -> Result<T, super::RunError> {
    let mut stream = channel.open(request).await?;
    in_time(what, stream.started(what)).await?;
    let (mut out, out_reader) = pipe()?;
    let (mut err, err_reader) = pipe()?;
    let consumer = tokio::task::spawn_blocking(move || consume(out_reader, err_reader));
    let failure = loop {
        let written = match in_time(what, stream.next()).await? {
            Output::Out(bytes) => out.write_all(&bytes).await,
            Output::Err(bytes) => err.write_all(&bytes).await,
            Output::Exit(exit) => break exit.failure,
        };
        if written.is_err() {
            // The consumer has seen enough, and says why.
            break None;
        }
    };
    drop((out, err));
    let consumed = joined(consumer.await);
    match failure {
        Some(failure) => Err(GuestError::Refused {
            what: what.to_owned(),
            failure,
        }
        .into()),
        None => Ok(consumed.map_err(ExchangeError::from)?),
    }
}

/// What a thread gave; its panic goes on here.
pub(super) fn joined<T>(result: Result<T, tokio::task::JoinError>) -> T {
    match result {
        Ok(value) => value,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // Blocking tasks are only cancelled with the whole runtime.
            Err(error) => panic!("a worker thread was cancelled: {error}"),
        },
    }
}
