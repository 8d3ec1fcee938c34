//! Imports root file systems: tar archives and OCI layout directories.

use std::collections::HashMap;
use std::fs;
use std::io::{self, BufReader, Read, Seek as _};
use std::path::Path;
use std::process::Stdio;

use flate2::read::MultiGzDecoder;

use super::build::Builder;
use super::error::{Error, Result};
use super::tool::{Running, Tool, XZ, ZSTD};
use super::{Image, digest, oci};

impl Builder<'_> {
    /// Imports a root file system: a tar archive (plain, gzip, xz or zstd) or
    /// an OCI layout directory with an image for linux/amd64. Kernel and guest
    /// agent are those of `kernel_from`.
    ///
    /// # Errors
    /// The archive is not acceptable, a blob's digest is wrong, the disk is full.
    pub fn import(&self, path: &Path, name: &str, kernel_from: &Image) -> Result<Image> {
        let shown = path.display().to_string();
        if path.is_dir() {
            let layers = oci::layers(path)?;
            return self.assemble(kernel_from, name, None, &shown, |merge| {
                for layer in layers.iter().rev() {
                    // Before a byte of it is used.
                    layer.verify()?;
                    let mut tar = Unpacked::open(layer.path())?;
                    let promotions = tar.used_by(|reader| merge.promotions(reader))?;
                    let mut tar = Unpacked::open(layer.path())?;
                    tar.used_by(|reader| merge.layer(reader, &promotions))?;
                }
                Ok(())
            });
        }
        let mut tar = Unpacked::open(path)?;
        self.assemble(kernel_from, name, None, &shown, |merge| {
            tar.used_by(|reader| merge.layer(reader, &HashMap::new()))
        })
    }
}

/// A tar archive with its compression taken off.
struct Unpacked {
    reader: Box<dyn Read>,
    /// The decompressor, where it is a tool of the host.
    tool: Option<Running>,
    /// Holds the tool's stderr.
    _dir: tempfile::TempDir,
}

impl Unpacked {
    fn open(path: &Path) -> Result<Self> {
        let fail = |source| Error::io("read", path, source);
        let mut file = fs::File::open(path).map_err(fail)?;
        let mut magic = Vec::new();
        (&file).take(6).read_to_end(&mut magic).map_err(fail)?;
        file.rewind().map_err(fail)?;
        let dir = tempfile::tempdir()
            .map_err(|source| Error::io("create", &std::env::temp_dir(), source))?;
        let (reader, tool): (Box<dyn Read>, _) = match magic[..] {
            [0x1f, 0x8b, ..] => {
                let buffer = BufReader::with_capacity(digest::CHUNK, file);
                (Box::new(MultiGzDecoder::new(buffer)), None)
            }
            [0xfd, b'7', b'z', b'X', b'Z', 0] => through(XZ, file, dir.path())?,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => through(ZSTD, file, dir.path())?,
            _ => (
                Box::new(BufReader::with_capacity(digest::CHUNK, file)),
                None,
            ),
        };
        Ok(Self {
            reader,
            tool,
            _dir: dir,
        })
    }

    /// Gives the archive to `work`, reads it to its end, and checks that the
    /// decompressor was content.
    fn used_by<T>(&mut self, work: impl FnOnce(&mut dyn Read) -> Result<T>) -> Result<T> {
        let done = match work(&mut self.reader) {
            Ok(done) => done,
            Err(error) => {
                return Err(match self.tool.take() {
                    Some(tool) => tool.blame(error),
                    None => error,
                });
            }
        };
        // Checksums stand at the end of the stream, padding before them.
        io::copy(&mut self.reader, &mut io::sink()).map_err(|source| Error::Archive {
            archive: "the archive".into(),
            reason: source.to_string(),
        })?;
        if let Some(tool) = self.tool.take() {
            tool.finish()?;
        }
        Ok(done)
    }
}

fn through(tool: Tool, file: fs::File, dir: &Path) -> Result<(Box<dyn Read>, Option<Running>)> {
    let mut command = tool.command();
    command
        .args(["-d", "-c"])
        .stdin(file)
        .stdout(Stdio::piped());
    let mut running = tool.spawn(&mut command, dir)?;
    match running.stdout() {
        Some(stdout) => Ok((Box::new(stdout), Some(running))),
        None => unreachable!("stdout was piped"),
    }
}
