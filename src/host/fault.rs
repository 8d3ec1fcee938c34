//! Named points at which a test stops this program or makes it fail.
//!
//! Every lease, every durable write and every step of a machine's life passes
//! through [`at`], so `cargo xtask probe faults` finds the points by running
//! the program once and listing what it passed: a new step is covered without
//! anybody adding it. Without the feature `faults` there is nothing here.
//!
//! `BULKHEAD_FAULT` says what to do: `record=FILE` appends each point to a
//! file as `PID ROLE N POINT`, `stop=ROLE N POINT` stops the program (SIGSTOP)
//! at the N-th passing of a point, `ERRNO=ROLE N POINT` makes it fail there.
//! `BULKHEAD_FAULT_REACHED` names a file that is given the process id of who
//! got to that point, before it stops or fails.

/// Which of our programs this is, for telling the same point apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A command of the user.
    Cli,
    /// The supervisor of a machine.
    Supervisor,
}

#[cfg(not(feature = "faults"))]
mod inner {
    use super::Role;

    /// Says which program this is.
    pub fn role(_: Role) {}

    /// Passes a point.
    ///
    /// # Errors
    /// The error a test wants here.
    #[inline]
    pub fn at(_: &str) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(feature = "faults")]
mod inner {
    use std::collections::HashMap;
    use std::io::{self, Write};
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{LazyLock, Mutex, PoisonError};

    use nix::errno::Errno;
    use nix::sys::signal::{Signal, raise};

    use super::Role;

    static SUPERVISOR: AtomicBool = AtomicBool::new(false);
    static PASSED: LazyLock<Mutex<HashMap<String, u32>>> = LazyLock::new(Mutex::default);
    static WANTED: LazyLock<Option<(String, String)>> = LazyLock::new(|| {
        let text = std::env::var("BULKHEAD_FAULT").ok()?;
        let (what, of) = text.split_once('=')?;
        Some((what.to_owned(), of.to_owned()))
    });

    /// Says which program this is.
    pub fn role(role: Role) {
        SUPERVISOR.store(role == Role::Supervisor, Ordering::Relaxed);
    }

    /// Passes a point.
    ///
    /// # Errors
    /// The error a test wants here.
    pub fn at(point: &str) -> io::Result<()> {
        let Some((what, of)) = &*WANTED else {
            return Ok(());
        };
        let role = match SUPERVISOR.load(Ordering::Relaxed) {
            true => "supervisor",
            false => "cli",
        };
        let count = {
            let mut passed = PASSED.lock().unwrap_or_else(PoisonError::into_inner);
            let count = passed.entry(point.to_owned()).or_default();
            *count += 1;
            *count
        };
        let here = format!("{role} {count} {point}");
        match what.as_str() {
            "record" => {
                let mut file = std::fs::File::options()
                    .append(true)
                    .create(true)
                    .open(of)?;
                // In one piece: others write to it too.
                file.write_all(format!("{} {here}\n", std::process::id()).as_bytes())
            }
            _ if *of != here => Ok(()),
            _ => {
                if let Some(reached) = std::env::var_os("BULKHEAD_FAULT_REACHED") {
                    std::fs::write(reached, std::process::id().to_string())?;
                }
                act(what)
            }
        }
    }

    /// Does what the test wants at this point.
    fn act(what: &str) -> io::Result<()> {
        match what {
            // The test does what it wants to whom it wants, then lets us go on.
            "stop" => Ok(raise(Signal::SIGSTOP)?),
            "ENOSPC" => Err(Errno::ENOSPC.into()),
            "EMFILE" => Err(Errno::EMFILE.into()),
            "EPERM" => Err(Errno::EPERM.into()),
            other => Err(io::Error::other(format!(
                "BULKHEAD_FAULT={other} is unknown"
            ))),
        }
    }
}

pub use inner::{at, role};
