//! Turns tar archives from anywhere into one normalised root file system.
//!
//! Nothing is unpacked on the host, so no name in an archive can reach a host
//! file: every entry is checked, and written to the next archive or left out.
//! Layers come uppermost first and the first entry of a name wins, which needs
//! memory for the names only.

use std::collections::{HashMap, HashSet};
use std::io::{Read, Write};

use tar::EntryType;

use super::entries::{each_entry, stream};
use super::error::{Error, Result};
use super::rules::{self, Rule};
use super::tarball::{Body, Meta, TarWriter};
use super::users::Accounts;

/// What an archive may hold at most.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Entries of all layers together, and directories they lie in.
    pub(super) entries: u64,
    /// Bytes of all regular files together.
    pub(super) bytes: u64,
    /// Bytes of all files taken into memory together.
    pub(super) kept: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            entries: 4_000_000,
            bytes: 64 << 30,
            kept: 256 << 20,
        }
    }
}

/// Longest name and link target taken, in bytes (PATH_MAX).
const MAX_PATH: usize = 4096;
/// Deepest name taken, in components.
const MAX_DEPTH: usize = 256;
/// Largest file taken into memory: account and package databases.
const MAX_KEPT: u64 = 64 << 20;

/// What stands under a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Node {
    /// A directory some entry lies in, without an entry of its own so far.
    Implied,
    Dir,
    File,
    /// A symbolic link, or a device that was left out.
    Other,
}

/// The root file system being merged.
pub(super) struct Merge<W: Write> {
    out: TarWriter<W>,
    /// Named in errors.
    archive: String,
    limits: Limits,
    trim: bool,
    seen: HashMap<Vec<u8>, Node>,
    /// Hidden by whiteouts of upper layers: the name and all below it.
    hidden: HashSet<Vec<u8>>,
    /// Directories whose lower layers are hidden.
    opaque: HashSet<Vec<u8>>,
    kept: HashMap<Vec<u8>, (Meta, Vec<u8>)>,
    layer: Layer,
}

/// What counts only once its layer is complete.
#[derive(Default)]
struct Layer {
    whiteouts: Vec<Vec<u8>>,
    opaque: Vec<Vec<u8>>,
    /// Names this layer wrote, to tell a repeated name from an overridden one.
    names: HashSet<Vec<u8>>,
    /// Files hidden by upper layers to the name under which a link kept them.
    moved: HashMap<Vec<u8>, Vec<u8>>,
}

/// What a merged root file system says about itself.
pub(super) struct Merged {
    /// Account and package databases by name.
    pub(super) kept: HashMap<Vec<u8>, (Meta, Vec<u8>)>,
}

impl<W: Write> Merge<W> {
    /// Writes to `out`; `trim` leaves documentation and translations out.
    pub(super) fn new(out: W, archive: String, limits: Limits, trim: bool) -> Self {
        Self {
            out: TarWriter::new(out),
            archive,
            limits,
            trim,
            seen: HashMap::new(),
            hidden: HashSet::new(),
            opaque: HashSet::new(),
            kept: HashMap::new(),
            layer: Layer::default(),
        }
    }

    /// Adds the layer below all layers so far. `promote` tells, for files that
    /// upper layers hide, the hard link that keeps their content
    /// ([`Merge::promotions`]).
    pub(super) fn layer(
        &mut self,
        tar: impl Read,
        promote: &HashMap<Vec<u8>, Vec<u8>>,
    ) -> Result<()> {
        let (archive, bytes) = (self.archive.clone(), self.limits.bytes);
        self.limits.bytes = each_entry(&archive, tar, bytes, |entry| self.entry(entry, promote))?;
        let layer = std::mem::take(&mut self.layer);
        self.hidden.extend(layer.whiteouts);
        self.opaque.extend(layer.opaque);
        Ok(())
    }

