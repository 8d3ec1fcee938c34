//! Interleaving: every subject once a round, in another order each time, so
//! that what the host does meanwhile meets all of them.

use std::io::IsTerminal as _;
use std::pin::Pin;

use anyhow::Result;

/// One round of one subject: its phases, in order.
#[derive(Debug, Clone, Default)]
pub(super) struct Sample(Vec<(&'static str, f64)>);

impl Sample {
    pub(super) fn get(&self, phase: &str) -> Option<f64> {
        let found = self.0.iter().find(|(name, _)| *name == phase);
        found.map(|(_, value)| *value)
    }

    pub(super) fn set(&mut self, phase: &'static str, value: f64) {
        self.0.push((phase, value));
    }
}

impl From<Vec<(&'static str, f64)>> for Sample {
    fn from(phases: Vec<(&'static str, f64)>) -> Self {
        Self(phases)
    }
}

impl<'a> IntoIterator for &'a Sample {
    type Item = &'a (&'static str, f64);
    type IntoIter = std::slice::Iter<'a, (&'static str, f64)>;
    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
    }
}

/// All rounds of one subject.
#[derive(Debug, Clone)]
pub(super) struct Series {
    pub(super) subject: String,
    pub(super) rounds: Vec<Sample>,
}

impl Series {
    /// Takes in more phases of the same rounds.
    pub(super) fn add(&mut self, more: Self) {
        for (round, more) in self.rounds.iter_mut().zip(more.rounds) {
            round.0.extend(more.0);
        }
    }

    pub(super) fn column(&self, phase: &str) -> Vec<f64> {
        let cells = self.rounds.iter().filter_map(|round| round.get(phase));
        cells.collect()
    }
}

/// What one round of a subject is: made anew each time.
pub(super) type Work<'a> = Pin<Box<dyn Future<Output = Result<Sample>> + 'a>>;

/// A subject and its work.
pub(super) struct Subject<'a> {
    pub(super) name: String,
    pub(super) work: Box<dyn FnMut() -> Work<'a> + 'a>,
}

impl<'a> Subject<'a> {
    pub(super) fn new<F>(name: impl Into<String>, mut work: impl FnMut() -> F + 'a) -> Self
    where
        F: Future<Output = Result<Sample>> + 'a,
    {
        Self {
            name: name.into(),
            work: Box::new(move || Box::pin(work())),
        }
    }
}

/// Measures `n` rounds, after one that warms up and is not counted.
pub(super) async fn interleaved(
    bench: &str,
    n: usize,
    mut subjects: Vec<Subject<'_>>,
) -> Result<Vec<Series>> {
    let shown = std::io::stderr().is_terminal();
    let mut all: Vec<Series> = subjects
        .iter()
        .map(|subject| Series {
            subject: subject.name.clone(),
            rounds: Vec::with_capacity(n),
        })
        .collect();
    for round in 0..=n {
        if shown {
            eprint!("\rbench {bench}: {round} of {n} rounds");
        }
        let mut order: Vec<usize> = (0..subjects.len()).collect();
        order.rotate_left(round / 2 % subjects.len().max(1));
        if round % 2 == 1 {
            order.reverse();
        }
        for at in order {
            let sample = (subjects[at].work)().await?;
            if round > 0 {
                all[at].rounds.push(sample);
            }
        }
    }
    if shown {
        eprintln!();
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    #[tokio::test]
    async fn every_subject_comes_first_and_last() {
        let order = RefCell::new(Vec::new());
        let subject = |name: &'static str| {
            let order = &order;
            Subject::new(name, move || async move {
                order.borrow_mut().push(name);
                Ok(Sample::from(vec![("x", 1.0)]))
            })
        };
        let subjects = vec![subject("a"), subject("b"), subject("c")];
        let all = interleaved("test", 6, subjects).await.unwrap();
        assert!(all.iter().all(|series| series.column("x").len() == 6));
        // Without the warm-up.
        let order = order.borrow();
        for at in [0, 2] {
            let mut seen: Vec<_> = order[3..].chunks(3).map(|round| round[at]).collect();
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen, ["a", "b", "c"]);
        }
    }
}
