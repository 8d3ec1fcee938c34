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
const BLOCK: usize = 4096;
/// Blocks read at once.
const BLOCKS: usize = 64;

pub(super) fn hex(digest: impl AsRef<[u8]>) -> String {
    let digits = digest.as_ref().iter().map(|byte| format!("{byte:02x}"));
    digits.collect()
}

/// Digest of a file's size and of every block that is not zero, with its
/// place: holes cost nothing, and it does not matter where there are any.
pub(crate) fn of_sparse(file: &File) -> io::Result<String> {
    let size = file.metadata()?.len();
    let mut hash = Sha256::new();
    hash.update(size.to_le_bytes());
    let mut at = 0;
    loop {
        at = match lseek64(file, at, Whence::SeekData) {
            // From the block it is in: extents need not begin with one.
            Ok(data) if data.unsigned_abs() < size => data / BLOCK as i64 * BLOCK as i64,
            // The end, or what came after it meanwhile.
            Ok(_) | Err(Errno::ENXIO) => return Ok(hex(hash.finalize())),
            Err(errno) => return Err(errno.into()),
        };
        let end = lseek64(file, at, Whence::SeekHole)?;
        while at < end && at.unsigned_abs() < size {
            at += i64::try_from(blocks(file, at, size, &mut hash)?).map_err(io::Error::other)?;
        }
    }
}

/// Takes some blocks in; gives how many bytes they have.
fn blocks(file: &File, at: i64, size: u64, hash: &mut Sha256) -> io::Result<u64> {
    let at = u64::try_from(at).map_err(io::Error::other)?;
    let most = (size - at).min((BLOCK * BLOCKS) as u64);
    let mut bytes = [0; BLOCK * BLOCKS];
    let bytes = &mut bytes[..usize::try_from(most).map_err(io::Error::other)?];
    file.read_exact_at(bytes, at)?;
    for (number, block) in bytes.chunks(BLOCK).enumerate() {
        if *block != [0; BLOCK][..block.len()] {
            hash.update((at + (number * BLOCK) as u64).to_le_bytes());
            hash.update(block);
        }
    }
    Ok(most)
}

/// Digest of all there is to be read.
fn of_bytes(mut from: impl Read) -> io::Result<String> {
    let (mut hash, mut bytes) = (Sha256::new(), vec![0; BLOCK * BLOCKS]);
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
pub(super) fn cached(path: &Path, cache: &Path) -> io::Result<String> {
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
