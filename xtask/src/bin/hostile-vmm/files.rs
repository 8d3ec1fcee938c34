//! Files of the host, and files of the jail that are not to be changed.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{PermissionsExt, symlink};

use nix::libc;

use crate::{Attempt, Came, call, deep, flat, text, tried};

fn read(path: &str) -> Came {
    tried(fs::read(path))
}

fn write(path: &str) -> Came {
    tried(OpenOptions::new().write(true).open(path))
}

fn mount(
    source: &std::ffi::CStr,
    target: &std::ffi::CStr,
    kind: &std::ffi::CStr,
    flags: u64,
) -> Came {
    let arguments = [text(source), text(target), text(kind), flags as usize, 0];
    call(libc::SYS_mount, &arguments)
}

/// The classic way out of a chroot.
fn chroot_escape() -> Came {
    let _ = fs::create_dir("/x");
    match call(libc::SYS_chroot, &[text(c"/lib")]) {
        Came::Out(_) => {
            for _ in 0..64 {
                let _ = std::env::set_current_dir("..");
            }
            call(libc::SYS_chroot, &[text(c".")]);
            read("etc/passwd")
        }
        refused => refused,
    }
}

/// Opens an inode by its number instead of by a name.
fn by_handle() -> Came {
    let Ok(root) = File::open("/") else {
        return Came::Refused("the root cannot be opened".into());
    };
    // struct file_handle: size, type FILEID_INO32_GEN, inode 2, generation 0.
    let handle = [8u32, 1, 2, 0];
    let fd = std::os::fd::AsRawFd::as_raw_fd(&root) as usize;
    call(
        libc::SYS_open_by_handle_at,
        &[fd, handle.as_ptr() as usize, 0],
    )
}

fn given_directory() -> Came {
    for fd in 0..1024 {
        // SAFETY: a zeroed structure for the kernel to fill.
        let mut stat: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: a valid structure.
        let got = unsafe { libc::fstat(fd, &raw mut stat) };
        if got == 0 && stat.st_mode & libc::S_IFMT == libc::S_IFDIR {
            return Came::Out(format!("descriptor {fd} is a directory"));
        }
    }
    Came::Refused("no descriptor is a directory".into())
}

fn listing() -> Came {
    match fs::read_dir("/") {
        Ok(entries) => {
            let names = entries
                .flatten()
                .map(|entry| entry.file_name().to_string_lossy().into_owned());
            let known = [
                "qemu",
                "lib",
                "lib64",
                "modules",
                "firmware",
                "kernel",
                "initramfs",
                "dev",
                "share",
                "proc",
            ];
            let odd: Vec<_> = names
                .filter(|name| !known.contains(&name.as_str()))
                .collect();
            match odd.is_empty() {
                true => Came::Refused("only what was planned is there".into()),
                false => Came::Out(odd.join(" ")),
            }
        }
        Err(error) => Came::Refused(error.to_string()),
    }
}

