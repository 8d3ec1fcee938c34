//! Staged changes as a diff that people read and `git apply` takes.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use super::unified::hunks;
use super::{Changes, Error};
use crate::guest::archive::{Beneath, HostDir, Kind, Name, Stamp, data_extents, printable};

/// Largest file that is shown line by line, in bytes.
const TEXT_MAX: u64 = 4 << 20;
/// Time for matching lines in all files together.
const EFFORT: Duration = Duration::from_secs(10);

/// How to show changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiffOptions {
    /// Escape control characters in lines: set it when a terminal reads the
    /// diff, or the guest's text can drive that terminal. The diff can then
    /// only be read, not applied, where there were any.
    pub escape: bool,
    /// Bytes of text; what follows is left out, file by file, and a last line
    /// says so.
    pub total: u64,
}

impl Default for DiffOptions {
    /// Nothing escaped, at most 64 MiB.
    fn default() -> Self {
        Self {
            escape: false,
            total: 64 << 20,
        }
    }
}

/// One side of a change.
enum Side {
    Absent,
    Dir,
    /// Content and permission bits; no content where it is too large.
    File(Option<Vec<u8>>, u64, u32),
    Symlink(Vec<u8>),
    Other,
}

/// Writes what [`super::apply`] would change in `dir`, in git's format.
///
/// Text files are shown in full hunks, with modes and symlinks; the result is
/// accepted by `git apply` and `patch -p1`. Binary files (with a NUL anywhere), files
/// over 4 MiB, directories and the insides of repositories are summed up in lines that
/// start with `#`, which both programs skip.
///
/// # Errors
/// [`Error::Host`] when the workspace cannot be read, [`Error::Show`] when
/// `out` cannot be written.
pub fn diff(
    dir: &HostDir,
    changes: &Changes,
    mut out: impl Write,
    options: &DiffOptions,
) -> Result<(), Error> {
    let host = dir.beneath();
    let staged = changes.files()?;
    let mut printer = Printer {
        out: Capped {
            text: Vec::new(),
            left: options.total,
            full: false,
        },
        escape: options.escape,
        effort: EFFORT,
    };
    let mut names: Vec<&Name> = changes.changed().chain(changes.removed()).collect();
    names.sort();
    names.dedup();
    let mut inside: Option<(&Name, u64)> = None;
    for name in names {
        let repository = name
            .ancestors()
            .skip(1)
            .find_map(|above| changes.repositories.get(&above));
        if repository != inside.map(|(root, _)| root)
            && let Some((root, count)) = inside.take()
        {
            printer.repository(root, count);
        }
        if !printer.out.hand_on(&mut out).map_err(Error::Show)? {
            let most = options.total >> 20;
            writeln!(out, "# diff cut after {most} MiB").map_err(Error::Show)?;
            return out.flush().map_err(Error::Show);
        }
        if let Some(root) = repository {
            inside = Some((root, inside.map_or(1, |(_, count)| count + 1)));
            continue;
        }
        let old = host_side(host, name)?;
        let new = match changes.staged.entries.get(name) {
            None => Side::Absent,
            Some(entry) => match entry.kind {
                Kind::Dir => Side::Dir,
                Kind::Symlink => Side::Symlink(
                    entry
                        .link
                        .as_deref()
                        .unwrap_or_default()
                        .as_bytes()
                        .to_vec(),
                ),
                Kind::File => {
                    let file = staged
                        .file(name)
                        .map_err(|errno| Error::host("read", name.as_path(), errno))?;
                    Side::File(content(name, file)?, entry.size, entry.mode)
                }
                Kind::Other => Side::Other,
            },
        };
        // Fails only when it is full, which `hand_on` tells.
        let _ = printer.change(name, old, new);
    }
    if let Some((root, count)) = inside {
        printer.repository(root, count);
    }
    if !printer.out.hand_on(&mut out).map_err(Error::Show)? {
        let most = options.total >> 20;
        writeln!(out, "# diff cut after {most} MiB").map_err(Error::Show)?;
    }
    out.flush().map_err(Error::Show)
}