    /// Hard links of a layer whose targets upper layers hide: target to link.
    pub(super) fn promotions(&self, tar: impl Read) -> Result<HashMap<Vec<u8>, Vec<u8>>> {
        let mut promotions = HashMap::new();
        each_entry(&self.archive, tar, self.limits.bytes, |entry| {
            if entry.header().entry_type() != EntryType::Link {
                return Ok(());
            }
            let (path, target) = (self.name(&entry.path_bytes())?, self.target(entry)?);
            if self.is_hidden(&target) && !self.is_hidden(&path) {
                promotions.entry(target).or_insert(path);
            }
            Ok(())
        })?;
        Ok(promotions)
    }

    /// Adds accounts and directories the guest needs, and ends the archive.
    pub(super) fn finish(mut self) -> Result<Merged> {
        let accounts = Accounts::complete(&self.kept, |path| self.has(path));
        for (path, bytes) in accounts.files {
            let meta = self
                .kept
                .get(path)
                .map_or(Meta::root(rules::mode_of(path)), |(meta, _)| *meta);
            self.write(path, meta, bytes.len() as u64, &mut &bytes[..])?;
        }
        for (path, text) in rules::FIXED {
            let no_dir = |node: Option<&Node>| matches!(node, Some(Node::File | Node::Other));
            if !no_dir(self.seen.get(&b"etc"[..]))
                && !matches!(self.seen.get(*path), Some(Node::Other))
            {
                self.write(
                    path,
                    Meta::root(0o644),
                    text.len() as u64,
                    &mut text.as_bytes(),
                )?;
            }
        }
        for (path, mode) in rules::DIRS {
            // Through a link (`/home` to `/var/home`) they cannot be made here.
            if self
                .seen
                .get(*path)
                .is_some_and(|node| *node != Node::Implied)
                || parents(path).any(|parent| self.seen.get(parent) == Some(&Node::Other))
            {
                continue;
            }
            let owned = path.starts_with(b"home/") || path.starts_with(b"workspace");
            let mut meta = Meta::root(*mode);
            if owned {
                (meta.uid, meta.gid) = (accounts.uid, accounts.gid);
            }
            self.seen.insert(path.to_vec(), Node::Dir);
            self.out
                .entry(path, meta, None, Body::Dir)
                .map_err(|source| self.stream(source))?;
        }
        let archive = self.archive;
        self.out
            .finish()
            .map_err(|source| stream(&archive, source))?;
        Ok(Merged { kept: self.kept })
    }

