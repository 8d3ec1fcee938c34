//! A new image from what a script made of a machine of another.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;

use bulkhead_agent::{Exec, Request};
use tokio::io::AsyncWriteExt;

use super::exchange::Exchange;
use super::host::Host;
use super::machine::Machine;
use super::runner::{Io, Session, unless_interrupted};
use super::transfer::{in_time, joined, pipe};
use super::{MachineError, RunError};
use crate::guest::{GuestError, Output};
use crate::image::{Builder, Image};
use crate::spec::Spec;

/// Packs the root file system in the guest. The archive has everything an
/// image keeps: owners, hard links, capabilities. What belongs to this run or
/// to a running system stays out.
const TAR: [&str; 19] = [
    "tar",
    "--create",
    "--file=-",
    "--directory=/",
    "--one-file-system",
    "--numeric-owner",
    "--xattrs",
    "--xattrs-include=security.capability",
    "--sort=name",
    "--warning=no-file-ignored",
    "--anchored",
    "--exclude=./dev",
    "--exclude=./proc",
    "--exclude=./run",
    "--exclude=./sys",
    "--exclude=./tmp/*",
    "--exclude=./var/tmp/*",
    "--exclude=./workspace/*/*",
    ".",
];
const WHAT: &str = "pack its root file system with tar";
/// How much of tar's complaints is kept, in bytes.
const WORDS: usize = 64 * 1024;

/// Runs the script of `spec` in a machine of its image and makes what the root
/// file system then is an image named `name`, with the same kernel and agent.
///
/// # Errors
/// Everything [`super::run`] can give; [`RunError::Script`] when the script
/// fails, and then no image is made. Nothing is left behind either way.
pub async fn provision(
    host: &Host,
    spec: &Spec,
    name: &str,
    mut io: Io,
) -> Result<Image, RunError> {
    // A bad name must not cost a whole provisioning.
    crate::image::check_name(name)?;
    let exchange = Exchange::prepare(&spec.workspace)?;
    let (from, mut machine) = super::runner::start(host, spec, None, &mut io).await?;
    let work = async {
        let session = Session {
            published: Vec::new(),
            host,
            spec,
            machine: &mut machine,
            exchange,
        };
        let done = session.run(&mut io).await?;
        if done.command.exit_code != 0 {
            return Err(RunError::Script {
                code: done.command.exit_code,
                timed_out: done.command.timed_out,
            });
        }
        let export = export(host, &machine, &from, name);
        unless_interrupted(&mut io.signals, export).await
    };
    let result = work.await;
    if let Err(errors) = machine.kill().await {
        for error in errors {
            tracing::warn!("left behind, `bulkhead gc` will try again: {error}");
        }
    }
    result
}

/// Takes the root file system out of the guest and into a new image.
async fn export(
    host: &Host,
    machine: &Machine,
    from: &Image,
    name: &str,
) -> Result<Image, RunError> {
    let exec = Exec {
        argv: TAR.map(str::to_owned).into(),
        user: Some("root".into()),
        cwd: Some("/".into()),
        ..Exec::default()
    };
    let mut stream = machine.channel().open(&Request::Exec(exec)).await?;
    in_time(WHAT, stream.started(WHAT)).await?;
    let (mut ours, theirs) = pipe()?;
    let (verdict, end) = mpsc::channel();
    let whole = Whole {
        archive: theirs,
        end,
    };
    let (store, from, name) = (host.images(), from.clone(), name.to_owned());
    let builder = tokio::task::spawn_blocking(move || {
        Builder::new(&store).from_root_tar(whole, &from, &name)
    });
    let carry = async {
        let mut words = Vec::new();
        loop {
            match in_time(WHAT, stream.next()).await? {
                Output::Out(bytes) => {
                    if ours.write_all(&bytes).await.is_err() {
                        // The builder has seen enough, and says why.
                        return Ok(());
                    }
                }
                Output::Err(bytes) => {
                    words.extend_from_slice(&bytes);
                    words.drain(..words.len().saturating_sub(WORDS));
                }
                Output::Exit(exit) => {
                    let result = match exit.code {
                        Some(0) => Ok(()),
                        _ => Err(complaints(&words)),
                    };
                    let _ = verdict.send(result);
                    return Ok(());
                }
            }
        }
    };
    let carried: Result<(), GuestError> = carry.await;
    drop((ours, verdict));
    let built = joined(builder.await);
    carried.map_err(MachineError::from)?;
    Ok(built?)
}

/// What tar said, without its wonder at file systems without attributes.
fn complaints(words: &[u8]) -> String {
    let words = super::console::printable(words, usize::MAX);
    let lines: Vec<&str> = words
        .lines()
        .filter(|line| !line.contains("xattr"))
        .collect();
    lines[lines.len().saturating_sub(5)..].join("; ")
}

/// An archive that ends well only if the program that makes it did.
struct Whole {
    archive: UnixStream,
    end: mpsc::Receiver<Result<(), String>>,
}

impl Read for Whole {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.archive.read(buffer)?;
        if count > 0 || buffer.is_empty() {
            return Ok(count);
        }
        match self.end.recv() {
            Ok(Ok(())) => Ok(0),
            Ok(Err(words)) => Err(io::Error::other(format!(
                "tar failed in the guest: {words}"
            ))),
            // A second reading of the end, or the machine went away.
            Err(mpsc::RecvError) => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn read(verdict: Option<Result<(), String>>) -> io::Result<Vec<u8>> {
        let (mut ours, archive) = UnixStream::pair().unwrap();
        let (sender, end) = mpsc::channel();
        ours.write_all(b"data").unwrap();
        drop(ours);
        if let Some(verdict) = verdict {
            sender.send(verdict).unwrap();
        }
        drop(sender);
        let mut bytes = vec![0; 4];
        let mut whole = Whole { archive, end };
        whole.read_exact(&mut bytes)?;
        whole.read(&mut [0]).map(|_| bytes)
    }

    #[test]
    fn an_archive_is_whole_only_if_tar_was_content() {
        assert_eq!(read(Some(Ok(()))).unwrap(), b"data");
        let error = read(Some(Err("disk on fire".into()))).unwrap_err();
        assert!(error.to_string().contains("disk on fire"), "{error}");
        assert!(read(None).is_err());
    }
}
