//! Unified hunks between two byte strings, in the form `git apply` reads.

use std::io::{self, Write};
use std::ops::Range;
use std::time::{Duration, Instant};

use similar::{Algorithm, DiffOp, capture_diff_slices_deadline, group_diff_ops};

/// Lines around a change.
const CONTEXT: usize = 3;
/// After this long the diff is only approximately minimal.
const EFFORT: Duration = Duration::from_secs(2);

/// Writes the hunks that turn `old` into `new`; `line` writes one line, its
/// mark first, without its newline.
pub(super) fn hunks<W: Write>(
    out: &mut W,
    old: &[u8],
    new: &[u8],
    mut line: impl FnMut(&mut W, u8, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let (old, new) = (lines(old), lines(new));
    let deadline = Some(Instant::now() + EFFORT);
    let ops = capture_diff_slices_deadline(Algorithm::Myers, &old, &new, deadline);
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
