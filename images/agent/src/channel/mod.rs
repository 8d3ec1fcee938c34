//! The byte stream to the host, whatever carries it.

mod serial;
mod vsock;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bulkhead_agent::{AGENT_PORT, FailureKind, VSOCK_PORT};
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::unistd::{read, write};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::failure::{Result, failure};
use crate::watch;

/// How long a machine's port may take to appear.
const PORT_DEADLINE: Duration = Duration::from_secs(5);

/// Where the host is to be found.
#[derive(Debug)]
pub(crate) enum Source {
    /// An open descriptor: one connection, then the end.
    Inherited(OwnedFd),
    /// The virtio-serial port with this device node.
    Serial(PathBuf),
    /// This vsock port, listened on.
    Vsock(u32),
    /// Whichever the machine has; vsock first if it is `true`.
    Machine(bool),
}

impl Source {
    /// Decides between port and vsock, waiting for a device that is still coming up.
    async fn resolve(self) -> Result<Self> {
        let Self::Machine(vsock) = self else {
            return Ok(self);
        };
        let deadline = Instant::now() + PORT_DEADLINE;
        loop {
            let port = serial::find(AGENT_PORT);
            let has_vsock = Path::new("/dev/vsock").exists();
            match port {
                Some(port) if !vsock => return Ok(Self::Serial(port)),
                _ if has_vsock && vsock => return Ok(Self::Vsock(VSOCK_PORT)),
                _ => {}
            }
            if Instant::now() > deadline {
                return match (port, has_vsock) {
                    (Some(port), _) => Ok(Self::Serial(port)),
                    (None, true) => Ok(Self::Vsock(VSOCK_PORT)),
                    (None, false) => Err(failure(
                        FailureKind::System,
                        format!("no way to the host: neither a port named {AGENT_PORT} nor vsock"),
                    )),
                };
            }
            // A machine with vsock only has no port to wait for.
            if port.is_none() && has_vsock && !Path::new("/sys/class/virtio-ports").exists() {
                return Ok(Self::Vsock(VSOCK_PORT));
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Opens it: every item is one connection.
    ///
    /// # Errors
    /// Nothing to be opened.
    pub(crate) async fn open(self) -> Result<Connections> {
        Ok(match self.resolve().await? {
            Self::Inherited(fd) => Connections::Inherited(Some(fd)),
            Self::Serial(path) => Connections::Serial(serial::Port::open(&path)?),
            Self::Vsock(port) => Connections::Vsock(vsock::Listener::bind(port)?),
            Self::Machine(_) => unreachable!("resolve() decided"),
        })
    }
}

/// The connections of a [`Source`], one after the other.
#[derive(Debug)]
pub(crate) enum Connections {
    Inherited(Option<OwnedFd>),
    Serial(serial::Port),
    Vsock(vsock::Listener),
}

impl Connections {
    /// The next connection; `None` when there cannot be another.
    ///
    /// # Errors
    /// The device is gone.
    pub(crate) async fn next(&mut self) -> io::Result<Option<Channel>> {
        let fd = match self {
            Self::Inherited(fd) => match fd.take() {
                Some(fd) => fd,
                None => return Ok(None),
            },
            Self::Serial(port) => port.connected().await?,
            Self::Vsock(listener) => listener.accept().await?,
        };
        Channel::new(fd).map(Some)
    }

    /// Whether a new connection is to replace the one that is served. Never
    /// completes for sources that have only one.
    pub(crate) async fn superseded(&self) {
        match self {
            Self::Vsock(listener) => listener.pending().await,
            _ => std::future::pending().await,
        }
    }
}

/// One connection.
#[derive(Debug)]
pub(crate) struct Channel(AsyncFd<OwnedFd>);

impl Channel {
    fn new(fd: OwnedFd) -> io::Result<Self> {
        set_nonblocking(&fd)?;
        Ok(Self(watch::both(fd)?))
    }

    /// Reads what there is; 0 when the host is gone, or was for a while: the
    /// runtime keeps a hang-up for ever and would have this turn without end.
    /// Cancel-safe.
    pub(crate) async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut guard = self.0.readable().await?;
            let gone = guard.ready().is_read_closed();
            if let Ok(result) = guard.try_io(|fd| Ok(read(fd.get_ref(), buffer)?)) {
                return result;
            }
            if gone {
                return Ok(0);
            }
        }
    }

    /// Writes what fits; an error when the host is gone, or was for a while.
    /// Cancel-safe.
    pub(crate) async fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            let mut guard = self.0.writable().await?;
            let gone = guard.ready().is_write_closed();
            if let Ok(result) = guard.try_io(|fd| Ok(write(fd.get_ref(), bytes)?)) {
                return result;
            }
            if gone {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
        }
    }

    /// Writes what fits now; `None` when nothing does, or the host is gone.
    pub(crate) fn try_write(&self, bytes: &[u8]) -> io::Result<Option<usize>> {
        let wrote = self
            .0
            .try_io(Interest::WRITABLE, |fd| Ok(write(fd, bytes)?));
        match wrote {
            Ok(count) => Ok(Some(count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Makes a descriptor fit for the runtime, and keeps it from commands.
fn set_nonblocking(fd: impl AsFd) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
    fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::OpenOptionsExt as _;
    use std::sync::mpsc;

    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;

    use super::*;

    /// A pipe with a name hangs up and comes back as a port does.
    #[test]
    fn who_hung_up_and_came_back_unseen_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        let (sender, answer) = mpsc::channel();
        let scene = async move {
            let mut options = File::options();
            let reader = options.read(true).custom_flags(nix::libc::O_NONBLOCK);
            let reader = reader.open(&path).unwrap();
            let host = File::options().write(true).open(&path).unwrap();
            let channel = Channel::new(reader.into()).unwrap();
            drop(host);
            while !channel.0.readable().await.unwrap().ready().is_read_closed() {}
            let _back = File::options().write(true).open(&path).unwrap();
            sender.send(channel.read(&mut [0; 8]).await).unwrap();
        };
        // A thread of its own: what it tests against never yields.
        std::thread::spawn(|| {
            let mut runtime = tokio::runtime::Builder::new_current_thread();
            runtime.enable_io().build().unwrap().block_on(scene);
        });
        let read = answer.recv_timeout(Duration::from_secs(20)).unwrap();
        assert_eq!(read.unwrap(), 0);
    }
}
