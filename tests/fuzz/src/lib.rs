//! What the fuzz targets have in common: runtimes, directories, tar checksums.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use bulkhead::error::{Explain, Report};
use tempfile::TempDir;

/// Bytes of a tar block.
const BLOCK: usize = 512;

/// Runs `work` with a clock that jumps ahead whenever nothing else is to be
/// done: no input can make a run last for one of the library's time limits.
pub fn block_on<T>(work: impl Future<Output = T>) -> T {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    let runtime = builder.enable_all().start_paused(true).build();
    runtime.expect("a runtime can be made").block_on(work)
}

/// Lets the tasks of the library do what they can.
pub async fn let_run() {
    for _ in 0..16 {
        tokio::task::yield_now().await;
    }
}

/// A directory in memory, where the host has such.
pub fn temp() -> TempDir {
    let memory = Path::new("/dev/shm");
    let made = match memory.is_dir() {
        true => tempfile::tempdir_in(memory),
        false => tempfile::tempdir(),
    };
    made.expect("a directory can be made")
}

/// Panics when something in `error` could steer a terminal. Lines may end.
pub fn check_error(error: &dyn Explain) {
    let Report {
        code,
        what,
        cause,
        remedy,
        system_call,
    } = Report::of(error);
    for text in [&code, &what, &cause, &remedy] {
        check_text(text);
    }
    system_call.iter().for_each(|call| check_text(call));
    assert!(!code.is_empty() && !remedy.is_empty());
}

/// Panics when `text` could steer a terminal, or is too long for anybody.
pub fn check_text(text: &str) {
    let steers = |c: char| c.is_control() && c != '\n' || ('\u{202a}'..='\u{202e}').contains(&c);
    assert!(!text.contains(steers), "control characters in {text:?}");
    assert!(text.len() <= 128 * 1024, "{} bytes of text", text.len());
}

/// Name to mode, kind and content of everything below `dir`.
pub fn tree(dir: &Path) -> BTreeMap<Vec<u8>, Node> {
    let mut all = BTreeMap::new();
    walk(dir, &mut Vec::new(), &mut all);
    all
}

/// Something in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// A directory.
    Dir,
    /// A regular file: apparent size, bytes on disk, permissions.
    File {
        /// Apparent size.
        size: u64,
        /// Space it takes.
        stored: u64,
        /// Permission bits.
        mode: u32,
    },
    /// A symlink and its target.
    Link(Vec<u8>),
    /// Nothing that should ever be there.
    Special(u32),
}

fn walk(dir: &Path, name: &mut Vec<u8>, all: &mut BTreeMap<Vec<u8>, Node>) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    for entry in entries.flatten() {
        let len = name.len();
        if len > 0 {
            name.push(b'/');
        }
        name.extend(entry.file_name().into_vec());
        let path = entry.path();
        let meta = path.symlink_metadata().expect("it was just listed");
        let kind = meta.file_type();
        let node = if kind.is_dir() {
            Node::Dir
        } else if kind.is_symlink() {
            let target = fs::read_link(&path).expect("it is a link");
            Node::Link(target.into_os_string().into_vec())
        } else if kind.is_file() {
            Node::File {
                size: meta.len(),
                stored: meta.blocks() * 512,
                mode: meta.permissions().mode() & 0o7777,
            }
        } else {
            Node::Special(meta.mode())
        };
        all.insert(name.clone(), node);
        if kind.is_dir() {
            walk(&path, name, all);
        }
        name.truncate(len);
    }
}

/// Makes the checksums of a tar archive right, header by header, as far as its
/// lengths make sense: nothing would be reached behind a wrong one.
pub fn right_checksums(archive: &mut [u8]) {
    let mut at = 0;
    while let Some(block) = archive.get_mut(at..at + BLOCK) {
        at += BLOCK;
        if block.iter().all(|&byte| byte == 0) {
            continue;
        }
        let mut header = tar::Header::new_old();
        header.as_mut_bytes().copy_from_slice(block);
        header.set_cksum();
        block.copy_from_slice(header.as_bytes());
        let sparse = header.entry_type().is_gnu_sparse();
        let mut more = sparse && header.as_bytes()[482] == 1;
        while more {
            more = archive.get(at + 504) == Some(&1);
            at += BLOCK;
        }
        let size = header.entry_size().unwrap_or(0).min(archive.len() as u64);
        at += (size as usize).next_multiple_of(BLOCK);
    }
}
