//! Files of a working tree that the host's configuration of git names: hooks,
//! more configuration, attributes. What a guest writes there would run.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path, PathBuf};

use nix::fcntl::readlinkat;

use super::{SMALL, folded_path, read_small};
use crate::guest::archive::{HostDir, Kind, Name, Stamp, Warnings};
use crate::run::workspace::git_config::{self, Pointer};

/// Symlinks followed on the way to one file, as many as Linux follows.
const LINKS_MAX: u32 = 40;
/// Configuration files read, with those they include.
const FILES_MAX: usize = 1000;

/// What the configuration of the host names, inside the workspace.
#[derive(Debug, Default)]
pub(super) struct Named {
    /// Names in the form that file systems compare.
    names: BTreeSet<Vec<String>>,
}

/// A configuration file to read.
struct Config {
    file: Name,
    /// The repository it belongs to, and the top of its working tree.
    repository: Name,
    tree: Name,
}

impl Named {
    /// Reads the configuration of the repositories at `roots`, and of those
    /// whose working tree has its top in one of `dirs`.
    pub(super) fn new<'a>(
        host: &HostDir,
        roots: impl Iterator<Item = &'a Name>,
        dirs: impl Iterator<Item = &'a Name>,
        warnings: &mut Warnings,
    ) -> Self {
        let mut pending = Vec::new();
        let mut add = |repository: Name, tree: Name| {
            for file in ["config", "config.worktree"] {
                pending.push(Config {
                    file: repository.join(file.as_ref()),
                    repository: repository.clone(),
                    tree: tree.clone(),
                });
            }
        };
        for root in roots {
            let tree = match root.split() {
                Some((above, last)) if last == ".git" => above,
                _ => root.clone(),
            };
            add(root.clone(), tree);
        }
        let mut outside = Vec::new();
        // The workspace may be a part of a working tree.
        for tree in host.path().ancestors().skip(1) {
            outside.push((tree.join(".git"), tree.to_owned()));
        }
        for dir in dirs {
            let git = dir.join(".git".as_ref());
            match kind(host, &git) {
                Some(Kind::File) => {
                    // A submodule, or another working tree.
                    let Some(target) = gitfile(host, &git) else {
                        continue;
                    };
                    let tree = host.path().join(dir.as_path());
                    outside.push((tree.join(&target), tree));
                    for repository in shared(host, dir, &target) {
                        add(repository, dir.clone());
                    }
                }
                Some(_) => {
                    if let Some(git) = resolve(host, dir, ".git").pop() {
                        add(git, dir.clone());
                    }
                }
                None => {}
            }
        }
        let mut named = Self::default();
        for path in outside
            .iter()
            .flat_map(|(git, tree)| named_outside(git, tree))
        {
            let found = resolve(host, &Name::default(), &path);
            named.names.extend(found.iter().map(folded_path));
        }
        let mut read = BTreeSet::new();
        while let Some(config) = pending.pop() {
            if read.len() == FILES_MAX || !read.insert((config.file.clone(), config.tree.clone())) {
                continue;
            }
            let Ok(Some(text)) = read_small(host.beneath(), &config.file) else {
                continue;
            };
            let Ok(pointers) = git_config::pointers(&text) else {
                let what = "not understood: hooks and files it names come back unseen";
                warnings.add(&config.file, what);
                continue;
            };
            named.follow(host, &config, &pointers, &mut pending);
        }
        named
    }

    fn follow(
        &mut self,
        host: &HostDir,
        config: &Config,
        pointers: &[Pointer],
        pending: &mut Vec<Config>,
    ) {
        let mut tree = config.tree.clone();
        for pointer in pointers {
            if let Pointer::Worktree(path) = pointer
                && let Some(found) = resolve(host, &config.repository, path).pop()
            {
                tree = found;
            }
        }
        for pointer in pointers {
            let (base, path) = match pointer {
                Pointer::Worktree(_) => continue,
                Pointer::Tree(path) => (&tree, path),
                Pointer::Include(path) => match &config.file.split() {
                    Some((dir, _)) => (&dir.clone(), path),
                    None => continue,
                },
            };
            let found = resolve(host, base, path);
            if let (Pointer::Include(_), Some(file)) = (pointer, found.last()) {
                pending.push(Config {
                    file: file.clone(),
                    repository: config.repository.clone(),
                    tree: tree.clone(),
                });
            }
            self.names.extend(found.iter().map(folded_path));
        }
    }

    /// Whether something new at `name` would be what the configuration names,
    /// or in it, or lead to something else than it.
    pub(super) fn covers(&self, name: &Name, kind: Kind) -> bool {
        if self.names.is_empty() {
            return false;
        }
        let name = folded_path(name);
        let leads =
            || (self.names.range(name.clone()..).next()).is_some_and(|at| at.starts_with(&name));
        (0..=name.len()).any(|len| self.names.contains(&name[..len]))
            || kind != Kind::Dir && leads()
    }
}

/// Where a `.git` file leads to.
fn gitfile(host: &HostDir, file: &Name) -> Option<String> {
    line(
        read_small(host.beneath(), file)
            .ok()??
            .strip_prefix(b"gitdir: ")?,
    )
}