    fn entry<R: Read>(
        &mut self,
        entry: &mut tar::Entry<'_, R>,
        promote: &HashMap<Vec<u8>, Vec<u8>>,
    ) -> Result<()> {
        let kind = entry.header().entry_type();
        if kind == EntryType::XGlobalHeader {
            return Ok(());
        }
        self.count()?;
        let capability = self.attributes(entry)?;
        let path = self.name(&entry.path_bytes())?;
        if let Some((dir, hides)) = whiteout(&path) {
            match hides {
                Some(name) => self.layer.whiteouts.push(join(dir, name)),
                None => self.layer.opaque.push(dir.to_vec()),
            }
            return Ok(());
        }
        let rule = rules::rule(&path, kind, self.trim);
        if rule == Rule::Drop {
            return Ok(());
        }
        let mut path = path;
        if self.is_hidden(&path) {
            match promote.get(&path).filter(|_| kind == EntryType::Regular) {
                Some(link) => {
                    self.layer.moved.insert(path, link.clone());
                    path = link.clone();
                }
                None => return Ok(()),
            }
        }
        let is_dir = kind == EntryType::Directory;
        match self.seen.get(&path) {
            // Repeated directories are common and harmless.
            Some(Node::Dir) if is_dir => return Ok(()),
            Some(Node::Implied) if is_dir => {}
            // The promoted file already stands under this link's name.
            Some(Node::File) if self.layer.moved.values().any(|to| *to == path) => return Ok(()),
            Some(_) if self.layer.names.contains(&path) => {
                return Err(self.bad(&format!("{} is in it twice", show(&path))));
            }
            // An upper layer has it.
            Some(_) => return Ok(()),
            None => {}
        }
        for parent in parents(&path) {
            match self.seen.get(parent) {
                Some(Node::Dir | Node::Implied) => {}
                Some(_) if self.layer.names.contains(parent) => {
                    return Err(self.bad(&format!(
                        "{} lies below {}, which is no directory",
                        show(&path),
                        show(parent)
                    )));
                }
                // Replaced by a file in an upper layer.
                Some(_) => return Ok(()),
                None => {
                    self.count()?;
                    self.seen.insert(parent.to_vec(), Node::Implied);
                }
            }
        }
        self.layer.names.insert(path.clone());
        let header = entry.header();
        let meta = Meta {
            mode: self.read(header.mode())?,
            uid: self.read(header.uid())?,
            gid: self.read(header.gid())?,
            mtime: self.read(header.mtime())?,
        };
        let node = match kind {
            EntryType::Directory => {
                self.put(&path, meta, capability.as_deref(), Body::Dir)?;
                Node::Dir
            }
            EntryType::Symlink => {
                let target = self.read(
                    entry
                        .link_name_bytes()
                        .ok_or_else(|| std::io::Error::other("a symbolic link without a target")),
                )?;
                if target.is_empty() || target.len() >= MAX_PATH || target.contains(&0) {
                    return Err(self.bad(&format!("{} links to no possible name", show(&path))));
                }
                self.put(&path, meta, None, Body::Symlink(&target))?;
                Node::Other
            }
            EntryType::Link => {
                let target = self.target(entry)?;
                let target = self.layer.moved.get(&target).cloned().unwrap_or(target);
                if self.kept.contains_key(&target) {
                    return Err(self.bad(&format!(
                        "{} is a hard link to {}",
                        show(&path),
                        show(&target)
                    )));
                }
                if self.seen.get(&target) != Some(&Node::File) {
                    return Err(self.bad(&format!(
                        "{} is a hard link to {}, which is no file before it",
                        show(&path),
                        show(&target)
                    )));
                }
                self.put(&path, meta, None, Body::Hardlink(&target))?;
                Node::File
            }
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                let size = entry.size();
                if rule == Rule::Keep || rule == Rule::Rewrite {
                    if size > MAX_KEPT {
                        return Err(self.bad(&format!("{} is too large", show(&path))));
                    }
                    self.limits.kept = (self.limits.kept.checked_sub(size))
                        .ok_or_else(|| self.bad("its databases are too large together"))?;
                    let mut bytes = Vec::new();
                    self.read(entry.read_to_end(&mut bytes))?;
                    if rule == Rule::Keep {
                        self.put(&path, meta, None, Body::File(size, &mut &bytes[..]))?;
                    }
                    self.kept.insert(path.clone(), (meta, bytes));
                } else {
                    self.put(&path, meta, capability.as_deref(), Body::File(size, entry))?;
                }
                Node::File
            }
            // The guest's /dev is its kernel's; other nodes have no use in an image.
            EntryType::Char | EntryType::Block | EntryType::Fifo => Node::Other,
            other => {
                return Err(self.bad(&format!("{} has the unknown type {other:?}", show(&path))));
            }
        };
        self.seen.insert(path, node);
        Ok(())
    }

    fn count(&mut self) -> Result<()> {
        self.limits.entries = (self.limits.entries.checked_sub(1))
            .ok_or_else(|| self.bad("it has too many entries"))?;
        Ok(())
    }

    /// The capability attribute; refuses encodings that would be misread.
    fn attributes<R: Read>(&self, entry: &mut tar::Entry<'_, R>) -> Result<Option<Vec<u8>>> {
        let mut capability = None;
        if let Some(records) = self.read(entry.pax_extensions())? {
            for record in records {
                let record = self.read(record)?;
                match record.key_bytes() {
                    b"SCHILY.xattr.security.capability" => {
                        capability = Some(record.value_bytes().to_vec());
                    }
                    key if key.starts_with(b"GNU.sparse.") => {
                        return Err(self.bad("it has sparse files in pax format"));
                    }
                    _ => {}
                }
            }
        }
        Ok(capability)
    }

    fn target<R: Read>(&self, entry: &tar::Entry<'_, R>) -> Result<Vec<u8>> {
        let target = entry
            .link_name_bytes()
            .ok_or_else(|| self.bad("it has a hard link without a target"))?;
        self.name(&target)
    }

    /// A name without leading slash or `.` components; empty for the root.
    fn name(&self, raw: &[u8]) -> Result<Vec<u8>> {
        if raw.len() >= MAX_PATH || raw.contains(&0) {
            return Err(self.bad("it has a name that is too long or has a zero byte"));
        }
        let mut name = Vec::with_capacity(raw.len());
        let mut depth = 0;
        for part in raw.split(|byte| *byte == b'/') {
            match part {
                b"" | b"." => continue,
                b".." => return Err(self.bad(&format!("{} leaves the root", show(raw)))),
                // Directory entries of Linux file systems end here.
                part if part.len() > 255 => {
                    return Err(self.bad(&format!("{} is too long a name", show(raw))));
                }
                part => {
                    if !name.is_empty() {
                        name.push(b'/');
                    }
                    name.extend_from_slice(part);
                    depth += 1;
                }
            }
        }
        if depth > MAX_DEPTH {
            return Err(self.bad("it has a name of more than 256 components"));
        }
        Ok(name)
    }

    fn is_hidden(&self, path: &[u8]) -> bool {
        let overridden = |path: &[u8]| {
            self.seen
                .get(path)
                .is_some_and(|node| matches!(node, Node::File | Node::Other))
                && !self.layer.names.contains(path)
        };
        self.hidden.contains(path)
            || overridden(path)
            || parents(path).any(|parent| {
                self.hidden.contains(parent) || self.opaque.contains(parent) || overridden(parent)
            })
            || (self.opaque.contains(&b""[..]) && !path.is_empty())
    }

    fn has(&self, path: &[u8]) -> bool {
        self.seen.contains_key(path)
    }

    fn write(&mut self, path: &[u8], meta: Meta, size: u64, data: &mut dyn Read) -> Result<()> {
        self.seen.insert(path.to_vec(), Node::File);
        self.put(path, meta, None, Body::File(size, data))
    }

    fn put(&mut self, path: &[u8], meta: Meta, cap: Option<&[u8]>, body: Body<'_>) -> Result<()> {
        // tar2sqfs knows the root by this name.
        let path = if path.is_empty() { b"./" } else { path };
        let result = self.out.entry(path, meta, cap, body);
        result.map_err(|source| self.stream(source))
    }

    fn read<T>(&self, result: std::io::Result<T>) -> Result<T> {
        result.map_err(|source| self.stream(source))
    }

    fn stream(&self, source: std::io::Error) -> Error {
        stream(&self.archive, source)
    }

    fn bad(&self, reason: &str) -> Error {
        Error::Archive {
            archive: self.archive.clone(),
            reason: reason.to_owned(),
        }
    }
}

fn show(path: &[u8]) -> String {
    String::from_utf8_lossy(path).escape_debug().to_string()
}

/// The directories above a name, nearest last; the root is not among them.
fn parents(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.iter()
        .enumerate()
        .filter(|(_, byte)| **byte == b'/')
        .map(|(at, _)| &path[..at])
}

fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    match dir {
        b"" => name.to_vec(),
        dir => [dir, b"/", name].concat(),
    }
}

/// An OCI whiteout: its directory, and the name it hides or none for all.
fn whiteout(path: &[u8]) -> Option<(&[u8], Option<&[u8]>)> {
    let (dir, name) = match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (&b""[..], path),
    };
    match name {
        b".wh..wh..opq" => Some((dir, None)),
        name => name.strip_prefix(b".wh.").map(|name| (dir, Some(name))),
    }
}

#[cfg(test)]
#[path = "merge_tests.rs"]
mod tests;
