//! Tables and times for people.

use super::message::{print_text, visible};
use crate::run::now_ms;

/// Rows of text in columns as wide as they need to be.
pub(super) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new(head: &[&str]) -> Self {
        Self {
            rows: vec![head.iter().map(|text| (*text).to_owned()).collect()],
        }
    }

    /// Adds a row. What it holds may be a guest's words.
    pub(super) fn row(&mut self, cells: &[String]) {
        let clean = |cell: &String| visible(&cell.replace('\n', " "));
        self.rows.push(cells.iter().map(clean).collect());
    }

    /// The lines of the table.
    pub(super) fn lines(&self) -> Vec<String> {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            let widest = cells.map(|cell| cell.chars().count()).max().unwrap_or(0);
            // More is no width to be formatted.
            widest.min(usize::from(u16::MAX))
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let line = |row: &Vec<String>| {
            let cells = row.iter().zip(&widths);
            let text: String = cells
                .map(|(cell, width)| format!("{cell:width$}  "))
                .collect();
            text.trim_end().to_owned()
        };
        self.rows.iter().map(line).collect()
    }

    pub(super) fn print(&self) {
        for line in self.lines() {
            print_text(&format!("{line}\n"));
        }
    }
}

/// How long ago a time was, in its largest unit.
pub(super) fn age(ms: u64) -> String {
    duration(now_ms().saturating_sub(ms))
}

/// A duration in milliseconds in its largest unit.
pub(super) fn duration(ms: u64) -> String {
    let secs = ms / 1000;
    match secs {
        0..60 => format!("{secs}s"),
        60..3600 => format!("{}m", secs / 60),
        3600..86400 => format!("{}h", secs / 3600),
        _ => format!("{}d", secs / 86400),
    }
}

/// Bytes in the largest unit they fill.
pub(super) fn bytes(count: u64) -> String {
    match count {
        0..1024 => format!("{count} B"),
        1024..1_048_576 => format!("{} KiB", count >> 10),
        1_048_576..10_737_418_240 => format!("{} MiB", count >> 20),
        _ => format!("{} GiB", count >> 30),
    }
}

/// A time as `2026-11-25T03:14:15.926Z`, from milliseconds since 1970-01-01 UTC.
pub(super) fn clock(ms: u64) -> String {
    let (days, rest) = (ms / 86_400_000, ms % 86_400_000);
    // Civil date from days since 1970-01-01 (proleptic Gregorian calendar): years
    // begin in March, so that a leap day is the last of its year.
    let days = days + 719_468;
    let era = days / 146_097;
    let day_of_era = days % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let (month, year) = match month {
        0..10 => (month + 3, year_of_era + era * 400),
        _ => (month - 9, year_of_era + era * 400 + 1),
    };
    let (hour, minute) = (rest / 3_600_000, rest / 60_000 % 60);
    let (second, milli) = (rest / 1000 % 60, rest % 1000);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{milli:03}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_civil() {
        assert_eq!(clock(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(clock(951_782_399_999), "2000-02-28T23:59:59.999Z");
        assert_eq!(clock(951_782_400_000), "2000-02-29T00:00:00.000Z");
        assert_eq!(clock(1_795_576_455_926), "2026-11-25T03:14:15.926Z");
        assert_eq!(clock(4_102_444_800_000), "2100-01-01T00:00:00.000Z");
    }

    #[test]
    fn columns_fit_and_nothing_steers_the_terminal() {
        let mut table = Table::new(&["A", "B"]);
        table.row(&["long one".into(), "\x1b[2Jx\ny".into()]);
        let lines = table.lines();
        assert_eq!(lines[0], "A         B");
        assert!(lines[1].starts_with("long one  ") && !lines[1].contains('\x1b'));
    }

    #[test]
    fn amounts_for_people() {
        assert_eq!(
            (duration(59_999), duration(3_600_000)),
            ("59s".into(), "1h".into())
        );
        assert_eq!(
            (bytes(1023), bytes(5 << 20)),
            ("1023 B".into(), "5 MiB".into())
        );
    }
}
