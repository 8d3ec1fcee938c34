//! From the initramfs to the real root: disks, overlay, switch.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bulkhead_agent::{FailureKind, ROOT_SERIAL, SCRATCH_SERIAL};
use nix::mount::{MsFlags, mount};
use nix::unistd::{chdir, chroot};

use super::options::Options;
use super::scratch::Scratch;
use crate::failure::{Context, Result, failure};

/// How long the root disk may take to appear.
const DISK_DEADLINE: Duration = Duration::from_secs(5);

/// Mounts one file system, and says what failed.
pub(super) fn attach(
    source: impl AsRef<Path>,
    target: impl AsRef<Path>,
    kind: &str,
    flags: MsFlags,
    options: &str,
) -> Result<()> {
    let (source, target) = (source.as_ref(), target.as_ref());
    mount(Some(source), target, Some(kind), flags, Some(options)).context(|| {
        format!(
            "cannot mount {} ({kind}) on {}",
            source.display(),
            target.display()
        )
    })
}

/// Makes the overlay of the root and the scratch disk the root directory.
/// Returns the scratch disk, to be brought to rest before power-off.
///
/// # Errors
/// No root disk, or a mount that failed. Nothing useful can run then.
pub(super) fn enter(options: &Options) -> Result<Option<Scratch>> {
    let root = wait_for_disk(ROOT_SERIAL).ok_or_else(|| {
        failure(
            FailureKind::System,
            format!(
                "no disk with serial {ROOT_SERIAL} after {} s; \
                 is its driver in the kernel or the initramfs? (bulkhead.root=none goes without)",
                DISK_DEADLINE.as_secs()
            ),
        )
    })?;
    for dir in ["/root-disk", "/scratch", "/new-root"] {
        make_dir(dir)?;
    }
    attach(&root, "/root-disk", "squashfs", MsFlags::MS_RDONLY, "")?;
    let scratch = mount_scratch(options)?;
    for dir in ["/scratch/upper", "/scratch/work"] {
        make_dir(dir)?;
    }
    attach(
        "overlay",
        "/new-root",
        "overlay",
        MsFlags::empty(),
        "lowerdir=/root-disk,upperdir=/scratch/upper,workdir=/scratch/work",
    )?;
    for dir in ["proc", "sys", "dev"] {
        let target = Path::new("/new-root").join(dir);
        make_dir(&target)?;
        move_mount(&Path::new("/").join(dir), &target)?;
    }
    free_initramfs();
    chdir("/new-root").context(|| "cannot enter /new-root".into())?;
    move_mount(Path::new("."), Path::new("/"))?;
    chroot(".").context(|| "cannot make the overlay the root directory".into())?;
    chdir("/").context(|| "cannot enter the new root directory".into())?;
    Ok(scratch)
}

fn make_dir(path: impl AsRef<Path>) -> Result<()> {
    let path = path.as_ref();
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        result => result.context(|| format!("cannot make {}", path.display())),
    }
}

fn move_mount(from: &Path, to: &Path) -> Result<()> {
    mount(Some(from), to, None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .context(|| format!("cannot move {} to {}", from.display(), to.display()))
}

/// Everything written goes to the scratch disk where there is one, else to memory.
fn mount_scratch(options: &Options) -> Result<Option<Scratch>> {
    // The root disk is there, so all disks of the machine are.
    let disk = (!options.scratch_in_memory)
        .then(|| find_disk(SCRATCH_SERIAL))
        .flatten();
    let Some(disk) = disk else {
        attach("scratch", "/scratch", "tmpfs", MsFlags::empty(), "mode=755")?;
        return Ok(None);
    };
    Scratch::mount(disk, Path::new("/scratch")).map(Some)
}

fn wait_for_disk(serial: &str) -> Option<PathBuf> {
    let deadline = Instant::now() + DISK_DEADLINE;
    loop {
        if let Some(disk) = find_disk(serial) {
            return Some(disk);
        }
        if Instant::now() > deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Finds a disk by serial; letters depend on the machine type.
fn find_disk(serial: &str) -> Option<PathBuf> {
    let names = fs::read_dir("/sys/block")
        .ok()?
        .flatten()
        .map(|e| e.file_name());
    names
        .filter(|name| name.as_bytes().starts_with(b"vd"))
        .find(|name| serial_of(name).as_deref() == Some(OsStr::new(serial)))
        .map(|name| Path::new("/dev").join(name))
        .filter(|disk| disk.exists())
}

fn serial_of(name: &OsStr) -> Option<OsString> {
    let text = fs::read(Path::new("/sys/block").join(name).join("serial")).ok()?;
    let end = text
        .iter()
        .position(|b| matches!(b, 0 | b'\n'))
        .unwrap_or(text.len());
    Some(OsStr::from_bytes(&text[..end]).to_owned())
}

/// Gives the memory of the initramfs' files back.
fn free_initramfs() {
    let Ok(root) = fs::metadata("/") else { return };
    remove_below(Path::new("/"), root.dev());
}

fn remove_below(dir: &Path, device: u64) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let Ok(meta) = fs::symlink_metadata(&path) else {
            continue;
        };
        // Mounted file systems are not part of it.
        if meta.dev() != device {
            continue;
        }
        if meta.is_dir() {
            remove_below(&path, device);
            let _ = fs::remove_dir(&path);
        } else {
            let _ = fs::remove_file(&path);
        }
    }
}
