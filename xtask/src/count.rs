//! What came of the tests: counted from what test programs print.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use anyhow::{Result, anyhow};

use crate::lab;

/// More failures than this are no accident, and no second try is made.
const MOST_TRIED_AGAIN: usize = 3;
/// Lines of a failed test's output that are shown again at the end.
const LINES_SHOWN_AGAIN: usize = 60;

/// A check and what came of it.
pub(crate) type Check = (&'static str, Result<()>);

/// What came of checks and tests.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Count {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    /// `NAME: reason` of each.
    pub(crate) skipped: BTreeSet<String>,
    /// Tests that failed and passed on a second try, alone: counted as passed.
    second: BTreeSet<String>,
    /// What tests that failed printed, and checks.
    said: BTreeMap<String, String>,
}

impl Count {
    /// Adds checks, saying what failed.
    pub(crate) fn checks(&mut self, checks: Vec<Check>) {
        for (name, result) in checks {
            match result {
                Ok(()) => self.passed += 1,
                Err(error) => {
                    println!("check failed: {name}: {error:#}");
                    self.said.insert(name.to_owned(), format!("{error:#}\n"));
                    self.failed += 1;
                }
            }
        }
    }

    /// Adds the tests that were run in the lab.
    pub(crate) fn lab(&mut self, tested: Result<lab::Tested>) {
        let name = "tests in the lab";
        match tested {
            Ok(tested) => {
                self.tests(&tested.text);
                let died = tested.died.join(", ");
                if !died.is_empty() {
                    self.checks(vec![(name, Err(anyhow!("not well ended: {died}")))]);
                }
                for (failed, ended, text) in tested.second {
                    self.second_try(&failed, ended, &text);
                }
            }
            Err(error) => self.checks(vec![(name, Err(error))]),
        }
    }

    /// Reads `test result: ok. 8 passed; 0 failed; 0 ignored; ...` and
    /// `skipped: NAME: reason` lines.
    pub(crate) fn tests(&mut self, text: &str) {
        let before = self.skipped.len();
        for line in text.lines().map(str::trim) {
            if let Some(skip) = line.strip_prefix("skipped: ") {
                self.skipped.insert(skip.to_owned());
            }
            let (passed, failed) = figures(line);
            self.passed += passed;
            self.failed += failed;
        }
        // A skipped test returns early, and the harness counts it as passed.
        self.passed -= self.passed.min(self.skipped.len() - before);
        for name in failed(text) {
            self.said.insert(name.clone(), output_of(&name, text));
        }
    }

    /// Reads what the tests that failed did when they were run again, alone:
    /// `ended` says whether all programs ended well. They count when all of them
    /// passed then, by the results and not by lines that a test could print.
    pub(crate) fn second_try(&mut self, failed_first: &BTreeSet<String>, ended: bool, text: &str) {
        let results = text.lines().map(figures);
        let (passed, failed) = results.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
        let skipped = text
            .lines()
            .any(|line| line.trim().starts_with("skipped: "));
        let number = failed_first.len();
        if ended && all_ended(text) && failed == 0 && passed >= number && !skipped {
            self.failed -= self.failed.min(number);
            self.passed += number;
            self.second.extend(failed_first.iter().cloned());
        }
    }

    /// What failed, with its last words, and the line that counts everything.
    pub(crate) fn closing(&self) -> String {
        let mut text = String::new();
        for (name, said) in &self.said {
            let how = match self.second.contains(name) {
                true => "failed, and passed on a second try, alone",
                false => "failed",
            };
            let _ = write!(text, "{how}: {name}\n{said}");
        }
        let _ = writeln!(
            text,
            "{} passed, {} failed, {} skipped",
            self.passed,
            self.failed,
            self.skipped.len()
        );
        text
    }
}

