//! The disk that takes everything the guest writes.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bulkhead_agent::FailureKind;
use nix::libc::O_DIRECTORY;
use nix::mount::MsFlags;

use super::root::attach;
use super::sys;
use crate::console::{complain, note};
use crate::failure::{Context, Result, failure, invalid};

/// How long the kernel may take to notice that the disk has grown.
const NOTICE: Duration = Duration::from_secs(5);

/// The scratch disk, mounted.
#[derive(Debug)]
pub(crate) struct Scratch {
    disk: PathBuf,
    /// Its root directory: the file system has no path once the overlay is the root.
    dir: File,
}

impl Scratch {
    /// Mounts `disk` on `target` and lets the file system fill it.
    ///
    /// # Errors
    /// It cannot be mounted. One that stays small still lets the machine run.
    pub(super) fn mount(disk: PathBuf, target: &Path) -> Result<Self> {
        // What is deleted is the host's again (docs/decisions/0009-disks.md).
        attach(&disk, target, "ext4", MsFlags::MS_NOATIME, "discard")?;
        let dir = File::options()
            .read(true)
            .custom_flags(O_DIRECTORY)
            .open(target)
            .context(|| "cannot open the scratch file system".into())?;
        let scratch = Self { disk, dir };
        if let Err(error) = scratch.fill() {
            complain!("{}", error.message);
        }
        Ok(scratch)
    }

    /// Waits until the disk has at least `bytes` bytes, as the host has made
    /// it, and lets the file system fill it.
    ///
    /// # Errors
    /// The disk stays smaller, or the kernel cannot grow the file system.
    pub(crate) fn grow(&self, bytes: u64) -> Result<()> {
        let deadline = Instant::now() + NOTICE;
        loop {
            let size = self.size()?;
            if size >= bytes {
                return self.fill();
            }
            if Instant::now() > deadline {
                return Err(invalid(format!(
                    "the disk has {size} bytes, not the {bytes} it should have"
                )));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Has the file system finish what it would write a few seconds later. A
    /// kernel that cannot be asked to does it then.
    pub(crate) fn commit(&self) {
        let _ = sys::flush_journal(&self.dir);
    }

    /// Stops all writes, with everything on the disk.
    pub(super) fn freeze(&self) -> nix::Result<()> {
        sys::freeze(&self.dir)
    }

    /// Size of the disk in bytes.
    fn size(&self) -> Result<u64> {
        let name = self.disk.file_name().unwrap_or_default();
        let file = Path::new("/sys/block").join(name).join("size");
        let text = fs::read_to_string(&file)
            .context(|| format!("cannot read the size of {}", self.disk.display()))?;
        let sectors: u64 = text.trim().parse().map_err(|_| {
            let what = format!("{} is not a number: {text:?}", file.display());
            failure(FailureKind::System, what)
        })?;
        Ok(sectors * 512)
    }

    /// Lets the file system fill its disk.
    fn fill(&self) -> Result<()> {
        let (block, used) = self.superblock()?;
        let blocks = self.size()? / block;
        if blocks <= used {
            return Ok(());
        }
        sys::resize_ext4(&self.dir, blocks).context(|| {
            format!(
                "cannot grow {} from {used} to {blocks} blocks",
                self.disk.display()
            )
        })?;
        note!(
            "grew the scratch file system to {} MiB",
            (blocks * block) >> 20
        );
        Ok(())
    }

    /// Block size in bytes and number of blocks, as ext4's superblock has them.
    fn superblock(&self) -> Result<(u64, u64)> {
        let mut bytes = [0; 1024];
        File::open(&self.disk)
            .and_then(|file| file.read_exact_at(&mut bytes, 1024))
            .context(|| format!("cannot read the superblock of {}", self.disk.display()))?;
        let word = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        // s_log_block_size; s_blocks_count_lo and _hi (kernel doc, ext4 superblock).
        let block = 1024_u64 << (word(0x18) & 0xf);
        let blocks = u64::from(word(0x4)) | u64::from(word(0x150)) << 32;
        Ok((block, blocks))
    }
}
