//! One machine through the library, with directories of its own.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead::guest::{Channel, Output};
use bulkhead::run::{Dirs, Host, Machine, RunError, recover};
use bulkhead::spec::{
    Accel, Bytes, Catalog, NetworkMode, NetworkName, NetworkPolicy, Request as Wish, Timeout,
};
use bulkhead_agent::{Exec, Request};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// More than any command here takes.
const PATIENCE: Duration = Duration::from_secs(120);
/// The kernels machines boot: ours, and the image's own.
pub(crate) const KERNELS: [Option<&str>; 2] = [Some("tuned"), None];

/// A host whose state directory has the prepared images, and nothing else.
pub(crate) struct Live {
    pub(crate) host: Host,
    _dir: Option<tempfile::TempDir>,
}

impl Live {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut live = Self::at(dir.path());
        live._dir = Some(dir);
        live
    }

    /// As [`Live::new`], with networks that lead elsewhere.
    pub(crate) fn with_site(site: bulkhead::host::network::Site) -> Self {
        let mut live = Self::new();
        live.host.site = site;
        live
    }

    /// Everything below `dir`.
    pub(crate) fn at(dir: &Path) -> Self {
        let mut host = Host {
            die_with_thread: true,
            ..Host::new(Dirs {
                state: own_state(dir),
                runtime: super::runtime(&dir.join("runtime")),
            })
        };
        // As the program reads it: the lab is slow.
        if let Ok(text) = std::env::var("BULKHEAD_BOOT_TIMEOUT") {
            let timeout: Timeout = text.parse().unwrap();
            (host.boot_timeout, host.proof_timeout) = (timeout.0, timeout.0);
        }
        Self { host, _dir: None }
    }

    /// Starts a small machine; `wish` says what differs.
    pub(crate) async fn start(&self, wish: Wish) -> Machine {
        self.start_from(wish, &Catalog::default()).await
    }

    /// As [`Live::start`], with less memory, and a network that has this policy.
    pub(crate) async fn start_in(&self, policy: NetworkPolicy) -> Machine {
        self.try_start_in(policy).await.unwrap()
    }

    /// As [`Live::start_in`], where it may fail.
    pub(crate) async fn try_start_in(&self, policy: NetworkPolicy) -> Result<Machine, RunError> {
        let mut catalog = Catalog::default();
        let own: NetworkName = "own".parse().unwrap();
        catalog.add_network(own.clone(), policy).unwrap();
        let wish = Wish {
            network: Some(own),
            memory: Some(Bytes::mib(256)),
            ..Wish::default()
        };
        self.try_start(wish, &catalog).await
    }

    /// As [`Live::start`], with names of a catalog.
    pub(crate) async fn start_from(&self, wish: Wish, catalog: &Catalog) -> Machine {
        self.try_start(wish, catalog).await.unwrap()
    }

    async fn try_start(&self, wish: Wish, catalog: &Catalog) -> Result<Machine, RunError> {
        let wish = wish.over(Wish {
            image: Some("base".into()),
            kernel: Some("tuned".into()),
            accel: Some(match super::accel().as_str() {
                "kvm" => Accel::Kvm,
                _ => Accel::Tcg,
            }),
            cpus: Some(1),
            memory: Some(Bytes::mib(512)),
            disk: Some(Bytes::gib(2)),
            network: Some(NetworkMode::Isolated.into()),
            ..Wish::default()
        });
        let spec = wish.resolve_machine(catalog).unwrap();
        Ok(self.host.start(&spec).await?.1)
    }
}

impl Drop for Live {
    /// What a machine of a failing test leaves.
    fn drop(&mut self) {
        let _ = recover(&self.host.dirs, false);
    }
}

/// A state directory in `dir` with the images and kernels that were prepared.
pub(crate) fn own_state(dir: &Path) -> PathBuf {
    let prepared: PathBuf = std::env::var_os("BULKHEAD_TEST_STATE")
        .expect("these tests need images: run them with `cargo xtask test`")
        .into();
    let state = dir.join("state");
    fs::create_dir(&state).unwrap();
    for name in ["images", "kernels"] {
        std::os::unix::fs::symlink(prepared.join(name), state.join(name)).unwrap();
    }
    state
}

/// Runs a shell script as root and gives what it prints; it must succeed.
pub(crate) async fn sh(machine: &Machine, script: &str) -> String {
    sh_over(machine.channel(), script).await
}

/// As [`sh`], in whatever guest this leads to.
pub(crate) async fn sh_over(channel: &Channel, script: &str) -> String {
    let exec = Exec {
        argv: ["sh", "-ec", script].map(str::to_owned).into(),
        user: Some("root".into()),
        cwd: Some("/root".into()),
        ..Exec::default()
    };
    let mut stream = channel.open(&Request::Exec(exec)).await.unwrap();
    let mut text = Vec::new();
    let work = async {
        stream.started("run a script").await.unwrap();
        loop {
            match stream.next().await.unwrap() {
                Output::Out(bytes) | Output::Err(bytes) => text.extend(bytes),
                Output::Exit(exit) => break exit,
            }
        }
    };
    let exit = tokio::time::timeout(PATIENCE, work).await;
    let text = String::from_utf8_lossy(&text).into_owned();
    let exit = exit.unwrap_or_else(|_| panic!("{script} does not end; so far: {text}"));
    assert_eq!(exit.code, Some(0), "{script}: {text}");
    text.trim().to_owned()
}

/// The file behind a machine's disk, which has no name any more. It lives on
/// with this descriptor.
pub(crate) fn disk_file(machine: &Machine) -> File {
    let fds = format!("/proc/{}/fd", machine.process().pid());
    let disk = fs::read_dir(&fds).unwrap().flatten().find(|fd| {
        fs::read_link(fd.path()).is_ok_and(|to| {
            to.to_string_lossy().contains("scratch.img") || to.ends_with("disk.img")
        })
    });
    File::open(disk.expect("QEMU has its disk open").path()).unwrap()
}

/// A small file system in memory on the directory of this name; unmounted when
/// dropped, also by a failing test.
pub(crate) struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    pub(crate) fn new(mib: u32) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let size = format!("size={mib}m");
        let none = None::<&str>;
        mount(
            none,
            dir.path(),
            Some("tmpfs"),
            MsFlags::empty(),
            Some(&*size),
        )
        .unwrap();
        Self(dir)
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// Takes so much of it, until the file is removed.
    pub(crate) fn ballast(&self, mib: usize) -> PathBuf {
        let file = self.path().join("ballast");
        fs::write(&file, vec![1; mib << 20]).unwrap();
        file
    }

    pub(crate) fn free(&self) -> u64 {
        let found = rustix::fs::statvfs(self.path()).unwrap();
        found.f_bavail * found.f_frsize
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Lazily: a machine of a failing test may still have its disk open.
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}
