//! What a guest may bring back into a git repository: data, nothing that runs.

mod data;
mod named;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;

use nix::unistd::{UnlinkatFlags, unlinkat};

use self::data::{Verdict, data, disguised, folded};
use self::named::Named;
use super::{Changes, Error, git_config};
use crate::guest::archive::{Beneath, HostDir, Kind, Name, Stamp, create_in};

/// Largest `config` or `.git` file that is read, in bytes.
const SMALL: u64 = 1 << 20;

/// Names that make git take a directory for a repository.
const SIGNS: [&str; 4] = ["HEAD", "objects", "refs", "commondir"];

/// Names that would take effect in a directory which becomes a repository.
const LURKING: [&str; 14] = [
    "config",
    "config.worktree",
    "hooks",
    "info/attributes",
    "objects/info/alternates",
    "commondir",
    "gitdir",
    "rebase-merge",
    "rebase-apply",
    "sequencer",
    "worktrees",
    "modules",
    "remotes",
    "branches",
];

/// Takes out of `changes` what must not reach a repository, with warnings.
pub(super) fn sanitise(changes: &mut Changes, dir: &HostDir) -> Result<(), Error> {
    let host = dir.beneath();
    let judge = Judge::new(changes, host);
    let named = Named::new(dir, judge.roots(), judge.dirs.keys(), &mut changes.warnings);
    let staged: Vec<(Name, Kind)> = changes
        .staged
        .entries
        .iter()
        .map(|(name, entry)| (name.clone(), entry.kind))
        .collect();
    let mut configs = Vec::new();
    for (name, kind) in staged {
        let verdict = match judge.name(&name, kind) {
            Verdict::Gitfile => judge.gitfile(changes, &name)?,
            verdict => verdict,
        };
        let verdict = match verdict {
            Verdict::Keep if named.covers(&name, kind) => {
                Verdict::Drop("left out: git's configuration on the host runs or reads it")
            }
            verdict => verdict,
        };
        match verdict {
            Verdict::Keep | Verdict::Gitfile => {}
            Verdict::Config => configs.push(name),
            Verdict::Drop(why) => {
                changes.staged.entries.remove(&name);
                changes.warnings.add(&name, why);
            }
            Verdict::Quiet => {
                changes.staged.entries.remove(&name);
            }
        }
    }
    let kept = judge.removals(changes);
    changes.removed.retain(|name| !kept.contains(name));
    changes.repositories = judge.roots().cloned().collect();
    for name in configs {
        config(changes, host, &name)?;
    }
    note_attributes(changes);
    Ok(())
}

struct Judge<'a> {
    host: &'a Beneath,
    /// All directories above a changed name, and whether they are repositories.
    dirs: BTreeMap<Name, Root>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Root {
    /// Not a repository.
    No,
    /// A repository, of the host or a new one.
    Yes,
    /// The guest would turn a directory of the host into one, with what lurks there.
    Turned,
}

impl<'a> Judge<'a> {
    fn new(changes: &Changes, host: &'a Beneath) -> Self {
        // Which signs each directory gets from the guest. Case and the like are
        // ignored, in its own name too: the host's file system may do so.
        let mut signs: BTreeMap<Vec<String>, [bool; 4]> = BTreeMap::new();
        let mut dirs = BTreeSet::new();
        let mut seen = BTreeSet::new();
        for name in changes.changed() {
            for below in name.ancestors() {
                let Some((dir, last)) = below.split() else {
                    break;
                };
                let last = folded(last.as_bytes());
                for (n, sign) in SIGNS.iter().enumerate() {
                    if last.eq_ignore_ascii_case(sign) {
                        signs.entry(folded_path(&dir)).or_default()[n] = true;
                    }
                }
                dirs.insert(dir);
                // What is above it was seen with it.
                if !seen.insert(below) {
                    break;
                }
            }
        }
        for name in changes.removed() {
            for dir in name.ancestors().skip(1) {
                if !dirs.insert(dir) {
                    break;
                }
            }
        }
        let there = |dir: &Name, path: &str| {
            let path = path
                .split('/')
                .fold(dir.clone(), |dir, part| dir.join(part.as_ref()));
            matches!(host.stat(&path), Ok(Some(_)))
        };
        let repository =
            |[head, objects, refs, commondir]: [bool; 4]| head && (objects || refs || commondir);
        let dirs = dirs
            .into_iter()
            .map(|dir| {
                let guest = signs.get(&folded_path(&dir)).copied().unwrap_or_default();
                let own = SIGNS.map(|sign| there(&dir, sign));
                let both = [0, 1, 2, 3].map(|n| guest[n] || own[n]);
                let named = dir.split().is_some_and(|(_, last)| last == ".git");
                let root = if !named && !repository(both) {
                    Root::No
                } else if !repository(own) && LURKING.iter().any(|path| there(&dir, path)) {
                    Root::Turned
                } else {
                    Root::Yes
                };
                (dir, root)
            })
            .collect();
        Self { host, dirs }
    }

