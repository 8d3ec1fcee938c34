//! From one machine to many: coming to rest before it is saved, and becoming
//! another after it was restored.

mod hooks;

use std::fs;
use std::io::Read;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use bulkhead_agent::{Configure, FailureKind, HOOKS, Life};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::sync;

use crate::failure::{Context, Result, failure, invalid};
use crate::identity;
use crate::init::Scratch;
use crate::names::Held;

/// Where this machine is in its lives.
#[derive(Debug, Default)]
pub(crate) struct Lives(Mutex<Now>);

#[derive(Debug, Default)]
struct Now {
    generation: u64,
    session: String,
    /// About to be saved, or restored and not yet another: nothing is served.
    rests: bool,
    /// How often it was told to go on as itself.
    resumed: u64,
    /// Where a clone's names are stored; used while it rests.
    held: Option<Held>,
}

impl Lives {
    fn now(&self) -> MutexGuard<'_, Now> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses what must not run in a machine that is like its siblings.
    ///
    /// # Errors
    /// It rests.
    pub(crate) fn awake(&self) -> Result<()> {
        match self.now().rests {
            true => Err(failure(
                FailureKind::System,
                "this machine was saved to be cloned, and is not a clone of its own yet",
            )),
            false => Ok(()),
        }
    }

    /// Brings the machine to rest.
    ///
    /// # Errors
    /// It has no random pool to name this life by, or was told to go on before
    /// everything was on its disk: then nobody waits for that any more.
    pub(crate) fn quiesce(&self, scratch: Option<&Scratch>) -> Result<Life> {
        self.quiesce_after(sync, || {
            let held = Held::take(Path::new("/"))?;
            // To take hold of files changes them: that goes to the disk now, and
            // not seconds later from every clone.
            if let Some(scratch) = scratch {
                scratch.commit();
            }
            Some(held)
        })
    }

    fn quiesce_after(
        &self,
        sync: impl FnOnce(),
        hold: impl FnOnce() -> Option<Held>,
    ) -> Result<Life> {
        let resumed = self.now().resumed;
        sync();
        let mut now = self.unless_resumed(resumed)?;
        if now.session.is_empty() {
            now.session = draw()?;
        }
        now.rests = true;
        drop(now);
        // After everything was written down, which takes the hold off. It may
        // wait for the disk: whoever asks for something meanwhile is refused.
        let held = hold();
        let mut now = self.unless_resumed(resumed)?;
        now.held = held;
        // A clone looks there again, and the kernel need not ask the disk then.
        hooks::any(Path::new(HOOKS));
        Ok(life(&now))
    }

    /// # Errors
    /// It was told to go on, more often than this.
    fn unless_resumed(&self, resumed: u64) -> Result<MutexGuard<'_, Now>> {
        let now = self.now();
        match now.resumed == resumed {
            true => Ok(now),
            false => Err(failure(
                FailureKind::System,
                "the machine was told to go on meanwhile",
            )),
        }
    }

    /// Whether becoming another takes no time to speak of: no hook is there, and
    /// its names need not be written to a disk.
    pub(crate) fn is_quick(&self) -> bool {
        self.now().held.is_some() && !hooks::any(Path::new(HOOKS))
    }

    /// Makes this clone unlike its siblings: entropy first, for all that
    /// follows draws on it, then clock and names, then the image's own hooks.
    ///
    /// # Errors
    /// It does not rest, is of another generation, or one of the steps failed:
    /// then it rests on.
    pub(crate) fn restored(&self, generation: u64, identity: &Configure) -> Result<Life> {
        let mut now = self.now();
        if !now.rests || generation != now.generation + 1 {
            return Err(invalid(format!(
                "generation {generation} does not follow {}{}",
                now.generation,
                if now.rests { "" } else { ", which runs" }
            )));
        }
        if identity.seed.is_none() || identity.unix_ns.is_none() || identity.hostname.is_none() {
            return Err(invalid("a clone needs a seed, a clock and a name"));
        }
        // To let go of the files would take longer than all of this.
        identity::apply(identity, now.held.as_ref())?;
        hooks::run(Path::new(HOOKS), generation)?;
        now.session = draw()?;
        now.generation = generation;
        now.rests = false;
        Ok(life(&now))
    }

    /// Goes on in place, after it was saved: it is no clone, and whatever becomes
    /// of its entropy and its clock, it serves.
    ///
    /// # Errors
    /// The identity could not be taken.
    pub(crate) fn resumed(&self, identity: &Configure) -> Result<Life> {
        let mut now = self.now();
        let taken = identity::apply(identity, None);
        now.held = None;
        now.rests = false;
        now.resumed += 1;
        taken.map(|()| life(&now))
    }

    /// Sets the clock.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) fn set_clock(&self, unix_ns: u64) -> Result<Life> {
        identity::set_clock(unix_ns)?;
        Ok(life(&self.now()))
    }
}

