//! Names of entries: checked once, then trusted to be relative and plain.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::{Error, Limits, printable};

/// A relative path of plain components: no root, no `.`, no `..`, no NUL.
///
/// The empty name is the directory everything is relative to. Bytes need not
/// be UTF-8, and control characters are allowed: use [`printable`] to show it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Name(PathBuf);

/// Longest component Linux file systems take, in bytes.
const COMPONENT_MAX: usize = 255;

impl Name {
    /// Checks a name out of an archive. Leading `./` and trailing `/` are dropped.
    ///
    /// # Errors
    /// [`Error::Hostile`] for a name that is not plain, [`Error::TooLarge`] for
    /// one that is longer or deeper than `limits`.
    pub fn parse(raw: &[u8], limits: &Limits) -> Result<Self, Error> {
        if raw.is_empty() {
            return Err(Error::hostile(raw, "has no name"));
        }
        if raw.len() > limits.path_len {
            // The whole name could be megabytes: show its start.
            let start = &raw[..raw.len().min(100)];
            return Err(Error::too_large(
                start,
                limits.path_len as u64,
                "bytes in a name",
            ));
        }
        if raw[0] == b'/' {
            return Err(Error::hostile(raw, "has an absolute name"));
        }
        let mut path = PathBuf::new();
        let mut depth = 0;
        for component in raw.split(|&byte| byte == b'/') {
            match component {
                b"" | b"." => continue,
                b".." => return Err(Error::hostile(raw, "climbs out with `..`")),
                _ if component.contains(&0) => {
                    return Err(Error::hostile(raw, "has a NUL in its name"));
                }
                _ if component.len() > COMPONENT_MAX => {
                    return Err(Error::hostile(
                        raw,
                        "has a component of more than 255 bytes",
                    ));
                }
                _ => path.push(OsStr::from_bytes(component)),
            }
            depth += 1;
        }
        if depth > limits.depth {
            return Err(Error::too_large(
                raw,
                limits.depth as u64,
                "directories deep",
            ));
        }
        Ok(Self(path))
    }

    /// The name as a relative path.
    pub fn as_path(&self) -> &Path {
        &self.0
    }

    /// The name's bytes.
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_os_str().as_bytes()
    }

    /// Whether this is the top directory itself.
    pub fn is_top(&self) -> bool {
        self.0.as_os_str().is_empty()
    }

    /// Number of components.
    pub fn depth(&self) -> usize {
        self.0.components().count()
    }

    /// The directory it is in and its last component; `None` for the top.
    pub fn split(&self) -> Option<(Name, &OsStr)> {
        Some((Self(self.0.parent()?.to_path_buf()), self.0.file_name()?))
    }

    /// This name and the names of all directories above it, the top last.
    pub fn ancestors(&self) -> impl Iterator<Item = Name> + '_ {
        self.0.ancestors().map(|path| Self(path.to_path_buf()))
    }

    /// A name below this one. `component` must be a single plain component.
    pub(crate) fn join(&self, component: &OsStr) -> Self {
        debug_assert!(!component.as_bytes().contains(&b'/') && component != "..");
        Self(self.0.join(component))
    }
}

impl AsRef<[u8]> for Name {
    fn as_ref(&self) -> &[u8] {
        if self.is_top() { b"." } else { self.as_bytes() }
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&printable(self.as_ref()))
    }
}

/// Whether a symlink in a directory `depth` below the top stays below the top.
///
/// Only leading `..` are counted: in `a/..` the `a` may itself be a symlink,
/// and then `..` is not where it seems to be.
pub(crate) fn link_stays_inside(depth: usize, target: &[u8]) -> bool {
    if target.is_empty() || target[0] == b'/' || target.contains(&0) {
        return false;
    }
    let mut up = 0;
    let mut descending = false;
    for component in target.split(|&byte| byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." if descending => return false,
            b".." => up += 1,
            _ => descending = true,
        }
    }
    up <= depth
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_names_are_normalised() {
        let name = |raw: &[u8]| Name::parse(raw, &Limits::default()).unwrap();
        assert_eq!(name(b"./a//b/./c/").as_path(), Path::new("a/b/c"));
        assert!(name(b"./").is_top());
        assert_eq!(name(b"a/b").split().unwrap().0.as_path(), Path::new("a"));
        assert_eq!(name(b"a").ancestors().count(), 2);
    }

    #[test]
    fn names_that_escape_are_refused() {
        for raw in [
            &b"/etc/passwd"[..],
            b"..",
            b"a/../b",
            b"a/..",
            b"",
            b"a\0b",
            b"//x",
        ] {
            let refused = Name::parse(raw, &Limits::default());
            assert!(matches!(refused, Err(Error::Hostile { .. })), "{raw:?}");
        }
        assert!(Name::parse(&[b'a'; 256], &Limits::default()).is_err());
        let deep = b"a/".repeat(300);
        assert!(matches!(
            Name::parse(&deep, &Limits::default()),
            Err(Error::TooLarge { .. })
        ));
    }

    #[test]
    fn links_may_climb_only_at_their_start() {
        assert!(link_stays_inside(0, b"a/b"));
        assert!(link_stays_inside(1, b"../b"));
        assert!(link_stays_inside(2, b".././../b"));
        assert!(!link_stays_inside(0, b"../b"));
        assert!(!link_stays_inside(0, b"a/../b"), "a may be a link");
        assert!(!link_stays_inside(3, b"a/../../b"));
        assert!(!link_stays_inside(3, b"/etc"));
        assert!(!link_stays_inside(3, b""));
    }
}
