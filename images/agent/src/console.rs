//! One line to whoever watches: the kernel's log, or stderr of a plain service.

use std::fmt::Arguments;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::OnceLock;

static KERNEL_LOG: OnceLock<File> = OnceLock::new();

/// From now on lines go to the kernel's log, which the console shows.
pub(crate) fn use_kernel_log() {
    if let Ok(file) = OpenOptions::new().write(true).open("/dev/kmsg") {
        // Set once, by PID 1, before anything else could.
        let _ = KERNEL_LOG.set(file);
    }
}

/// How loud a line is.
#[derive(Clone, Copy)]
pub(crate) enum Level {
    /// Shown even on a `quiet` console.
    Failure = 3,
    /// Only in the log.
    Note = 6,
}

/// Writes one line; nobody can be told when that fails.
pub(crate) fn line(level: Level, text: Arguments<'_>) {
    let _ = match KERNEL_LOG.get() {
        // One write is one record.
        Some(mut file) => file.write_all(format!("<{}>bulkhead: {text}\n", level as u8).as_bytes()),
        None => std::io::stderr().write_all(format!("bulkhead-agent: {text}\n").as_bytes()),
    };
}

/// Reports a failure, formatted as by `format!`.
macro_rules! complain {
    ($($arg:tt)*) => { $crate::console::line($crate::console::Level::Failure, format_args!($($arg)*)) };
}
/// Leaves a note, formatted as by `format!`.
macro_rules! note {
    ($($arg:tt)*) => { $crate::console::line($crate::console::Level::Note, format_args!($($arg)*)) };
}
pub(crate) use {complain, note};
