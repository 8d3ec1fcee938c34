//! What changed on the host since the workspace was packed.

use nix::errno::Errno;

use super::{Changes, Error};
use crate::guest::archive::{Beneath, Kind, Manifest, Name, Stamp, stat_in};

/// Names that are not on the host as they were packed.
pub(super) fn conflicts(
    host: &Beneath,
    changes: &Changes,
    manifest: &Manifest,
) -> Result<Vec<String>, Error> {
    let mut found = Vec::new();
    for name in changes.changed().chain(changes.removed()) {
        let now =
            look(host, name).map_err(|errno| Error::host("look at", name.as_path(), errno))?;
        let wanted = changes.staged.entries.get(name).map(|entry| entry.kind);
        let fine = match (now, manifest.entries.get(name)) {
            // Gone already, and to be gone.
            (Now::Absent, _) if wanted.is_none() => true,
            (Now::Absent, None) => true,
            (Now::Absent, Some(_)) => false,
            (Now::Blocked, _) => replaced_above(changes, name),
            (Now::There(now), None) => now.kind == Kind::Dir && wanted == Some(Kind::Dir),
            (Now::There(now), Some(then)) if now.kind == Kind::Dir => then.kind == Kind::Dir,
            (Now::There(now), Some(then)) => now == *then,
        };
        if !fine {
            found.push(name.to_string());
        }
    }
    found.sort();
    found.dedup();
    Ok(found)
}

/// What is at a name now.
pub(super) enum Now {
    Absent,
    /// Its directory is a symlink or a file.
    Blocked,
    There(Stamp),
}

pub(super) fn look(host: &Beneath, name: &Name) -> Result<Now, Errno> {
    let Some((parent, last)) = name.split() else {
        return Ok(Now::Absent);
    };
    let dir = match host.dir(&parent) {
        Ok(dir) => dir,
        Err(Errno::ENOENT) => return Ok(Now::Absent),
        Err(Errno::ELOOP | Errno::ENOTDIR) => return Ok(Now::Blocked),
        Err(errno) => return Err(errno),
    };
    Ok(stat_in(&dir, last)?.map_or(Now::Absent, |stat| Now::There(Stamp::of(&stat))))
}

/// Whether what stands in the way of `name` is itself replaced or removed.
fn replaced_above(changes: &Changes, name: &Name) -> bool {
    name.ancestors().skip(1).any(|above| {
        let dir = changes
            .staged
            .entries
            .get(&above)
            .is_some_and(|entry| entry.kind == Kind::Dir);
        dir || changes.removed.contains(&above)
    })
}
