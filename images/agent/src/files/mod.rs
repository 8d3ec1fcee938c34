//! Moving files in and out, and what else a host does with directories.

mod dirs;
mod pack;
mod track;
mod transfer;
mod unpack;

use std::future::Future;
use std::sync::Arc;

use bulkhead_agent::{DEFAULT_USER, Exit, FileKind, Kind, Reply};
use nix::mount::{MsFlags, mount};

pub(crate) use self::track::Tracked;
use self::transfer::{Input, Output};
pub(crate) use self::transfer::{alone, run as work};
use crate::exec::user::Users;
use crate::failure::{Context, Result, invalid};
use crate::server::{Server, Stream};

/// Who new files belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Owner {
    uid: u32,
    gid: u32,
}

impl Owner {
    fn find(name: &str) -> Result<Self> {
        let user = Users::read()?.find(name)?;
        Ok(Self {
            uid: user.uid,
            gid: user.gid,
        })
    }
}

/// Unpacks what comes in.
pub(crate) fn put(
    server: Arc<Server>,
    stream: Arc<Stream>,
    path: String,
    user: Option<String>,
    track: bool,
) -> impl Future<Output = Exit> + Send {
    transfer::run(Arc::clone(&stream), move || {
        let owner = Owner::find(user.as_deref().unwrap_or(DEFAULT_USER))?;
        let base = dirs::make(&path, owner)?;
        stream.reply(&Reply::Started { pid: 0 });
        unpack::unpack(&base, Input::new(&stream), owner)?;
        if track {
            server.tracked.remember(&path, &base)?;
        }
        Ok(())
    })
}

/// Sends a file or a directory.
pub(crate) fn get(stream: Arc<Stream>, path: String) -> impl Future<Output = Exit> + Send {
    transfer::run(Arc::clone(&stream), move || {
        let source = pack::Source::open(&path)?;
        stream.reply(&Reply::Started { pid: 0 });
        let mut output = Output::new(&stream, Kind::Out);
        pack::all(&source, &mut output)?;
        output.finish()
    })
}

/// Sends what changed since the tracked `put`.
pub(crate) fn changes(
    server: Arc<Server>,
    stream: Arc<Stream>,
    path: String,
) -> impl Future<Output = Exit> + Send {
    transfer::run(Arc::clone(&stream), move || {
        let marks = server.tracked.marks(&path)?;
        let base = dirs::open(&path)?;
        stream.reply(&Reply::Started { pid: 0 });
        let mut output = Output::new(&stream, Kind::Out);
        let removed = pack::changed(&base, &marks, &mut output)?;
        output.finish()?;
        let mut side = Output::new(&stream, Kind::Err);
        for name in removed {
            side.put(&name)?;
            side.put(b"\0")?;
        }
        side.finish()
    })
}

/// Says what is at a path.
pub(crate) fn stat(path: &str) -> Result<Reply> {
    if !path.starts_with('/') {
        return Err(invalid(format!("{path} is not an absolute path")));
    }
    let kind = match std::fs::metadata(path) {
        Ok(meta) if meta.is_dir() => FileKind::Directory,
        Ok(_) => FileKind::File,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => FileKind::Absent,
        Err(error) => return Err(error).context(|| format!("cannot examine {path}")),
    };
    Ok(Reply::Stat { kind })
}

/// Makes a directory that belongs to `user`.
pub(crate) fn mkdir(path: &str, user: Option<&str>) -> Result<()> {
    let owner = Owner::find(user.unwrap_or("root"))?;
    let dir = dirs::make(path, owner)?;
    dirs::give(&dir, owner).context(|| format!("cannot change the owner of {path}"))
}

/// Mounts a virtio-9p share.
pub(crate) fn mount_9p(tag: &str, path: &str, read_only: bool) -> Result<()> {
    if tag.is_empty() || tag.contains('\0') {
        return Err(invalid(format!("{tag:?} cannot be a mount tag")));
    }
    dirs::make(path, Owner { uid: 0, gid: 0 })?;
    let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    flags.set(MsFlags::MS_RDONLY, read_only);
    let options = "trans=virtio,version=9p2000.L,msize=262144";
    mount(Some(tag), path, Some("9p"), flags, Some(options))
        .context(|| format!("cannot mount the share {tag} on {path}"))
}
