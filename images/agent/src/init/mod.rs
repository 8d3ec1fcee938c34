//! PID 1: boots the machine, starts the agent's server, reaps, powers off.

mod modules;
mod network;
mod options;
mod power;
mod root;
mod scratch;
mod settle;
mod sys;

use std::ffi::CString;
use std::sync::Arc;
use std::time::Instant;

use nix::errno::Errno;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, execv};

use self::options::Options;
use crate::channel::Source;
use crate::console::{self, complain, note};
use crate::server;

pub(crate) use self::power::ask as ask_to_power_off;
pub(crate) use self::scratch::Scratch;

/// Logs how long each step of the boot took, where asked to.
struct Steps {
    trace: bool,
    last: Instant,
}

impl Steps {
    fn done(&mut self, step: &str) {
        if self.trace {
            note!("{step}: {} us", self.last.elapsed().as_micros());
            self.last = Instant::now();
        }
    }
}

/// The whole life of PID 1.
pub(crate) fn run() -> ! {
    let start = Instant::now();
    settle::mount_kernel_file_systems();
    console::use_kernel_log();
    let line = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let (options, unknown) = Options::parse(&line);
    for word in unknown {
        complain!("unknown option on the kernel's command line: {word}");
    }
    let mut steps = Steps {
        trace: options.trace,
        last: start,
    };
    steps.done("kernel file systems");
    modules::load();
    steps.done("modules");
    let scratch = if options.stay {
        None
    } else {
        match root::enter(&options) {
            Ok(scratch) => scratch.map(Arc::new),
            Err(error) => {
                complain!("{}", error.message);
                complain!("no root file system: powering off");
                power::off(None)
            }
        }
    };
    steps.done("root");
    settle::mount_the_rest();
    steps.done("mounts");
    settle::make_workspace();
    settle::name_host(&options);
    steps.done("workspace");
    settle::loopback_up();
    steps.done("lo");
    if let Err(error) = options.network.up() {
        complain!("{}", error.message);
    }
    steps.done("network");
    let source = Source::Machine(options.vsock);
    let own_init = options.init.is_none();
    let role = server::Role::Machine { own_init };
    let shared = scratch.clone();
    let server = sys::fork_child(move || server::main(source, role, shared));
    steps.done("fork");
    match (server, options.init) {
        (Err(error), _) => {
            complain!("cannot start the agent's server: {error}");
            power::off(scratch.as_deref())
        }
        (Ok(_), Some(init)) => hand_over(&init, scratch.as_deref()),
        (Ok(server), None) => supervise(server, scratch.as_deref()),
    }
}

/// Reaps until the server ends, which ends the machine.
fn supervise(server: Pid, scratch: Option<&Scratch>) -> ! {
    loop {
        match waitpid(None, None) {
            Ok(WaitStatus::Exited(pid, 0)) if pid == server => break,
            Ok(status @ (WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, ..)))
                if pid == server =>
            {
                complain!("the agent's server died ({status:?}): powering off");
                break;
            }
            Err(Errno::ECHILD) => break,
            _ => {}
        }
    }
    power::off(scratch)
}

/// Lets the image's own init be PID 1.
fn hand_over(init: &str, scratch: Option<&Scratch>) -> ! {
    let error = match CString::new(init) {
        Ok(path) => execv(&path, &[&path]).err(),
        Err(_) => Some(Errno::EINVAL),
    };
    complain!("cannot run {init} as init ({error:?}): powering off");
    power::off(scratch)
}