/// The tests that failed, when they are few and nothing worse happened: one of
/// hundreds of real machines may have met a busy host.
pub(crate) fn worth_a_second_try(text: &str) -> Option<BTreeSet<String>> {
    let failed = failed(text);
    let counted: usize = text.lines().map(|line| figures(line).1).sum();
    let few = (1..=MOST_TRIED_AGAIN).contains(&failed.len()) && counted == failed.len();
    (few && all_ended(text)).then_some(failed)
}

/// Whether each program that began told a result: one that died does not.
pub(crate) fn all_ended(text: &str) -> bool {
    let begun = |line: &&str| line.starts_with("running ") && line.contains(" test");
    let results = text
        .lines()
        .filter(|line| line.starts_with("test result: "));
    text.lines().filter(begun).count() == results.count()
}

/// Names of the tests that failed: `test NAME ... FAILED`.
pub(crate) fn failed(text: &str) -> BTreeSet<String> {
    let name = |line: &str| {
        let (name, how) = line.strip_prefix("test ")?.rsplit_once(" ... ")?;
        (how == "FAILED").then(|| name.to_owned())
    };
    text.lines().filter_map(name).collect()
}

/// How many passed and failed, of `test result: ok. 8 passed; 0 failed; ...`.
fn figures(line: &str) -> (usize, usize) {
    let Some(result) = line.strip_prefix("test result: ") else {
        return (0, 0);
    };
    let figure = |what: &str| -> usize {
        let before = result.split(what).next().unwrap_or_default();
        let number = before.trim().rsplit(' ').next().unwrap_or_default();
        number.parse().unwrap_or(0)
    };
    (figure("passed"), figure("failed"))
}

