//! Kernels: from a Debian package or a file, and the modules the guest needs.

use std::collections::HashMap;
use std::fs;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use super::KernelFormat;
use super::error::{Error, Result};

/// Modules the guest agent needs before it has a root file system, or that
/// nothing in the guest could load later. What they depend on is added.
const WANTED: &[&str] = &[
    "virtio_pci",
    "virtio_mmio",
    "virtio_blk",
    "virtio_console",
    "squashfs",
    "overlay",
    // ext4 asks for it through the crypto layer, not as a dependency.
    "crc32c_generic",
    "ext4",
    "virtio_rng",
    "virtio_balloon",
    "virtio_net",
    "vmw_vsock_virtio_transport",
    "9pnet_virtio",
    "9p",
];

/// Which kernel an image boots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KernelSource {
    /// The package named in the recipe.
    Package,
    /// A bzImage or vmlinux, or a directory with one; it needs no modules.
    Path(PathBuf),
}

/// A kernel module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Module {
    /// File name.
    pub(super) file: String,
    pub(super) data: Vec<u8>,
}

/// A kernel ready to be put into an image.
pub(super) struct Kernel {
    pub(super) data: Vec<u8>,
    pub(super) format: KernelFormat,
    pub(super) release: String,
    /// In loading order.
    pub(super) modules: Vec<Module>,
}

/// The kernel file a `--kernel` path means.
pub(super) fn find(path: &Path) -> PathBuf {
    if !path.is_dir() {
        return path.to_owned();
    }
    ["vmlinux", "bzImage", "vmlinuz"]
        .iter()
        .map(|name| path.join(name))
        .find(|candidate| candidate.is_file())
        .unwrap_or_else(|| path.join("vmlinux"))
}

impl Kernel {
    /// Reads a kernel that needs no modules.
    pub(super) fn from_path(path: &Path) -> Result<Self> {
        let path = find(path);
        let data = fs::read(&path).map_err(|source| Error::io("read", &path, source))?;
        let (format, release) = identify(&data).map_err(|reason| Error::Kernel {
            path,
            reason: reason.into(),
        })?;
        Ok(Self {
            data,
            format,
            release,
            modules: Vec::new(),
        })
    }

    /// Reads a kernel and its modules from the unpacked files of a package.
    pub(super) fn from_package(tar: &Path) -> Result<Self> {
        let unusable = |reason: String| Error::Kernel {
            path: tar.to_owned(),
            reason,
        };
        let mut tree = Tree::open(tar)?;
        let data = match tree.kernel {
            Some(at) => tree.read(at)?,
            None => return Err(unusable("the package has no boot/vmlinuz".into())),
        };
        let (format, release) = identify(&data).map_err(|reason| unusable(reason.into()))?;
        let modules = tree.closure(WANTED)?;
        Ok(Self {
            data,
            format,
            release,
            modules,
        })
    }
}

/// Format and release of a kernel image.
fn identify(data: &[u8]) -> std::result::Result<(KernelFormat, String), &'static str> {
    let word = |text: &[u8]| {
        let end = text.iter().position(|b| !b.is_ascii_graphic())?;
        let word = std::str::from_utf8(text.get(..end)?).ok()?;
        (!word.is_empty() && word.len() < 65).then(|| word.to_owned())
    };
    if data.starts_with(b"\x7fELF") {
        let release = find_bytes(data, b"Linux version ")
            .and_then(|at| word(&data[at + b"Linux version ".len()..]))
            .ok_or("it has no version string")?;
        return Ok((KernelFormat::Vmlinux, release));
    }
    // Documentation/arch/x86/boot.rst: "HdrS" at 0x202, the version string at
    // the 16-bit number at 0x20e plus 0x200.
    if data.get(0x202..0x206) == Some(b"HdrS") {
        let at = usize::from(u16::from_le_bytes([data[0x20e], data[0x20f]])) + 0x200;
        let release = data
            .get(at..)
            .and_then(word)
            .ok_or("it has no version string")?;
        return Ok((KernelFormat::Bzimage, release));
    }
    Err("it is neither a bzImage nor an ELF vmlinux")
}

fn find_bytes(data: &[u8], what: &[u8]) -> Option<usize> {
    data.windows(what.len()).position(|window| window == what)
}

type Place = (u64, u64);

/// The files of a kernel package, read where they stand in its tar archive.
struct Tree {
    file: fs::File,
    path: PathBuf,
    kernel: Option<Place>,
    /// Module name, with `_` for `-`, to its file name and place.
    modules: HashMap<String, (String, Place)>,
}

