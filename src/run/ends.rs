//! The two ends of what QEMU is given: ours, and the descriptors it gets.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use tokio::net::UnixStream;

use super::control::is_served;
use super::error::MachineError;
use super::machine::io_error;
use super::options::StartOptions;
use crate::guest::archive::HostDir;
use crate::host::{fault, lease, probe, sys};
use crate::image::scratch;
use crate::plan::{Descriptor, Plan};
use crate::spec::fill_random;

/// Our ends of the descriptors QEMU is given.
#[derive(Debug, Default)]
pub(super) struct Ends {
    pub(super) qmp: Option<UnixStream>,
    pub(super) serial: Option<UnixStream>,
    pub(super) console: Option<UnixStream>,
    pub(super) qga: Option<UnixStream>,
    pub(super) agent: Option<UnixStream>,
    pub(super) cid: Option<u32>,
    /// The guest's end of its network, until QEMU has it.
    pub(super) tap: Option<OwnedFd>,
}

impl Ends {
    /// Connects to the sockets of a machine whose owner died.
    pub(super) async fn reconnect(plan: &Plan, sockets: &Path) -> io::Result<Self> {
        let mut ends = Self {
            cid: plan.cid,
            ..Self::default()
        };
        for descriptor in &plan.descriptors {
            if let Some((name, end)) = ends.end(*descriptor) {
                fault::at("connect to machine")?;
                *end = Some(UnixStream::connect(sockets.join(name)).await?);
            }
        }
        Ok(ends)
    }

    /// Connects to the monitor only.
    pub(super) async fn monitor(sockets: &Path) -> io::Result<UnixStream> {
        UnixStream::connect(sockets.join("qmp")).await
    }

    /// Name and place of a descriptor that is a socket.
    fn end(&mut self, descriptor: Descriptor) -> Option<(&'static str, &mut Option<UnixStream>)> {
        match descriptor {
            Descriptor::Qmp => Some(("qmp", &mut self.qmp)),
            Descriptor::Serial => Some(("serial", &mut self.serial)),
            Descriptor::Console => Some(("console", &mut self.console)),
            Descriptor::Qga => Some(("qga", &mut self.qga)),
            Descriptor::Agent => Some(("agent", &mut self.agent)),
            Descriptor::Root
            | Descriptor::Scratch
            | Descriptor::Share
            | Descriptor::Vsock
            | Descriptor::Tap => None,
        }
    }
}

/// Opens what QEMU is given, in the plan's order.
pub(super) fn descriptors(
    plan: &Plan,
    dir: &Path,
    options: &StartOptions,
    ends: &mut Ends,
) -> Result<Vec<OwnedFd>, MachineError> {
    let sockets = options.sockets.as_deref();
    plan.descriptors
        .iter()
        .map(|descriptor| match descriptor {
            Descriptor::Root => Ok(File::open(&plan.root)
                .map_err(io_error("open", &plan.root))?
                .into()),
            Descriptor::Share => share(plan, dir, options),
            Descriptor::Scratch => scratch_disk(plan, dir, options),
            Descriptor::Vsock => {
                let (vhost, cid) = claim_cid()?;
                ends.cid = Some(cid);
                Ok(vhost)
            }
            Descriptor::Tap => {
                let what = "the tap";
                ends.tap.take().ok_or(MachineError::Missing { what })
            }
            socket => {
                let what = "a descriptor that is no socket";
                let (name, end) = ends.end(*socket).ok_or(MachineError::Missing { what })?;
                let made = match sockets {
                    Some(sockets) => listening(&sockets.join(name), end),
                    None => pair(end),
                };
                made.map_err(io_error("make a socket for", &plan.qemu))
            }
        })
        .collect()
}

/// A pair of sockets: one end for us, the other for QEMU.
pub(super) fn pair(end: &mut Option<UnixStream>) -> io::Result<OwnedFd> {
    fault::at("make socket pair")?;
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    *end = Some(UnixStream::from_std(ours)?);
    Ok(theirs.into())
}

