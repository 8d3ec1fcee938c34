//! The control group of one machine: what its VMM may use of the host.
//!
//! cgroup v2 has one hierarchy for everything, v1 one for each controller; a
//! machine has a group in each that is needed. All of them are below a group
//! `bulkhead` of ours, which goes with the last of them. Mounts are never
//! touched. The controllers for CPU, memory and processes take a line in
//! `Controller` each; reads and writes are limited where the host can.

mod blkio;
mod entrance;
mod hierarchy;
mod oom;

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::libc;

pub use self::blkio::device_of;
pub use self::entrance::Entrance;
use self::hierarchy::{Controller, Hierarchies, lists};
pub use self::oom::Shortage;
use super::lease::Lease;
use super::sys;
use crate::error::Explain;
use crate::spec::{Bytes, VmId, fill_random};

/// Our own group, the parent of all machines'.
const PARENT: &str = "bulkhead";
/// The time a quota is a share of, in microseconds: the kernel's own default.
const PERIOD_US: u64 = 100_000;
/// How long what is killed may take to be gone.
const KILL_DEADLINE: Duration = Duration::from_secs(30);
/// How often a group is made again whose parent another machine's end removed.
const TRIES: u32 = 5;

/// A control group could not be made or changed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CgroupError {
    /// The host has none for us.
    #[error("this host gives the machine no control group: {why}")]
    Unavailable {
        /// What was seen.
        why: String,
    },
    /// The kernel refused.
    #[error("cannot {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Arc<io::Error>,
    },
}

impl Explain for CgroupError {
    fn code(&self) -> &'static str {
        match self {
            Self::Unavailable { .. } => "cgroup-unavailable",
            Self::Io { .. } => "cgroup-refused",
        }
    }

    fn remedy(&self) -> String {
        Self::remedy()
    }
}

impl CgroupError {
    /// What helps whatever was refused.
    pub(crate) fn remedy() -> String {
        "Run as root on a host with the controllers cpu, memory and pids (see `bulkhead doctor`), \
         or do without their limits (--waive cgroup)."
            .into()
    }
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_owned();
    move |source| CgroupError::Io {
        action,
        path,
        source: Arc::new(source),
    }
}

/// The group of one machine: a directory in each hierarchy that is needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    dirs: Vec<PathBuf>,
}

impl Cgroup {
    /// Decides where the group of a machine will be. Makes nothing yet.
    ///
    /// # Errors
    /// The host lacks a controller, or we may not make groups.
    pub fn choose(id: &VmId) -> Result<Self, CgroupError> {
        let read = |path: &str| fs::read_to_string(path).map_err(io_error("read", Path::new(path)));
        let host = Hierarchies {
            mounts: read("/proc/self/mountinfo")?,
            own: read("/proc/self/cgroup")?,
        };
        // Another state directory may have a machine of the same name.
        let mut bytes = [0; 4];
        fill_random(&mut bytes);
        let name = format!("{id}-{:08x}", u32::from_le_bytes(bytes));
        let mut dirs = Vec::new();
        for controller in Controller::ALL {
            let base = host.base(controller)?;
            if rustix::fs::access(&base, rustix::fs::Access::WRITE_OK).is_err() {
                return Err(CgroupError::Unavailable {
                    why: format!("{} is not ours to write", base.display()),
                });
            }
            let dir = base.join(PARENT).join(&name);
            if !dirs.contains(&dir) {
                dirs.push(dir);
            }
        }
        // Only needed where somebody asks for it; on v2 it is in the same group.
        if let Some(base) = host.io_v1() {
            dirs.push(base.join(PARENT).join(&name));
        }
        Ok(Self { dirs })
    }

    /// The group of a machine whose leases these are, if it has one.
    pub fn of_leases(leases: &[Lease]) -> Option<Self> {
        let dirs: Vec<_> = leases
            .iter()
            .filter_map(|lease| match lease {
                Lease::Cgroup { path } => Some(path.clone()),
                _ => None,
            })
            .collect();
        (!dirs.is_empty()).then_some(Self { dirs })
    }

    /// What is written down before [`Cgroup::make`].
    pub fn leases(&self) -> impl Iterator<Item = Lease> {
        self.dirs
            .iter()
            .map(|dir| Lease::Cgroup { path: dir.clone() })
    }

