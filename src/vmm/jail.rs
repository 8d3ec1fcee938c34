//! A jail, made ready for the sequence between fork and exec: everything that
//! needs memory or a look at the host is done here.

use std::collections::BTreeSet;
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::libc;
use seccompiler::BpfProgram;

use super::share::User;
use crate::host::sys;
use crate::plan::{self, LsmKind};
use crate::spec::JailLayer;

/// Device number of /dev/kvm (Documentation/admin-guide/devices.txt).
const KVM: libc::dev_t = libc::makedev(10, 232);

/// How a program is confined.
#[derive(Debug, Default)]
pub struct Jail {
    /// Its root.
    pub(super) root: Option<Root>,
    /// The user it becomes.
    pub(super) user: Option<User>,
    /// Pid, network, IPC, host name and control group namespaces.
    pub(super) namespaces: bool,
    /// A user namespace, where its maker is not root.
    pub(super) user_namespace: bool,
    /// Its maker is root: there are capabilities to give up for good.
    pub(super) privileged: bool,
    /// What a security module is to know it by.
    pub(super) label: Option<Label>,
    /// What Landlock allows.
    pub(super) landlock: Option<Landlock>,
    /// Filters for system calls, the one to be asked last first.
    pub(super) filters: Vec<BpfProgram>,
    /// Resource limits: number and value.
    pub(super) limits: Vec<(u32, u64)>,
    /// Its memory is in a file that it is given.
    pub(super) ram: bool,
    /// One heap for all threads, and no huge pages: an emulator asks for them for
    /// the code that it translates, and each that an idle clone begins is 2 MiB.
    pub(super) small: bool,
    /// Its whole environment; the owner's where it is absent.
    pub(super) environment: Option<Vec<CString>>,
}