pub(crate) const ATTEMPTS: &[Attempt] = &[
    deep("read /etc/passwd", || read("/etc/passwd")),
    deep("read /etc/shadow", || read("/etc/shadow")),
    deep("read /etc/passwd by way of ..", || {
        read("/../../../../../../etc/passwd")
    }),
    deep("list the host's root", listing),
    deep("read the environment of process 1", || {
        read("/proc/1/environ")
    }),
    deep("read /proc/self/mountinfo", || read("/proc/self/mountinfo")),
    deep("read /proc/kcore", || read("/proc/kcore")),
    deep("reach a root by /proc/self/root", || {
        read("/proc/self/root/etc/passwd")
    }),
    deep("list /sys", || tried(fs::read_dir("/sys"))),
    deep("read the host's disk", || read("/dev/vda")),
    deep("read the kernel's memory", || read("/dev/mem")),
    deep("read the kernel's log", || read("/dev/kmsg")),
    deep("open /dev/net/tun", || write("/dev/net/tun")),
    deep("open /dev/vhost-net", || write("/dev/vhost-net")),
    deep("open /dev/fuse", || write("/dev/fuse")),
    deep("open a terminal", || write("/dev/ptmx")),
    deep("open the controlling terminal", || write("/dev/tty")),
    deep("set the handler of core dumps", || {
        write("/proc/sys/kernel/core_pattern")
    }),
    deep("set the program for modules", || {
        write("/proc/sys/kernel/modprobe")
    }),
    deep("press SysRq", || write("/proc/sysrq-trigger")),
    deep("leave the control group", || {
        write("/sys/fs/cgroup/cgroup.procs")
    }),
    deep("set a release agent", || {
        write("/sys/fs/cgroup/release_agent")
    }),
    deep("change the program", || write("/qemu")),
    deep("change the C library", || write("/lib/libc.so.6")),
    deep("change the guest's kernel", || write("/kernel")),
    deep("make a file", || tried(File::create("/x"))),
    deep("make a file in /tmp", || tried(File::create("/tmp/x"))),
    deep("make a directory", || tried(fs::create_dir("/d"))),
    deep("make a link", || tried(symlink("/etc", "/l"))),
    deep("make a second name", || tried(fs::hard_link("/qemu", "/q"))),
    deep("remove the guest's kernel", || {
        tried(fs::remove_file("/kernel"))
    }),
    deep("rename the program", || tried(fs::rename("/qemu", "/q"))),
    deep("make the program setuid", || {
        tried(fs::set_permissions(
            "/qemu",
            fs::Permissions::from_mode(0o4755),
        ))
    }),
    flat("make a setuid file", || {
        let flags = (libc::O_CREAT | libc::O_WRONLY) as usize;
        call(
            libc::SYS_openat,
            &[-100_isize as usize, text(c"/tmp/x"), flags, 0o4755],
        )
    }),
    deep("own the program", || {
        tried(std::os::unix::fs::chown("/qemu", Some(0), Some(0)))
    }),
    deep("cut the guest's kernel", || {
        call(libc::SYS_truncate, &[text(c"/kernel"), 0])
    }),
    deep("set an attribute", || {
        call(
            libc::SYS_setxattr,
            &[text(c"/qemu"), text(c"user.x"), text(c"x"), 1, 0],
        )
    }),
    deep("make a device node", || {
        let block = (libc::S_IFBLK | 0o666) as usize;
        call(libc::SYS_mknod, &[text(c"/disk"), block, 0xfe00])
    }),
    deep("make a pipe with a name", || {
        call(libc::SYS_mknod, &[text(c"/pipe"), 0o010_666, 0])
    }),
    deep("escape by chroot", chroot_escape),
    deep("open an inode by its handle", by_handle),
    deep("use a directory that was left open", given_directory),
    deep("mount a tmpfs", || mount(c"x", c"/lib", c"tmpfs", 0)),
    deep("mount a proc", || mount(c"proc", c"/lib", c"proc", 0)),
    deep("make the root writable", || {
        mount(c"", c"/", c"", 0x20 | 0x1000)
    }),
    deep("bind the root elsewhere", || {
        mount(c"/", c"/lib", c"", 0x1000)
    }),
    deep("uncover what is below a mount", || {
        call(libc::SYS_umount2, &[text(c"/kernel"), 2])
    }),
    deep("change attributes of a mount", || {
        let attr = [0u64, 1, 0, 0];
        call(
            442,
            &[
                -100_isize as usize,
                text(c"/"),
                0,
                attr.as_ptr() as usize,
                32,
            ],
        )
    }),
    deep("clone a mount", || {
        call(428, &[-100_isize as usize, text(c"/"), 1])
    }),
    deep("open a file system", || call(430, &[text(c"tmpfs"), 0])),
    deep("change the root again", || {
        call(libc::SYS_pivot_root, &[text(c"/"), text(c"/")])
    }),
];
