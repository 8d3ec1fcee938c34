//! Files into a machine and out of it, with the rights of the caller.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::Path;

use bulkhead_agent::{FileKind, Request};

use super::client::Client;
use super::error::SuperviseError;
use super::wire::Open;
use crate::guest::archive::{self, HostDir, Limits, Manifest, PackLimits, Warnings};
use crate::run::workspace::{self, ApplyOptions, Changes};
use crate::run::{receive, send};

/// What a copy is worth telling.
type Notes = Vec<String>;

fn bad(from: impl Into<String>, to: impl Into<String>, why: impl Into<String>) -> SuperviseError {
    SuperviseError::Copy {
        from: from.into(),
        to: to.into(),
        why: why.into(),
    }
}

/// The last component of a path, without which nothing can be placed.
fn last(path: &Path) -> Option<String> {
    Some(path.file_name()?.to_str()?.to_owned())
}

fn notes(warnings: &Warnings) -> Notes {
    let mut notes: Notes = warnings.list.iter().map(ToString::to_string).collect();
    if warnings.more > 0 {
        notes.push(format!("and {} more like these", warnings.more));
    }
    notes
}

impl Client {
    /// Copies a file or a directory of the host to an absolute path in the
    /// guest, as `cp -r` would: into a directory that is there, else to that
    /// very name. It belongs to `user` then; to the image's user when absent.
    ///
    /// # Errors
    /// One of the paths cannot be used, or the guest refuses.
    pub async fn copy_in(
        &self,
        from: &Path,
        to: &str,
        user: Option<String>,
    ) -> Result<Vec<String>, SuperviseError> {
        let shown = from.display().to_string();
        let fail = |error: io::Error| bad(&shown, to, error.to_string());
        let meta = fs::metadata(from).map_err(fail)?;
        let there = self.stat(to).await?;
        let whole = from.canonicalize().map_err(fail)?;
        // `dir/.` is what is in it.
        let content = shown.ends_with("/.") || shown == ".";
        // As it was typed: a link goes by its own name.
        let name = last(from).or_else(|| last(&whole));
        let name = name.ok_or_else(|| bad(&shown, to, "it has no name"))?;
        let what = format!("take {shown}");
        if meta.is_dir() {
            let path = match there {
                FileKind::Directory if content => to.to_owned(),
                FileKind::Directory => format!("{}/{name}", to.trim_end_matches('/')),
                FileKind::Absent => to.to_owned(),
                FileKind::File => return Err(bad(shown, to, "there is a file of that name")),
            };
            let dir = HostDir::open(&whole).map_err(fail)?;
            let put = open(Request::Put {
                path,
                user,
                track: false,
            });
            let pack = move |writer| archive::pack(&dir, writer, &PackLimits::default());
            let packed = send(&self.streams().await?, &put, &what, pack).await?;
            return Ok(notes(&packed.warnings));
        }
        let (path, name) = match there {
            FileKind::Directory => (to.to_owned(), name),
            _ if to.ends_with('/') => (to.to_owned(), name),
            _ => {
                let to = Path::new(to);
                let parent = to.parent().unwrap_or(Path::new("/"));
                let name = last(to).ok_or_else(|| bad(&shown, "/", "it has no name there"))?;
                (parent.to_string_lossy().into_owned(), name)
            }
        };
        let put = open(Request::Put {
            path,
            user,
            track: false,
        });
        let pack = move |writer| {
            archive::pack_file(&whole, OsStr::new(&name), writer, &PackLimits::default())
        };
        send(&self.streams().await?, &put, &what, pack).await?;
        Ok(Notes::new())
    }

