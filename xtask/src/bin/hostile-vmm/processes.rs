//! Other processes, other users, other namespaces.

use nix::libc;

use crate::{Attempt, Came, call, deep, flat, text};

/// Highest process id that is looked for.
const PIDS: usize = 50_000;

/// Asks for each process but this one: out if one answers.
fn each(ask: impl Fn(usize) -> Came) -> Came {
    let own = std::process::id() as usize;
    let mut last = Came::Refused("no process is there".into());
    for pid in (1..PIDS).filter(|pid| *pid != own) {
        match ask(pid) {
            Came::Out(why) => return Came::Out(format!("process {pid}: {why}")),
            other => last = other,
        }
    }
    last
}

fn unshare(flag: libc::c_int) -> Came {
    call(libc::SYS_unshare, &[flag as usize])
}

fn become_root() -> Came {
    call(libc::SYS_setresuid, &[0, 0, 0])
}

fn exec(path: &std::ffi::CStr) -> Came {
    let words = [text(path), 0];
    let none = [0usize];
    call(
        libc::SYS_execve,
        &[text(path), words.as_ptr() as usize, none.as_ptr() as usize],
    )
}

/// Runs bytes that are in no file.
fn exec_memory() -> Came {
    let name = text(c"x");
    // SAFETY: a text that ends in zero.
    let fd = unsafe { libc::syscall(libc::SYS_memfd_create, name, 0) };
    if fd < 0 {
        return Came::Refused(std::io::Error::last_os_error().to_string());
    }
    let words = [name, 0];
    call(
        libc::SYS_execveat,
        &[fd as usize, text(c""), words.as_ptr() as usize, 0, 0x1000],
    )
}

