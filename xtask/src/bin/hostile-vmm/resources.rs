//! More of the host than it is given.

use std::time::Duration;

use nix::libc;

use crate::{Attempt, Came, call, deep, flat, tried};

/// More than the jail of any probe allows.
const THREADS: usize = 400;
const DESCRIPTORS: usize = 4096;
const MEMORY: usize = 6 << 30;

fn thread_bomb() -> Came {
    for made in 0..THREADS {
        let thread = std::thread::Builder::new().stack_size(64 << 10);
        if let Err(error) = thread.spawn(|| std::thread::sleep(Duration::from_secs(60))) {
            return Came::Refused(format!("after {made} threads: {error}"));
        }
    }
    Came::Out(format!("{THREADS} threads"))
}

fn descriptor_bomb() -> Came {
    for made in 0..DESCRIPTORS {
        // SAFETY: an integer.
        if unsafe { libc::dup(2) } < 0 {
            let error = std::io::Error::last_os_error();
            return Came::Refused(format!("after {made} descriptors: {error}"));
        }
    }
    Came::Out(format!("{DESCRIPTORS} descriptors"))
}

fn memory_bomb() -> Came {
    let mut held = Vec::new();
    while held.len() << 20 < MEMORY {
        // Written to, or it takes no memory.
        held.push(vec![1u8; 1 << 20]);
    }
    Came::Out(format!("{} MiB", held.len()))
}

fn lock_memory() -> Came {
    let block = vec![1u8; 1 << 20];
    call(libc::SYS_mlock, &[block.as_ptr() as usize, block.len()])
}

fn raise(resource: u32) -> Came {
    let limit = [u64::MAX, u64::MAX];
    call(
        libc::SYS_prlimit64,
        &[0, resource as usize, limit.as_ptr() as usize, 0],
    )
}

/// A descriptor that QEMU would not have: it gets ten at most.
fn leaked_descriptor() -> Came {
    for fd in 16..4096 {
        // SAFETY: integers.
        if unsafe { libc::fcntl(fd, libc::F_GETFD) } >= 0 {
            return Came::Out(format!("descriptor {fd} is open"));
        }
    }
    Came::Refused("none is open".into())
}

/// Its disks: the root disk is everybody's, and nobody may write to it.
fn write_to_root_disk() -> Came {
    let mut seen = 0;
    for fd in 3..16 {
        // SAFETY: integers.
        let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
        // SAFETY: a zeroed structure for the kernel to fill.
        let mut stat: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: a valid structure.
        let file = flags >= 0
            && unsafe { libc::fstat(fd, &raw mut stat) } == 0
            && stat.st_mode & libc::S_IFMT == libc::S_IFREG;
        // What has a name is kept; its own disk is unlinked.
        if file && stat.st_nlink > 0 {
            seen += 1;
            // SAFETY: one valid byte, past the end of any squashfs.
            if unsafe { libc::pwrite(fd, [0u8].as_ptr().cast(), 1, 1 << 40) } > 0 {
                return Came::Out(format!("descriptor {fd} was written to"));
            }
        }
    }
    match seen {
        0 => Came::Skipped("it was given no disk that has a name".into()),
        _ => Came::Refused("it is not open for writing".into()),
    }
}

/// One byte far behind the end of its own disk: the host's would fill up.
fn write_past_disk() -> Came {
    // SAFETY: the signal for it is ignored, as whoever wants to go on would do.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    for fd in 3..16 {
        // SAFETY: one valid byte.
        let wrote = unsafe { libc::pwrite(fd, [0u8].as_ptr().cast(), 1, 1 << 41) };
        if wrote > 0 {
            return Came::Out(format!("descriptor {fd} is 2 TiB long now"));
        }
    }
    Came::Refused("no descriptor can be written there".into())
}

/// Core dumps, which a handler of the host's reads as root: off at 1 byte, and
/// on again at 0.
fn core_handler() -> Came {
    // SAFETY: a zeroed structure for the kernel to fill.
    let mut limit: libc::rlimit = unsafe { std::mem::zeroed() };
    // SAFETY: a valid structure.
    unsafe { libc::getrlimit(libc::RLIMIT_CORE, &raw mut limit) };
    match (limit.rlim_cur, limit.rlim_max) {
        (1, 1) => Came::Refused("the limit is one byte, at which none is run".into()),
        (soft, hard) => Came::Out(format!("the limit is {soft}, {hard}")),
    }
}

fn grow_root_disk() -> Came {
    for fd in 3..16 {
        // SAFETY: a zeroed structure for the kernel to fill.
        let mut stat: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: a valid structure.
        let named = unsafe { libc::fstat(fd, &raw mut stat) } == 0 && stat.st_nlink > 0;
        if named && stat.st_mode & libc::S_IFMT == libc::S_IFREG {
            // SAFETY: integers.
            if unsafe { libc::fchmod(fd, 0o666) } == 0 {
                return Came::Out("its mode was changed".into());
            }
        }
    }
    Came::Refused("it belongs to somebody else".into())
}

pub(crate) const ATTEMPTS: &[Attempt] = &[
    deep("make threads without end", thread_bomb),
    deep("open descriptors without end", descriptor_bomb),
    deep("use memory without end", memory_bomb),
    deep("lock memory", lock_memory),
    deep("raise its limit of open files", || {
        raise(libc::RLIMIT_NOFILE)
    }),
    deep("raise its limit of processes", || raise(libc::RLIMIT_NPROC)),
    deep("have a handler of core dumps run", core_handler),
    flat("lower its limit of core files to zero", || {
        let none = [0u64, 0];
        let core = libc::RLIMIT_CORE as usize;
        call(libc::SYS_prlimit64, &[0, core, none.as_ptr() as usize, 0])
    }),
    deep("write past its disk", write_past_disk),
    deep("raise its limit of core files", || raise(libc::RLIMIT_CORE)),
    deep("use a descriptor that was left open", leaked_descriptor),
    deep("write to the root disk", write_to_root_disk),
    deep("change the mode of the root disk", grow_root_disk),
    deep("open the root disk anew", || {
        tried(std::fs::File::options().write(true).open("/proc/self/fd/7"))
    }),
];