    /// Copies a file or a directory of the guest to the host, likewise.
    /// Nothing is written outside `to`, whatever the guest sends.
    ///
    /// # Errors
    /// One of the paths cannot be used, or what the guest sends is unusable.
    pub async fn copy_out(&self, from: &str, to: &Path) -> Result<Vec<String>, SuperviseError> {
        let shown = to.display().to_string();
        let fail = |error: io::Error| bad(from, &shown, error.to_string());
        let kind = self.stat(from).await?;
        let content = from.ends_with("/.");
        let name = last(Path::new(from));
        if kind == FileKind::Absent {
            return Err(bad(from, &shown, "there is no such file in the guest"));
        }
        // Where it goes, and under which name there.
        let (dir, name) = match (to.is_dir(), kind) {
            (true, FileKind::Directory) if content || name.is_none() => (to.to_owned(), None),
            (true, _) => (to.to_owned(), name.clone()),
            (false, _) if shown.ends_with('/') && kind == FileKind::File => {
                return Err(bad(from, &shown, "there is no such directory"));
            }
            (false, _) => {
                let parent = to.parent().filter(|dir| !dir.as_os_str().is_empty());
                let parent = parent.unwrap_or(Path::new("."));
                (parent.to_owned(), last(to))
            }
        };
        let dir = dir.canonicalize().map_err(fail)?;
        let into = HostDir::open(&dir).map_err(fail)?;
        // On the same file system, so that what is whole moves into place.
        let staging = tempfile::Builder::new()
            .prefix(archive::HIDDEN_PREFIX)
            .tempdir_in(&dir)
            .map_err(fail)?;
        let get = open(Request::Get {
            path: from.to_owned(),
        });
        let what = format!("send {from}");
        let place = staging.path().to_owned();
        let is_dir = kind == FileKind::Directory;
        let target = name.as_ref().map(|name| dir.join(name));
        if is_dir && let Some(target) = &target {
            // A new directory is prepared as a whole; one that is there is filled.
            let inner = match target.is_dir() {
                true => target.clone(),
                false => {
                    let fresh = place.join("new");
                    fs::create_dir(&fresh).map_err(fail)?;
                    fresh
                }
            };
            let filled = self.fetch(&get, &what, &place, &inner).await?;
            if !target.is_dir() {
                fs::rename(&inner, target).map_err(fail)?;
            }
            return Ok(filled);
        }
        let Some(target) = target else {
            return self.fetch(&get, &what, &place, into.path()).await;
        };
        // A device or a link stays what it is.
        if fs::symlink_metadata(&target).is_ok_and(|meta| !meta.is_file()) {
            return Err(bad(from, &shown, "what is there is not a regular file"));
        }
        let inner = place.join("new");
        fs::create_dir(&inner).map_err(fail)?;
        let filled = self.fetch(&get, &what, &place, &inner).await?;
        let mut files = fs::read_dir(&inner).map_err(fail)?;
        let file = files
            .next()
            .ok_or_else(|| bad(from, &shown, "the guest sent nothing"))?
            .map_err(fail)?;
        if !file.file_type().map_err(fail)?.is_file() {
            return Err(bad(
                from,
                &shown,
                "the guest sent something else than a file",
            ));
        }
        fs::rename(file.path(), target).map_err(fail)?;
        Ok(filled)
    }

    /// Has the guest send something, and brings it into `dir`, over what is
    /// there; `staging` is private.
    async fn fetch(
        &self,
        get: &Open,
        what: &str,
        staging: &Path,
        dir: &Path,
    ) -> Result<Vec<String>, SuperviseError> {
        let into = HostDir::open(dir)
            .map_err(|error| bad(what, dir.display().to_string(), error.to_string()))?;
        let staging = staging.to_owned();
        let bring = move |archive, side| {
            // Nothing belongs there: a guest that writes to it is cut off.
            drop::<std::os::unix::net::UnixStream>(side);
            let nothing = io::empty();
            let changes = Changes::stage(archive, nothing, &staging, &into, &Limits::default())?;
            let options = ApplyOptions { force: true };
            let applied = workspace::apply(&into, &changes, &Manifest::default(), &options)?;
            let mut warnings = changes.warnings.clone();
            warnings.append(applied.warnings);
            Ok(warnings)
        };
        let warnings = receive(&self.streams().await?, get, what, bring).await?;
        Ok(notes(&warnings))
    }
}

fn open(request: Request) -> Open {
    Open::Guest { request }
}
