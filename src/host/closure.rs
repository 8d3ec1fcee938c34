//! The files a QEMU binary needs to run: libraries, modules, firmware.
//!
//! Found once for each binary by asking its own loader, and kept with the size
//! and time of every file: an update of any of them is noticed.

use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::lease::write_durably;
use super::stamp::Stamp;
use crate::plan::jail::{Closure, FIRMWARE, LIBRARIES, MODULES, PROGRAM};

/// Modules a machine of ours can need: the accelerators.
const WANTED_MODULES: [&str; 2] = ["accel-tcg-x86_64.so", "accel-kvm-x86_64.so"];

/// Firmware a machine of ours can need, on microvm and q35.
const WANTED_FIRMWARE: [&str; 12] = [
    "bios-256k.bin",
    "bios.bin",
    "bios-microvm.bin",
    "qboot.rom",
    "linuxboot.bin",
    "linuxboot_dma.bin",
    "multiboot.bin",
    "multiboot_dma.bin",
    "pvh.bin",
    "kvmvapic.bin",
    "efi-virtio.rom",
    "pxe-virtio.rom",
];

/// A closure on disk.
#[derive(Serialize, Deserialize)]
struct Kept {
    closure: Closure,
    stamps: Vec<Stamp>,
    modules: Option<PathBuf>,
}

/// The closure of `qemu`; kept in `cache`, and taken from there while no
/// file of it has changed.
///
/// # Errors
/// It is no program of this architecture, or a library is missing.
pub fn of(qemu: &Path, cache: &Path) -> io::Result<Closure> {
    let qemu = fs::canonicalize(qemu)?;
    let digest = Sha256::digest(qemu.as_os_str().as_encoded_bytes());
    let name: String = digest.iter().take(8).map(|b| format!("{b:02x}")).collect();
    let path = cache.join(format!("closure-{name}.json"));
    if let Some(kept) = fs::read(&path)
        .ok()
        .and_then(|text| serde_json::from_slice::<Kept>(&text).ok())
        .filter(Kept::is_fresh)
    {
        return Ok(kept.closure);
    }
    let closure = find(&qemu)?;
    let stamps = closure.files.values().map(|file| Stamp::of(file));
    let kept = Kept {
        stamps: stamps.collect::<io::Result<_>>()?,
        modules: std::env::var_os("QEMU_MODULE_DIR").map(PathBuf::from),
        closure,
    };
    // Found again next time where it cannot be kept.
    let _ =
        fs::create_dir_all(cache).and_then(|()| write_durably(&path, &serde_json::to_vec(&kept)?));
    Ok(kept.closure)
}

fn find(qemu: &Path) -> io::Result<Closure> {
    let loader = interpreter(qemu)?;
    let mut closure = Closure::default();
    let mut add = |place: PathBuf, file: &Path| -> io::Result<()> {
        closure.files.insert(place, fs::canonicalize(file)?);
        Ok(())
    };
    add(PROGRAM.into(), qemu)?;
    // The kernel looks for it by the name in the program.
    add(loader.clone(), &loader)?;
    let mut programs = vec![qemu.to_owned()];
    for name in WANTED_MODULES {
        if let Some(file) = first(&modules(qemu), name) {
            add(Path::new(MODULES).join(name), &file)?;
            programs.push(file);
        }
    }
    for program in programs {
        for (name, file) in libraries(&loader, &program)? {
            add(Path::new(LIBRARIES).join(name), &file)?;
        }
    }
    for name in WANTED_FIRMWARE {
        if let Some(file) = first(&firmware(qemu), name) {
            add(Path::new(FIRMWARE).join(name), &file)?;
        }
    }
    Ok(closure)
}

impl Kept {
    fn is_fresh(&self) -> bool {
        let files = self.closure.files.values();
        self.modules == std::env::var_os("QEMU_MODULE_DIR").map(PathBuf::from)
            && self.stamps.len() == self.closure.files.len()
            && files
                .zip(&self.stamps)
                .all(|(file, stamp)| Stamp::of(file).is_ok_and(|now| now == *stamp))
    }
}

