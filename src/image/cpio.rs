//! Writes the archives Linux unpacks as initramfs ("newc" cpio, see
//! Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! The same entries give the same bytes: owner 0, time 0, inodes counted.

use std::io::{self, Read, Write};

const PAGE: u64 = 4096;
const DIR: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const CHAR: u32 = 0o020_000;

/// An archive being written.
pub(super) struct Cpio<W: Write> {
    out: W,
    inode: u32,
    written: u64,
}

impl<W: Write> Cpio<W> {
    pub(super) fn new(out: W) -> Self {
        Self {
            out,
            inode: 0,
            written: 0,
        }
    }

    /// A directory; its parents must have come before.
    pub(super) fn dir(&mut self, path: &str) -> io::Result<()> {
        self.entry(path, DIR | 0o755, (0, 0), &[])
    }

    /// A regular file with this mode.
    pub(super) fn file(&mut self, path: &str, mode: u32, data: &[u8]) -> io::Result<()> {
        self.entry(path, FILE | mode, (0, 0), data)
    }

    /// A character device.
    pub(super) fn char(&mut self, path: &str, major: u32, minor: u32) -> io::Result<()> {
        self.entry(path, CHAR | 0o600, (major, minor), &[])
    }

    /// Writes the trailer, and as many zeroes, which the kernel skips, as leave but
    /// one byte in the last page. QEMU puts an initramfs at the end of a microvm's
    /// memory, in whole pages, after the firmware has put the tables of ACPI into
    /// the last of them: where it reached that far, the kernel hung.
    pub(super) fn finish(mut self) -> io::Result<W> {
        self.inode = u32::MAX;
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        let zeroes = (PAGE + 1 - self.written % PAGE) % PAGE;
        io::copy(&mut io::repeat(0).take(zeroes), &mut self.out)?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn entry(&mut self, path: &str, mode: u32, dev: (u32, u32), data: &[u8]) -> io::Result<()> {
        let path = path.trim_start_matches('/');
        let size = u32::try_from(data.len())
            .map_err(|_| io::Error::other(format!("{path} is too large for an initramfs")))?;
        self.inode = self.inode.wrapping_add(1);
        let links = if mode & DIR == DIR { 2 } else { 1 };
        let name_size = path.len() as u32 + 1;
        let mut header = String::from("070701");
        for field in [
            self.inode, mode, 0, 0, links, 0, size, 0, 0, dev.0, dev.1, name_size, 0,
        ] {
            header.push_str(&format!("{field:08x}"));
        }
        self.write(header.as_bytes())?;
        self.write(path.as_bytes())?;
        self.write(&[0])?;
        self.pad()?;
        self.write(data)?;
        self.pad()
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len() as u64;
        self.out.write_all(bytes)
    }

    fn pad(&mut self) -> io::Result<()> {
        let pad = (4 - self.written % 4) % 4;
        self.write(&[0; 4][..pad as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpio_lists_what_was_written() {
        let mut cpio = Cpio::new(Vec::new());
        cpio.dir("/dev").unwrap();
        cpio.char("/dev/console", 5, 1).unwrap();
        cpio.file("/init", 0o755, b"#!/bin/sh\n").unwrap();
        let bytes = cpio.finish().unwrap();
        // The kernel's tables have the rest of the page.
        assert_eq!(bytes.len() % 4096, 1);
        let text = String::from_utf8_lossy(&bytes);
        // Fields of the device: mode, then the major and minor numbers at 9, 10.
        let at = text.find("dev/console").unwrap();
        let header = &text[at - 110..at];
        assert_eq!(&header[14..22], "00002180");
        assert_eq!(&header[78..94], "0000000500000001");
        let init = text.find("init\0").unwrap();
        assert_eq!(&text[init - 110..init - 104], "070701");
        assert_eq!((init - 110) % 4, 0);
        assert_eq!(&text[init - 110 + 14..init - 110 + 22], "000081ed");
    }
}
