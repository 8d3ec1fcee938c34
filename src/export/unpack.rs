//! Takes an export in. Everything in it is held to be hostile.

use std::fs::File;
use std::io::{BufRead as _, Read};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use zstd::stream::read::Decoder;

use super::error::{ExportError, Flaw};
use super::header::{Content, Header, LONGEST, Machine};
use super::seal::Sealed;
use crate::host::fault;
use crate::snapshot;
use crate::template::{self, BLOCK, MOST, Older, Piece, Template};

/// Largest window of the decompressor, as a power of two: 8 MiB.
const WINDOW: u32 = 23;

/// An export that is being taken in: its header is read, its files are not.
pub struct Import<R: Read> {
    of: String,
    from: Decoder<'static, Sealed<R>>,
    header: Header,
    /// Bytes of data that may still come.
    left: u64,
}

impl<R: Read> Import<R> {
    /// Reads the header of an export; `of` is what it is called. Blocks.
    ///
    /// # Errors
    /// It is none, is damaged, or claims more than there may be.
    pub fn open(from: R, of: impl Into<String>) -> Result<Self, ExportError> {
        let of = of.into();
        let begin = || -> Result<_, Flaw> {
            fault::at("import header").map_err(Flaw::Unreadable)?;
            let from = Sealed::new(from)?;
            let mut from = Decoder::with_buffer(from).map_err(Flaw::of)?.single_frame();
            from.window_log_max(WINDOW).map_err(Flaw::of)?;
            let header = header(&mut from)?;
            Ok((from, header))
        };
        match begin() {
            Ok((from, header)) => Ok(Self {
                of,
                from,
                left: header.data,
                header,
            }),
            Err(flaw) => Err(ExportError::Refused { of, flaw }),
        }
    }

    /// What it says of itself.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// What it is called.
    pub fn of(&self) -> &str {
        &self.of
    }

    /// The template in it.
    ///
    /// # Errors
    /// It is a snapshot.
    pub fn template(&self) -> Result<&template::Manifest, ExportError> {
        match &self.header.content {
            Content::Template(manifest) => Ok(manifest),
            other => Err(self.other(other, "template")),
        }
    }

    /// The snapshot in it, and what its machine is made of.
    ///
    /// # Errors
    /// It is a template.
    pub fn snapshot(&self) -> Result<(&snapshot::Manifest, &Machine), ExportError> {
        match &self.header.content {
            Content::Snapshot { manifest, machine } => Ok((manifest, machine)),
            other => Err(self.other(other, "snapshot")),
        }
    }

    /// Puts the template into a store. Whether it fits the host is not asked:
    /// what does not is never cloned. Blocks.
    ///
    /// # Errors
    /// There is one of that key; it is not what was exported; the disk is full.
    /// Nothing of it is there then.
    pub fn keep_template(mut self, store: &template::Store) -> Result<Template, ExportError> {
        let manifest = template::Manifest {
            // No path is looked at that a file named.
            kernel: None,
            ..self.template()?.clone()
        };
        // Before all of it is read; asked again when it is there.
        store.vacant(&manifest.key)?;
        let staged = store.stage()?;
        self.room(staged.path())?;
        for (name, piece) in self.header.clone().content.parts() {
            self.part(name, piece, Some(staged.path()))?;
            let found = template::Store::piece(staged.path(), name)?;
            self.same(name, piece, &found)?;
        }
        self.end()?;
        Ok(store.publish(staged, &manifest, Older::Kept)?)
    }

    /// Puts the snapshot into a machine's store, without its memory where that
    /// is not wanted. Whether it fits the machine is not asked: a restore does.
    /// Gives what is there then. Blocks.
    ///
    /// # Errors
    /// There is one of that name; it is not what was exported; the disk is
    /// full. Nothing of it is there then.
    pub fn keep_snapshot(
        mut self,
        store: &snapshot::Store,
        disk_only: bool,
    ) -> Result<snapshot::Manifest, ExportError> {
        let mut manifest = self.snapshot()?.0.clone();
        store.free(&manifest.name)?;
        let staged = store.stage()?;
        self.room(staged.path())?;
        for (name, piece) in self.header.clone().content.parts() {
            if disk_only && name == snapshot::STATE {
                self.part(name, piece, None)?;
                continue;
            }
            self.part(name, piece, Some(staged.path()))?;
            let found = snapshot::Store::piece(staged.path(), name)?;
            self.same(name, piece, &found)?;
        }
        self.end()?;
        // Those before it are not here.
        manifest.parent = None;
        manifest.transient = false;
        manifest.saved = manifest.saved.filter(|_| !disk_only);
        store.commit(staged, &manifest)?;
        Ok(manifest)
    }

    /// Refuses what the file system of `dir` has no room for.
    fn room(&self, dir: &Path) -> Result<(), ExportError> {
        let found = rustix::fs::statvfs(dir);
        let found = found.map_err(|errno| ExportError::io("read", dir)(errno.into()))?;
        let free = found.f_bavail.saturating_mul(found.f_frsize);
        // Machines that run write there, too.
        let usable = free - free / 10;
        match self.header.data > usable {
            true => Err(ExportError::NoRoom {
                of: self.of.clone(),
                needed: self.header.data,
                usable,
                path: dir.parent().unwrap_or(dir).to_owned(),
            }),
            false => Ok(()),
        }
    }