/// What is written to the kernel for a label at the next exec (proc_pid_attr(5)).
#[derive(Debug)]
pub(super) struct Label {
    /// Where: the first that is there.
    pub(super) files: [&'static CStr; 2],
    /// What.
    pub(super) text: CString,
}

impl Label {
    fn new(label: &plan::jail::Label) -> io::Result<Self> {
        let exec = c"/proc/thread-self/attr/exec";
        let (first, text) = match label.kind {
            // aa_change_onexec(2)
            LsmKind::Apparmor => (
                c"/proc/thread-self/attr/apparmor/exec",
                format!("exec {}", label.name),
            ),
            LsmKind::Selinux => (exec, label.name.clone()),
        };
        Ok(Self {
            files: [first, exec],
            text: CString::new(text)?,
        })
    }
}

/// The root of a jail.
#[derive(Debug)]
pub(super) struct Root {
    /// An empty directory of the host, to mount it on.
    pub(super) dir: CString,
    /// What is made in it, in order; paths without the first slash.
    pub(super) entries: Vec<Entry>,
}

/// Something in the root of a jail.
#[derive(Debug)]
pub(super) enum Entry {
    /// A directory.
    Dir(CString),
    /// A file of the host.
    File {
        /// Its path on the host.
        from: CString,
        /// Its place.
        to: CString,
    },
    /// A device node of its own, in a directory of its own.
    Device {
        /// The directory.
        dir: CString,
        /// The node.
        to: CString,
        /// Its number.
        number: libc::dev_t,
        /// Its owner.
        owner: u32,
    },
    /// A device node of the host.
    HostDevice {
        /// Its path on the host.
        from: CString,
        /// Its place.
        to: CString,
    },
    /// What the kernel says of the processes in the jail.
    Proc(CString),
    /// A directory of the host, as a detached mount.
    Tree {
        /// The mount.
        mount: OwnedFd,
        /// Its place.
        to: CString,
    },
}

/// Rights of the whole root, of its share and of its device (landlock(7)).
#[derive(Debug)]
pub(super) struct Landlock {
    /// Handled rights: files, network, scopes; and how much of it the kernel knows.
    pub(super) handled: [u64; 3],
    /// Size of that in bytes.
    pub(super) size: usize,
    /// Paths and the rights below them.
    pub(super) rules: Vec<(CString, u64)>,
}

const LANDLOCK_EXECUTE: u64 = 1;
const LANDLOCK_WRITE_FILE: u64 = 1 << 1;
const LANDLOCK_READ: u64 = (1 << 2) | (1 << 3);
/// Removing and making files and directories, and moving and cutting them.
const LANDLOCK_CHANGE: u64 = (1 << 4) | (1 << 5) | (1 << 7) | (1 << 8) | (1 << 13) | (1 << 14);
const LANDLOCK_IOCTL: u64 = 1 << 15;

impl Landlock {
    fn new(abi: i64, jail: &plan::Jail) -> Self {
        let files: u64 = match abi {
            1 => (1 << 13) - 1,
            2 => (1 << 14) - 1,
            3 | 4 => (1 << 15) - 1,
            _ => (1 << 16) - 1,
        };
        let (net, size) = if abi >= 4 { (0b11, 16) } else { (0, 8) };
        let (scoped, size) = if abi >= 6 { (0b11, 24) } else { (0, size) };
        let mut rules = vec![(c"/".to_owned(), LANDLOCK_EXECUTE | LANDLOCK_READ)];
        if jail.share == Some(true) {
            rules.push((
                c"/share".to_owned(),
                (LANDLOCK_READ | LANDLOCK_WRITE_FILE | LANDLOCK_CHANGE) & files,
            ));
        }
        if jail.kvm {
            let rights = LANDLOCK_READ | LANDLOCK_WRITE_FILE | LANDLOCK_IOCTL;
            // A file, not a directory.
            rules.push((c"/dev/kvm".to_owned(), rights & files & !(1 << 3)));
        }
        Self {
            handled: [files, net, scoped],
            size,
            rules,
        }
    }
}

/// What a jail is made with besides its plan.
#[derive(Debug)]
pub struct Needs<'a> {
    /// An empty directory to mount its root on.
    pub dir: &'a Path,
    /// Who it becomes.
    pub user: Option<User>,
    /// Owner of its device nodes, by the host's count.
    pub owner: Option<u32>,
    /// The shared workspace as a detached mount (see [`crate::vmm::detach`]).
    pub share: Option<OwnedFd>,
    /// Filters for system calls (see [`crate::vmm::seccomp`]).
    pub filters: Vec<BpfProgram>,
    /// It is given a file with its memory.
    pub ram: bool,
    /// It emulates a clone, of which there may be many: it is to take little memory.
    pub small: bool,
    /// Whether Landlock is to be used where the kernel has it.
    pub landlock: bool,
}

impl Jail {
    /// Makes `plan` ready.
    ///
    /// # Errors
    /// A path with a zero byte.
    pub fn new(plan: &plan::Jail, needs: Needs<'_>) -> io::Result<Self> {
        let Needs {
            dir, user, owner, ..
        } = needs;
        let mut environment = None;
        let root = if plan.has(JailLayer::Files) {
            environment = Some(vec![
                c"LD_LIBRARY_PATH=/lib".to_owned(),
                c"QEMU_MODULE_DIR=/modules".to_owned(),
            ]);
            Some(Root {
                dir: c_string(dir)?,
                entries: entries(plan, owner, needs.share)?,
            })
        } else {
            None
        };
        let landlock = match needs.landlock && root.is_some() {
            true => landlock()?,
            false => None,
        };
        Ok(Self {
            root,
            limits: limits(plan, user.is_some()),
            user,
            namespaces: plan.has(JailLayer::Namespaces),
            user_namespace: plan.unprivileged
                && (plan.has(JailLayer::Namespaces) || plan.has(JailLayer::Files)),
            privileged: !plan.unprivileged,
            label: plan.label.as_ref().map(Label::new).transpose()?,
            landlock: landlock.map(|abi| Landlock::new(abi, plan)),
            filters: needs.filters,
            ram: needs.ram,
            small: needs.small,
            environment,
        })
    }
}

