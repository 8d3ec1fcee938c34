//! `bulkhead console`.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::Global;
use super::message::Failure;
use super::terminal::RawMode;
use crate::run::Controller;
use crate::spec::VmId;

/// Ctrl-] leaves, as in telnet and virsh.
const LEAVE: u8 = 0x1d;

/// Options.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Name of a running machine.
    vm: VmId,
}

/// Connects the terminal to the emergency console.
pub(super) async fn run(args: Args, global: &Global) -> Result<i32, Failure> {
    let console = Controller::new(&global.host()?.dirs, args.vm)
        .console()
        .await?;
    let _raw = RawMode::enter();
    if _raw.is_some() {
        eprint!("Connected to the emergency console; Ctrl-] leaves.\r\n");
    }
    let (mut from_guest, mut to_guest) = console.into_split();
    let output = tokio::spawn(async move {
        let mut stdout = tokio::io::stdout();
        let mut buffer = vec![0; 16 * 1024];
        while let Ok(count @ 1..) = from_guest.read(&mut buffer).await {
            if stdout.write_all(&buffer[..count]).await.is_err() || stdout.flush().await.is_err() {
                break;
            }
        }
    });
    let input = async {
        let mut stdin = tokio::io::stdin();
        let mut buffer = vec![0; 4096];
        while let Ok(count @ 1..) = stdin.read(&mut buffer).await {
            let bytes = &buffer[..count];
            let (bytes, leave) = match bytes.iter().position(|byte| *byte == LEAVE) {
                Some(at) => (&bytes[..at], true),
                None => (bytes, false),
            };
            if to_guest.write_all(bytes).await.is_err() || leave {
                return;
            }
        }
        // The end of a pipe: what the guest still says is wanted.
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = input => {}
        _ = output => {}
    }
    Ok(0)
}
