//! The guest agent: PID 1 of a machine, or a plain service in one.

mod channel;
mod clone;
mod console;
mod emergency;
mod exec;
mod failure;
mod files;
mod forward;
mod identity;
mod info;
mod init;
mod memory;
mod names;
mod server;
mod watch;

use std::os::fd::{FromRawFd, OwnedFd};
use std::path::PathBuf;

use crate::channel::Source;
use crate::server::Role;

const USAGE: &str = "usage: bulkhead-agent service [--fd N | --port PATH | --vsock PORT]";

fn main() {
    if std::process::id() == 1 {
        init::run();
    }
    let args: Vec<String> = std::env::args().skip(1).collect();
    match service_source(&args) {
        Some(source) => std::process::exit(server::main(source, Role::Service, None)),
        None => {
            console::complain!("{USAGE}");
            std::process::exit(2)
        }
    }
}

fn service_source(args: &[String]) -> Option<Source> {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["service"] => Some(Source::Machine(false)),
        ["service", "--fd", fd] => inherited(fd.parse().ok()?),
        ["service", "--port", path] => Some(Source::Serial(PathBuf::from(path))),
        ["service", "--vsock", port] => Some(Source::Vsock(port.parse().ok()?)),
        _ => None,
    }
}

#[allow(unsafe_code)] // a descriptor handed over by number
fn inherited(fd: i32) -> Option<Source> {
    if fd < 3 || nix::fcntl::fcntl(borrow(fd), nix::fcntl::FcntlArg::F_GETFD).is_err() {
        return None;
    }
    // SAFETY: it is open, and by the meaning of --fd it is ours.
    Some(Source::Inherited(unsafe { OwnedFd::from_raw_fd(fd) }))
}

#[allow(unsafe_code)]
fn borrow<'a>(fd: i32) -> std::os::fd::BorrowedFd<'a> {
    // SAFETY: only asked whether it is open; no other thread runs yet.
    unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) }
}