fn first(dirs: &[PathBuf], name: &str) -> Option<PathBuf> {
    dirs.iter()
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

/// Where QEMU's modules can be: as it is told, beside it, or in the system.
fn modules(qemu: &Path) -> Vec<PathBuf> {
    let told = std::env::var_os("QEMU_MODULE_DIR").map(PathBuf::from);
    let beside = [
        "../lib/x86_64-linux-gnu/qemu",
        "../lib64/qemu",
        "../lib/qemu",
    ];
    let dir = qemu.parent().unwrap_or(Path::new("/"));
    told.into_iter()
        .chain(beside.map(|path| dir.join(path)))
        .collect()
}

/// Where QEMU's firmware can be, in the order of its own search.
fn firmware(qemu: &Path) -> Vec<PathBuf> {
    let dir = qemu.parent().unwrap_or(Path::new("/"));
    let prefixes = [dir.join(".."), "/usr/local".into(), "/usr".into()];
    let names = [
        "share/qemu",
        "share/seabios",
        "share/qemu-firmware",
        "lib/ipxe/qemu",
    ];
    prefixes
        .iter()
        .flat_map(|prefix| names.map(|name| prefix.join(name)))
        .collect()
}

/// The program that loads an ELF program (elf(5), PT_INTERP).
fn interpreter(program: &Path) -> io::Result<PathBuf> {
    let bad = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_owned());
    let mut file = fs::File::open(program)?;
    let mut head = [0; 64];
    let read = file.read(&mut head)?;
    if head.starts_with(b"#!") {
        return Err(bad("it is a script; a jail takes the program itself"));
    }
    // 64 bits, little endian, x86-64.
    if read < 64 || !head.starts_with(b"\x7fELF\x02\x01") || head[18..20] != [62, 0] {
        return Err(bad("it is no x86-64 program"));
    }
    let number = |bytes: &[u8]| {
        let mut all = [0; 8];
        all[..bytes.len()].copy_from_slice(bytes);
        u64::from_le_bytes(all)
    };
    let (table, count) = (number(&head[32..40]), number(&head[56..58]));
    for at in 0..count {
        let mut entry = [0; 56];
        file.seek(SeekFrom::Start(table.saturating_add(at * 56)))?;
        file.read_exact(&mut entry)?;
        if number(&entry[0..4]) == 3 {
            let mut name = Vec::new();
            file.seek(SeekFrom::Start(number(&entry[8..16])))?;
            file.take(number(&entry[32..40]).min(4096))
                .read_to_end(&mut name)?;
            let name = String::from_utf8_lossy(&name);
            return Ok(name.trim_end_matches('\0').into());
        }
    }
    Err(bad("it has no program interpreter"))
}

/// What the loader would load for `program`: name and file of each library.
fn libraries(loader: &Path, program: &Path) -> io::Result<Vec<(String, PathBuf)>> {
    // ld.so(8): it says what it finds, and runs nothing.
    let output = Command::new(loader).arg("--list").arg(program).output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(io::Error::other(said.trim().to_owned()));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let mut found = Vec::new();
    for line in text
        .lines()
        .filter_map(|line| line.trim().split_once(" => "))
    {
        let (name, rest) = line;
        let file = rest.rsplit_once(" (").map_or(rest, |(file, _)| file);
        if file.contains("not found") {
            let why = format!("the library {name} of {} is missing", program.display());
            return Err(io::Error::new(io::ErrorKind::NotFound, why));
        }
        let name = Path::new(name).file_name().unwrap_or_default();
        found.push((name.to_string_lossy().into_owned(), PathBuf::from(file)));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_of_this_host_is_closed_over_and_kept() {
        let cache = tempfile::tempdir().unwrap();
        let closure = of(Path::new("/bin/sh"), cache.path()).unwrap();
        let files: Vec<_> = closure
            .files
            .keys()
            .map(|place| place.to_str().unwrap())
            .collect();
        assert!(
            files.contains(&PROGRAM) && files.contains(&"/lib/libc.so.6"),
            "{files:?}"
        );
        assert!(
            files.iter().any(|file| file.contains("ld-linux")),
            "{files:?}"
        );
        let kept: Vec<_> = fs::read_dir(cache.path()).unwrap().flatten().collect();
        assert_eq!(kept.len(), 1);
        // What is kept is believed for as long as its files are the same.
        let path = kept[0].path();
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replace("/lib/libc.so.6", "/lib/believed")).unwrap();
        let again = of(Path::new("/bin/sh"), cache.path()).unwrap();
        assert!(again.files.contains_key(Path::new("/lib/believed")));
        fs::write(&path, text.replace("\"size\":", "\"size\":1")).unwrap();
        assert_eq!(of(Path::new("/bin/sh"), cache.path()).unwrap(), closure);
    }

    #[test]
    fn scripts_and_texts_are_no_programs() {
        let dir = tempfile::tempdir().unwrap();
        for (text, why) in [("#!/bin/sh\n", "script"), ("text", "no x86-64 program")] {
            let file = dir.path().join("file");
            fs::write(&file, text).unwrap();
            let error = of(&file, dir.path()).unwrap_err();
            assert!(error.to_string().contains(why), "{error}");
        }
    }
}