fn life(now: &Now) -> Life {
    let clock = |id| clock_gettime(id).map_or(Duration::ZERO, Duration::from);
    Life {
        boot_id: boot_id(),
        generation: now.generation,
        session: now.session.clone(),
        uptime_ms: clock(ClockId::CLOCK_BOOTTIME).as_millis() as u64,
        unix_ns: clock(ClockId::CLOCK_REALTIME).as_nanos() as u64,
    }
}

/// What the kernel calls this boot. It is asked once: a clone remembers the
/// answer, as it remembers its generation.
pub(crate) fn boot_id() -> String {
    static ID: OnceLock<String> = OnceLock::new();
    if let Some(id) = ID.get() {
        return id.clone();
    }
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    match id.trim() {
        "" => String::new(),
        id => ID.get_or_init(|| id.to_owned()).clone(),
    }
}

/// The name of a life.
fn draw() -> Result<String> {
    let mut bytes = [0; 16];
    identity::pool()
        .and_then(|mut pool| pool.read_exact(&mut bytes))
        .context(|| "cannot read the random pool".into())?;
    Ok(bytes.map(|byte| format!("{byte:02x}")).concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quiesce(lives: &Lives) -> Result<Life> {
        lives.quiesce_after(|| {}, || None)
    }

    #[test]
    fn what_rests_serves_nothing_until_it_is_another() {
        let lives = Lives::default();
        lives.awake().unwrap();
        let saved = quiesce(&lives).unwrap();
        assert_eq!((saved.generation, saved.session.len()), (0, 32));
        assert!(lives.awake().is_err());
        // Neither another generation nor half an identity makes it one.
        let named = Configure {
            hostname: Some("clone".into()),
            ..Configure::default()
        };
        for (generation, identity) in [(0, &named), (2, &named), (1, &named)] {
            assert!(lives.restored(generation, identity).is_err());
            assert!(lives.awake().is_err(), "{generation}");
        }
    }

    #[test]
    fn what_was_saved_goes_on_as_itself_whatever_fails() {
        let lives = Lives::default();
        let saved = quiesce(&lives).unwrap();
        let went_on = lives.resumed(&Configure::default()).unwrap();
        assert_eq!(
            (went_on.generation, went_on.session),
            (saved.generation, saved.session)
        );
        lives.awake().unwrap();
        quiesce(&lives).unwrap();
        let bad = Configure {
            seed: Some("no digits".into()),
            ..Configure::default()
        };
        assert!(lives.resumed(&bad).is_err());
        lives.awake().unwrap();
    }

    #[test]
    fn a_rest_that_comes_too_late_is_none() {
        let lives = Lives::default();
        let go_on = || drop(lives.resumed(&Configure::default()));
        let late = lives.quiesce_after(go_on, || None);
        assert!(late.unwrap_err().message.contains("meanwhile"));
        lives.awake().unwrap();
    }

    #[test]
    fn what_runs_is_no_clone() {
        let error = Lives::default().restored(1, &Configure::default());
        assert!(error.unwrap_err().message.contains("which runs"));
    }
}