/// A socket that QEMU listens on, and our connection to it: a later owner can
/// connect again.
fn listening(path: &Path, end: &mut Option<UnixStream>) -> io::Result<OwnedFd> {
    // A power cut leaves it, where its lease is lost (decision 0015).
    if !is_served(path) {
        let _ = std::fs::remove_file(path);
    }
    fault::at("bind machine socket")?;
    let listener = std::os::unix::net::UnixListener::bind(path)?;
    let ours = std::os::unix::net::UnixStream::connect(path)?;
    ours.set_nonblocking(true)?;
    *end = Some(UnixStream::from_std(ours)?);
    Ok(listener.into())
}

/// The shared workspace.
pub(super) fn share(
    plan: &Plan,
    dir: &Path,
    options: &StartOptions,
) -> Result<OwnedFd, MachineError> {
    let missing = MachineError::Missing {
        what: "the shared workspace",
    };
    let path = &plan.share.as_ref().ok_or(missing)?.dir;
    let open = || {
        let share = match &options.share {
            Some(share) => share.clone(),
            None => HostDir::open(path)?,
        };
        super::share::record(dir, &share)?;
        share.as_fd().try_clone_to_owned()
    };
    open().map_err(io_error("share", path))
}

/// The writable disk: one that is kept, or a fresh one that exists only for as
/// long as QEMU holds it.
fn scratch_disk(plan: &Plan, dir: &Path, options: &StartOptions) -> Result<OwnedFd, MachineError> {
    let open = |path: &Path| {
        let disk = File::options().read(true).write(true).open(path);
        disk.map_err(io_error("open", path))
    };
    if let Some(path) = &options.disk {
        if !path.exists() {
            let template = empty_disk(plan, options)?;
            // Whole or not at all: a machine may be started again after a crash.
            let fresh = lease::half_made(path);
            let _ = fs::remove_file(&fresh);
            fault::at("copy disk.img").map_err(io_error("make", path))?;
            scratch::copy(&template, &fresh)?;
            fault::at("rename disk.img")
                .and_then(|()| File::open(&fresh)?.sync_all())
                .and_then(|()| fs::rename(&fresh, path))
                .inspect_err(|_| drop(fs::remove_file(&fresh)))
                .map_err(io_error("make", path))?;
        }
        return Ok(open(path)?.into());
    }
    let template = empty_disk(plan, options)?;
    let path = dir.join("scratch.img");
    fault::at("copy scratch.img").map_err(io_error("make", &path))?;
    scratch::copy(&template, &path)?;
    let disk = open(&path)?;
    fs::remove_file(&path).map_err(io_error("unlink", &path))?;
    Ok(disk.into())
}

/// What the disk is copied from: an empty one, or that of the template, whose
/// guest has its file system mounted.
fn empty_disk(plan: &Plan, options: &StartOptions) -> Result<PathBuf, MachineError> {
    match options
        .memory
        .origin()
        .and_then(|origin| origin.disk.as_ref())
    {
        Some(disk) => Ok(fd_path(disk)),
        None => Ok(scratch::template(&options.cache, plan.scratch.0)?),
    }
}

/// An open file by a name of this process's.
fn fd_path(file: &File) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

/// Claims a free vsock address. It is free again when the descriptor closes.
fn claim_cid() -> Result<(OwnedFd, u32), MachineError> {
    let path = Path::new("/dev/vhost-vsock");
    let vhost = probe::vhost_vsock().map_err(io_error("open", path))?;
    for _ in 0..64 {
        let mut bytes = [0; 4];
        fill_random(&mut bytes);
        // 0 to 2 are the hypervisor, this host and its loopback; the last is "any".
        let cid = u32::from_le_bytes(bytes).clamp(3, u32::MAX - 1);
        match sys::set_guest_cid(vhost.as_fd(), u64::from(cid)) {
            Ok(()) => return Ok((vhost.into(), cid)),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            Err(error) => return Err(io_error("claim a vsock address on", path)(error)),
        }
    }
    Err(io_error("claim a vsock address on", path)(
        io::ErrorKind::AddrInUse.into(),
    ))
}
