//! What the kernel says of a VMM: of the process, and of every thread.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;

use super::{Finding, Subject, Verdict, counted, expect, finding};
use crate::host::cgroup::Cgroup;
use crate::host::lease::Lease;
use crate::host::{lsm, process, sys};
use crate::plan::jail::{SHARE, longest};
use crate::plan::{Descriptor, LsmKind, Plan, Ram};
use crate::spec::{Bytes, JailLayer};

/// Fewest filters of system calls: our two, and QEMU's own.
const FILTERS: u32 = 3;
/// v1 counts memory and swap together.
const MEMSW: &str = "memory.memsw.limit_in_bytes";
/// What anonymous inodes a VMM may hold (`/proc/PID/fd`).
const ANONYMOUS: [&str; 6] = [
    "[eventfd]",
    "[eventpoll]",
    "[signalfd]",
    "[timerfd]",
    "kvm-vm",
    "kvm-vcpu",
];

/// Looks at the process.
pub(super) fn look(subject: &Subject) -> io::Result<Vec<Finding>> {
    let threads = Threads::read(subject.pid)?;
    let mut findings = user(subject, &threads);
    findings.extend(filters(subject, &threads));
    findings.extend(namespaces(subject)?);
    findings.extend(files(subject)?);
    findings.push(descriptors(subject)?);
    findings.extend(template(subject)?);
    findings.extend(limits(subject)?);
    findings.extend(cgroup(subject)?);
    findings.push(label(subject)?);
    Ok(findings)
}

/// What /proc/PID/task/TID/status says, thread by thread.
struct Threads(Vec<String>);

impl Threads {
    fn read(pid: i32) -> io::Result<Self> {
        let mut all = Vec::new();
        for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
            match fs::read_to_string(entry?.path().join("status")) {
                Ok(status) => all.push(status),
                // It ended meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) if error.raw_os_error() == Some(nix::libc::ESRCH) => {}
                Err(error) => return Err(error),
            }
        }
        match all.is_empty() {
            true => Err(io::ErrorKind::NotFound.into()),
            false => Ok(Self(all)),
        }
    }

    /// The values that a field has, in all threads together.
    fn values(&self, field: &str) -> BTreeSet<String> {
        let of = |status: &String| {
            let mut lines = status.lines();
            let value = lines.find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
            let words: Vec<_> = value.unwrap_or("missing").split_whitespace().collect();
            words.join(" ")
        };
        self.0.iter().map(of).collect()
    }

    fn text(&self, field: &str) -> String {
        self.values(field)
            .into_iter()
            .collect::<Vec<_>>()
            .join(" | ")
    }
}

fn user(subject: &Subject, threads: &Threads) -> Vec<Finding> {
    let plan = &subject.plan;
    let leased = subject.leases.iter().find_map(|lease| match lease {
        Lease::Uid { uid, .. } => Some(*uid),
        _ => None,
    });
    let own = nix::unistd::geteuid().as_raw();
    let count = threads.0.len();
    let mut findings = vec![finding(
        "user",
        "threads",
        Verdict::Pass,
        format!("{count}; what follows holds for each"),
    )];
    let ids = |field: &str| match leased {
        Some(uid) => expect(
            "user",
            field,
            &threads.text(field),
            &[uid.to_string().as_str(); 4].join(" "),
        ),
        None if plan.jail.unprivileged => finding(
            "user",
            field,
            Verdict::Weaker,
            format!("{}, the owner's own", threads.text(field)),
        ),
        None => expect("user", field, &threads.text(field), "one of its own"),
    };
    for field in ["Uid", "Gid"] {
        findings.push(counted(plan, JailLayer::User, ids(field)));
    }
    let groups = threads.text("Groups");
    findings.push(match plan.jail.unprivileged {
        // They cannot be given up without a privilege.
        true => finding(
            "user",
            "Groups",
            Verdict::Weaker,
            format!("{groups}, of user {own}"),
        ),
        false => counted(plan, JailLayer::User, expect("user", "Groups", &groups, "")),
    });
    for field in ["CapInh", "CapPrm", "CapEff", "CapAmb", "CapBnd"] {
        findings.push(expect(
            "user",
            field,
            &threads.text(field),
            "0000000000000000",
        ));
    }
    findings.push(expect(
        "user",
        "NoNewPrivs",
        &threads.text("NoNewPrivs"),
        "1",
    ));
    findings
}

