//! A clone in the hands of a caller.

use std::ops::Deref;

use tokio::sync::mpsc::UnboundedSender;

use super::keeper::Word;
use super::ledger::CloneId;
use crate::run::Machine;

/// A clone of the pool's: nobody else has it, and nobody else ever gets it.
/// Dropped or released, it is ended, and the pool starts another. Whoever has it
/// looks after it as after any machine: its end, its disk, its network's filter
/// ([`Machine::unfiltered`]).
#[derive(Debug)]
pub struct Loan {
    id: CloneId,
    machine: Option<Box<Machine>>,
    /// It may have run since it was taken.
    touched: bool,
    words: UnboundedSender<Word>,
}

impl Loan {
    pub(super) fn new(id: CloneId, machine: Box<Machine>, words: UnboundedSender<Word>) -> Self {
        Self {
            id,
            machine: Some(machine),
            touched: false,
            words,
        }
    }

    /// From here on it is not lent again.
    pub(super) fn touch(&mut self) {
        self.touched = true;
    }

    /// Gives it back, to be ended in the background.
    pub fn release(self) {}
}

impl Deref for Loan {
    type Target = Machine;

    fn deref(&self) -> &Machine {
        // Taken in `drop` only.
        self.machine.as_ref().expect("a loan has its machine")
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        if let Some(machine) = self.machine.take() {
            let (id, touched) = (self.id, self.touched);
            // Where there is no keeper any more, it ends here.
            let _ = self.words.send(Word::Back {
                id,
                machine,
                touched,
            });
        }
    }
}