/// The text on one file, kept back until it is known to fit.
struct Capped {
    text: Vec<u8>,
    /// Bytes that may still be written.
    left: u64,
    full: bool,
}

impl Capped {
    /// Writes the text to `out`, unless it did not fit.
    fn hand_on(&mut self, out: &mut impl Write) -> io::Result<bool> {
        if !self.full {
            out.write_all(&self.text)?;
        }
        self.text.clear();
        Ok(!self.full)
    }
}

impl Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.left.checked_sub(bytes.len() as u64) {
            Some(left) if !self.full => self.left = left,
            _ => {
                self.full = true;
                return Err(io::ErrorKind::StorageFull.into());
            }
        }
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn host_side(host: &Beneath, name: &Name) -> Result<Side, Error> {
    let failed = |errno| Error::host("read", name.as_path(), errno);
    let stat = match host.stat(name) {
        Ok(Some(stat)) => Stamp::of(&stat),
        // Below a symlink or a file there is nothing that apply would replace.
        Ok(None) | Err(nix::errno::Errno::ELOOP) => return Ok(Side::Absent),
        Err(errno) => return Err(failed(errno)),
    };
    Ok(match stat.kind {
        Kind::Dir => Side::Dir,
        Kind::Other => Side::Other,
        Kind::Symlink => {
            let (parent, last) = name
                .split()
                .ok_or_else(|| failed(nix::errno::Errno::EINVAL))?;
            let parent = host.dir(&parent).map_err(failed)?;
            let target = nix::fcntl::readlinkat(parent, last).map_err(failed)?;
            Side::Symlink(target.as_bytes().to_vec())
        }
        Kind::File => {
            let file = host.file(name).map_err(failed)?;
            Side::File(content(name, file)?, stat.size, stat.mode)
        }
    })
}

