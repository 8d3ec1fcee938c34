//! Making a machine unlike its siblings: entropy, clock, names.
#![allow(unsafe_code)] // the ioctls of the random pool have no safe form

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::OnceLock;

use bulkhead_agent::Configure;
use nix::libc;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use nix::unistd::sethostname;

use crate::failure::{Context, Result, invalid};
use crate::names::{self, Held};

/// Most entropy taken at once, in bytes.
const MAX_SEED: usize = 512;

nix::ioctl_none!(reseed, b'R', 7);
// From linux/random.h; the type of its argument is that of the fixed part.
const RNDADDENTROPY: libc::c_ulong = nix::request_code_write!(b'R', 3, size_of::<[i32; 2]>()) as _;

#[repr(C)]
struct Entropy {
    bits: i32,
    len: i32,
    bytes: [u8; MAX_SEED],
}

/// Applies everything that is asked for; stops at the first failure. Names are
/// stored in the files that are held, where they are.
pub(crate) fn apply(configure: &Configure, held: Option<&Held>) -> Result<()> {
    if let Some(seed) = &configure.seed {
        let seed = decode_hex(seed).filter(|seed| !seed.is_empty() && seed.len() <= MAX_SEED);
        let what = || format!("the seed is not 1 to {MAX_SEED} bytes in hexadecimal");
        stir(&seed.ok_or_else(|| invalid(what()))?)
            .context(|| "cannot stir the random pool".into())?;
    }
    if let Some(ns) = configure.unix_ns {
        set_clock(ns)?;
    }
    let (id, name) = (&configure.machine_id, &configure.hostname);
    if let Some(id) = id {
        check_id(id)?;
    }
    if let Some(name) = name {
        check_name(name)?;
        sethostname(name).context(|| format!("cannot set the host name {name}"))?;
    }
    if let (Some(held), Some(id), Some(name)) = (held, id, name)
        && held.store(id, name)
    {
        return Ok(());
    }
    let root = Path::new("/");
    if let Some(id) = id {
        names::write_id(root, id)?;
    }
    match name {
        Some(name) => names::write_host(root, name, configure.room),
        None => Ok(()),
    }
}

fn check_id(id: &str) -> Result<()> {
    let fits = |b| matches!(b, b'0'..=b'9' | b'a'..=b'f');
    match id.len() == 32 && id.bytes().all(fits) {
        true => Ok(()),
        false => Err(invalid(format!(
            "machine id {id:?} is not 32 lower-case hex digits"
        ))),
    }
}

fn check_name(name: &str) -> Result<()> {
    let fits = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'.';
    match !name.is_empty() && name.len() <= names::LONGEST && name.bytes().all(fits) {
        true => Ok(()),
        false => Err(invalid(format!("{name:?} cannot be a host name"))),
    }
}

/// Sets the wall clock, in nanoseconds since 1970-01-01 UTC.
///
/// # Errors
/// The kernel refuses.
pub(crate) fn set_clock(ns: u64) -> Result<()> {
    let time = TimeSpec::new((ns / 1_000_000_000) as i64, (ns % 1_000_000_000) as i64);
    clock_settime(ClockId::CLOCK_REALTIME, time).context(|| "cannot set the clock".into())
}

/// The kernel's random pool, opened once: a clone need not look for it.
///
/// # Errors
/// There is none, or no descriptor is left.
pub(crate) fn pool() -> io::Result<&'static File> {
    static POOL: OnceLock<File> = OnceLock::new();
    match POOL.get() {
        Some(pool) => Ok(pool),
        None => {
            // To add to it takes a privilege, not the right to write.
            let pool = File::open("/dev/urandom")?;
            Ok(POOL.get_or_init(|| pool))
        }
    }
}

/// Adds entropy that counts, and has the generator use it at once.
fn stir(seed: &[u8]) -> io::Result<()> {
    let mut entropy = Entropy {
        bits: 8 * seed.len() as i32,
        len: seed.len() as i32,
        bytes: [0; MAX_SEED],
    };
    entropy.bytes[..seed.len()].copy_from_slice(seed);
    let pool = pool()?;
    // SAFETY: the kernel reads the fixed part and `len` bytes after it.
    let added = unsafe { libc::ioctl(pool.as_raw_fd(), RNDADDENTROPY, &entropy) };
    nix::errno::Errno::result(added)?;
    // SAFETY: takes no argument.
    unsafe { reseed(pool.as_raw_fd()) }?;
    Ok(())
}

fn decode_hex(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u8>> = text.chars().map(|c| Some(c.to_digit(16)? as u8)).collect();
    let digits = digits?;
    (digits.len() % 2 == 0).then(|| {
        digits
            .chunks(2)
            .map(|pair| pair[0] << 4 | pair[1])
            .collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_is_read_or_refused() {
        assert_eq!(decode_hex("00ff7A"), Some(vec![0, 255, 0x7a]));
        assert_eq!(decode_hex("abc"), None);
        assert_eq!(decode_hex("zz"), None);
    }
}
