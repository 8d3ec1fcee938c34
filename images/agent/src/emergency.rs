//! A root shell on the console of last resort, for when nothing else answers.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_agent::Exec;
use nix::libc::{O_NOCTTY, O_NONBLOCK};

use crate::console::complain;
use crate::exec;
use crate::failure::{Context, Result};
use crate::server::Server;
use crate::watch;

const CONSOLE: &str = "/dev/hvc0";
/// Between two shells.
const PAUSE: Duration = Duration::from_secs(1);

/// Runs a shell whenever somebody types on the console. It returns at once on
/// a machine without one.
pub(crate) async fn serve(server: Arc<Server>) {
    loop {
        match typed().await {
            Ok(console) => {
                if let Err(error) = shell(&server, &console).await {
                    complain!("{}", error.message);
                }
            }
            Err(_) => return,
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Waits for the first line, and leaves it to the shell.
async fn typed() -> io::Result<OwnedFd> {
    let open = |flags| {
        let mut options = File::options();
        options
            .read(true)
            .write(true)
            .custom_flags(flags | O_NOCTTY);
        options.open(CONSOLE).map(OwnedFd::from)
    };
    let waiting = watch::readable(open(O_NONBLOCK)?)?;
    drop(waiting.readable().await?);
    // Shells do not expect a terminal that does not block.
    open(0)
}

async fn shell(server: &Server, console: &OwnedFd) -> Result<()> {
    let request = Exec {
        argv: ["/bin/sh", "-i"].map(str::to_owned).into(),
        env: vec![("TERM".into(), "vt100".into())],
        user: Some("root".into()),
        ..Exec::default()
    };
    let stdio = [console.as_fd(); 3];
    let child = exec::start_on(server, &request, stdio)?;
    let what = || "cannot wait for the emergency shell".to_owned();
    let pidfd = watch::readable(child.pidfd).context(what)?;
    drop(pidfd.readable().await.context(what)?);
    exec::spawn::reap(child.pid).context(what)?;
    Ok(())
}
