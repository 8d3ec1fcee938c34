//! The disk a machine writes to: made once per size, copied sparsely per machine.

use std::fs;
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::copy_file_range;
use nix::unistd::{Whence, lseek64};

use super::error::{Error, Result};
use super::tool::MKFS_EXT4;

/// The same in every template: the guest finds the disk by its serial number,
/// and the same size should give the same file.
const UUID: &str = "6b756c62-6561-4864-a100-736372617463";
/// Part of a template's name: raise it when the arguments of mkfs change.
const FORMAT: u32 = 3;
/// What a directory with a template in the making begins with.
const FRESH: &str = ".scratch-";
/// Age at which nobody is making it any more.
const STALE: std::time::Duration = std::time::Duration::from_secs(3600);
/// Smallest disk made, in bytes.
const MIN_SIZE: u64 = 16 << 20;

/// An empty ext4 file system of `size` bytes, made in `cache_dir` the first
/// time. The file is sparse and must not be written to: see [`copy`].
///
/// # Errors
/// mkfs.ext4 is missing or fails, the size is too small, the disk is full.
pub fn template(cache_dir: &Path, size: u64) -> Result<PathBuf> {
    let path = cache_dir.join(format!("scratch-{FORMAT}-{size}.ext4"));
    if path.is_file() {
        return Ok(path);
    }
    let fail = |source| Error::io("create", &path, source);
    if size < MIN_SIZE {
        return Err(fail(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a disk needs at least {MIN_SIZE} bytes"),
        )));
    }
    fs::create_dir_all(cache_dir).map_err(|source| Error::io("create", cache_dir, source))?;
    sweep(cache_dir);
    let dir = tempfile::Builder::new()
        .prefix(FRESH)
        .tempdir_in(cache_dir)
        .map_err(fail)?;
    let fresh = dir.path().join("scratch");
    fs::File::create(&fresh)
        .and_then(|file| file.set_len(size))
        .map_err(fail)?;
    let make = |tables: &str| {
        let mut command = MKFS_EXT4.command();
        command.args(["-q", "-F", "-m", "0", "-U", UUID, "-L", "scratch"])
        // A small journal and large flexible groups keep the metadata in few places.
        .args(["-J", "size=4", "-G", "256", "-i", "65536"])
        // Grown while mounted: the kernel refuses that with sparse_super2, and
        // without the resize inode it puts what it adds into meta groups.
        .args(["-O", "^resize_inode"])
        .arg("-E")
        .arg(format!(
            "{tables}=1,lazy_journal_init=1,nodiscard,root_owner=0:0,hash_seed={UUID}"
        ))
        .arg(&fresh)
        .env("E2FSPROGS_FAKE_TIME", "1");
        MKFS_EXT4.output(&mut command, dir.path())
    };
    // The file is all zeroes: no kernel has to write them into tables, not even
    // later. Older than 1.47, mkfs cannot be told, and the kernel does it.
    if make("assume_storage_prezeroed").is_err() {
        make("lazy_itable_init")?;
    }
    // Two processes may have made it: the same bytes, so either may win.
    fs::rename(&fresh, &path).map_err(fail)?;
    let allocated = fs::metadata(&path).map_err(fail)?.blocks() * 512;
    tracing::debug!(path = %path.display(), size, allocated, "made a scratch template");
    Ok(path)
}