    /// Reads a file, into a new one in `dir` where there is one.
    fn part(&mut self, name: &str, piece: &Piece, dir: Option<&Path>) -> Result<(), ExportError> {
        let Some(dir) = dir else {
            return self.runs(piece.size, |_, _| Ok(()));
        };
        let path = dir.join(name);
        let make = || {
            fault::at(&format!("import {name}"))?;
            let mut options = File::options();
            let options = options.write(true).create_new(true).mode(0o600);
            let file = options.open(&path)?;
            file.set_len(piece.size)?;
            Ok(file)
        };
        let file = make().map_err(ExportError::io("create", &path))?;
        self.runs(piece.size, |at, bytes| {
            file.write_all_at(bytes, at)
                .map_err(ExportError::io("write", &path))
        })
    }

    /// Reads runs of blocks, in order and within `size`, up to their end.
    fn runs(
        &mut self,
        size: u64,
        mut take: impl FnMut(u64, &[u8]) -> Result<(), ExportError>,
    ) -> Result<(), ExportError> {
        let mut buffer = vec![0; MOST];
        let mut least = 0;
        loop {
            let Some((at, len)) = self.run(least, size).map_err(|flaw| self.refused(flaw))? else {
                return Ok(());
            };
            let bytes = &mut buffer[..len];
            let read = self.from.read_exact(bytes);
            read.map_err(|error| self.refused(Flaw::of(error)))?;
            if bytes
                .chunks(BLOCK)
                .any(|block| block.iter().all(|byte| *byte == 0))
            {
                return Err(self.refused(Flaw::Corrupt("a block of zeroes".into())));
            }
            take(at, bytes)?;
            least = at + len as u64;
        }
    }

    /// The place and length of the next run; `None` at the end.
    fn run(&mut self, least: u64, size: u64) -> Result<Option<(u64, usize)>, Flaw> {
        let at = u64::from_le_bytes(exact(&mut self.from)?);
        let len = u32::from_le_bytes(exact(&mut self.from)?);
        let corrupt = |what: String| Err(Flaw::Corrupt(what));
        if len == 0 {
            return match at == size {
                true => Ok(None),
                false => corrupt(format!("a file ends at {at}, not at {size}")),
            };
        }
        let end = at.saturating_add(len.into());
        let whole = at.is_multiple_of(BLOCK as u64)
            && ((len as usize).is_multiple_of(BLOCK) || end == size);
        if at < least || end > size || len as usize > MOST || !whole {
            return corrupt(format!("{len} bytes at {at} of {size}"));
        }
        let Some(left) = self.left.checked_sub(len.into()) else {
            let most = self.header.data;
            return Err(Flaw::TooLarge(format!(
                "more data than the {most} bytes it says"
            )));
        };
        self.left = left;
        Ok(Some((at, len as usize)))
    }

    fn same(&self, name: &str, wanted: &Piece, found: &Piece) -> Result<(), ExportError> {
        match found == wanted {
            true => Ok(()),
            false => Err(self.refused(Flaw::Corrupt(format!("{name} is not what was saved")))),
        }
    }

    /// Reads the end: nothing may follow, neither within nor after it.
    fn end(&mut self) -> Result<(), ExportError> {
        let end = |from: &mut Decoder<'static, Sealed<R>>| {
            if from.read(&mut [0]).map_err(Flaw::of)? > 0 {
                return Err(Flaw::Corrupt("more data than its files have".into()));
            }
            match from.get_mut().fill_buf().map_err(Flaw::of)?.is_empty() {
                true => Ok(()),
                false => Err(Flaw::Corrupt("more than one frame".into())),
            }
        };
        end(&mut self.from).map_err(|flaw| self.refused(flaw))
    }

    fn other(&self, found: &Content, wanted: &'static str) -> ExportError {
        self.refused(Flaw::Kind {
            found: found.kind(),
            wanted,
        })
    }

    fn refused(&self, flaw: Flaw) -> ExportError {
        ExportError::Refused {
            of: self.of.clone(),
            flaw,
        }
    }
}

fn exact<const N: usize>(from: &mut impl Read) -> Result<[u8; N], Flaw> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes).map_err(Flaw::of)?;
    Ok(bytes)
}

fn header(from: &mut impl Read) -> Result<Header, Flaw> {
    let len = u32::from_le_bytes(exact(from)?) as usize;
    if len > LONGEST {
        let told = format!("a header of {len} bytes, and {LONGEST} are the most");
        return Err(Flaw::TooLarge(told));
    }
    // As much as there is: what is claimed takes no memory.
    let mut text = Vec::new();
    let read = from.take(len as u64).read_to_end(&mut text);
    if read.map_err(Flaw::of)? != len {
        return Err(Flaw::Corrupt("its header has no end".into()));
    }
    let header: Header = serde_json::from_slice(&text).map_err(|error| {
        // It may quote all of it.
        let told: String = error.to_string().chars().take(300).collect();
        Flaw::Corrupt(format!("its header: {told}"))
    })?;
    header.check()?;
    Ok(header)
}
