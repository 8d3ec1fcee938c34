//! Running commands.

pub(crate) mod cgroup;
mod prepare;
mod pump;
pub(crate) mod spawn;
mod terminal;
mod tree;
pub(crate) mod user;

use std::fs::File;
use std::future::Future;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bulkhead_agent::{DEFAULT_USER, Exec, Exit, Failure, FailureKind, Kind, Reply, Size};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::libc::{WEXITSTATUS, WIFSIGNALED, WTERMSIG};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, pipe2};
use tokio::sync::watch;

use self::cgroup::Cgroup;
use self::prepare::Prepared;
use self::pump::Side;
use self::spawn::{Child, Plan, Step, Stumble};
use self::user::{User, Users};
use crate::failure::{Context, Result, failure};
use crate::server::{Server, Stream};

/// A command that was started, as the host controls it.
#[derive(Debug)]
pub(crate) struct Command {
    pid: i32,
    /// Reaped: the number may be somebody else's.
    reaped: AtomicBool,
    cgroup: Option<Cgroup>,
    terminal: Option<pump::End>,
}

impl Command {
    /// Sends a signal to the process group.
    pub(crate) fn signal(&self, signal: i32) {
        let Ok(signal) = Signal::try_from(signal) else {
            return;
        };
        if !self.reaped.load(Ordering::Relaxed) {
            // It may be on its way out, which is what most signals are for.
            let _ = killpg(Pid::from_raw(self.pid), signal);
        }
    }

    /// Changes the size of the terminal.
    pub(crate) fn resize(&self, size: Size) {
        if let Some(terminal) = &self.terminal {
            let _ = terminal::resize(terminal.get_ref(), size);
        }
    }

    /// Kills the command and everything it started.
    pub(crate) fn kill(&self) {
        match &self.cgroup {
            Some(cgroup) if cgroup.kill().is_ok() => {}
            _ => tree::kill_tree(self.pid),
        }
    }
}

/// The agent's ends of a command's standard streams.
struct Ends {
    input: Option<pump::End>,
    output: pump::End,
    error: Option<pump::End>,
}

/// Starts a command. The future is its life: it answers the request, moves the
/// bytes, and tells how the command ended.
///
/// # Errors
/// The request cannot be met, or no process could be made.
pub(crate) fn start(
    server: &Arc<Server>,
    stream: Arc<Stream>,
    request: Exec,
) -> Result<(Arc<Command>, impl Future<Output = Exit> + Send + 'static)> {
    let user = Users::read()?.find(request.user.as_deref().unwrap_or(DEFAULT_USER))?;
    let prepared = Prepared::new(&request, &user)?;
    let wiring = || "cannot make the command's standard streams".to_owned();
    let (ends, theirs) = wire(&request, &user).context(wiring)?;
    let cgroup = server
        .cgroups
        .make(stream.id())
        .context(|| "cannot make the command's control group".into())?;
    let plan = Plan {
        programs: prepared.programs,
        argv: prepared.argv,
        env: prepared.env,
        cwd: prepared.cwd,
        user: &user,
        stdio: [0, 1, 2].map(|n| theirs[n.min(theirs.len() - 1)].as_fd()),
        terminal: request.terminal.is_some(),
        cgroup: cgroup.as_ref().map(|group| &group.dir),
        files: server.command_files,
    };
    let child = spawn::spawn(&plan).context(|| format!("cannot start {}", request.argv[0]))?;
    drop(plan);
    drop(theirs);
    let command = Arc::new(Command {
        pid: child.pid,
        reaped: AtomicBool::new(false),
        cgroup,
        terminal: request.terminal.is_some().then(|| Arc::clone(&ends.output)),
    });
    let work = live(
        Arc::clone(server),
        stream,
        Arc::clone(&command),
        child,
        ends,
        request,
    );
    Ok((command, work))
}

