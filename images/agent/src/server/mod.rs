//! Serves the host: connections, sessions, and what outlives them.

mod outbox;
mod session;
mod stream;
mod wire;

use std::sync::Arc;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};

use self::session::{End, Session};
pub(crate) use self::stream::Stream;
use self::wire::{Reader, Writer};
use crate::channel::{Channel, Connections, Source};
use crate::clone::Lives;
use crate::console::complain;
use crate::emergency;
use crate::exec::cgroup::Cgroups;
use crate::failure::{Context, Result};
use crate::files::Tracked;
use crate::init::{self, Scratch};
use crate::memory;

/// Open files the agent itself may have: six for each of many commands.
const OWN_FILES: rlim_t = 65_536;
/// What a command of a machine gets, as under systemd on Debian.
const COMMAND_FILES: (rlim_t, rlim_t) = (1024, 524_288);
/// How long a thread that has nothing to do is kept: less than a template is
/// left alone before it is saved, or each clone would end it.
const KEEP: Duration = Duration::from_secs(2);
/// How long a last answer may take to leave before the machine powers off.
const FAREWELL: Duration = Duration::from_secs(1);

/// What the agent is to its machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// The machine is ours; with `own_init` PID 1 is our supervisor, otherwise
    /// it is the image's init.
    Machine { own_init: bool },
    /// A service of a system that is not ours to power off.
    Service,
}

/// What all sessions share.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) role: Role,
    pub(crate) cgroups: Cgroups,
    pub(crate) tracked: Tracked,
    pub(crate) lives: Lives,
    /// The disk that takes everything written, where there is one.
    pub(crate) scratch: Option<Arc<Scratch>>,
    /// Soft and hard limit of open files for commands.
    pub(crate) command_files: (rlim_t, rlim_t),
}

/// Runs the server until it is over; returns the exit code of its process.
pub(crate) fn main(source: Source, role: Role, scratch: Option<Arc<Scratch>>) -> i32 {
    let command_files = raise_limits(role);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_stack_size(512 * 1024)
        .max_blocking_threads(256)
        .thread_keep_alive(KEEP)
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            complain!("cannot start the server's runtime: {error}");
            return 1;
        }
    };
    let server = Arc::new(Server {
        role,
        cgroups: Cgroups::detect(),
        tracked: Tracked::default(),
        lives: Lives::default(),
        scratch,
        command_files,
    });
    let code = match runtime.block_on(serve(source, &server)) {
        Ok(Over::PowerOff) if role == (Role::Machine { own_init: false }) => {
            init::ask_to_power_off()
        }
        Ok(_) => 0,
        Err(error) => {
            complain!("{}", error.message);
            1
        }
    };
    // A transfer that waits for its disk must not keep the process.
    runtime.shutdown_background();
    code
}

fn role_has_console(role: Role) -> bool {
    role == Role::Machine { own_init: true }
}

/// The server must outlive memory pressure and have files for every stream.
fn raise_limits(role: Role) -> (rlim_t, rlim_t) {
    // Without privileges the server lives with what it got.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    let given = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or(COMMAND_FILES);
    let hard = given.1.max(COMMAND_FILES.1);
    let raised = setrlimit(Resource::RLIMIT_NOFILE, OWN_FILES, hard)
        .or_else(|_| setrlimit(Resource::RLIMIT_NOFILE, given.1.min(OWN_FILES), given.1));
    match (role, raised) {
        (Role::Machine { .. }, Ok(())) => COMMAND_FILES,
        _ => given,
    }
}

/// Why the server is over.
enum Over {
    /// The host wants the machine to power off.
    PowerOff,
    /// There will be no other connection.
    Channel,
}

async fn serve(source: Source, server: &Arc<Server>) -> Result<Over> {
    let mut connections = source.open().await?;
    if role_has_console(server.role) {
        tokio::spawn(emergency::serve(Arc::clone(server)));
    }
    if let Role::Machine { .. } = server.role {
        tokio::spawn(memory::watch());
    }
    let lost = || "lost the way to the host".to_owned();
    while let Some(channel) = connections.next().await.context(lost)? {
        if serve_connection(&channel, &connections, server).await {
            return Ok(Over::PowerOff);
        }
    }
    Ok(Over::Channel)
}

/// Serves one connection until its end. Returns whether to power off.
async fn serve_connection(
    channel: &Channel,
    connections: &Connections,
    server: &Arc<Server>,
) -> bool {
    let (mut reader, mut writer) = (Reader::default(), Writer::default());
    let mut session = Session::new(server);
    session.greet();
    let mut expected = true;
    loop {
        let outbox = session.outbox();
        let end = loop {
            // Before the channel is asked for more, which costs as much again:
            // the host waits for answers, not for that.
            if let Err(error) = writer.push(channel, &outbox) {
                break unwritable(&error);
            }
            tokio::select! {
                biased;
                () = connections.superseded() => break End::Gone,
                end = session.step(&mut reader, channel, expected) => {
                    if let Some(end) = end {
                        break end;
                    }
                }
                more = writer.more(channel, &outbox) => {
                    if let Err(error) = more {
                        break unwritable(&error);
                    }
                }
            }
        };
        match end {
            End::PowerOff => {
                let _ = tokio::time::timeout(FAREWELL, writer.finish(channel, &outbox)).await;
                session.reset();
                return true;
            }
            End::Gone => {
                session.reset();
                return false;
            }
            End::Again => {
                session.reset();
                session = Session::new(server);
                session.greet();
                session.accept();
            }
            End::Violation(what) => {
                complain!("the host broke the protocol: {what}; waiting for its next Hello");
                session.reset();
                session = Session::new(server);
            }
        }
        expected = false;
    }
}

fn unwritable(error: &std::io::Error) -> End {
    complain!("cannot write to the host: {error}");
    End::Gone
}
