//! Reaching the supervisor of a machine.

use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_agent::{FileKind, Reply, Request};

use super::error::SuperviseError;
use super::view::Live;
use super::wire::{Answer, Ask, ExecId, ExecInfo, ExecRequest, Open, Settings};
use crate::guest::{Channel, GuestError};
use crate::net::{self, Serving};
use crate::run::{Commanded, ControlError, Controller, Dirs, Io, command};
use crate::snapshot::Wish;
use crate::spec::{Timeout, VmId};

/// How long a supervisor may take to answer.
const ANSWER: Duration = Duration::from_secs(20);
/// What it takes at most to make a disk larger, besides: the guest's time to fill
/// it, before and after, and QEMU's.
const GROW: Duration = Duration::from_secs(2 * 60 + 30);
/// How long it may take to say how its machine is: it asks QEMU and the guest.
const LOOK: Duration = Duration::from_secs(10);
/// How long it may take to save its machine.
const SAVE: Duration = Duration::from_secs(3600);
/// How long the end of a machine is waited for.
const WITHOUT_END: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Reaches the supervisor of one machine.
#[derive(Debug, Clone)]
pub struct Client {
    id: VmId,
    controller: Controller,
}

impl Client {
    /// For the machine named `id` of the host with `dirs`.
    pub fn new(dirs: &Dirs, id: VmId) -> Self {
        Self {
            controller: Controller::new(dirs, id.clone()),
            id,
        }
    }

    /// The machine's name.
    pub fn id(&self) -> &VmId {
        &self.id
    }

    /// How the machine is.
    ///
    /// # Errors
    /// No supervisor answers.
    pub async fn status(&self) -> Result<Live, SuperviseError> {
        match self.ask(&Ask::Status, LOOK).await? {
            Answer::Status(live) => Ok(*live),
            _ => Err(self.confused()),
        }
    }

    /// Waits until the machine has ended.
    ///
    /// # Errors
    /// No supervisor answers, or it dies meanwhile.
    pub async fn wait(&self) -> Result<(), SuperviseError> {
        self.done(&Ask::Wait, WITHOUT_END).await
    }

    /// Powers the machine off and waits until it has ended: gently for `grace`
    /// (the machine's own when absent), at once with `force`.
    ///
    /// # Errors
    /// No supervisor answers, or it dies meanwhile.
    pub async fn stop(&self, grace: Option<Timeout>, force: bool) -> Result<(), SuperviseError> {
        self.done(&Ask::Stop { grace, force }, WITHOUT_END).await
    }

    /// Makes the machine stand still.
    ///
    /// # Errors
    /// It does not run, or no supervisor answers.
    pub async fn pause(&self) -> Result<(), SuperviseError> {
        self.done(&Ask::Pause, ANSWER).await
    }

    /// Makes it go on.
    ///
    /// # Errors
    /// It is not paused, or no supervisor answers.
    pub async fn resume(&self) -> Result<(), SuperviseError> {
        self.done(&Ask::Resume, ANSWER).await
    }

    /// Saves the machine, which goes on.
    ///
    /// # Errors
    /// It cannot be saved, or no supervisor answers.
    pub async fn save(&self, wish: Wish) -> Result<(), SuperviseError> {
        let wish = Box::new(wish);
        self.done(&Ask::Save { wish }, SAVE).await
    }

    /// Changes limits of the running machine, and of its next start.
    ///
    /// # Errors
    /// It cannot be so, or no supervisor answers.
    pub async fn set(&self, settings: Settings) -> Result<(), SuperviseError> {
        let settings = Box::new(settings);
        self.done(&Ask::Set { settings }, GROW + ANSWER).await
    }

    /// Starts a command that runs on when the caller is gone.
    ///
    /// # Errors
    /// The guest cannot run it, or no supervisor answers.
    pub async fn detach(&self, request: ExecRequest) -> Result<ExecId, SuperviseError> {
        let request = Box::new(request);
        match self.ask(&Ask::Detach { request }, 2 * ANSWER).await? {
            Answer::Exec(id) => Ok(id),
            _ => Err(self.confused()),
        }
    }

    /// Commands that run or ran lately, oldest first.
    ///
    /// # Errors
    /// No supervisor answers.
    pub async fn execs(&self) -> Result<Vec<ExecInfo>, SuperviseError> {
        match self.ask(&Ask::Execs, ANSWER).await? {
            Answer::Execs(execs) => Ok(execs),
            _ => Err(self.confused()),
        }
    }

    /// Sends a signal to a command.
    ///
    /// # Errors
    /// It does not run, or no supervisor answers.
    pub async fn signal(&self, exec: ExecId, signal: i32) -> Result<(), SuperviseError> {
        self.done(&Ask::Signal { exec, signal }, ANSWER).await
    }