fn line(bytes: &[u8]) -> Option<String> {
    let bytes = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    String::from_utf8(bytes.to_vec()).ok()
}

/// The repositories at `target`, if inside the workspace: its own directory,
/// and the one it shares with other working trees.
fn shared(host: &HostDir, dir: &Name, target: &str) -> Vec<Name> {
    let Some(own) = resolve(host, dir, target).pop() else {
        return Vec::new();
    };
    let common = read_small(host.beneath(), &own.join("commondir".as_ref()));
    let common = common.ok().flatten().and_then(|text| line(&text));
    let common = common.and_then(|path| resolve(host, &own, &path).pop());
    std::iter::once(own).chain(common).collect()
}

/// Absolute paths of what the configuration of a repository names whose
/// directory may be outside the workspace. Only names in it are of use, so it
/// does no harm if somebody chooses the file that is read.
fn named_outside(git: &Path, tree: &Path) -> Vec<String> {
    let mut repository = normal(git);
    if let Some(target) = read_outside(&repository)
        && let Some(target) = target.strip_prefix(b"gitdir: ").and_then(line)
    {
        repository = normal(&tree.join(target));
    }
    let common = read_outside(&repository.join("commondir")).and_then(|text| line(&text));
    let common = common.map(|path| normal(&repository.join(path)));
    let mut found = Vec::new();
    for repository in std::iter::once(repository).chain(common) {
        for file in ["config", "config.worktree"] {
            let text = read_outside(&repository.join(file)).unwrap_or_default();
            for pointer in git_config::pointers(&text).unwrap_or_default() {
                let path = match &pointer {
                    Pointer::Worktree(_) => continue,
                    Pointer::Tree(path) => tree.join(at_home(path)),
                    Pointer::Include(path) => repository.join(at_home(path)),
                };
                found.extend(normal(&path).to_str().map(str::to_owned));
            }
        }
    }
    found
}

/// A small file. What somebody else may have put there instead is not opened:
/// a device could notice.
fn read_outside(path: &Path) -> Option<Vec<u8>> {
    let mut options = std::fs::OpenOptions::new();
    let found = options
        .read(true)
        .custom_flags(nix::libc::O_PATH)
        .open(path)
        .ok()?;
    if !found.metadata().ok()?.is_file() {
        return None;
    }
    let file = std::fs::File::open(format!("/proc/self/fd/{}", found.as_raw_fd())).ok()?;
    let mut bytes = Vec::new();
    file.take(SMALL).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// A path without `..`, as if nothing in it were a symlink.
fn normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => {
                normal.pop();
            }
            part => normal.push(part),
        }
    }
    normal
}

fn at_home(path: &str) -> PathBuf {
    match path.strip_prefix("~/") {
        Some(rest) => Path::new(&std::env::var_os("HOME").unwrap_or_default()).join(rest),
        None => path.into(),
    }
}

/// What `path` stands for, seen from `base`: the last name is where it leads,
/// the others are symlinks on the way. Nothing where it leads outside.
fn resolve(host: &HostDir, base: &Name, path: &str) -> Vec<Name> {
    let inside = |path: &[u8]| -> Option<Vec<u8>> {
        let path = Path::new(OsStr::from_bytes(path));
        let below = path.strip_prefix(host.path()).ok()?;
        Some(below.as_os_str().as_bytes().to_vec())
    };
    let (mut at, mut left) = (base.clone(), at_home(path).into_os_string().into_vec());
    let (mut found, mut links) = (Vec::new(), 0);
    loop {
        if left.starts_with(b"/") {
            match inside(&left) {
                Some(below) => (at, left) = (Name::default(), below),
                None => return Vec::new(),
            }
        }
        let end = left.iter().position(|&byte| byte == b'/');
        let (part, rest) = match end {
            Some(end) => (left[..end].to_vec(), left[end + 1..].to_vec()),
            None => (std::mem::take(&mut left), Vec::new()),
        };
        left = rest.into_iter().skip_while(|&byte| byte == b'/').collect();
        match &part[..] {
            b"" | b"." => {}
            b".." => match at.split() {
                Some((above, _)) => at = above,
                None => return Vec::new(),
            },
            part if part.contains(&0) || part.len() > 255 => return Vec::new(),
            part => {
                let next = at.join(OsStr::from_bytes(part));
                match link(host, &at, OsStr::from_bytes(part)) {
                    Some(target) if links < LINKS_MAX => {
                        links += 1;
                        left = [&target, &b"/"[..], &left].concat();
                        found.push(next);
                    }
                    _ => at = next,
                }
            }
        }
        if left.is_empty() {
            found.push(at);
            return found;
        }
    }
}

/// Target of a symlink of the host.
fn link(host: &HostDir, dir: &Name, last: &OsStr) -> Option<Vec<u8>> {
    let dir = host.beneath().dir(dir).ok()?;
    let target = readlinkat(dir, last).ok()?;
    Some(target.as_bytes().to_vec())
}

fn kind(host: &HostDir, name: &Name) -> Option<Kind> {
    let stat = host.beneath().stat(name).ok()??;
    Some(Stamp::of(&stat).kind)
}