    fn roots(&self) -> impl Iterator<Item = &Name> {
        self.dirs
            .iter()
            .filter(|(_, root)| **root != Root::No)
            .map(|(name, _)| name)
    }

    /// Repositories a name is in, innermost first.
    fn above(&self, name: &Name) -> Vec<(Name, Root)> {
        let roots = name.ancestors().skip(1).filter_map(|above| {
            let root = *self.dirs.get(&above)?;
            (root != Root::No).then_some((above, root))
        });
        roots.collect()
    }

    fn name(&self, name: &Name, kind: Kind) -> Verdict {
        for part in name.as_path().components() {
            let part = part.as_os_str().as_bytes();
            if part != b".git" && disguised(part) {
                return Verdict::Drop("left out: some file systems take this name for `.git`");
            }
        }
        let roots = self.above(name);
        if let Some((_, last)) = name.split()
            && last == ".git"
        {
            match kind {
                Kind::Dir => {}
                Kind::File if roots.is_empty() => return Verdict::Gitfile,
                _ => return Verdict::Drop("left out: a `.git` that points elsewhere"),
            }
        }
        if roots.iter().any(|(_, root)| *root == Root::Turned) {
            return Verdict::Drop(
                "left out: it would turn a directory of the host into a repository",
            );
        }
        let mut verdict = Verdict::Keep;
        for (index, (root, _)) in roots.iter().enumerate() {
            let Ok(below) = name.as_path().strip_prefix(root.as_path()) else {
                continue;
            };
            let parts: Vec<&[u8]> = below
                .components()
                .map(|part| part.as_os_str().as_bytes())
                .collect();
            let host_has = |path: &[&[u8]]| {
                let path = path.iter().fold(root.clone(), |dir, part| {
                    dir.join(std::ffi::OsStr::from_bytes(part))
                });
                matches!(self.host.stat(&path), Ok(Some(_)))
            };
            match data(&parts, kind, index > 0, host_has) {
                // Only the innermost repository's `config` is one.
                Verdict::Config if index > 0 => {
                    return Verdict::Drop("left out: inside a repository's `config`");
                }
                Verdict::Config => verdict = Verdict::Config,
                Verdict::Keep => {}
                other => return other,
            }
        }
        verdict
    }

    /// A `.git` file may only point into a `.git/modules` of the same workspace,
    /// where everything was judged; git submodules are made so.
    fn gitfile(&self, changes: &Changes, name: &Name) -> Result<Verdict, Error> {
        let elsewhere = Verdict::Drop("left out: a `.git` file that points elsewhere");
        let text = read_small(&changes.files()?, name)?.unwrap_or_default();
        if self.host.stat(name).ok().flatten().is_some() {
            let known = read_small(self.host, name).ok().flatten();
            return Ok(if known.as_ref() == Some(&text) {
                Verdict::Keep
            } else {
                elsewhere
            });
        }
        let Some(target) = text.strip_prefix(b"gitdir: ") else {
            return Ok(elsewhere);
        };
        let target = target.strip_suffix(b"\n").unwrap_or(target);
        let mut at: Vec<&[u8]> = name.split().map_or(Vec::new(), |(dir, _)| {
            // Borrowed from `name`, which has the same start.
            let depth = dir.depth();
            name.as_path()
                .components()
                .take(depth)
                .map(|part| part.as_os_str().as_bytes())
                .collect()
        });
        let mut descending = false;
        for part in target.split(|&byte| byte == b'/') {
            match part {
                b".." if !descending && !at.is_empty() => {
                    at.pop();
                }
                b"" | b"." | b".." => return Ok(elsewhere),
                part => {
                    descending = true;
                    at.push(part);
                }
            }
        }
        let inside = at.windows(2).any(|pair| pair == [&b".git"[..], b"modules"]);
        let plain = !target.iter().any(|byte| byte.is_ascii_control());
        Ok(if inside && plain {
            Verdict::Gitfile
        } else {
            elsewhere
        })
    }