    /// Runs a command that ends with the caller, and gives how it ended.
    ///
    /// # Errors
    /// No supervisor answers, the machine ends meanwhile, or the output cannot
    /// be written.
    pub async fn exec(
        &self,
        request: ExecRequest,
        io: &mut Io,
    ) -> Result<Commanded, SuperviseError> {
        let what = format!(
            "run {}",
            request.exec.argv.first().map_or("", String::as_str)
        );
        let limit = request.timeout.map(|timeout| timeout.0);
        // The limit is ours to keep; the supervisor's is later, for our death.
        let backstop = |timeout: Timeout| Timeout(timeout.0 + ANSWER);
        let request = Box::new(ExecRequest {
            timeout: request.timeout.map(backstop),
            ..request
        });
        let channel = self.streams().await?;
        let stream = channel.open_with(&Open::Exec { request }).await?;
        // Others may run commands in this machine too.
        let name = format!("{}-{}", self.id, VmId::random());
        Ok(command(stream, what, io, &name, limit).await?)
    }

    /// Follows a command that runs, and gives how it ended.
    ///
    /// # Errors
    /// As [`Client::exec`], or it does not run.
    pub async fn attach(&self, exec: ExecId, io: &mut Io) -> Result<Commanded, SuperviseError> {
        let channel = self.streams().await?;
        let stream = channel.open_with(&Open::Attach { exec }).await?;
        let what = format!("attach to {exec}");
        let name = format!("{}-{}", self.id, VmId::random());
        match command(stream, what, io, &name, None).await? {
            // 127 is for programs that do not exist.
            Commanded {
                refused: Some(_), ..
            } => Err(SuperviseError::ExecEnded {
                id: self.id.clone(),
                exec,
            }),
            ended => Ok(ended),
        }
    }

    /// What is at an absolute path in the guest.
    ///
    /// # Errors
    /// The guest does not answer, or may not look.
    pub async fn stat(&self, path: &str) -> Result<FileKind, SuperviseError> {
        let request = Request::Stat {
            path: path.to_owned(),
        };
        let channel = self.streams().await?;
        let what = format!("examine {path}");
        let asked = async {
            let mut stream = channel.open_with(&Open::Guest { request }).await?;
            stream.started(&what).await
        };
        match tokio::time::timeout(ANSWER, asked).await {
            Ok(Ok(Reply::Stat { kind })) => Ok(kind),
            Ok(Ok(other)) => Err(GuestError::Protocol(format!("{other:?} to Stat")).into()),
            Ok(Err(error)) => Err(error.into()),
            Err(_) => Err(GuestError::Timeout {
                what,
                after: ANSWER,
            }
            .into()),
        }
    }

    /// A channel over which ports are forwarded.
    ///
    /// # Errors
    /// No supervisor answers.
    pub async fn forward_channel(&self) -> Result<Channel, SuperviseError> {
        self.streams().await
    }

    /// Carries connections to `listener` to a port on the guest's loopback;
    /// `told` hears why one cannot be.
    ///
    /// # Errors
    /// The listener cannot be watched.
    pub fn forward(
        channel: &Channel,
        listener: TcpListener,
        port: u16,
        told: impl Fn(GuestError) + Clone + Send + Sync + 'static,
    ) -> io::Result<Serving> {
        // The channel ends with its last clone: the caller keeps one.
        let channel = channel.clone();
        let connect = move || {
            let channel = channel.clone();
            async move {
                let what = format!("connect to port {port}");
                let request = Request::Connect { port };
                let asked = async {
                    let mut stream = channel.open_with(&Open::Guest { request }).await?;
                    stream.started(&what).await?;
                    Ok(stream)
                };
                match tokio::time::timeout(ANSWER, asked).await {
                    Ok(result) => result,
                    Err(_) => Err(GuestError::Timeout {
                        what: what.clone(),
                        after: ANSWER,
                    }),
                }
            }
        };
        net::forward(listener, connect, told, Arc::default())
    }

    /// A channel to the supervisor, over which streams are opened.
    pub(super) async fn streams(&self) -> Result<Channel, SuperviseError> {
        let (answer, connection) = self.controller.open(&Ask::Streams, ANSWER).await?;
        match answer {
            Answer::Streams => {}
            Answer::Refused(report) => return Err(SuperviseError::Told(report)),
            _ => return Err(self.confused()),
        }
        let connected = Channel::connect(connection);
        match tokio::time::timeout(ANSWER, connected).await {
            Ok(connected) => Ok(connected?.0),
            Err(_) => Err(self.confused()),
        }
    }

    async fn done(&self, ask: &Ask, within: Duration) -> Result<(), SuperviseError> {
        match self.ask(ask, within).await? {
            Answer::Done => Ok(()),
            _ => Err(self.confused()),
        }
    }

    async fn ask(&self, ask: &Ask, within: Duration) -> Result<Answer, SuperviseError> {
        match self.controller.call(ask, within).await? {
            Answer::Refused(report) => Err(SuperviseError::Told(report)),
            answer => Ok(answer),
        }
    }

    fn confused(&self) -> SuperviseError {
        ControlError::Answer {
            id: self.id.clone(),
        }
        .into()
    }
}
