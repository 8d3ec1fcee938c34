//! Makes images: from a recipe, or from a root file system made elsewhere.

use std::collections::HashMap;
use std::fs;
use std::io::{self, BufWriter, Read, Write as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use super::error::{Error, Result};
use super::initramfs::{self, AgentBinary};
use super::kernel::{self, Kernel, KernelSource};
use super::merge::{Limits, Merge, Merged};
use super::recipe::Recipe;
use super::staging::Staging;
use super::store::{SCHEMA, Store, check_name};
use super::tool::{MMDEBSTRAP, TAR2SQFS};
use super::{File, Image, Manifest, apt, digest, packages};

/// How root file systems are compressed: reading is what a run waits for, and
/// lz4 unpacks several times faster than zstd or gzip for a third more bytes.
const COMPRESSOR: [&str; 4] = ["--compressor", "lz4", "--comp-extra", "hc"];
/// Part of the key of an image's inputs: raise it when this module's output changes.
const FORMAT: u32 = 2;

pub(super) const ROOT: &str = "root.squashfs";
pub(super) const KERNEL: &str = "kernel";
pub(super) const INITRAMFS: &str = "initramfs";

/// Makes images in a store. Blocking: some steps take minutes.
pub struct Builder<'a> {
    pub(super) store: &'a Store,
    progress: Box<dyn Fn(&str) + 'a>,
}

impl<'a> Builder<'a> {
    /// A builder that tells nobody what it does.
    pub fn new(store: &'a Store) -> Self {
        Self {
            store,
            progress: Box::new(|_| {}),
        }
    }

    /// Calls `progress` with each step as it begins.
    #[must_use]
    pub fn with_progress(mut self, progress: impl Fn(&str) + 'a) -> Self {
        self.progress = Box::new(progress);
        self
    }

    /// Key of everything [`Builder::from_recipe`] would use, without using it.
    ///
    /// # Errors
    /// Apt does not know the kernel, or a kernel file cannot be read.
    pub fn key(recipe: &Recipe, agent: &AgentBinary, kernel: &KernelSource) -> Result<String> {
        let kernel = match kernel {
            KernelSource::Package => {
                let dir = tempfile::tempdir()
                    .map_err(|source| Error::io("create", &std::env::temp_dir(), source))?;
                let package = apt::kernel_package(&recipe.kernel, dir.path())?;
                format!("{} {}", package.name, package.version)
            }
            KernelSource::Path(path) => digest::of_file(&kernel::find(path))?.0,
        };
        let text = format!(
            "{FORMAT}\n{recipe:?}\n{}\n{}\n{kernel}\n",
            agent.record.version, agent.record.sha256
        );
        Ok(digest::of_bytes(text.as_bytes()))
    }

    /// Builds an image from Debian packages.
    ///
    /// # Errors
    /// A tool fails or is missing, the kernel cannot be used, the disk is full.
    pub fn from_recipe(
        &self,
        recipe: &Recipe,
        name: &str,
        agent: &AgentBinary,
        kernel: &KernelSource,
    ) -> Result<Image> {
        check_name(name)?;
        let staging = self.store.stage()?;
        self.step("fetching the kernel");
        let kernel = match kernel {
            KernelSource::Path(path) => Kernel::from_path(path)?,
            KernelSource::Package => {
                let scratch = scratch(&staging)?;
                let package = apt::kernel_package(&recipe.kernel, scratch.path())?;
                let tar = apt::files_of(&package, scratch.path())?;
                Kernel::from_package(&tar)?
            }
        };
        let image = write_file(&staging, KERNEL, |out| out.write_all(&kernel.data))?;
        let initramfs = write_file(&staging, INITRAMFS, |out| {
            initramfs::write(out, agent, &kernel)
        })?;
        self.step("installing packages");
        let (root, merged) = self.bootstrap(recipe, &staging)?;
        let manifest = Manifest {
            schema: SCHEMA,
            name: name.to_owned(),
            from: None,
            root,
            kernel: super::Kernel {
                image,
                release: kernel.release,
                format: kernel.format,
            },
            initramfs,
            agent: agent.record.clone(),
            packages: packages::list(&merged.kept),
        };
        self.step("checking and naming the image");
        self.store.commit(staging, manifest, name)
    }

    /// Makes an image whose root file system is the tar archive in `reader`,
    /// with kernel and agent of `from`. The archive may come from a guest:
    /// nothing of it is unpacked on the host.
    ///
    /// # Errors
    /// The archive is not acceptable, tar2sqfs fails, the disk is full.
    pub fn from_root_tar(&self, reader: impl Read, from: &Image, name: &str) -> Result<Image> {
        const ARCHIVE: &str = "the root file system";
        let provisioned = Some(from.id.clone());
        self.assemble(from, name, provisioned, ARCHIVE, |merge| {
            // Whether its maker was content shows at the very end.
            whole(merge, reader, ARCHIVE)
        })
    }

    /// Makes an image from layers that `fill` adds, with the kernel of `from`.
    pub(super) fn assemble(
        &self,
        from: &Image,
        name: &str,
        provisioned: Option<String>,
        archive: &str,
        fill: impl FnOnce(&mut Merge<io::PipeWriter>) -> Result<()>,
    ) -> Result<Image> {
        check_name(name)?;
        let _in_use = from.lock()?;
        let staging = self.store.stage()?;
        self.step("packing the root file system");
        let (root, merged) = squash(&staging, archive, false, 0, fill)?;
        for (source, file) in [
            (from.kernel(), &from.manifest.kernel.image),
            (from.initramfs(), &from.manifest.initramfs),
        ] {
            let target = staging.path().join(&file.file);
            fs::hard_link(&source, &target)
                .or_else(|_| fs::copy(&source, &target).map(|_| ()))
                .map_err(|error| Error::io("create", &target, error))?;
        }
        let manifest = Manifest {
            schema: SCHEMA,
            name: name.to_owned(),
            from: provisioned,
            root,
            packages: packages::list(&merged.kept),
            ..from.manifest.clone()
        };
        self.step("checking and naming the image");
        self.store.commit(staging, manifest, name)
    }