fn filters(subject: &Subject, threads: &Threads) -> Vec<Finding> {
    let mode = expect("seccomp", "Seccomp", &threads.text("Seccomp"), "2");
    let counts = threads.values("Seccomp_filters");
    let enough = counts
        .iter()
        .all(|count| count.parse::<u32>().is_ok_and(|count| count >= FILTERS));
    let measured = threads.text("Seccomp_filters");
    let filters = match enough {
        true => finding("seccomp", "Seccomp_filters", Verdict::Pass, measured),
        false => expect("seccomp", "Seccomp_filters", &measured, "3 or more"),
    };
    let landlock = match (
        subject.plan.jail.has(JailLayer::Landlock),
        sys::landlock_abi(),
    ) {
        (false, _) => (Verdict::Waived, "not asked for".to_owned()),
        // Nothing in /proc shows it; it was set or nothing would run.
        (true, Ok(abi)) => (Verdict::Unseen, format!("ABI {abi}, set before exec")),
        (true, Err(error)) => (Verdict::Unseen, format!("this kernel has none: {error}")),
    };
    vec![
        // QEMU's own filter is there either way.
        mode,
        counted(&subject.plan, JailLayer::Seccomp, filters),
        finding("landlock", "rules", landlock.0, landlock.1),
    ]
}

fn namespaces(subject: &Subject) -> io::Result<Vec<Finding>> {
    let plan = &subject.plan;
    let mut findings = Vec::new();
    for kind in ["pid", "net", "ipc", "uts", "cgroup", "mnt"] {
        let read = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}"));
        let (own, theirs) = (read("self")?, read(&subject.pid.to_string())?);
        let what = format!("{kind} namespace");
        let text = theirs.display().to_string();
        let found = match own != theirs {
            true => finding("namespaces", &what, Verdict::Pass, text),
            false => expect("namespaces", &what, &text, "one of its own"),
        };
        let layer = match kind {
            "mnt" => JailLayer::Files,
            _ => JailLayer::Namespaces,
        };
        findings.push(counted(plan, layer, found));
    }
    let status = fs::read_to_string(format!("/proc/{}/status", subject.pid))?;
    let inner = status
        .lines()
        .find_map(|line| line.strip_prefix("NSpid:")?.split_whitespace().last());
    let inner = expect(
        "namespaces",
        "process id inside",
        inner.unwrap_or("missing"),
        "1",
    );
    findings.push(counted(plan, JailLayer::Namespaces, inner));
    let devices = fs::read_to_string(format!("/proc/{}/net/dev", subject.pid))?;
    let names = devices
        .lines()
        .skip(2)
        .filter_map(|line| line.split(':').next());
    let names: Vec<_> = names.map(str::trim).collect();
    let network = expect("namespaces", "network devices", &names.join(" "), "lo");
    findings.push(counted(plan, JailLayer::Namespaces, network));
    Ok(findings)
}

/// The mounts of a process: place, and whether it is read-only.
fn mounts(pid: i32) -> io::Result<Vec<(PathBuf, bool)>> {
    let text = fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
    // proc(5): the fifth field is the place, the sixth its options.
    let mount = |line: &str| {
        let mut fields = line.split(' ').skip(4);
        let place = fields.next()?.into();
        Some((
            place,
            fields.next()?.split(',').any(|option| option == "ro"),
        ))
    };
    Ok(text.lines().filter_map(mount).collect())
}

fn files(subject: &Subject) -> io::Result<Vec<Finding>> {
    let plan = &subject.plan;
    let mounts = mounts(subject.pid)?;
    let mut planned: BTreeSet<PathBuf> = plan.jail.files.keys().cloned().collect();
    planned.insert("/".into());
    if plan.jail.kvm {
        // A node of its own on a mount of its own, or the host's.
        planned.insert(match plan.jail.own_user() {
            true => "/dev".into(),
            false => "/dev/kvm".into(),
        });
    }
    if plan.jail.share.is_some() {
        planned.extend([SHARE, "/proc"].map(PathBuf::from));
    }
    let seen: BTreeSet<_> = mounts.iter().map(|(place, _)| place.clone()).collect();
    let odd: Vec<_> = seen.symmetric_difference(&planned).collect();
    let what = "mounts";
    let root = match odd.is_empty() {
        true => finding(
            "files",
            what,
            Verdict::Pass,
            format!("the {} planned", seen.len()),
        ),
        false => {
            let odd: Vec<_> = odd
                .iter()
                .take(5)
                .map(|place| place.display().to_string())
                .collect();
            let measured = format!("{}, among them {}", seen.len(), odd.join(" "));
            expect(
                "files",
                what,
                &measured,
                &format!("the {} planned", planned.len()),
            )
        }
    };
    let writable: Vec<_> = mounts
        .iter()
        .filter(|(place, read_only)| {
            let share = plan.jail.share == Some(true) && place == Path::new(SHARE);
            !read_only && !share
        })
        .map(|(place, _)| place.display().to_string())
        .take(5)
        .collect();
    let written = expect("files", "writable mounts", &writable.join(" "), "");
    // The name of the host's own root, seen from inside.
    let host = fs::symlink_metadata(format!("/proc/{}/root/etc", subject.pid)).is_ok();
    let host = if host { "there" } else { "not there" };
    let host = expect("files", "/etc of the host", host, "not there");
    let all = [root, written, host];
    Ok(all.map(|one| counted(plan, JailLayer::Files, one)).into())
}

