//! Unified hunks between two byte strings, in the form `git apply` reads.

use std::io::{self, Write};
use std::ops::Range;
use std::time::{Duration, Instant};

use similar::algorithms::{Capture, Compact, DiffHook, Replace, myers};
use similar::{DiffOp, group_diff_ops};

/// Lines around a change.
const CONTEXT: usize = 3;
/// After this long the diff of one file is only approximately minimal.
const EFFORT: Duration = Duration::from_secs(2);
/// Joining neighbouring hunks may take time in proportion to the product of
/// hunks and lines; above this they stay as they are.
const JOIN_MAX: usize = 50_000_000;

/// Writes the hunks that turn `old` into `new`; `line` writes one line, its
/// mark first, without its newline. The time for matching lines is taken from
/// `budget`; when that is used up, all lines are replaced.
pub(super) fn hunks<W: Write>(
    out: &mut W,
    old: &[u8],
    new: &[u8],
    budget: &mut Duration,
    mut line: impl FnMut(&mut W, u8, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let (old, new) = (lines(old), lines(new));
    let start = Instant::now();
    let ops = matched(&old, &new, start + EFFORT.min(*budget));
    *budget = budget.saturating_sub(start.elapsed());
    let mut print = |out: &mut W, mark: u8, text: &[u8]| match text.strip_suffix(b"\n") {
        Some(text) => line(out, mark, text),
        None => {
            line(out, mark, text)?;
            out.write_all(b"\\ No newline at end of file\n")
        }
    };
    for group in group_diff_ops(ops, CONTEXT) {
        let (Some(first), Some(last)) = (group.first(), group.last()) else {
            continue;
        };
        let span = |range: fn(&DiffOp) -> Range<usize>| range(first).start..range(last).end;
        let (from, to) = (span(DiffOp::old_range), span(DiffOp::new_range));
        writeln!(out, "@@ -{} +{} @@", position(&from), position(&to))?;
        for op in &group {
            if let DiffOp::Equal { .. } = op {
                for text in &old[op.old_range()] {
                    print(out, b' ', text)?;
                }
                continue;
            }
            for text in &old[op.old_range()] {
                print(out, b'-', text)?;
            }
            for text in &new[op.new_range()] {
                print(out, b'+', text)?;
            }
        }
    }
    Ok(())
}

/// The steps from `old` to `new`, few of them if there is time.
fn matched(old: &[&[u8]], new: &[&[u8]], deadline: Instant) -> Vec<DiffOp> {
    let mut raw = Capture::new();
    let (all_old, all_new) = (0..old.len(), 0..new.len());
    // Captures cannot fail.
    let _ = myers::diff_deadline(&mut raw, old, all_old, new, all_new, Some(deadline));
    let raw = raw.into_ops();
    let mut ops = Replace::new(Capture::new());
    if raw.len().saturating_mul(old.len() + new.len()) <= JOIN_MAX {
        let mut joined = Compact::new(ops, old, new);
        replay(&raw, &mut joined);
        ops = joined.into_inner();
    } else {
        replay(&raw, &mut ops);
    }
    ops.into_inner().into_ops()
}

fn replay<D: DiffHook>(ops: &[DiffOp], hook: &mut D) {
    for op in ops {
        let _ = op.apply_to_hook(hook);
    }
    let _ = hook.finish();
}

/// Lines with their newlines. Only `\n` ends a line, as in git.
fn lines(text: &[u8]) -> Vec<&[u8]> {
    text.split_inclusive(|&byte| byte == b'\n').collect()
}

/// `start,length` of a hunk; an empty side names the line before it.
fn position(range: &Range<usize>) -> String {
    match range.len() {
        0 => format!("{},0", range.start),
        1 => format!("{}", range.start + 1),
        len => format!("{},{len}", range.start + 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(old: &str, new: &str, mut budget: Duration) -> String {
        let mut out = Vec::new();
        hunks(
            &mut out,
            old.as_bytes(),
            new.as_bytes(),
            &mut budget,
            |out, mark, line| out.write_all(&[&[mark], line, b"\n"].concat()),
        )
        .unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn without_time_all_lines_are_replaced() {
        let (old, new) = ("a\nb\nc\nd\n", "x\nb\nc\ny\n");
        let text = shown(old, new, Duration::from_secs(10));
        assert_eq!(text, "@@ -1,4 +1,4 @@\n-a\n+x\n b\n c\n-d\n+y\n");
        let text = shown(old, new, Duration::ZERO);
        assert_eq!(text, "@@ -1,4 +1,4 @@\n-a\n-b\n-c\n-d\n+x\n+b\n+c\n+y\n");
    }

    #[test]
    fn many_small_hunks_take_little_time() {
        let old: String = (0..400_000).map(|n| format!("{}\n", n % 7)).collect();
        let new: String = (0..400_000)
            .map(|n| format!("{}\n", n % 7 + n % 2))
            .collect();
        let (mut budget, start) = (Duration::from_secs(10), Instant::now());
        let (old, new) = (old.into_bytes(), new.into_bytes());
        hunks(&mut io::sink(), &old, &new, &mut budget, |_, _, _| Ok(())).unwrap();
        let took = start.elapsed();
        assert!(took < Duration::from_secs(8), "{took:?}");
        assert!(budget < Duration::from_secs(10));
    }
}