/// The content of a file that is not too large to show, nor has holes, which
/// read as NULs and cost nothing to make.
fn content(name: &Name, file: File) -> Result<Option<Vec<u8>>, Error> {
    let failed = |source| Error::host("read", name.as_path(), source);
    let meta = file.metadata().map_err(failed)?;
    let size = meta.len();
    let whole = || {
        data_extents(&file, size)
            .iter()
            .map(|(_, len)| len)
            .sum::<u64>()
            == size
    };
    if size > TEXT_MAX || meta.blocks() * 512 < size && !whole() {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    file.take(TEXT_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    Ok((bytes.len() as u64 <= TEXT_MAX).then_some(bytes))
}

struct Printer {
    out: Capped,
    escape: bool,
    /// Time left for matching lines.
    effort: Duration,
}

impl Printer {
    fn repository(&mut self, root: &Name, count: u64) {
        let _ = writeln!(self.out, "# repository {root}: {count} entries changed");
    }

    fn change(&mut self, name: &Name, old: Side, new: Side) -> io::Result<()> {
        match (old, new) {
            (Side::Absent, Side::Absent) | (Side::Dir, Side::Dir) => Ok(()),
            (Side::Other, _) | (_, Side::Other) => writeln!(self.out, "# {name}: special file"),
            (Side::Absent, Side::Dir) => writeln!(self.out, "# {name}: new directory"),
            (Side::Dir, Side::Absent) => writeln!(self.out, "# {name}: removed directory"),
            (Side::Dir, new) => {
                writeln!(self.out, "# {name}: removed directory")?;
                self.change(name, Side::Absent, new)
            }
            (old, Side::Dir) => {
                self.change(name, old, Side::Absent)?;
                self.change(name, Side::Absent, Side::Dir)
            }
            // git, too, shows a change of type as a removal and an addition;
            // and patch cannot change a symlink in place.
            (old @ (Side::Symlink(_) | Side::File(..)), new @ Side::Symlink(_))
            | (old @ Side::Symlink(_), new @ Side::File(..))
                if text(&old) != text(&new) || git_mode(&old) != git_mode(&new) =>
            {
                self.change(name, old, Side::Absent)?;
                self.change(name, Side::Absent, new)
            }
            (old, new) => self.content(name, &old, &new),
        }
    }

    fn content(&mut self, name: &Name, old: &Side, new: &Side) -> io::Result<()> {
        let (Some(from), Some(to)) = (text(old), text(new)) else {
            return match (old, new) {
                (Side::File(Some(from), ..), Side::File(Some(to), ..)) if from == to => {
                    self.head(name, old, new, false)
                }
                _ => writeln!(
                    self.out,
                    "# {name}: binary or large file, {} -> {}",
                    size(old),
                    size(new)
                ),
            };
        };
        if from == to && git_mode(old) == git_mode(new) {
            return Ok(());
        }
        self.head(name, old, new, from != to)?;
        let escape = self.escape;
        hunks(
            &mut self.out,
            from,
            to,
            &mut self.effort,
            |out, mark, line| {
                out.write_all(&[mark])?;
                match escape {
                    false => out.write_all(line)?,
                    true => out.write_all(visible(line).as_bytes())?,
                }
                out.write_all(b"\n")
            },
        )
    }

    fn head(&mut self, name: &Name, old: &Side, new: &Side, with_names: bool) -> io::Result<()> {
        let (a, b) = (quoted("a/", name), quoted("b/", name));
        let modes = match (git_mode(old), git_mode(new)) {
            (Some(old), Some(new)) if old == new => String::new(),
            (Some(old), Some(new)) => format!("old mode {old}\nnew mode {new}\n"),
            (None, Some(new)) => format!("new file mode {new}\n"),
            (Some(old), None) => format!("deleted file mode {old}\n"),
            (None, None) => String::new(),
        };
        if modes.is_empty() && !with_names {
            return Ok(());
        }
        write!(self.out, "diff --git {a} {b}\n{modes}")?;
        if !with_names {
            return Ok(());
        }
        // A name with a space is ended by a tab, or patch cuts it short.
        let end = if name.as_bytes().contains(&b' ') {
            "\t"
        } else {
            ""
        };
        match git_mode(old) {
            Some(_) => writeln!(self.out, "--- {a}{end}")?,
            None => writeln!(self.out, "--- /dev/null")?,
        }
        match git_mode(new) {
            Some(_) => writeln!(self.out, "+++ {b}{end}"),
            None => writeln!(self.out, "+++ /dev/null"),
        }
    }
}

/// What is shown line by line; the content of a symlink is its target.
fn text(side: &Side) -> Option<&[u8]> {
    match side {
        Side::Absent => Some(b""),
        Side::Symlink(target) => Some(target),
        Side::File(Some(bytes), ..) if !bytes.contains(&0) => Some(bytes),
        _ => None,
    }
}

fn git_mode(side: &Side) -> Option<&'static str> {
    match side {
        Side::Symlink(_) => Some("120000"),
        Side::File(_, _, mode) if mode & 0o100 != 0 => Some("100755"),
        Side::File(..) => Some("100644"),
        _ => None,
    }
}

fn size(side: &Side) -> String {
    match side {
        Side::File(_, size, _) => format!("{size} bytes"),
        _ => "none".into(),
    }
}

/// A name as git writes it: plain, or in quotes with C escapes.
fn quoted(prefix: &str, name: &Name) -> String {
    let bytes = name.as_bytes();
    let plain = |&byte: &u8| (0x20..0x7f).contains(&byte) && byte != b'"' && byte != b'\\';
    if bytes.iter().all(plain) {
        return format!("{prefix}{}", String::from_utf8_lossy(bytes));
    }
    let mut text = format!("\"{prefix}");
    for byte in bytes {
        match byte {
            b'"' | b'\\' => {
                text.push('\\');
                text.push(char::from(*byte));
            }
            byte if plain(byte) => text.push(char::from(*byte)),
            byte => {
                let _ = write!(text, "\\{byte:03o}");
            }
        }
    }
    text.push('"');
    text
}

/// A line as a terminal may see it; tabs stay.
fn visible(line: &[u8]) -> String {
    let parts: Vec<_> = line.split(|&byte| byte == b'\t').map(printable).collect();
    parts.join("\t")
}