    fn bootstrap(&self, recipe: &Recipe, staging: &Staging) -> Result<(File, Merged)> {
        let scratch = scratch(staging)?;
        let sources = apt::sources(&recipe.suite, scratch.path())?;
        let mut command = MMDEBSTRAP.command();
        command
            .arg(format!("--variant={}", recipe.variant.as_str()))
            .arg(format!("--include={}", recipe.packages.join(",")))
            .args(["--format=tar", "--aptopt=Apt::Install-Recommends \"false\""])
            .args([recipe.suite.as_str(), "-"])
            .args(&sources.lines)
            // Its chroot goes where the next build would sweep it.
            .env("TMPDIR", scratch.path())
            .env("SOURCE_DATE_EPOCH", sources.epoch.to_string())
            .stdout(Stdio::piped());
        let mut debian = MMDEBSTRAP.spawn(&mut command, scratch.path())?;
        let Some(mut tar) = debian.stdout() else {
            unreachable!("stdout was piped")
        };
        let packed = squash(
            staging,
            MMDEBSTRAP.name,
            recipe.trim,
            sources.epoch,
            |merge| {
                self.step("packing the root file system");
                whole(merge, &mut tar, MMDEBSTRAP.name)
            },
        );
        match packed {
            Ok(packed) => {
                drop(tar);
                debian.finish().map(|()| packed)
            }
            // Its pipe is open still: if it has failed, then not because of us.
            Err(error) => Err(debian.blame(error)),
        }
    }

    fn step(&self, what: &str) {
        (self.progress)(what);
    }
}

/// Adds the layer in `tar`, and reads what follows its end: whoever writes it
/// pads it, and takes a pipe that is closed before that for a failure.
fn whole(merge: &mut Merge<impl io::Write>, mut tar: impl Read, archive: &str) -> Result<()> {
    merge.layer(&mut tar, &HashMap::new())?;
    let read = io::copy(&mut tar, &mut io::sink());
    read.map(|_| ()).map_err(|source| Error::Archive {
        archive: archive.to_owned(),
        reason: source.to_string(),
    })
}

/// Runs tar2sqfs behind a [`Merge`] that `fill` fills.
fn squash(
    staging: &Staging,
    archive: &str,
    trim: bool,
    epoch: u64,
    fill: impl FnOnce(&mut Merge<io::PipeWriter>) -> Result<()>,
) -> Result<(File, Merged)> {
    let path = staging.path().join(ROOT);
    let (reader, writer) = io::pipe().map_err(|source| Error::io("pipe into", &path, source))?;
    let mut command = TAR2SQFS.command();
    command
        .args(["--quiet", "--no-skip", "--force"])
        .args(COMPRESSOR)
        .arg(&path)
        .env("SOURCE_DATE_EPOCH", epoch.to_string())
        .stdin(reader)
        .stdout(Stdio::null());
    let tool = TAR2SQFS.spawn(&mut command, staging.path())?;
    // The command still holds the reading end: a dead tool must break the pipe.
    drop(command);
    let mut merge = Merge::new(writer, archive.to_owned(), Limits::default(), trim);
    let merged = match fill(&mut merge).and_then(|()| merge.finish()) {
        Ok(merged) => merged,
        Err(error) => return Err(tool.blame(error)),
    };
    tool.finish()?;
    let (sha256, size) = digest::of_file(&path)?;
    let file = File {
        file: ROOT.to_owned(),
        size,
        sha256,
    };
    Ok((file, merged))
}

/// A directory for what must not get into the image.
fn scratch(staging: &Staging) -> Result<tempfile::TempDir> {
    let fail = |source| Error::io("create a directory in", staging.path(), source);
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    tempfile::Builder::new()
        .permissions(open)
        .tempdir_in(staging.path())
        .map_err(fail)
}

fn write_file(
    staging: &Staging,
    name: &str,
    fill: impl FnOnce(&mut BufWriter<digest::Hashing<fs::File>>) -> io::Result<()>,
) -> Result<File> {
    let path: PathBuf = staging.path().join(name);
    let fail = |source| Error::io("write", Path::new(&path), source);
    let file = fs::File::create(&path).map_err(fail)?;
    let mut out = BufWriter::new(digest::Hashing::new(file));
    fill(&mut out).map_err(fail)?;
    let hashing = out.into_inner().map_err(|error| fail(error.into_error()))?;
    let (sha256, size) = hashing.finish();
    Ok(File {
        file: name.to_owned(),
        size,
        sha256,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::tool::Tool;

    #[test]
    fn who_pads_an_archive_is_read_to_the_end() {
        const SH: Tool = Tool {
            name: "sh",
            package: "dash",
            converts: false,
        };
        let dir = tempfile::tempdir().unwrap();
        let mut command = SH.command();
        // More than a pipe holds: it cannot have ended before it was read.
        command.args(["-c", "head -c 1000000 /dev/zero"]);
        let mut maker = SH
            .spawn(command.stdout(Stdio::piped()), dir.path())
            .unwrap();
        let mut tar = maker.stdout().unwrap();
        let mut merge = Merge::new(io::sink(), "sh".into(), Limits::default(), false);
        whole(&mut merge, &mut tar, "sh").unwrap();
        drop(tar);
        maker.finish().unwrap();
    }
}
