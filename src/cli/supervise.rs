//! `bulkhead supervise`: what `bulkhead start` starts. Not for people.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::Global;
use super::message::Failure;
use crate::error::Report;
use crate::host::fault;
use crate::run::FAILED;
use crate::spec::VmId;
use crate::supervise::{Start, supervise};

/// Options.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Take over a machine that runs without a supervisor.
    #[arg(long)]
    take_over: bool,
    /// Name of the machine.
    vm: VmId,
}

/// Watches one machine from its start to its end.
pub(super) async fn run(args: Args, global: &Global) -> Result<i32, Failure> {
    fault::role(fault::Role::Supervisor);
    // Out of the terminal's reach. It fails where this is a session of its own.
    let _ = nix::unistd::setsid();
    let _ = std::env::set_current_dir("/");
    let start = match args.take_over {
        true => Start::TakeOver,
        false => Start::Boot,
    };
    let (sender, stop) = mpsc::channel(1);
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        if let Ok(mut signals) = signal(kind) {
            let sender = sender.clone();
            tokio::spawn(async move {
                while signals.recv().await.is_some() {
                    let _ = sender.send(()).await;
                }
            });
        }
    }
    let told = AtomicBool::new(false);
    let host = global.host()?;
    let done = supervise(&host, &args.vm, start, stop, || {
        told.store(true, Ordering::Relaxed);
        tell(None);
    });
    match done.await {
        Ok(()) => Ok(0),
        Err(error) => {
            let report = Report::of(&error);
            if !told.load(Ordering::Relaxed) {
                tell(Some(&report));
            }
            tracing::error!("{}: {}", report.what, report.cause);
            Ok(FAILED)
        }
    }
}

/// Tells whoever started us. They may be gone.
fn tell(failure: Option<&Report>) {
    let Ok(line) = serde_json::to_string(&failure) else {
        return;
    };
    let mut stdout = std::io::stdout().lock();
    let _ = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
    // Nothing more will come: they need not wait for our end.
    if let Ok(null) = std::fs::File::options().write(true).open("/dev/null") {
        let _ = nix::unistd::dup2_stdout(null);
    }
}
