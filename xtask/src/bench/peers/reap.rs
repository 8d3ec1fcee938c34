//! Process 1 of a namespace: runs a program, and reaps what it leaves at once.
//!
//! libvirt daemonizes QEMU and polls for its end. Under a process 1 that reaps
//! orphans late, its figures would be that program's, not its own.

use std::os::unix::process::ExitStatusExt as _;
use std::process::Command;

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::sys::wait::{WaitStatus, waitpid};

/// Options.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Program and arguments.
    #[arg(required = true, last = true)]
    command: Vec<String>,
}

/// Runs the program to its end.
pub(crate) fn run(args: &Args) -> Result<()> {
    let [program, words @ ..] = &args.command[..] else {
        return Ok(());
    };
    let child = Command::new(program).args(words).spawn();
    let child = child.with_context(|| format!("cannot run {program}"))?;
    let pid = i32::try_from(child.id())?;
    loop {
        match waitpid(None, None) {
            Ok(WaitStatus::Exited(ended, code)) if ended.as_raw() == pid => {
                std::process::exit(code);
            }
            Ok(WaitStatus::Signaled(ended, signal, _)) if ended.as_raw() == pid => {
                let status = std::process::ExitStatus::from_raw(signal as i32);
                anyhow::bail!("{program} ended with {status}");
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}