/// The last lines of what a test printed, from below `---- NAME stdout ----`.
fn output_of(name: &str, text: &str) -> String {
    let begin = format!("---- {name} stdout ----");
    let block = text.lines().skip_while(|line| *line != begin).skip(1);
    let ends = |line: &&str| {
        let next = line.starts_with("---- ") && line.ends_with(" stdout ----");
        !next && !["failures:", "successes:"].contains(line)
    };
    let lines: Vec<&str> = block.take_while(ends).collect();
    let from = lines.len().saturating_sub(LINES_SHOWN_AGAIN);
    let shown = lines
        .into_iter()
        .skip(from)
        .map(|line| format!("  {line}\n"));
    shown.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_and_skips_are_counted() {
        let text = "test result: ok. 8 passed; 0 failed; 0 ignored; 0 measured\n\
                    skipped: qemu10: no such suite\n\
                    test result: FAILED. 3 passed; 2 failed; 0 ignored\n";
        let mut count = Count::default();
        count.tests(text);
        assert_eq!(
            (count.passed, count.failed, count.skipped.len()),
            (10, 2, 1)
        );
    }

    #[test]
    fn a_lab_that_comes_to_nothing_is_a_failure() {
        let tested = |text: &str, died: &[&str]| {
            let mut count = Count::default();
            count.lab(Ok(lab::Tested {
                text: text.to_owned(),
                died: died.iter().map(|name| (*name).to_owned()).collect(),
                ..Default::default()
            }));
            (count.passed, count.failed)
        };
        let good = "test result: ok. 8 passed; 0 failed; 0 ignored\n";
        let bad = "test result: FAILED. 7 passed; 1 failed; 0 ignored\n";
        assert_eq!(tested(good, &[]), (8, 0));
        assert_eq!(tested(bad, &[]), (7, 1));
        // It died before it told a result.
        assert_eq!(tested(good, &["resources (134)"]), (8, 1));
        let mut count = Count::default();
        count.lab(Err(anyhow!("not over after 900 s")));
        assert_eq!((count.passed, count.failed), (0, 1));
    }

    #[test]
    fn a_second_try_in_the_lab_does_not_hide_a_program_that_died() {
        let second = PASSED;
        for (died, result) in [(vec![], (2, 0)), (vec!["jail (134)".to_owned()], (2, 1))] {
            let mut count = Count::default();
            count.lab(Ok(lab::Tested {
                text: ONE_FAILED.to_owned(),
                second: vec![(failed(ONE_FAILED), true, second.to_owned())],
                failed: vec!["kvm (101)".to_owned()],
                died,
            }));
            assert_eq!((count.passed, count.failed), result);
        }
    }

    /// One program of two tests, as the harness prints it.
    const ONE_FAILED: &str = "\nrunning 2 tests\n\
        test a_good_one ... ok\n\
        test of::a_terminal ... FAILED\n\n\
        successes:\n\n\
        ---- a_good_one stdout ----\n\
        chatter\n\n\
        successes:\n    a_good_one\n\n\
        failures:\n\n\
        ---- of::a_terminal stdout ----\n\n\
        thread 'of::a_terminal' panicked at tests/machine.rs:3:5:\n\
        ask did not come\n\n\n\
        failures:\n    of::a_terminal\n\n\
        test result: FAILED. 1 passed; 1 failed; 0 ignored\n";

    /// A second try that passes.
    const PASSED: &str = "running 1 test\ntest of::a_terminal ... ok\n\n\
        test result: ok. 1 passed; 0 failed; 0 ignored\n";

    fn counted(ended: bool, second: &str) -> Count {
        let mut count = Count::default();
        count.tests(ONE_FAILED);
        count.second_try(&failed(ONE_FAILED), ended, second);
        count
    }

    #[test]
    fn a_second_try_that_passes_counts_and_is_told() {
        let count = counted(true, PASSED);
        assert_eq!((count.passed, count.failed), (2, 0));
        let closing = count.closing();
        let told = "failed, and passed on a second try, alone: of::a_terminal\n";
        assert!(closing.starts_with(told), "{closing}");
        assert!(closing.contains("  ask did not come\n"), "{closing}");
        assert!(!closing.contains("chatter"), "{closing}");
        assert!(
            closing.ends_with("\n2 passed, 0 failed, 0 skipped\n"),
            "{closing}"
        );
    }

    #[test]
    fn what_fails_twice_or_says_nothing_has_failed() {
        let again = ONE_FAILED.to_owned();
        // The name is another program's, too.
        let twice = format!("{PASSED}{ONE_FAILED}");
        // It died, after it or a child had said that it was well.
        let died = "running 1 test\ntest of::a_terminal ... ok\n".to_owned();
        let none = "running 0 tests\ntest result: ok. 0 passed; 0 failed\n".to_owned();
        let skipped = format!("{PASSED}skipped: of::a_terminal: no terminal\n");
        let all = [again, twice, died, none, skipped, String::new()];
        let all = all.into_iter().map(|text| (true, text));
        // All that it says is well, and then it dies.
        for (ended, second) in all.chain([(false, PASSED.to_owned())]) {
            let count = counted(ended, &second);
            assert_eq!((count.passed, count.failed), (1, 1), "{second}");
            assert!(count.closing().starts_with("failed: of::a_terminal\n"));
        }
    }

    #[test]
    fn only_few_and_plain_failures_get_a_second_try() {
        let names = |text: &str| worth_a_second_try(text).map(Vec::from_iter);
        assert_eq!(names(ONE_FAILED), Some(vec!["of::a_terminal".to_owned()]));
        // All is well.
        let good = "running 1 test\ntest a ... ok\ntest result: ok. 1 passed; 0 failed\n";
        assert_eq!(names(good), None);
        // A program began and has no result: it died.
        assert_eq!(names(&format!("{ONE_FAILED}running 7 tests\n")), None);
        // The same name in two programs.
        assert_eq!(names(&ONE_FAILED.repeat(2)), None);
        // Many.
        let many: String = (0..=MOST_TRIED_AGAIN)
            .map(|n| ONE_FAILED.replace("a_terminal", &format!("t{n}")))
            .collect();
        assert_eq!(names(&many), None);
    }
}