    /// Removals that must not happen: what protects the host, and repositories
    /// that would be left headless.
    fn removals(&self, changes: &mut Changes) -> BTreeSet<Name> {
        let mut kept = BTreeSet::new();
        let beheaded: BTreeSet<Name> = self
            .roots()
            .filter(|root| changes.removed.contains(&root.join("HEAD".as_ref())))
            .filter(|root| {
                !changes
                    .staged
                    .entries
                    .contains_key(&root.join("HEAD".as_ref()))
            })
            .cloned()
            .collect();
        for root in &beheaded {
            changes
                .warnings
                .add(root, "repository kept: the guest removed it");
        }
        for name in &changes.removed {
            if name.ancestors().any(|above| beheaded.contains(&above)) {
                kept.insert(name.clone());
                continue;
            }
            let host_kind = match self.host.stat(name) {
                Ok(Some(stat)) => Stamp::of(&stat).kind,
                _ => continue,
            };
            let may_go = match self.name(name, host_kind) {
                Verdict::Keep => {
                    host_kind != Kind::Dir || name.split().is_none_or(|(_, last)| last != ".git")
                }
                Verdict::Gitfile => true,
                _ => false,
            };
            if !may_go {
                changes.warnings.add(
                    name,
                    "kept: the guest may not remove this from a repository",
                );
                kept.insert(name.clone());
            }
        }
        // A directory cannot go while something in it stays.
        let above: Vec<Name> = kept
            .iter()
            .flat_map(|name| name.ancestors().collect::<Vec<_>>())
            .collect();
        kept.extend(above);
        kept
    }
}

fn folded_path(name: &Name) -> Vec<String> {
    let parts = name.as_path().components();
    parts
        .map(|part| folded(part.as_os_str().as_bytes()))
        .collect()
}

/// Replaces a staged `config` by the host's own with harmless additions.
fn config(changes: &mut Changes, host: &Beneath, name: &Name) -> Result<(), Error> {
    let staged = changes.files()?;
    let guest = read_small(&staged, name)?;
    let own = match host.stat(name) {
        Ok(Some(_)) => Some(read_small(host, name)?),
        _ => None,
    };
    let merged = match (&guest, &own) {
        (None, _) | (_, Some(None)) => Err("left out: too large"),
        (Some(guest), own) => git_config::merge(own.as_ref().and_then(|own| own.as_deref()), guest),
    };
    let merged = match merged {
        Ok(merged) => merged,
        Err(why) => {
            changes.warnings.add(name, why);
            changes.staged.entries.remove(name);
            return Ok(());
        }
    };
    for key in merged.refused {
        changes.warnings.add(name, format!("left out: {key}"));
    }
    if own.flatten().as_ref() == Some(&merged.text) {
        changes.staged.entries.remove(name);
        return Ok(());
    }
    // A new file: the staged one may have other names.
    let failed = |source: std::io::Error| Error::host("rewrite the staged", name.as_path(), source);
    let Some((parent, last)) = name.split() else {
        return Ok(());
    };
    let parent = staged.dir(&parent).map_err(|errno| failed(errno.into()))?;
    unlinkat(&parent, last, UnlinkatFlags::NoRemoveDir).map_err(|errno| failed(errno.into()))?;
    let mut file = create_in(&parent, last).map_err(|errno| failed(errno.into()))?;
    file.write_all(&merged.text).map_err(failed)?;
    if let Some(entry) = changes.staged.entries.get_mut(name) {
        entry.size = merged.text.len() as u64;
    }
    Ok(())
}

/// A small file's content; `None` when it is not small, or not a file.
fn read_small(dir: &Beneath, name: &Name) -> Result<Option<Vec<u8>>, Error> {
    let failed = |source: std::io::Error| Error::host("read", name.as_path(), source);
    let file = dir.file(name).map_err(|errno| failed(errno.into()))?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    file.take(SMALL + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    Ok((bytes.len() as u64 <= SMALL).then_some(bytes))
}

/// These files are the workspace's own and come back; but they choose among
/// the filters and drivers that the host's own configuration defines.
fn note_attributes(changes: &mut Changes) {
    for name in changes.staged.entries.keys() {
        let Some((_, last)) = name.split() else {
            continue;
        };
        if last == ".gitattributes" || last == ".gitmodules" {
            changes.warnings.add(
                name,
                "changed in the guest: read it before running git on it",
            );
        }
    }
}
