//! Parts of the kernel that QEMU has no business with.

use nix::libc;

use crate::{Attempt, Came, call, deep, flat, text};

/// A call of the 32-bit table: 359 is socket there.
#[cfg(target_arch = "x86_64")]
fn old_table() -> Came {
    let result: i32;
    // SAFETY: the kernel keeps all registers but eax; rbx is restored.
    unsafe {
        std::arch::asm!(
            "xchg rbx, {family}",
            "int 0x80",
            "xchg rbx, {family}",
            family = inout(reg) 1u64 => _,
            inlateout("eax") 359i32 => result,
            in("ecx") 1,
            in("edx") 0,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    match result {
        0.. => Came::Out(format!("it gave {result}")),
        error => Came::Refused(std::io::Error::from_raw_os_error(-error).to_string()),
    }
}

/// An ioctl on every descriptor it was given.
fn ioctl(request: usize) -> Came {
    let mut buffer = [0u8; 256];
    for fd in 0..32 {
        if let Came::Out(why) = call(
            libc::SYS_ioctl,
            &[fd, request, buffer.as_mut_ptr() as usize],
        ) {
            return Came::Out(why);
        }
    }
    Came::Refused("no descriptor takes it".into())
}

/// A key of whoever started it: the probe has one in its session's keyring.
fn key_of_owner() -> Came {
    let (search, session) = (10, -3_isize as usize);
    let name = text(c"bulkhead-probe-canary");
    call(libc::SYS_keyctl, &[search, session, text(c"user"), name, 0])
}

/// A filter that the kernel compiles, on a socket it was given.
fn socket_filter() -> Came {
    // struct sock_filter: return 65535 bytes; struct sock_fprog: how many, where.
    let code = [0x0000_ffff_0000_0006_u64];
    let program = [1, code.as_ptr() as u64];
    let (level, attach_filter) = (libc::SOL_SOCKET as usize, 26);
    for fd in 0..16 {
        let at = program.as_ptr() as usize;
        if let Came::Out(why) = call(libc::SYS_setsockopt, &[fd, level, attach_filter, at, 16]) {
            return Came::Out(why);
        }
    }
    Came::Refused("no descriptor takes it".into())
}

fn io_uring() -> Came {
    let mut parameters = [0u8; 120];
    call(
        libc::SYS_io_uring_setup,
        &[1, parameters.as_mut_ptr() as usize],
    )
}

fn bpf() -> Came {
    // BPF_MAP_CREATE: an array of one.
    let attr = [2u32, 4, 4, 1, 0, 0, 0, 0];
    call(libc::SYS_bpf, &[0, attr.as_ptr() as usize, 32])
}

fn perf() -> Came {
    let mut attr = [0u32; 32];
    (attr[0], attr[1]) = (0, 128);
    let minus_one = -1_isize as usize;
    // Of everybody, on the first processor.
    call(
        libc::SYS_perf_event_open,
        &[attr.as_ptr() as usize, minus_one, 0, minus_one, 0],
    )
}

/// Any segment there is: the probe has made one.
fn shared_memory() -> Came {
    let mut buffer = [0u8; 256];
    for index in 0..64 {
        let shm_stat = 13;
        let arguments = [index, shm_stat, buffer.as_mut_ptr() as usize];
        if let Came::Out(why) = call(libc::SYS_shmctl, &arguments) {
            return Came::Out(why);
        }
    }
    Came::Refused("there is none".into())
}

fn message_queue() -> Came {
    let create = libc::O_CREAT as usize;
    call(
        libc::SYS_mq_open,
        &[text(c"bulkhead-probe"), create, 0o600, 0],
    )
}

pub(crate) const ATTEMPTS: &[Attempt] = &[
    flat("use io_uring", io_uring),
    deep("load a BPF map", bpf),
    deep("watch the processor's events", perf),
    flat("handle page faults itself", || {
        call(libc::SYS_userfaultfd, &[0])
    }),
    flat("add a key", || {
        call(
            libc::SYS_add_key,
            &[text(c"user"), text(c"x"), text(c"x"), 1, -3_isize as usize],
        )
    }),
    deep("find a key of its owner", key_of_owner),
    flat("filter a socket it was given", socket_filter),
    flat("look into keyrings", || {
        call(libc::SYS_keyctl, &[0, -5_isize as usize, 1])
    }),
    flat("ask for a key", || {
        call(libc::SYS_request_key, &[text(c"user"), text(c"x"), 0, 0])
    }),
    deep("load another kernel", || {
        call(libc::SYS_kexec_load, &[0, 0, 0, 0])
    }),
    deep("load another kernel from a file", || {
        call(libc::SYS_kexec_file_load, &[0, 0, 0, 0, 0])
    }),
    deep("load a module", || {
        call(libc::SYS_init_module, &[text(c"x"), 1, text(c"")])
    }),
    deep("load a module from a file", || {
        call(libc::SYS_finit_module, &[0, text(c""), 0])
    }),
    deep("remove a module", || {
        call(libc::SYS_delete_module, &[text(c"loop"), 0x800])
    }),
    deep("restart the host", || {
        call(libc::SYS_reboot, &[0xfee1_dead, 0x2812_1969, 0])
    }),
    deep("read the kernel's log", || {
        let mut buffer = [0u8; 64];
        call(libc::SYS_syslog, &[3, buffer.as_mut_ptr() as usize, 64])
    }),
    deep("account for processes", || {
        call(libc::SYS_acct, &[text(c"/x")])
    }),
    deep("change the host's name", || {
        call(libc::SYS_sethostname, &[text(c"x"), 1])
    }),
    deep("change the domain's name", || {
        call(libc::SYS_setdomainname, &[text(c"x"), 1])
    }),
    deep("set the clock", || {
        // To what it is: nobody else should suffer from a jail that leaks.
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let time = [now.map_or(0, |now| now.as_secs()), 0];
        call(libc::SYS_clock_settime, &[0, time.as_ptr() as usize])
    }),
    deep("adjust the clock", || {
        let mut adjust = [0u64; 26];
        // ADJ_MAXERROR: an estimate that nobody acts on.
        adjust[0] = 4;
        call(libc::SYS_adjtimex, &[adjust.as_ptr() as usize])
    }),
    deep("use I/O ports", || call(libc::SYS_iopl, &[3])),
    deep("use one I/O port", || call(libc::SYS_ioperm, &[0x70, 1, 1])),
    flat("change segments", || {
        let mut buffer = [0u8; 64];
        call(libc::SYS_modify_ldt, &[0, buffer.as_mut_ptr() as usize, 64])
    }),
    deep("watch all files", || call(libc::SYS_fanotify_init, &[4, 0])),
    flat("watch files", || call(libc::SYS_inotify_init1, &[0])),
    deep("swap to a file", || {
        call(libc::SYS_swapon, &[text(c"/kernel"), 0])
    }),
    deep("stop swapping", || {
        call(libc::SYS_swapoff, &[text(c"/kernel")])
    }),
    flat("change quotas", || {
        call(libc::SYS_quotactl, &[0x8000_0200, text(c"/"), 0, 0])
    }),
    deep("hang up the terminal", || call(libc::SYS_vhangup, &[])),
    deep("reach shared memory of the host", shared_memory),
    flat("make a POSIX message queue", message_queue),
    flat("make a message queue", || {
        call(libc::SYS_msgget, &[1, 0o1600])
    }),
    flat("make semaphores", || {
        call(libc::SYS_semget, &[1, 1, 0o1600])
    }),
    deep("type for the user (TIOCSTI)", || ioctl(0x5412)),
    deep("take a terminal", || ioctl(0x540e)),
    deep("make a tap", || ioctl(0x4004_54ca)),
    deep("format a disk", || ioctl(0x125f)),
    deep("encrypt a guest of KVM's", || ioctl(0xc008_aeba)),
    deep("have KVM pretend to be Xen", || ioctl(0x4038_ae7a)),
    deep("make guest memory of KVM's own", || ioctl(0xc040_aed4)),
    deep("make a worker of vhost's", || ioctl(0x8004_af08)),
    flat("see a file system's freezer", || ioctl(0xc004_5877)),
    flat("send a file by the kernel", || {
        call(libc::SYS_sendfile, &[1, 0, 0, 1])
    }),
    flat("splice", || call(libc::SYS_splice, &[0, 0, 1, 0, 1, 0])),
    flat("use a call of the 32-bit table", old_table),
    flat("use a call of the x32 table", || {
        call(0x4000_0000 | 41, &[1, 1, 0])
    }),
    flat("use a call there is not", || call(1_000_000, &[])),
];
