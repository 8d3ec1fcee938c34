//! The network of a `bulkhead run`, changed while it runs.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError, Weak};

use super::RunError;
use super::machine::{Machine, missing};
use super::network::Rules;
use super::record::save_spec;
use crate::spec::{NetworkChange, Spec};

/// Who changes it. A detached machine's supervisor does that by itself.
#[derive(Debug)]
pub(super) struct Retune {
    rules: Option<Weak<Rules>>,
    dir: PathBuf,
    /// What the run was asked for, with what was changed since. Held while it
    /// changes.
    spec: Mutex<Spec>,
}

impl Retune {
    /// For a machine that was started by this spec.
    pub(super) fn new(machine: &Machine, spec: &Spec) -> Self {
        Self {
            rules: machine.rules(),
            dir: machine.dir().to_owned(),
            spec: Mutex::new(spec.clone()),
        }
    }

    /// Makes a change, all of it or nothing, and writes down what is asked for from
    /// now on. Waits for the kernel.
    pub(super) fn change(&self, change: &NetworkChange) -> Result<(), RunError> {
        let mut spec = self.spec.lock().unwrap_or_else(PoisonError::into_inner);
        change.check(&spec.network)?;
        // It may have ended meanwhile.
        let rules = self.rules.as_ref().and_then(Weak::upgrade);
        let rules = rules.ok_or(missing("a network"))?;
        let mut changed = spec.clone();
        change.apply(&mut changed.network);
        rules.change(&changed.network, change.denies())?;
        if let Err(error) = save_spec(&self.dir, &changed) {
            // What is asked for, and what holds, are the same.
            if let Err(error) = rules.change(&spec.network, true) {
                tracing::warn!("the network's rules may be those that were refused: {error}");
            }
            return Err(error.into());
        }
        *spec = changed;
        Ok(())
    }
}