fn descriptors(subject: &Subject) -> io::Result<Finding> {
    let plan = &subject.plan;
    let root = fs::canonicalize(&plan.root).unwrap_or_else(|_| plan.root.clone());
    let (mut count, mut odd) = (0, Vec::new());
    for entry in fs::read_dir(format!("/proc/{}/fd", subject.pid))? {
        let path = entry?.path();
        let Ok(target) = fs::read_link(&path) else {
            continue; // closed meanwhile
        };
        count += 1;
        let text = target.to_string_lossy();
        let anonymous = text.strip_prefix("anon_inode:");
        let known = match anonymous {
            Some(name) => ANONYMOUS.iter().any(|one| name.starts_with(one)),
            None => {
                text.starts_with("socket:[")
                    || text.starts_with("/memfd:")
                    || ["/dev/null", "/dev/vhost-vsock", "/dev/net/tun", "/dev/kvm"].contains(&&*text)
                    || target == root
                    || of_template(plan, &target, &path)
                    // Its writable disk, unlinked or kept.
                    || target.starts_with(&subject.dir)
                    || plan.jail.share.is_some() && target.starts_with(SHARE)
                    // Its kernel and firmware, while it loads them.
                    || plan.jail.files.contains_key(&target)
            }
        };
        if !known {
            odd.push(text.into_owned());
        }
    }
    Ok(match odd.is_empty() {
        true => finding(
            "files",
            "descriptors",
            Verdict::Pass,
            format!("{count}, all of them known"),
        ),
        false => {
            odd.truncate(5);
            let found = expect(
                "files",
                "descriptors",
                &odd.join(" "),
                "none besides the known",
            );
            counted(plan, JailLayer::Files, found)
        }
    })
}

/// Whether a descriptor is the file that its memory is in, or one beside that.
fn of_template(plan: &Plan, target: &Path, fd: &Path) -> bool {
    match &plan.ram {
        Ram::Own | Ram::Restored { .. } => false,
        Ram::Cloned { inode, .. } => is_inode(fd, *inode),
        Ram::Saved { file } => file.parent().is_some_and(|dir| target.starts_with(dir)),
    }
}

/// Whether a descriptor is of this device and inode, whatever its name.
fn is_inode(fd: &Path, inode: (u64, u64)) -> bool {
    fs::metadata(fd).is_ok_and(|meta| (meta.dev(), meta.ino()) == inode)
}

/// How a clone has its template's memory: it must not be able to write to it.
fn template(subject: &Subject) -> io::Result<Option<Finding>> {
    let Ram::Cloned {
        template, inode, ..
    } = &subject.plan.ram
    else {
        return Ok(None);
    };
    let mut modes = BTreeSet::new();
    for entry in fs::read_dir(format!("/proc/{}/fd", subject.pid))? {
        let path = entry?.path();
        if is_inode(&path, *inode) {
            modes.insert(mode(subject.pid, &path)?);
        }
    }
    let measured = modes.into_iter().collect::<Vec<_>>().join(" ");
    let what = format!("memory of template {template}");
    Ok(Some(expect("files", &what, &measured, "read-only")))
}

/// How a descriptor was opened (proc(5), fdinfo).
fn mode(pid: i32, fd: &Path) -> io::Result<&'static str> {
    let number = fd.file_name().unwrap_or_default().to_string_lossy();
    let text = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}"))?;
    let flags = text.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok());
    Ok(match flags.map(|flags| flags & nix::libc::O_ACCMODE) {
        Some(nix::libc::O_RDONLY) => "read-only",
        _ => "writable",
    })
}

fn limits(subject: &Subject) -> io::Result<Vec<Finding>> {
    let text = fs::read_to_string(format!("/proc/{}/limits", subject.pid))?;
    let read = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let words: Vec<_> = line
            .unwrap_or("missing")
            .split_whitespace()
            .take(2)
            .collect();
        words.join(" ")
    };
    let jail = &subject.plan.jail;
    let both = |value: u32| format!("{value} {value}");
    let mut findings = vec![
        expect(
            "user",
            "open files",
            &read("Max open files"),
            &both(jail.open_files),
        ),
        // One byte: no file, and no handler either, which 0 would not stop.
        expect("user", "core files", &read("Max core file size"), &both(1)),
    ];
    if let Some(most) = longest_file(subject) {
        let seen = read("Max file size");
        let within = seen.split(' ').all(|word| {
            let value: Option<u64> = word.parse().ok();
            value.is_some_and(|value| value <= most)
        });
        findings.push(match within {
            true => finding("user", "longest file", Verdict::Pass, seen),
            false => expect("user", "longest file", &seen, &format!("{most} at most")),
        });
    }
    if jail.own_user() {
        findings.push(expect(
            "user",
            "threads of its user",
            &read("Max processes"),
            &both(jail.threads),
        ));
    }
    Ok(findings)
}