impl Tree {
    fn open(path: &Path) -> Result<Self> {
        let fail = |source| Error::io("read", path, source);
        let file = fs::File::open(path).map_err(fail)?;
        let (mut kernel, mut modules) = (None, HashMap::new());
        let mut archive = tar::Archive::new(&file);
        for entry in archive.entries_with_seek().map_err(fail)? {
            let entry = entry.map_err(fail)?;
            let place = (entry.raw_file_position(), entry.size());
            let name = entry.path().map_err(fail)?;
            let Some(file) = name.file_name().and_then(|file| file.to_str()) else {
                continue;
            };
            if file.starts_with("vmlinuz-") {
                kernel = Some(place);
            } else if let Some(stem) = file.strip_suffix(".ko") {
                modules.insert(stem.replace('-', "_"), (file.to_owned(), place));
            }
        }
        Ok(Self {
            file,
            path: path.to_owned(),
            kernel,
            modules,
        })
    }

    fn read(&mut self, (at, size): Place) -> Result<Vec<u8>> {
        let fail = |source| Error::io("read", &self.path, source);
        let mut data = Vec::new();
        self.file.seek(SeekFrom::Start(at)).map_err(fail)?;
        let read = (&self.file)
            .take(size)
            .read_to_end(&mut data)
            .map_err(fail)?;
        if read as u64 != size {
            return Err(fail(std::io::ErrorKind::UnexpectedEof.into()));
        }
        Ok(data)
    }

    /// The wanted modules and all they depend on, dependencies first. What the
    /// package does not have is built into the kernel, or cannot be had.
    fn closure(&mut self, wanted: &[&str]) -> Result<Vec<Module>> {
        let mut order: Vec<Module> = Vec::new();
        let mut done = std::collections::HashSet::new();
        let mut stack: Vec<(String, Option<Module>)> = wanted
            .iter()
            .rev()
            .map(|name| ((*name).to_owned(), None))
            .collect();
        while let Some((name, ready)) = stack.pop() {
            if let Some(module) = ready {
                order.push(module);
                continue;
            }
            let Some((file, place)) = self.modules.get(&name).cloned() else {
                continue;
            };
            if !done.insert(name.clone()) {
                continue;
            }
            let data = self.read(place)?;
            let depends = depends(&data);
            stack.push((name, Some(Module { file, data })));
            stack.extend(depends.into_iter().map(|name| (name, None)));
        }
        Ok(order)
    }
}

/// Modules named in a module's `depends=` record (.modinfo, NUL-separated).
fn depends(data: &[u8]) -> Vec<String> {
    let Some(at) = find_bytes(data, b"\0depends=") else {
        return Vec::new();
    };
    let list = data[at + b"\0depends=".len()..]
        .split(|byte| *byte == 0)
        .next()
        .unwrap_or_default();
    String::from_utf8_lossy(list)
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(modules: &[(&str, &str)]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut tar = tar::Builder::new(file.reopen().unwrap());
        for (name, depends) in modules {
            let data = format!("\x7fELF\0license=GPL\0depends={depends}\0name=x\0");
            let mut header = tar::Header::new_gnu();
            header.set_size(data.len() as u64);
            let path = format!("./lib/modules/1/kernel/{name}.ko");
            tar.append_data(&mut header, path, data.as_bytes()).unwrap();
        }
        tar.finish().unwrap();
        file
    }

    #[test]
    fn dependencies_are_loaded_first_and_once() {
        let file = package(&[
            ("ext4", "jbd2,crc16"),
            ("crc16", ""),
            ("jbd2", "crc16"),
            ("virtio-rng", "virtio"),
            ("virtio", ""),
            ("unrelated", ""),
        ]);
        let mut tree = Tree::open(file.path()).unwrap();
        let modules = tree.closure(&["ext4", "virtio_rng", "built_in"]).unwrap();
        let names: Vec<_> = modules.iter().map(|module| module.file.as_str()).collect();
        assert_eq!(names.len(), 5, "{names:?}");
        let at = |name: &str| names.iter().position(|other| *other == name).unwrap();
        assert!(at("crc16.ko") < at("jbd2.ko") && at("jbd2.ko") < at("ext4.ko"));
        assert!(at("virtio.ko") < at("virtio-rng.ko"));
    }

    #[test]
    fn kernels_are_told_apart() {
        let mut bzimage = vec![0; 0x400];
        bzimage[0x202..0x206].copy_from_slice(b"HdrS");
        bzimage[0x20e..0x210].copy_from_slice(&0x100u16.to_le_bytes());
        bzimage[0x300..0x30d].copy_from_slice(b"6.1.0-1 (me) ");
        assert_eq!(
            identify(&bzimage),
            Ok((KernelFormat::Bzimage, "6.1.0-1".into()))
        );
        let vmlinux = b"\x7fELF....Linux version 6.12.1 (gcc)\0";
        assert_eq!(
            identify(vmlinux),
            Ok((KernelFormat::Vmlinux, "6.12.1".into()))
        );
        assert!(identify(b"MZ").is_err());
    }
}