/// Removes what was being made when its maker died. Making one takes seconds.
fn sweep(cache_dir: &Path) {
    for entry in fs::read_dir(cache_dir).into_iter().flatten().flatten() {
        let old = entry
            .metadata()
            .and_then(|meta| meta.modified())
            .is_ok_and(|time| time.elapsed().is_ok_and(|age| age > STALE));
        if old && entry.file_name().to_string_lossy().starts_with(FRESH) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Copies a sparse file; `to` must not exist. Only data is read and written,
/// and on file systems with reflinks (XFS, Btrfs) not even that. Gives back
/// the bytes copied.
///
/// # Errors
/// What reading and writing can give; `to` is removed again then.
pub fn copy(from: &Path, to: &Path) -> Result<u64> {
    let source = fs::File::open(from).map_err(|error| Error::io("read", from, error))?;
    let size = source
        .metadata()
        .map_err(|error| Error::io("read", from, error))?
        .len();
    let target = fs::File::create_new(to).map_err(|error| Error::io("create", to, error))?;
    target
        .set_len(size)
        .and_then(|()| copy_data(&source, &target))
        .map_err(|error| {
            let _ = fs::remove_file(to);
            Error::io("write", to, error)
        })
}

fn copy_data(source: &fs::File, target: &fs::File) -> io::Result<u64> {
    let (mut at, mut copied) = (0, 0);
    loop {
        at = match lseek64(source, at, Whence::SeekData) {
            Ok(data) => data,
            // Nothing but a hole up to the end.
            Err(Errno::ENXIO) => return Ok(copied),
            Err(errno) => return Err(errno.into()),
        };
        let end = lseek64(source, at, Whence::SeekHole)?;
        while at < end {
            let (mut from, mut to) = (at, at);
            let want = usize::try_from(end - at).unwrap_or(usize::MAX);
            let done = match copy_file_range(source, Some(&mut from), target, Some(&mut to), want) {
                // Two file systems, or one that cannot (copy_file_range(2)).
                Err(Errno::EXDEV | Errno::EINVAL | Errno::EOPNOTSUPP) => {
                    copy_block(source, target, at, want)?
                }
                done => done?,
            };
            if done == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            at += done as i64;
            copied += done as u64;
        }
    }
}

/// Copies up to a block by reading and writing it. Zeroes are left out: the
/// target is a hole there, and the source may be unable to tell of its holes.
fn copy_block(source: &fs::File, target: &fs::File, at: i64, want: usize) -> io::Result<usize> {
    let mut block = [0; 64 << 10];
    let want = want.min(block.len());
    let at = u64::try_from(at).map_err(io::Error::other)?;
    let done = source.read_at(&mut block[..want], at)?;
    if block[..done].iter().any(|byte| *byte != 0) {
        target.write_all_at(&block[..done], at)?;
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_disk_costs_little() {
        let dir = tempfile::tempdir().unwrap();
        let path = template(dir.path(), 20 << 30).unwrap();
        assert_eq!(template(dir.path(), 20 << 30).unwrap(), path);
        let data = fs::metadata(&path).unwrap();
        assert_eq!(data.len(), 20 << 30);
        assert!(data.blocks() * 512 < 8 << 20, "{} blocks", data.blocks());

        let to = dir.path().join("copy");
        let start = std::time::Instant::now();
        let copied = copy(&path, &to).unwrap();
        println!("{copied} bytes in {:?}", start.elapsed());
        let data = fs::metadata(&to).unwrap();
        assert_eq!(data.len(), 20 << 30);
        assert!(data.blocks() * 512 < 8 << 20, "{} blocks", data.blocks());
        let mut super_block = [0; 2];
        let file = fs::File::open(&to).unwrap();
        file.read_exact_at(&mut super_block, 1024 + 56).unwrap();
        assert_eq!(super_block, [0x53, 0xef]);
        // The template and the copies of others are never written over.
        assert!(copy(&path, &to).is_err() && to.exists());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn data_between_holes_survives() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("a"), dir.path().join("b"));
        let file = fs::File::create(&from).unwrap();
        file.write_all_at(b"middle", 5 << 20).unwrap();
        file.set_len(9 << 20).unwrap();
        copy(&from, &to).unwrap();
        assert_eq!(fs::read(&from).unwrap(), fs::read(&to).unwrap());
    }

    #[test]
    fn a_disk_is_copied_to_another_file_system() {
        let dir = tempfile::tempdir().unwrap();
        let other = tempfile::tempdir_in("/dev/shm").unwrap();
        let (from, to) = (dir.path().join("a"), other.path().join("b"));
        let file = fs::File::create(&from).unwrap();
        file.write_all_at(&[7; 100_000], 5 << 20).unwrap();
        file.write_all_at(&[0; 1 << 20], 7 << 20).unwrap();
        file.set_len(9 << 20).unwrap();
        let device = |path: &Path| fs::metadata(path).unwrap().dev();
        assert_ne!(device(dir.path()), device(other.path()));
        copy(&from, &to).unwrap();
        assert_eq!(fs::read(&from).unwrap(), fs::read(&to).unwrap());
        assert!(fs::metadata(&to).unwrap().blocks() * 512 < 256 << 10);
    }
}
