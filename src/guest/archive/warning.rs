//! Remarks on entries that were left out or altered.

use std::fmt;

use super::printable;

/// Most warnings that are kept word for word.
const KEPT: usize = 1000;

/// A remark on one entry.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub struct Warning {
    /// The entry, safe to print.
    pub path: String,
    /// What was done with it, and why.
    pub what: String,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.what)
    }
}

/// A bounded list of warnings: a guest cannot fill memory with them.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Warnings {
    /// The first ones.
    pub list: Vec<Warning>,
    /// How many more there were.
    pub more: u64,
}

impl Warnings {
    /// Adds a remark on the entry named `path`.
    pub fn add(&mut self, path: impl AsRef<[u8]>, what: impl Into<String>) {
        if self.list.len() < KEPT {
            self.list.push(Warning {
                path: printable(path.as_ref()),
                what: what.into(),
            });
        } else {
            self.more += 1;
        }
    }

    /// Takes over all of `other`.
    pub fn append(&mut self, other: Self) {
        self.more += other.more;
        for warning in other.list {
            if self.list.len() < KEPT {
                self.list.push(warning);
            } else {
                self.more += 1;
            }
        }
    }

    /// Whether there is nothing to say.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_bounded() {
        let mut warnings = Warnings::default();
        for n in 0..KEPT + 5 {
            warnings.add(format!("f{n}"), "odd");
        }
        assert_eq!((warnings.list.len(), warnings.more), (KEPT, 5));
        let mut twice = warnings.clone();
        twice.append(warnings);
        assert_eq!((twice.list.len(), twice.more), (KEPT, 10 + KEPT as u64));
    }
}
