//! SHA-256 of large sparse files, and of files that seldom change.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek64};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::host::lease::write_durably;
use crate::host::stamp::Stamp;

/// What is zero or not as a whole, in bytes.
pub(crate) const BLOCK: usize = 4096;
/// Bytes read, and given away, at once.
pub(crate) const MOST: usize = 64 * BLOCK;

pub(super) fn hex(digest: impl AsRef<[u8]>) -> String {
    let digits = digest.as_ref().iter().map(|byte| format!("{byte:02x}"));
    digits.collect()
}

/// Digest of a file's size and of every block that is not zero, with its
/// place: holes cost nothing, and it does not matter where there are any.
pub(crate) fn of_sparse(file: &File) -> io::Result<String> {
    let mut hash = SparseHash::new(file.metadata()?.len());
    each_run(file, |at, bytes| {
        hash.add(at, bytes);
        Ok(())
    })?;
    Ok(hash.finish())
}

/// The digest of [`of_sparse`] in the making.
pub(crate) struct SparseHash(Sha256);

impl SparseHash {
    /// Of a file of `size` bytes.
    pub(crate) fn new(size: u64) -> Self {
        Self(Sha256::new_with_prefix(size.to_le_bytes()))
    }

    /// Takes in blocks that are not zero, after those before them.
    pub(crate) fn add(&mut self, at: u64, bytes: &[u8]) {
        for (number, block) in bytes.chunks(BLOCK).enumerate() {
            self.0.update((at + (number * BLOCK) as u64).to_le_bytes());
            self.0.update(block);
        }
    }

    pub(crate) fn finish(self) -> String {
        hex(self.0.finalize())
    }
}

/// Gives away every part of a file that is no hole, in whole blocks: where it
/// begins and ends.
pub(crate) fn each_extent(
    file: &File,
    mut take: impl FnMut(u64, u64) -> io::Result<()>,
) -> io::Result<()> {
    let size = file.metadata()?.len();
    let block = BLOCK as u64;
    let mut at = 0;
    loop {
        let from = i64::try_from(at).map_err(io::Error::other)?;
        let data = match lseek64(file, from, Whence::SeekData) {
            Ok(data) if data.unsigned_abs() < size => data,
            // The end, or what came after it meanwhile.
            Ok(_) | Err(Errno::ENXIO) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        };
        let hole = lseek64(file, data, Whence::SeekHole)?.unsigned_abs();
        // Extents need not begin and end with a block.
        let begin = at.max(data.unsigned_abs() / block * block);
        at = hole.next_multiple_of(block).min(size);
        if begin < at {
            take(begin, at)?;
        }
        if at == size {
            return Ok(());
        }
    }
}

/// Gives away every block of a file that is not zero, several at once where
/// they follow each other, with the place of the first.
pub(crate) fn each_run(
    file: &File,
    mut take: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut buffer = vec![0; MOST];
    each_extent(file, |mut at, end| {
        while at < end {
            let most = (end - at).min(MOST as u64);
            let bytes = &mut buffer[..usize::try_from(most).map_err(io::Error::other)?];
            file.read_exact_at(bytes, at)?;
            runs(at, bytes, &mut take)?;
            at += most;
        }
        Ok(())
    })
}

fn runs(
    mut at: u64,
    mut rest: &[u8],
    take: &mut impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let is_zero = |block: &[u8]| *block == [0; BLOCK][..block.len()];
    while let Some(first) = rest.chunks(BLOCK).next() {
        let zero = is_zero(first);
        let alike = rest.chunks(BLOCK).take_while(|one| is_zero(one) == zero);
        let (run, after) = rest.split_at(alike.map(<[u8]>::len).sum());
        if !zero {
            take(at, run)?;
        }
        at += run.len() as u64;
        rest = after;
    }
    Ok(())
}