impl Jail {
    /// Namespaces that come with the fork.
    pub(super) fn clone_flags(&self) -> libc::c_int {
        let mut flags = 0;
        if self.namespaces {
            flags |=
                libc::CLONE_NEWPID | libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
        }
        if self.root.is_some() {
            flags |= libc::CLONE_NEWNS;
        }
        if self.user_namespace {
            flags |= libc::CLONE_NEWUSER;
        }
        flags
    }

    /// Name of an entry of its root.
    pub(super) fn entry_name(&self, at: u32) -> Option<String> {
        let entry = self.root.as_ref()?.entries.get(at as usize)?;
        Some(format!("/{}", entry.name().to_string_lossy()))
    }
}

/// What the kernel knows of Landlock; none where it has none. Any other answer
/// is a layer that cannot be made.
fn landlock() -> io::Result<Option<i64>> {
    match sys::landlock_abi() {
        Ok(abi) => Ok(Some(abi)),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EOPNOTSUPP)) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Numbers and values of its limits.
fn limits(plan: &plan::Jail, own_user: bool) -> Vec<(u32, u64)> {
    let mut limits = vec![
        (libc::RLIMIT_NOFILE, u64::from(plan.open_files)),
        // At 0 a handler of the host (`|` in core_pattern) would still be run as
        // root, on memory that the guest filled; at 1 it is not (coredump.c).
        (libc::RLIMIT_CORE, 1),
        (libc::RLIMIT_MSGQUEUE, 0),
        (libc::RLIMIT_SIGPENDING, 256),
        (libc::RLIMIT_MEMLOCK, 0),
        (libc::RLIMIT_RTPRIO, 0),
        (libc::RLIMIT_NICE, 0),
    ];
    if let Some(size) = plan.file_size {
        limits.push((libc::RLIMIT_FSIZE, size.0));
    }
    if own_user {
        // Counted by user: only one of its own has no other's threads.
        limits.push((libc::RLIMIT_NPROC, u64::from(plan.threads)));
    }
    limits
}

fn entries(
    plan: &plan::Jail,
    owner: Option<u32>,
    share: Option<OwnedFd>,
) -> io::Result<Vec<Entry>> {
    let mut dirs = BTreeSet::new();
    let mut list = Vec::new();
    for (place, file) in &plan.files {
        let to = place.strip_prefix("/").unwrap_or(place);
        // A directory sorts before what is in it.
        dirs.extend(to.ancestors().skip(1).filter(|dir| *dir != Path::new("")));
        list.push(Entry::File {
            from: c_string(file)?,
            to: c_string(to)?,
        });
    }
    let mut dirs: Vec<PathBuf> = dirs.into_iter().map(Path::to_owned).collect();
    if share.is_some() {
        // QEMU reaches attributes of files by way of its descriptors there.
        dirs.extend(["share", "proc"].map(PathBuf::from));
        list.push(Entry::Proc(c"proc".to_owned()));
    }
    if plan.kvm {
        dirs.push("dev".into());
        let to = c"dev/kvm".to_owned();
        list.push(match owner {
            Some(owner) => Entry::Device {
                dir: c"dev".to_owned(),
                to,
                number: KVM,
                owner,
            },
            None => Entry::HostDevice {
                from: c"/dev/kvm".to_owned(),
                to,
            },
        });
    }
    // After the devices, which are in place before the root is read-only.
    if let Some(mount) = share {
        list.push(Entry::Tree {
            mount,
            to: c"share".to_owned(),
        });
    }
    let dirs = dirs.iter().map(|dir| Ok(Entry::Dir(c_string(dir)?)));
    let dirs: io::Result<Vec<_>> = dirs.collect();
    Ok(dirs?.into_iter().chain(list).collect())
}

fn c_string(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

impl Entry {
    /// Its place, for naming the one that failed.
    pub(super) fn name(&self) -> &CString {
        match self {
            Self::Dir(to)
            | Self::Proc(to)
            | Self::File { to, .. }
            | Self::Device { to, .. }
            | Self::HostDevice { to, .. }
            | Self::Tree { to, .. } => to,
        }
    }

    pub(super) fn mount_fd(&self) -> i32 {
        match self {
            Self::Tree { mount, .. } => mount.as_raw_fd(),
            _ => -1,
        }
    }
}