    /// Makes it. The leases are written down by then.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn make(&self) -> Result<(), CgroupError> {
        for dir in &self.dirs {
            let mut tries = 0;
            loop {
                match make(dir) {
                    // The end of the last other machine took the parent away.
                    Err(error) if is_gone(&error) && tries < TRIES => tries += 1,
                    made => break made.map_err(io_error("make the control group", dir))?,
                }
            }
        }
        Ok(())
    }

    #[cfg(test)]
    fn add(&self, pid: u32) {
        for dir in &self.dirs {
            set(&dir.join("cgroup.procs"), &pid.to_string()).unwrap();
        }
    }

    /// Whether a process is in all of it.
    pub fn holds(&self, pid: i32) -> bool {
        let pid = pid.to_string();
        let holds = |dir: &PathBuf| {
            let listed = fs::read_to_string(dir.join("cgroup.procs"));
            listed.is_ok_and(|listed| listed.lines().any(|line| line == pid))
        };
        self.dirs.iter().all(holds)
    }

    /// Limits CPU time to `percent` of one core, or lifts the limit.
    ///
    /// # Errors
    /// The kernel refuses, for one because the group is gone.
    pub fn set_cpu_quota(&self, percent: Option<u32>) -> Result<(), CgroupError> {
        let quota = percent.map(|percent| u64::from(percent) * PERIOD_US / 100);
        // cgroup-v2 and sched-bwc of the kernel's documentation.
        if let Some(file) = self.file("cpu.max") {
            let quota = quota.map_or("max".to_owned(), |quota| quota.to_string());
            return write(&file, &format!("{quota} {PERIOD_US}"));
        }
        let Some(file) = self.file("cpu.cfs_quota_us") else {
            return Err(CgroupError::Unavailable {
                why: "its group has no limit for CPU time".into(),
            });
        };
        write(
            &file.with_file_name("cpu.cfs_period_us"),
            &PERIOD_US.to_string(),
        )?;
        write(
            &file,
            &quota.map_or("-1".to_owned(), |quota| quota.to_string()),
        )
    }

    /// What limits CPU time now, and what does where it is `percent` of one core;
    /// as the kernel writes them.
    pub(crate) fn cpu_quota(&self, percent: u32) -> (Option<String>, String) {
        let one = |name| self.read([name, name]);
        // v1 has in two files what v2 has in one.
        let seen = one("cpu.max").or_else(|| {
            let (quota, period) = one("cpu.cfs_quota_us").zip(one("cpu.cfs_period_us"))?;
            Some(format!("{quota} {period}"))
        });
        let quota = u64::from(percent) * PERIOD_US / 100;
        (seen, format!("{quota} {PERIOD_US}"))
    }

    /// Limits memory, and threads and processes.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn limit(&self, memory: Bytes, threads: u32) -> Result<(), CgroupError> {
        // cgroup-v2 and cgroup-v1/memory of the kernel's documentation.
        let limit = |names: [&str; 2], value: String| {
            let file = names.iter().find_map(|name| self.file(name));
            let file = file.ok_or_else(|| CgroupError::Unavailable {
                why: format!("its group has no {}", names[0]),
            })?;
            write(&file, &value)
        };
        limit(
            ["memory.max", "memory.limit_in_bytes"],
            memory.0.to_string(),
        )?;
        limit(["pids.max", "pids.max"], threads.to_string())?;
        self.limit_swap(memory)?;
        // A VMM that lost a part of itself is of no use to anybody.
        match self.file("memory.oom.group") {
            Some(file) => write(&file, "1"),
            None => Ok(()),
        }
    }

    /// As much swap as memory, where the kernel counts it: what is idle can be
    /// swapped out, and what is used is bounded all the same.
    fn limit_swap(&self, memory: Bytes) -> Result<(), CgroupError> {
        // v1 counts memory and swap together.
        match (
            self.file("memory.swap.max"),
            self.file("memory.memsw.limit_in_bytes"),
        ) {
            (Some(file), _) => write(&file, &memory.0.to_string()),
            (None, Some(file)) => write(&file, &(2 * memory.0).to_string()),
            (None, None) => Ok(()),
        }
    }

    /// Its directories: one on v2, one for each controller on v1.
    pub fn dirs(&self) -> &[PathBuf] {
        &self.dirs
    }

    /// What is written in a file of its, by v2's name or v1's.
    pub fn read(&self, names: [&str; 2]) -> Option<String> {
        let file = names.iter().find_map(|name| self.file(name))?;
        Some(fs::read_to_string(file).ok()?.trim().to_owned())
    }

    fn file(&self, name: &str) -> Option<PathBuf> {
        self.dirs
            .iter()
            .map(|dir| dir.join(name))
            .find(|file| file.exists())
    }
}

/// What is said of a group that was removed: ENODEV where one of its files was
/// open already.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV))
}

fn write(file: &Path, text: &str) -> Result<(), CgroupError> {
    set(file, text).map_err(io_error("write", file))
}

/// Writes to a file of the kernel's. What is not there cannot be made, which
/// v1 would answer with EACCES.
fn set(file: &Path, text: &str) -> io::Result<()> {
    let mut file = fs::File::options().write(true).open(file)?;
    io::Write::write_all(&mut file, text.as_bytes())
}