/// Memory with these rights from the start, under KVM: emulation has to execute
/// what it writes.
fn memory(rights: libc::c_int) -> Came {
    if let Err(error) = std::fs::File::open("/dev/kvm") {
        return Came::Skipped(format!("emulation needs such memory (/dev/kvm: {error})"));
    }
    let (minus_one, flags) = (-1_isize as usize, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let rights = rights as usize;
    call(
        libc::SYS_mmap,
        &[0, 4096, rights, flags as usize, minus_one, 0],
    )
}

/// The same with memory that was written before.
fn execute_what_was_written() -> Came {
    let (read, execute) = (libc::PROT_READ, libc::PROT_EXEC);
    match memory(read | libc::PROT_WRITE) {
        Came::Out(_) => {}
        other => return other,
    }
    let page = vec![0u8; 8192];
    let at = (page.as_ptr() as usize).next_multiple_of(4096);
    call(libc::SYS_mprotect, &[at, 4096, (read | execute) as usize])
}

/// All capabilities there are.
fn capabilities() -> Came {
    let (header, all) = ([0x2008_0522_u32, 0], [u32::MAX; 6]);
    call(
        libc::SYS_capset,
        &[header.as_ptr() as usize, all.as_ptr() as usize],
    )
}

fn fork() -> Came {
    // SAFETY: the child ends at once.
    match unsafe { libc::syscall(libc::SYS_fork) } {
        // SAFETY: as above.
        0 => unsafe { libc::_exit(0) },
        result => crate::came(result),
    }
}

fn read_memory(pid: usize) -> Came {
    let mut buffer = [0u8; 8];
    let local = [buffer.as_mut_ptr() as usize, 8];
    let remote = [0x40_0000_usize, 8];
    call(
        libc::SYS_process_vm_readv,
        &[
            pid,
            local.as_ptr() as usize,
            1,
            remote.as_ptr() as usize,
            1,
            0,
        ],
    )
}

pub(crate) const ATTEMPTS: &[Attempt] = &[
    deep("see another process", || {
        each(|pid| call(libc::SYS_kill, &[pid, 0]))
    }),
    deep("signal everybody", || {
        call(libc::SYS_kill, &[-1_isize as usize, 0])
    }),
    deep("signal a thread of another", || {
        each(|pid| call(libc::SYS_tgkill, &[pid, pid, 0]))
    }),
    deep("hold another process", || {
        each(|pid| call(libc::SYS_pidfd_open, &[pid, 0]))
    }),
    deep("trace another process", || {
        each(|pid| call(libc::SYS_ptrace, &[libc::PTRACE_ATTACH as usize, pid, 0, 0]))
    }),
    deep("read another's memory", || each(read_memory)),
    deep("limit another process", || {
        let limit = [0u64, 0];
        each(|pid| call(libc::SYS_prlimit64, &[pid, 0, limit.as_ptr() as usize, 0]))
    }),
    deep("take over a descriptor of another", || {
        each(|pid| match call(libc::SYS_pidfd_open, &[pid, 0]) {
            Came::Out(_) => call(438, &[3, 0, 0]),
            other => other,
        })
    }),
    deep("find its owner", || {
        let parent = call(libc::SYS_getppid, &[]);
        match parent {
            Came::Out(why) if why == "it gave 0" => Came::Refused("it has no parent here".into()),
            other => other,
        }
    }),
    deep("change the priority of another process", || {
        each(|pid| {
            call(
                libc::SYS_setpriority,
                &[libc::PRIO_PROCESS as usize, pid, 1],
            )
        })
    }),
    deep("raise its own priority", || {
        call(libc::SYS_setpriority, &[0, 0, -20_isize as usize])
    }),
    deep("run in real time", || {
        let priority = [50u32];
        call(
            libc::SYS_sched_setscheduler,
            &[0, 1, priority.as_ptr() as usize],
        )
    }),
    deep("read and write before others", || {
        call(libc::SYS_ioprio_set, &[1, 0, 1 << 13])
    }),
    flat("fork", fork),
    flat("make a process with clone", || {
        call(libc::SYS_clone, &[libc::SIGCHLD as usize, 0, 0, 0, 0])
    }),
    flat("make a user namespace", || unshare(libc::CLONE_NEWUSER)),
    deep("make a mount namespace", || unshare(libc::CLONE_NEWNS)),
    deep("make a network namespace", || unshare(libc::CLONE_NEWNET)),
    deep("make a pid namespace", || unshare(libc::CLONE_NEWPID)),
    deep("make an IPC namespace", || unshare(libc::CLONE_NEWIPC)),
    deep("make a host name namespace", || unshare(libc::CLONE_NEWUTS)),
    deep("make a control group namespace", || {
        unshare(libc::CLONE_NEWCGROUP)
    }),
    deep("make a time namespace", || unshare(0x80)),
    deep("enter a namespace", || {
        for fd in 0..64 {
            if let Came::Out(why) = call(libc::SYS_setns, &[fd, 0]) {
                return Came::Out(why);
            }
        }
        Came::Refused("no descriptor is one".into())
    }),
    deep("become root", become_root),
    deep("become root's group", || {
        call(libc::SYS_setresgid, &[0, 0, 0])
    }),
    deep("join groups", || {
        let groups = [0u32];
        call(libc::SYS_setgroups, &[1, groups.as_ptr() as usize])
    }),
    deep("gain capabilities", capabilities),
    deep("raise an ambient capability", || {
        call(
            libc::SYS_prctl,
            &[libc::PR_CAP_AMBIENT as usize, 2, 21, 0, 0],
        )
    }),
    deep("change its secure bits", || {
        call(libc::SYS_prctl, &[libc::PR_SET_SECUREBITS as usize, 0])
    }),
    deep("take back no_new_privs", || {
        call(
            libc::SYS_prctl,
            &[libc::PR_SET_NO_NEW_PRIVS as usize, 0, 0, 0, 0],
        )
    }),
    deep("take off its filter", || {
        call(
            libc::SYS_prctl,
            &[libc::PR_SET_SECCOMP as usize, 0, 0, 0, 0],
        )
    }),
    deep("execute a shell", || exec(c"/bin/sh")),
    deep("execute a setuid program", || exec(c"/usr/bin/su")),
    deep("execute the guest's kernel", || exec(c"/kernel")),
    flat("execute memory", exec_memory),
    flat("make memory that is written and executed", || {
        memory(libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC)
    }),
    flat("execute memory that was written", execute_what_was_written),
    flat("change its personality", || {
        call(libc::SYS_personality, &[0x004_0000])
    }),
    flat("compare kernel objects", || {
        call(libc::SYS_kcmp, &[1, 1, 0, 0, 0])
    }),
];