/// Starts a command on a terminal that exists already, outside any stream.
///
/// # Errors
/// As [`start`].
pub(crate) fn start_on(
    server: &Server,
    request: &Exec,
    stdio: [BorrowedFd<'_>; 3],
) -> Result<Child> {
    let user = Users::read()?.find(request.user.as_deref().unwrap_or(DEFAULT_USER))?;
    let prepared = Prepared::new(request, &user)?;
    let plan = Plan {
        programs: prepared.programs,
        argv: prepared.argv,
        env: prepared.env,
        cwd: prepared.cwd,
        user: &user,
        stdio,
        terminal: true,
        cgroup: None,
        files: server.command_files,
    };
    spawn::spawn(&plan).context(|| format!("cannot start {}", request.argv[0]))
}

/// Makes the standard streams: our ends, and the child's (one stands for all
/// that follow it).
fn wire(request: &Exec, user: &User) -> std::io::Result<(Ends, Vec<OwnedFd>)> {
    if let Some(size) = request.terminal {
        let (ours, theirs) = terminal::open(size, user)?;
        let ours = pump::end(ours, Side::Both)?;
        let ends = Ends {
            input: Some(Arc::clone(&ours)),
            output: ours,
            error: None,
        };
        return Ok((ends, vec![theirs]));
    }
    let (input, stdin) = if request.stdin {
        let (stdin, input) = pipe2(OFlag::O_CLOEXEC)?;
        (Some(pump::end(input, Side::Both)?), stdin)
    } else {
        (None, File::open("/dev/null")?.into())
    };
    let (output, stdout) = pipe2(OFlag::O_CLOEXEC)?;
    let (error, stderr) = pipe2(OFlag::O_CLOEXEC)?;
    let ends = Ends {
        input,
        output: pump::end(output, Side::Reading)?,
        error: Some(pump::end(error, Side::Reading)?),
    };
    Ok((ends, vec![stdin, stdout, stderr]))
}

async fn live(
    server: Arc<Server>,
    stream: Arc<Stream>,
    command: Arc<Command>,
    child: Child,
    ends: Ends,
    request: Exec,
) -> Exit {
    let outcome = run(&stream, &command, child, ends, &request).await;
    if let Some(cgroup) = &command.cgroup {
        server.cgroups.dispose(cgroup);
    }
    match outcome {
        Ok(exit) => exit,
        Err(failure) => stream.refuse(failure),
    }
}

async fn run(
    stream: &Arc<Stream>,
    command: &Command,
    child: Child,
    ends: Ends,
    request: &Exec,
) -> Result<Exit> {
    let stumble = read_report(child.report).await;
    let stumble = stumble.context(|| "cannot learn whether the command started".into())?;
    if let Some(stumble) = stumble {
        wait(command, child.pidfd).await?;
        return Err(explain(stumble, request));
    }
    stream.reply(&Reply::Started {
        pid: command.pid as u32,
    });
    let (exited, watching) = watch::channel(false);
    // ^D, the only end of input a terminal knows.
    let end_of_file: &[u8] = if request.terminal.is_some() {
        b"\x04"
    } else {
        b""
    };
    let feeding = tokio::spawn(pump::input(Arc::clone(stream), ends.input, end_of_file));
    let output = pump::output(ends.output, Arc::clone(stream), Kind::Out, watching.clone());
    let error = async {
        if let Some(error) = ends.error {
            pump::output(error, Arc::clone(stream), Kind::Err, watching).await;
        }
    };
    let ending = async {
        let exit = wait(command, child.pidfd).await;
        // Sends to the pumps, which may be done already.
        let _ = exited.send(true);
        exit
    };
    let (exit, (), ()) = tokio::join!(ending, output, error);
    feeding.abort();
    exit
}

async fn read_report(report: OwnedFd) -> std::io::Result<Option<Stumble>> {
    let report = crate::watch::readable(report)?;
    // Readable means complete: one small write, or the end.
    drop(report.readable().await?);
    Stumble::read(File::from(report.into_inner()))
}

async fn wait(command: &Command, pidfd: OwnedFd) -> Result<Exit> {
    let what = || format!("cannot wait for process {}", command.pid);
    let pidfd = crate::watch::readable(pidfd).context(what)?;
    drop(pidfd.readable().await.context(what)?);
    let ended = spawn::reap(command.pid).context(what)?;
    command.reaped.store(true, Ordering::Relaxed);
    let signal = WIFSIGNALED(ended.status).then(|| WTERMSIG(ended.status));
    Ok(Exit {
        code: signal.is_none().then(|| WEXITSTATUS(ended.status)),
        signal,
        failure: None,
        cpu_us: ended.cpu_us,
        max_rss_kib: ended.max_rss_kib,
    })
}

/// Why a child never became its program, in words.
fn explain(stumble: Stumble, request: &Exec) -> Failure {
    let program = &request.argv[0];
    let error = std::io::Error::from(stumble.error);
    let (kind, what) = match (stumble.step, stumble.error) {
        (Step::Program, Errno::ENOENT) if program.contains('/') => (
            FailureKind::NotFound,
            format!("cannot run {program} (or its interpreter)"),
        ),
        (Step::Program, Errno::ENOENT) => (
            FailureKind::NotFound,
            format!("cannot find {program} in PATH"),
        ),
        (Step::Program, Errno::ENOMEM | Errno::EAGAIN | Errno::EIO | Errno::ENFILE) => {
            (FailureKind::System, format!("cannot run {program}"))
        }
        (Step::Program, _) => (
            FailureKind::NotExecutable,
            format!("cannot execute {program}"),
        ),
        (Step::Cwd, _) => {
            let cwd = request.cwd.as_deref().unwrap_or("the user's home");
            (
                FailureKind::Invalid,
                format!("cannot enter working directory {cwd}"),
            )
        }
        (Step::User, _) => (FailureKind::System, "cannot become the user".to_owned()),
        (step, _) => {
            let step = format!("{step:?}").to_lowercase();
            (
                FailureKind::System,
                format!("cannot set up the {step} of {program}"),
            )
        }
    };
    failure(kind, format!("{what}: {error}"))
}