/// The longest file it may write: its disk may have grown since it was planned.
fn longest_file(subject: &Subject) -> Option<u64> {
    let planned = subject.plan.jail.file_size?.0;
    let fd = subject.plan.fd(Descriptor::Scratch)?;
    let disk = fs::metadata(format!("/proc/{}/fd/{fd}", subject.pid));
    let grown = disk.map_or(0, |disk| longest(Bytes(disk.len())).0);
    Some(planned.max(grown))
}

/// The label the host's security module knows it by.
fn label(subject: &Subject) -> io::Result<Finding> {
    let jail = &subject.plan.jail;
    let what = "label";
    if !jail.has(JailLayer::Lsm) {
        return Ok(finding("lsm", what, Verdict::Waived, "not asked for"));
    }
    let unseen = |why: String| finding("lsm", what, Verdict::Unseen, why);
    let Some(planned) = &jail.label else {
        return Ok(unseen(match lsm::active() {
            None => "neither AppArmor nor SELinux is active".into(),
            Some(active) => format!(
                "{}; none was planned",
                lsm::label(subject.pid, active.kind)?
            ),
        }));
    };
    let seen = lsm::label(subject.pid, planned.kind)?;
    Ok(match planned.kind {
        // `NAME (MODE)`
        LsmKind::Apparmor => expect("lsm", what, &seen, &format!("{} (enforce)", planned.name)),
        LsmKind::Selinux if lsm::is_permissive() && seen == planned.name => {
            finding("lsm", what, Verdict::Weaker, format!("{seen}, permissive"))
        }
        LsmKind::Selinux => expect("lsm", what, &seen, &planned.name),
    })
}

/// Whether a process is the kernel's own.
fn is_kernel(pid: &str) -> bool {
    pid.parse().is_ok_and(process::is_kernel_thread)
}

fn cgroup(subject: &Subject) -> io::Result<Vec<Finding>> {
    let plan = &subject.plan;
    let Some(group) = Cgroup::of_leases(&subject.leases) else {
        let why = "it has none";
        let found = match plan.jail.unprivileged {
            true => finding("cgroup", "group", Verdict::Weaker, why),
            false => expect("cgroup", "group", why, "one of its own"),
        };
        return Ok(vec![counted(plan, JailLayer::Cgroup, found)]);
    };
    let pid = subject.pid.to_string();
    let mut findings = Vec::new();
    for dir in group.dirs() {
        let members = fs::read_to_string(dir.join("cgroup.procs"))
            .unwrap_or_else(|error| format!("unreadable ({error})"));
        // KVM and vhost put threads of the kernel beside it, which are no way
        // in: they do what QEMU may ask of them, on its account.
        let members: Vec<_> = members.lines().filter(|pid| !is_kernel(pid)).collect();
        let what = format!("processes in {}", dir.display());
        findings.push(expect("cgroup", &what, &members.join(" "), &pid));
    }
    let limit = |what: &str, names, expected: String| {
        let measured = group.read(names).unwrap_or_else(|| "missing".into());
        expect("cgroup", what, &measured, &expected)
    };
    // The kernel counts whole pages.
    let memory = plan.jail.memory.0 / 4096 * 4096;
    findings.push(limit(
        "memory",
        ["memory.max", "memory.limit_in_bytes"],
        memory.to_string(),
    ));
    if let Some(swap) = group.read(["memory.swap.max", "memory.swap.max"]) {
        findings.push(expect("cgroup", "swap", &swap, &memory.to_string()));
    } else if let Some(both) = group.read([MEMSW, MEMSW]) {
        let expected = (2 * plan.jail.memory.0 / 4096 * 4096).to_string();
        findings.push(expect("cgroup", "memory and swap", &both, &expected));
    }
    findings.push(limit(
        "threads",
        ["pids.max", "pids.max"],
        plan.jail.threads.to_string(),
    ));
    // Nobody changes it meanwhile.
    let quota = subject.cpu_quota.lock();
    let quota = quota.unwrap_or_else(PoisonError::into_inner);
    if let Some(percent) = *quota {
        let (seen, expected) = group.cpu_quota(percent);
        let seen = seen.unwrap_or_else(|| "missing".into());
        findings.push(expect("cgroup", "cpu", &seen, &expected));
    }
    Ok(findings
        .into_iter()
        .map(|one| counted(plan, JailLayer::Cgroup, one))
        .collect())
}
