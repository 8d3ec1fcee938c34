//! A program in QEMU's place that tries to get out of its jail, or up in it.
//!
//! `cargo xtask probe vmm` starts it instead of QEMU, with QEMU's arguments;
//! the machine's name says which attempt to make: `probe-N-...`. Without
//! arguments it lists the attempts.
#![allow(unsafe_code)] // every attempt is a system call that no crate should offer

mod files;
mod kernel;
mod network;
mod processes;
mod resources;

use nix::libc;

/// What came of an attempt.
enum Came {
    /// It got somewhere it must not.
    Out(String),
    /// It was stopped.
    Refused(String),
    /// It cannot be tried here.
    Skipped(String),
}

/// Something a broken VMM may try.
struct Attempt {
    /// Its name.
    name: &'static str,
    /// Worth trying without the filter for system calls, too: other layers
    /// stop it by themselves.
    deep: bool,
    run: fn() -> Came,
}

/// Exit codes for [`Came`]; `xtask/src/probe/vmm.rs` knows them.
const REFUSED: i32 = 10;
const OUT: i32 = 11;
const SKIPPED: i32 = 12;

/// An attempt that the other layers stop, too.
const fn deep(name: &'static str, run: fn() -> Came) -> Attempt {
    Attempt {
        name,
        deep: true,
        run,
    }
}

/// An attempt that the filter for system calls stops: what it asks for is no
/// harm to anybody else in itself, but nothing QEMU needs.
const fn flat(name: &'static str, run: fn() -> Came) -> Attempt {
    Attempt {
        name,
        deep: false,
        run,
    }
}

/// A system call: out if it succeeds.
fn call(number: libc::c_long, arguments: &[usize]) -> Came {
    let at = |n: usize| arguments.get(n).copied().unwrap_or(0);
    // SAFETY: this process is there to be broken; no memory of it matters.
    let result = unsafe { libc::syscall(number, at(0), at(1), at(2), at(3), at(4), at(5)) };
    came(result)
}

fn came(result: libc::c_long) -> Came {
    match result {
        0.. => Came::Out(format!("it gave {result}")),
        _ => Came::Refused(std::io::Error::last_os_error().to_string()),
    }
}

/// What the library says: out if it succeeds.
fn tried<T>(result: std::io::Result<T>) -> Came {
    match result {
        Ok(_) => Came::Out("it succeeded".into()),
        Err(error) => Came::Refused(error.to_string()),
    }
}

/// The address of a text.
fn text(text: &std::ffi::CStr) -> usize {
    text.as_ptr() as usize
}

fn main() {
    let all: Vec<&Attempt> = [
        files::ATTEMPTS,
        processes::ATTEMPTS,
        network::ATTEMPTS,
        kernel::ATTEMPTS,
        resources::ATTEMPTS,
    ]
    .into_iter()
    .flatten()
    .collect();
    let words: Vec<String> = std::env::args().collect();
    let named = words.iter().position(|word| word == "-name");
    let Some(name) = named.and_then(|at| words.get(at + 1)) else {
        for attempt in &all {
            println!(
                "{}\t{}",
                if attempt.deep { "deep" } else { "flat" },
                attempt.name
            );
        }
        return;
    };
    let number = name
        .split('-')
        .nth(1)
        .and_then(|number| number.parse::<usize>().ok());
    let Some(attempt) = number.and_then(|number| all.into_iter().nth(number)) else {
        eprintln!("{name} names no attempt");
        std::process::exit(1);
    };
    let (code, why) = match (attempt.run)() {
        Came::Refused(why) => (REFUSED, why),
        Came::Out(why) => (OUT, why),
        Came::Skipped(why) => (SKIPPED, why),
    };
    eprintln!("{}: {why}", attempt.name);
    std::process::exit(code);
}
