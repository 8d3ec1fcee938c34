//! The commands of one machine: started, followed, logged, and remembered.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_agent::{Control, Exit, FailureKind, Kind, Reply, Request};
use tokio::sync::{broadcast, watch};

use super::log::ExecLog;
use super::relay::{Ending, drive};
use super::server::{FromClient, Inputs, ToClient, failure};
use super::wire::{ExecEnd, ExecId, ExecInfo, ExecRequest, Open};
use crate::guest::{Channel, GuestError, Input, Stream};
use crate::host::fault;
use crate::run::{FAILED, TIMED_OUT, now_ms};

/// How long the guest may take to say whether it can run a command.
const ANSWER: Duration = Duration::from_secs(30);
/// Pieces of output kept for followers that are slow.
const FOLLOWED: usize = 64;
/// Commands of one machine at a time.
const MAX_COMMANDS: usize = 512;

/// Output as it is given to those who follow a command.
type Piece = (Kind, Arc<[u8]>);

/// A command that runs.
#[derive(Debug)]
struct Running {
    pid: u32,
    input: Input,
    /// Whether anything reads its stdin.
    stdin: bool,
    followers: broadcast::Sender<Piece>,
    ended: watch::Receiver<Option<Exit>>,
}

/// The commands of one machine.
#[derive(Debug)]
pub(super) struct Execs {
    channel: Channel,
    /// Where their logs are.
    logs: PathBuf,
    next: AtomicU32,
    running: Mutex<BTreeMap<ExecId, Running>>,
    /// Streams under way: commands and transfers.
    busy: AtomicUsize,
    /// Told how the main command ended.
    main: watch::Sender<Option<ExecEnd>>,
    /// There is, or is to be, a main command.
    main_expected: AtomicBool,
    /// The machine stands still: nothing can be started.
    paused: AtomicBool,
    /// Why the machine ends, for those whose commands end with it.
    why: Mutex<String>,
}

/// Counts what is under way for as long as it lives.
struct Busy<'a>(&'a AtomicUsize);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// As [`Busy`], for what is not done here.
pub(super) struct KeptBusy(Arc<Execs>);

