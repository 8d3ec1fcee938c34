//! Files to and from the guest as tar archives.
//!
//! [`pack`] writes a host directory as a tar stream; [`unpack`] reads an
//! archive of the hostile guest below one directory and nowhere else.
//!
//! What unpacking does with entries it does not like:
//!
//! | entry | treatment |
//! | --- | --- |
//! | absolute name, `..`, NUL, name or tree too long or deep | archive refused |
//! | name through a symlink or a file, or seen before (directories may repeat) | archive refused |
//! | hard link to anything but a file of this archive | archive refused |
//! | lengths, sparse maps, PAX records or checksums that do not add up | archive refused |
//! | more bytes or entries than the [`Limits`] | archive refused |
//! | devices, FIFOs, sockets and unknown types | skipped, with a warning |
//! | symlink that may leave the target | skipped, with a warning |
//! | set-user-id, set-group-id and sticky bits | stripped, with a warning |
//! | extended attributes, ACLs, owners | ignored: the caller's owner and umask hold |
//!
//! The first half cannot come from an honest agent; the second half can come
//! from an honest command, such as `python3 -m venv` linking to `/usr/bin`.

mod beneath;
mod error;
mod header;
mod host_dir;
mod name;
mod pack;
mod read;
mod unpack;
mod warning;

pub(crate) use beneath::{Beneath, chown_link, copy_data, create_in, data_extents, stat_in, umask};
pub use error::Error;
pub use host_dir::HostDir;
pub use name::Name;
pub(crate) use name::link_stays_inside;
pub use pack::{Kind, Manifest, PackLimits, Packed, Stamp, pack, pack_file};
pub use unpack::{Modes, Options, Unpacked, UnpackedEntry, unpack};
pub use warning::{Warning, Warnings};

pub use crate::text::printable;

/// Bounds on an archive from the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes stored in the archive, a hard link counted as a copy.
    pub bytes: u64,
    /// Apparent size of one file in bytes; a sparse file may exceed `bytes`.
    pub file_size: u64,
    /// Entries of any type, and directories made on the way to them.
    pub entries: u64,
    /// Bytes of all names and link targets together.
    pub name_bytes: u64,
    /// Bytes of one name.
    pub path_len: usize,
    /// Components of one name.
    pub depth: usize,
}

impl Default for Limits {
    /// 16 GiB in a million entries; a sparse file may look like 1 TiB.
    fn default() -> Self {
        Self {
            bytes: 16 << 30,
            file_size: 1 << 40,
            entries: 1_000_000,
            name_bytes: 256 << 20,
            path_len: 4000,
            depth: MAX_DEPTH,
        }
    }
}

/// How the names of directories start in which changes are prepared, at the top
/// of a workspace. They are never packed.
pub(crate) const HIDDEN_PREFIX: &str = ".bulkhead-apply-";

/// Deepest tree that is packed, and by default unpacked, in components.
pub const MAX_DEPTH: usize = 256;