/// Makes one group, its parent, and on v2 hands the controllers down to it.
fn make(dir: &Path) -> io::Result<()> {
    let parent = dir.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let base = parent.parent().ok_or(io::ErrorKind::InvalidInput)?;
    match fs::create_dir(parent) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    for group in [base, parent] {
        let file = group.join("cgroup.subtree_control");
        let Ok(given) = fs::read_to_string(&file) else {
            continue; // v1
        };
        for controller in Controller::ALL {
            if !lists(&given, controller) {
                set(&file, &format!("+{}", controller.name()))?;
            }
        }
        // Not everywhere there, and not always needed.
        let _ = set(&file, "+io");
    }
    fs::create_dir(dir)
}

/// Removes a group of ours, after killing what is in it.
pub(super) fn release(dir: &Path) -> io::Result<()> {
    let deadline = Instant::now() + KILL_DEADLINE;
    loop {
        match fs::remove_dir(dir) {
            Ok(()) => break,
            Err(error) if error.kind() == io::ErrorKind::NotFound => break,
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                if Instant::now() > deadline {
                    return Err(error);
                }
                kill_all(dir)?;
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(error) => return Err(error),
        }
    }
    // Stays for as long as other machines have groups in it.
    if let Some(parent) = dir.parent().filter(|parent| parent.ends_with(PARENT)) {
        let _ = fs::remove_dir(parent);
    }
    Ok(())
}

/// Kills everything in a group: by the kernel where it can (v2, 5.14 and
/// later), else one by one; what is forked meanwhile is the next round's.
fn kill_all(dir: &Path) -> io::Result<()> {
    match set(&dir.join("cgroup.kill"), "1") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        killed => return killed,
    }
    let members = || -> io::Result<Vec<i32>> {
        let text = fs::read_to_string(dir.join("cgroup.procs"))?;
        // 0 stands for a process that this pid namespace does not have.
        let pids = text.lines().filter_map(|line| line.parse().ok());
        Ok(pids.filter(|pid| *pid > 0).collect())
    };
    for pid in members()? {
        let gone = |error: &io::Error| error.raw_os_error() == Some(libc::ESRCH);
        let pidfd = match sys::pidfd_open(pid) {
            Err(error) if gone(&error) => continue,
            opened => opened?,
        };
        // A member still: the descriptor names it and no later process.
        if members()?.contains(&pid) {
            match sys::pidfd_send_signal(pidfd.as_fd(), libc::SIGKILL) {
                Err(error) if !gone(&error) => return Err(error),
                _ => {}
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A group of the kernel's, or the reason why there is none here.
    fn group() -> Option<Cgroup> {
        match Cgroup::choose(&"cgroup-test".parse().unwrap()) {
            Ok(group) => Some(group),
            Err(error) => {
                println!("skipped: control_group: {error}");
                None
            }
        }
    }

    /// Tells whether the kernel was asked to kill all of a group, where it can.
    struct Told(fs::File);

    impl Told {
        fn of(group: &Cgroup) -> Option<Self> {
            use rustix::fs::inotify::{CreateFlags, WatchFlags, add_watch, init};
            let file = group.file("cgroup.kill")?;
            let watch = init(CreateFlags::NONBLOCK).unwrap();
            add_watch(&watch, file, WatchFlags::MODIFY).unwrap();
            Some(Self(watch.into()))
        }

        fn any(&mut self) -> bool {
            io::Read::read(&mut self.0, &mut [0; 512]).is_ok()
        }
    }

    #[test]
    fn what_is_in_a_group_ends_with_it() {
        let Some(group) = group() else { return };
        group.make().unwrap();
        let mut children: Vec<_> = (0..3)
            .map(|_| {
                std::process::Command::new("sleep")
                    .arg("60")
                    .spawn()
                    .unwrap()
            })
            .collect();
        for child in &children {
            group.add(child.id());
            let pid = i32::try_from(child.id()).unwrap();
            assert!(group.holds(pid) && !group.holds(1));
        }
        group.set_cpu_quota(Some(20)).unwrap();
        group.set_cpu_quota(None).unwrap();
        let leases: Vec<_> = group.leases().collect();
        assert_eq!(Cgroup::of_leases(&leases), Some(group.clone()));
        let mut told = Told::of(&group);
        for lease in &leases {
            lease.release().unwrap();
        }
        if let Some(told) = &mut told {
            assert!(told.any(), "they were killed one by one");
        }
        for child in &mut children {
            let status = child.wait().unwrap();
            assert_eq!(
                std::os::unix::process::ExitStatusExt::signal(&status),
                Some(9)
            );
        }
        assert!(group.dirs.iter().all(|dir| !dir.exists()));
        for lease in &leases {
            lease.release().unwrap(); // again
        }
        let error = group.set_cpu_quota(Some(20)).unwrap_err();
        assert_eq!(error.code(), "cgroup-unavailable");
    }

    #[test]
    fn groups_come_and_go_beside_each_other() {
        if group().is_none() {
            return;
        }
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..25 {
                        let group = group().unwrap();
                        group.make().unwrap();
                        group.leases().for_each(|lease| lease.release().unwrap());
                    }
                });
            }
        });
    }
}