impl Drop for KeptBusy {
    fn drop(&mut self) {
        self.0.busy.fetch_sub(1, Ordering::Relaxed);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Passes a point in the life of a command.
fn passed(point: &str) -> Result<(), GuestError> {
    fault::at(point).map_err(|source| GuestError::Io {
        action: "starting a command",
        source: source.into(),
    })
}

impl Execs {
    pub(super) fn new(channel: Channel, logs: PathBuf) -> Self {
        ExecLog::close_all(&logs);
        Self {
            next: AtomicU32::new(ExecLog::last_number(&logs) + 1),
            channel,
            logs,
            running: Mutex::default(),
            busy: AtomicUsize::new(0),
            main: watch::channel(None).0,
            main_expected: AtomicBool::new(false),
            paused: AtomicBool::new(false),
            why: Mutex::default(),
        }
    }

    /// Commands and transfers under way.
    pub(super) fn busy(&self) -> usize {
        self.busy.load(Ordering::Relaxed)
    }

    /// Counts as under way for as long as the result lives.
    pub(super) fn keep_busy(self: &Arc<Self>) -> KeptBusy {
        self.busy.fetch_add(1, Ordering::Relaxed);
        KeptBusy(Arc::clone(self))
    }

    /// Waits until the ends of all commands are written down, but not long.
    pub(super) async fn settled(&self) {
        for _ in 0..100 {
            if lock(&self.running).is_empty() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits for the end of the main command.
    pub(super) async fn main_ended(&self) -> ExecEnd {
        let mut main = self.main.subscribe();
        loop {
            if let Some(end) = main.borrow_and_update().clone() {
                return end;
            }
            if main.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Whether the machine stands still, and nothing can be started in it.
    pub(super) fn stand_still(&self, paused: bool) {
        self.paused.store(paused, Ordering::Relaxed);
    }

    /// Says why the machine ends, to those whose commands end with it.
    pub(super) fn machine_ends(&self, why: &str) {
        *lock(&self.why) = why.to_owned();
    }

    /// Commands that run or ran, oldest first.
    pub(super) fn list(&self) -> Vec<ExecInfo> {
        ExecLog::list(&self.logs)
    }

    /// Sends a signal to a command.
    pub(super) async fn signal(&self, id: ExecId, signal: i32) -> Option<()> {
        let input = lock(&self.running).get(&id)?.input.clone();
        input.control(&Control::Signal { signal }).await.ok()
    }

    /// Starts a command that no client owns.
    ///
    /// # Errors
    /// The guest refuses it.
    pub(super) async fn detach(
        self: &Arc<Self>,
        request: ExecRequest,
        main: bool,
    ) -> Result<ExecId, GuestError> {
        let id = match main {
            true => ExecId::MAIN,
            false => self.number(),
        };
        let begun = self.begin(id, request).await?;
        let execs = Arc::clone(self);
        tokio::spawn(async move { execs.follow(begun, None).await });
        Ok(id)
    }

    fn number(&self) -> ExecId {
        ExecId(self.next.fetch_add(1, Ordering::Relaxed))
    }

    /// Serves one stream of a client.
    pub(super) async fn open(self: &Arc<Self>, request: Open, to: ToClient, inputs: Inputs) {
        self.busy.fetch_add(1, Ordering::Relaxed);
        let _busy = Busy(&self.busy);
        if self.paused.load(Ordering::Relaxed) && !matches!(request, Open::Attach { .. }) {
            let why = "the machine is paused";
            return to.refuse(failure(FailureKind::System, why)).await;
        }
        match request {
            Open::Exec { request } => match self.begin(self.number(), *request).await {
                Ok(begun) => {
                    let pid = begun.pid;
                    let _ = to.reply(&Reply::Started { pid }).await;
                    self.follow(begun, Some((to, inputs))).await;
                }
                Err(error) => to.refuse(refusal(error)).await,
            },
            Open::Attach { exec } => self.attach(exec, to, inputs).await,
            Open::Guest { request } => self.transfer(&request, to, inputs).await,
        }
    }

    /// Has the guest start a command.
    async fn begin(&self, id: ExecId, request: ExecRequest) -> Result<Begun, GuestError> {
        if lock(&self.running).len() >= MAX_COMMANDS {
            let why = format!("{MAX_COMMANDS} commands run in this machine already");
            return Err(GuestError::Refused {
                what: "start another command".into(),
                failure: failure(FailureKind::Invalid, why),
            });
        }
        let ExecRequest { exec, timeout } = request;
        let info = ExecInfo {
            id,
            argv: exec.argv.clone(),
            user: exec.user.clone(),
            terminal: exec.terminal.is_some(),
            started_ms: now_ms(),
            ended: None,
        };
        let what = format!("run {}", exec.argv.first().map_or("", String::as_str));
        let stdin = exec.stdin || exec.terminal.is_some();
        let mut log = ExecLog::begin(&self.logs, &info);
        let started = async {
            passed("begin exec")?;
            let mut stream = self.channel.open(&Request::Exec(exec)).await?;
            match tokio::time::timeout(ANSWER, stream.started(&what)).await {
                Ok(Ok(Reply::Started { pid })) => Ok((stream, pid)),
                Ok(Ok(other)) => Err(GuestError::Protocol(format!("{other:?} to Exec"))),
                Ok(Err(error)) => Err(error),
                Err(_) => Err(GuestError::Timeout {
                    what,
                    after: ANSWER,
                }),
            }
        };
        let (stream, pid) = match started.await {
            Ok(started) => started,
            Err(error) => {
                let end = ExecEnd {
                    at_ms: now_ms(),
                    exit_code: refusal_code(&error),
                    signal: None,
                    failure: Some(error.to_string()),
                };
                log.end(&end);
                if id == ExecId::MAIN {
                    self.main.send_replace(Some(end));
                }
                return Err(error);
            }
        };
        // The guest runs it, whatever becomes of us.
        let _ = passed("began exec");
        let (followers, _) = broadcast::channel(FOLLOWED);
        let (over, ended) = watch::channel(None);
        let running = Running {
            pid,
            input: stream.input(),
            stdin,
            followers: followers.clone(),
            ended,
        };
        lock(&self.running).insert(id, running);
        Ok(Begun {
            id,
            pid,
            stream,
            log,
            timeout: timeout.map(|timeout| timeout.0),
            followers,
            over,
        })
    }

    /// Follows a command to its end; with a client, for no longer than that.
    async fn follow(&self, begun: Begun, client: Option<(ToClient, Inputs)>) {
        if client.is_none() {
            self.busy.fetch_add(1, Ordering::Relaxed);
        }
        // Counted by `open` otherwise.
        let _busy = client.is_none().then(|| Busy(&self.busy));
        let Begun {
            id,
            stream,
            mut log,
            timeout,
            followers,
            over,
            ..
        } = begun;
        let (to, inputs) = client.unzip();
        let ending = drive(stream, timeout, to.as_ref(), inputs, |kind, bytes| {
            log.output(kind == Kind::Err, bytes);
            // Nobody may be following.
            let _ = followers.send((kind, bytes.into()));
        })
        .await;
        let (end, exit) = self.words(ending);
        let _ = passed("end exec");
        log.end(&end);
        lock(&self.running).remove(&id);
        over.send_replace(Some(exit.clone()));
        if id == ExecId::MAIN {
            self.main.send_replace(Some(end));
        }
        if let Some(to) = to {
            to.exit(&exit).await;
        }
    }

    /// What is written down of an ending, and what a client is told.
    fn words(&self, ending: Ending) -> (ExecEnd, Exit) {
        let end = |exit_code, signal, failure| ExecEnd {
            at_ms: now_ms(),
            exit_code,
            signal,
            failure,
        };
        let told = |message: String| Exit {
            failure: Some(failure(FailureKind::System, message)),
            ..Exit::default()
        };
        match ending {
            Ending::Exit(exit) => {
                let code = match (exit.code, exit.signal) {
                    (Some(code), _) => code & 0xff,
                    (None, Some(signal)) => 128 + (signal & 0x7f),
                    (None, None) => FAILED,
                };
                let failure = exit.failure.as_ref().map(|failure| failure.message.clone());
                (end(code, exit.signal, failure), exit)
            }
            Ending::TimedOut => {
                let why = "ended by its time limit".to_owned();
                let killed = Exit {
                    signal: Some(nix::libc::SIGKILL),
                    ..Exit::default()
                };
                (end(TIMED_OUT, None, Some(why)), killed)
            }
            Ending::Abandoned => {
                let why = "ended with the command line that started it".to_owned();
                let end = end(128 + nix::libc::SIGKILL, None, Some(why.clone()));
                (end, told(why))
            }
            Ending::Lost(error) => {
                let why = match lock(&self.why).as_str() {
                    "" => error.to_string(),
                    why => why.to_owned(),
                };
                let why = format!("the machine ended meanwhile: {why}");
                (end(FAILED, None, Some(why.clone())), told(why))
            }
        }
    }

    /// Lets a client follow a running command, and write to it.
    async fn attach(&self, id: ExecId, to: ToClient, mut inputs: Inputs) {
        if id == ExecId::MAIN {
            self.main_begun().await;
        }
        let found = lock(&self.running).get(&id).map(|running| {
            let pieces = running.followers.subscribe();
            let ended = running.ended.clone();
            (
                running.pid,
                running.input.clone(),
                running.stdin,
                pieces,
                ended,
            )
        });
        let Some((pid, input, stdin, mut pieces, mut ended)) = found else {
            let why = format!("no command {id} runs in this machine");
            to.refuse(failure(FailureKind::NotFound, why)).await;
            return;
        };
        if to.reply(&Reply::Started { pid }).await.is_none() {
            return;
        }
        let output = async {
            loop {
                match pieces.recv().await {
                    Ok((kind, bytes)) => to.output(kind, &bytes).await?,
                    Err(broadcast::error::RecvError::Lagged(count)) => {
                        let note = format!("\r\n[too slow: {count} pieces of output left out]\r\n");
                        to.output(Kind::Err, note.as_bytes()).await?;
                    }
                    Err(broadcast::error::RecvError::Closed) => break,
                }
            }
            ended.wait_for(Option::is_some).await.ok()?.clone()
        };
        let input = async {
            while let Some(message) = inputs.recv().await {
                match message {
                    // Leaving is not the end of the command's input, and does not kill it.
                    FromClient::End | FromClient::Control(Control::Kill) => {}
                    FromClient::In(bytes) => {
                        if stdin {
                            let _ = input.send(&bytes).await;
                        }
                        to.passed(bytes.len()).await;
                    }
                    FromClient::Control(control) => {
                        let _ = input.control(&control).await;
                    }
                }
            }
        };
        tokio::select! {
            exit = output => if let Some(exit) = exit {
                to.exit(&exit).await;
            },
            () = input => {}
        }
    }

    /// The main command is about to be started.
    pub(super) fn expect_main(&self) {
        self.main_expected.store(true, Ordering::Relaxed);
    }

    /// Waits until the main command runs or has ended, where there is to be one.
    async fn main_begun(&self) {
        let begin = tokio::time::Instant::now();
        while self.main_expected.load(Ordering::Relaxed)
            && !lock(&self.running).contains_key(&ExecId::MAIN)
            && self.main.borrow().is_none()
            && begin.elapsed() < ANSWER
        {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Passes a transfer on to the guest.
    async fn transfer(&self, request: &Request, to: ToClient, inputs: Inputs) {
        // What changes the machine itself is the supervisor's to ask.
        if !matches!(
            request,
            Request::Put { .. }
                | Request::Get { .. }
                | Request::Stat { .. }
                | Request::Connect { .. }
                | Request::Info
        ) {
            let why = "only transfers and connections are passed on to the guest";
            to.refuse(failure(FailureKind::Invalid, why)).await;
            return;
        }
        let mut stream = match self.channel.open(request).await {
            Ok(stream) => stream,
            Err(error) => return to.refuse(refusal(error)).await,
        };
        match tokio::time::timeout(ANSWER, stream.started("do that")).await {
            Ok(Ok(reply)) => {
                let _ = to.reply(&reply).await;
            }
            Ok(Err(error)) => return to.refuse(refusal(error)).await,
            Err(_) => {
                let why = "the guest does not answer";
                return to.refuse(failure(FailureKind::System, why)).await;
            }
        }
        let ending = drive(stream, None, Some(&to), Some(inputs), |_, _| {}).await;
        let (_, exit) = self.words(ending);
        to.exit(&exit).await;
    }
}

/// A command that the guest has started.
struct Begun {
    id: ExecId,
    pid: u32,
    stream: Stream,
    log: ExecLog,
    timeout: Option<Duration>,
    followers: broadcast::Sender<Piece>,
    over: watch::Sender<Option<Exit>>,
}

/// Why a request was not fulfilled, for a client.
fn refusal(error: GuestError) -> bulkhead_agent::Failure {
    match error {
        GuestError::Refused { failure, .. } => failure,
        error => failure(FailureKind::System, error.to_string()),
    }
}

fn refusal_code(error: &GuestError) -> i32 {
    match error {
        GuestError::Refused { failure, .. } if failure.kind == FailureKind::NotFound => 127,
        GuestError::Refused { failure, .. } if failure.kind == FailureKind::NotExecutable => 126,
        _ => FAILED,
    }
}