/// Digest of all there is to be read.
fn of_bytes(mut from: impl Read) -> io::Result<String> {
    let (mut hash, mut bytes) = (Sha256::new(), vec![0; MOST]);
    loop {
        match from.read(&mut bytes)? {
            0 => return Ok(hex(hash.finalize())),
            count => hash.update(&bytes[..count]),
        }
    }
}

/// A digest on disk, and what the file was like then.
#[derive(Serialize, Deserialize)]
struct Kept {
    stamp: Stamp,
    sha256: String,
}

/// Digest of a file that is kept in `cache` for as long as the file is the same,
/// whatever links lead to it.
pub(crate) fn cached(path: &Path, cache: &Path) -> io::Result<String> {
    let path = &path.canonicalize()?;
    let stamp = Stamp::of(path)?;
    let name = hex(Sha256::digest(path.as_os_str().as_encoded_bytes()));
    let place = cache.join(format!("sha256-{}.json", &name[..16]));
    let kept = std::fs::read(&place)
        .ok()
        .and_then(|text| serde_json::from_slice::<Kept>(&text).ok())
        .filter(|kept| kept.stamp == stamp);
    if let Some(kept) = kept {
        return Ok(kept.sha256);
    }
    let sha256 = of_bytes(File::open(path)?)?;
    let kept = Kept { stamp, sha256 };
    // Reckoned again next time where it cannot be kept.
    let _ = std::fs::create_dir_all(cache)
        .and_then(|()| write_durably(&place, &serde_json::to_vec(&kept)?));
    Ok(kept.sha256)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_and_zeroes_are_the_same_and_places_count() {
        let file = |parts: &[(&[u8], u64)], size| {
            let file = tempfile::tempfile().unwrap();
            for (bytes, at) in parts {
                file.write_all_at(bytes, *at).unwrap();
            }
            file.set_len(size).unwrap();
            of_sparse(&file).unwrap()
        };
        let size = 3 << 20;
        let sparse = file(&[(b"data", 5000)], size);
        assert_eq!(sparse, file(&[(&[0; 1 << 20], 0), (b"data", 5000)], size));
        assert_ne!(sparse, file(&[(b"data", 5001)], size));
        assert_ne!(sparse, file(&[(b"data", 5000 + 4096)], size));
        assert_ne!(sparse, file(&[(b"data", 5000)], size + 1));
        assert_ne!(sparse, file(&[(b"data", 5000), (b"x", 2 << 20)], size));
    }

    #[test]
    fn blocks_that_are_not_zero_come_in_runs_and_in_order() {
        let file = tempfile::tempfile().unwrap();
        let size = (3 << 20) + 100;
        file.set_len(size).unwrap();
        for at in [4096, 2 * 4096 + 7, 5 * 4096, 1 << 20, size - 1] {
            file.write_all_at(b"x", at).unwrap();
        }
        let mut seen = Vec::new();
        each_run(&file, |at, bytes| {
            seen.push((at, bytes.len()));
            Ok(())
        })
        .unwrap();
        let expected = [
            (4096, 2 * 4096),
            (5 * 4096, 4096),
            (1 << 20, 4096),
            (3 << 20, 100),
        ];
        assert_eq!(seen, expected);
        let mut data = 0;
        each_extent(&file, |begin, end| {
            data += end - begin;
            Ok(())
        })
        .unwrap();
        assert!((4 * 4096 + 100..1 << 20).contains(&data), "{data}");
    }

    #[test]
    fn a_changed_file_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kernel");
        std::fs::write(&path, b"abc").unwrap();
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        for _ in 0..2 {
            assert_eq!(cached(&path, dir.path()).unwrap(), abc);
        }
        // By another name it is the same file.
        let other = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &other).unwrap();
        assert_eq!(cached(&other, dir.path()).unwrap(), abc);
        let kept = || std::fs::read_dir(dir.path()).unwrap().count() - 2;
        assert_eq!(kept(), 1);
        std::fs::write(&path, b"abcd").unwrap();
        assert_ne!(cached(&path, dir.path()).unwrap(), abc);
    }
}
