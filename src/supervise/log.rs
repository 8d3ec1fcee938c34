//! What a command wrote, kept on the host: bounded, byte for byte, with times.
//!
//! A file of records: kind (`u8`), time (`u64`, milliseconds since 1970-01-01
//! UTC), length (`u32`), payload; integers are little-endian. The first is the
//! command itself. A full file becomes `.old`, in place of an older one.

use std::fs::{self, File};
use std::io::{self, BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::wire::{ExecEnd, ExecId, ExecInfo};
use crate::error::Explain;
use crate::run::now_ms;

/// Bytes in one file.
const LIMIT: u64 = 8 << 20;
/// Longest payload taken from a file.
const MAX_PAYLOAD: u32 = 1 << 20;
/// Logs kept for one machine; of older commands they are removed.
const KEPT: usize = 100;
const HEADER: usize = 13;

/// A log could not be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the log {path}")]
pub struct LogError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

impl Explain for LogError {
    fn code(&self) -> &'static str {
        match self.source.kind() {
            io::ErrorKind::NotFound => "log-not-found",
            _ => "log-unreadable",
        }
    }

    fn remedy(&self) -> String {
        "See `bulkhead inspect` for the commands of a machine.".into()
    }
}

/// What stands in a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// The command, at the beginning of each file.
    Start(ExecInfo),
    /// It wrote to stdout.
    Out(Vec<u8>),
    /// It wrote to stderr.
    Err(Vec<u8>),
    /// It ended.
    End(ExecEnd),
}

/// The log of one command, being written. A disk that refuses costs the log,
/// not the command.
#[derive(Debug)]
pub struct ExecLog {
    path: PathBuf,
    file: Option<File>,
    written: u64,
    info: ExecInfo,
}

fn path(dir: &Path, id: ExecId) -> PathBuf {
    dir.join(format!("{id}.log"))
}

fn old(path: &Path) -> PathBuf {
    path.with_extension("log.old")
}

impl ExecLog {
    /// Begins the log of a command in `dir`.
    pub(super) fn begin(dir: &Path, info: &ExecInfo) -> Self {
        prune(dir);
        let path = path(dir, info.id);
        let _ = fs::remove_file(old(&path));
        let mut log = Self {
            path,
            file: None,
            written: 0,
            info: info.clone(),
        };
        log.open();
        log
    }

    fn open(&mut self) {
        let mut options = File::options();
        // It may hold secrets.
        options.write(true).create(true).truncate(true).mode(0o600);
        self.file = options.open(&self.path).ok();
        self.written = 0;
        let info = self.info.clone();
        self.json(0, &info);
    }

    /// Takes in output.
    pub(super) fn output(&mut self, error: bool, bytes: &[u8]) {
        if self.written + bytes.len() as u64 > LIMIT {
            let _ = fs::rename(&self.path, old(&self.path));
            self.open();
        }
        self.record(if error { 2 } else { 1 }, bytes);
    }

    /// Writes how it ended.
    pub(super) fn end(&mut self, end: &ExecEnd) {
        self.info.ended = Some(end.clone());
        self.json(9, end);
    }

    fn json(&mut self, kind: u8, value: &impl serde::Serialize) {
        if let Ok(text) = serde_json::to_vec(value) {
            self.record(kind, &text);
        }
    }

    fn record(&mut self, kind: u8, bytes: &[u8]) {
        let Some(file) = &mut self.file else { return };
        let len = u32::try_from(bytes.len()).unwrap_or(MAX_PAYLOAD);
        let mut record = Vec::with_capacity(HEADER + bytes.len());
        record.push(kind);
        record.extend(now_ms().to_le_bytes());
        record.extend(len.to_le_bytes());
        record.extend(bytes);
        match file.write_all(&record) {
            Ok(()) => self.written += record.len() as u64,
            Err(error) => {
                tracing::warn!("the log {} ends here: {error}", self.path.display());
                self.file = None;
            }
        }
    }

    /// Reads a log, the older file first, and calls `each` with the time (in
    /// milliseconds since 1970-01-01 UTC) and the entry.
    ///
    /// # Errors
    /// There is none, or it cannot be read.
    pub fn read(
        dir: &Path,
        id: ExecId,
        mut each: impl FnMut(u64, Entry) -> io::Result<()>,
    ) -> Result<(), LogError> {
        let path = path(dir, id);
        let mut whole = || {
            // A command that wrote a lot: what is kept is its end.
            if let Ok(file) = File::open(old(&path)) {
                entries(file, &mut each)?;
            }
            entries(File::open(&path)?, &mut each)
        };
        whole().map_err(|source| LogError { path, source })
    }

    /// Follows a log while it is written, from the beginning of the newer file.
    ///
    /// # Errors
    /// There is none, or it cannot be read.
    pub fn tail(dir: &Path, id: ExecId) -> Result<Tail, LogError> {
        let path = path(dir, id);
        match File::open(&path) {
            Ok(file) => Ok(Tail { path, file }),
            Err(source) => Err(LogError { path, source }),
        }
    }

    /// The commands that have logs in `dir`, oldest first.
    pub fn list(dir: &Path) -> Vec<ExecInfo> {
        let mut infos: Vec<ExecInfo> = ids(dir)
            .into_iter()
            .filter_map(|id| info(&path(dir, id)).ok().flatten())
            .collect();
        infos.sort_by_key(|info| (info.started_ms, info.id));
        infos
    }

    /// Ends what an earlier supervisor could not end.
    pub(super) fn close_all(dir: &Path) {
        for info in Self::list(dir) {
            if info.ended.is_some() {
                continue;
            }
            let path = path(dir, info.id);
            let mut log = Self {
                file: File::options().append(true).open(&path).ok(),
                path,
                written: 0,
                info,
            };
            log.end(&ExecEnd {
                at_ms: now_ms(),
                exit_code: crate::run::FAILED,
                signal: None,
                failure: Some("its supervisor died".into()),
            });
        }
    }

    /// The highest number used in `dir`.
    pub(super) fn last_number(dir: &Path) -> u32 {
        ids(dir).into_iter().map(|id| id.0).max().unwrap_or(0)
    }
}

/// A log that is followed while it is written.
#[derive(Debug)]
pub struct Tail {
    path: PathBuf,
    file: File,
}

impl Tail {
    /// The next entry; `None` when nothing more has been written yet.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn next(&mut self) -> io::Result<Option<(u64, Entry)>> {
        use std::io::Seek;
        let before = self.file.stream_position()?;
        match entry(&mut self.file)? {
            Some(entry) => Ok(Some(entry)),
            None => {
                // Half a record may be on its way; or the file was set aside,
                // and the newer one goes on.
                self.file.seek(io::SeekFrom::Start(before))?;
                if moved(&self.file, &self.path) && before == self.file.metadata()?.len() {
                    self.file = File::open(&self.path)?;
                    return entry(&mut self.file);
                }
                Ok(None)
            }
        }
    }
}

fn moved(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (file.metadata(), fs::metadata(path)) {
        (Ok(here), Ok(there)) => (here.dev(), here.ino()) != (there.dev(), there.ino()),
        _ => false,
    }
}

fn ids(dir: &Path) -> Vec<ExecId> {
    fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            entry
                .file_name()
                .to_str()?
                .strip_suffix(".log")?
                .parse()
                .ok()
        })
        .collect()
}

fn prune(dir: &Path) {
    let mut numbers = ids(dir);
    numbers.sort();
    numbers.retain(|id| *id != ExecId::MAIN);
    let excess = numbers.len().saturating_sub(KEPT - 1);
    for id in numbers.into_iter().take(excess) {
        let path = path(dir, id);
        // One that is still written stays.
        if info(&path).is_ok_and(|info| info.is_some_and(|info| info.ended.is_none())) {
            continue;
        }
        let _ = fs::remove_file(old(&path));
        let _ = fs::remove_file(path);
    }
}

/// Reads all of a file.
fn entries(file: File, each: &mut impl FnMut(u64, Entry) -> io::Result<()>) -> io::Result<()> {
    let mut reader = BufReader::new(file);
    while let Some((time, entry)) = entry(&mut reader)? {
        each(time, entry)?;
    }
    Ok(())
}

/// The command of a log, and how it ended.
fn info(path: &Path) -> io::Result<Option<ExecInfo>> {
    let mut found: Option<ExecInfo> = None;
    let mut reader = BufReader::new(File::open(path)?);
    let mut header = [0; HEADER];
    // Output is skipped, not read.
    loop {
        match reader.read_exact(&mut header) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
            other => other?,
        }
        let (kind, _, len) = decode(header)?;
        if kind == 1 || kind == 2 {
            reader.seek_relative(i64::from(len))?;
            continue;
        }
        let mut payload = vec![0; len as usize];
        reader.read_exact(&mut payload)?;
        match (kind, &mut found) {
            (0, found) => *found = serde_json::from_slice(&payload).ok(),
            (9, Some(found)) => found.ended = serde_json::from_slice(&payload).ok(),
            _ => {}
        }
    }
    Ok(found)
}

fn decode(header: [u8; HEADER]) -> io::Result<(u8, u64, u32)> {
    let [kind, t0, t1, t2, t3, t4, t5, t6, t7, l0, l1, l2, l3] = header;
    let len = u32::from_le_bytes([l0, l1, l2, l3]);
    if len > MAX_PAYLOAD {
        let why = format!("a record of {len} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
    }
    Ok((
        kind,
        u64::from_le_bytes([t0, t1, t2, t3, t4, t5, t6, t7]),
        len,
    ))
}

/// The next record; `None` at the end, or before one that is not all there.
fn entry(reader: &mut impl Read) -> io::Result<Option<(u64, Entry)>> {
    let mut header = [0; HEADER];
    let short = |error: &io::Error| error.kind() == io::ErrorKind::UnexpectedEof;
    match reader.read_exact(&mut header) {
        Err(error) if short(&error) => return Ok(None),
        other => other?,
    }
    let (kind, time, len) = decode(header)?;
    let mut payload = vec![0; len as usize];
    match reader.read_exact(&mut payload) {
        Err(error) if short(&error) => return Ok(None),
        other => other?,
    }
    let entry = match kind {
        0 => Entry::Start(serde_json::from_slice(&payload)?),
        1 => Entry::Out(payload),
        2 => Entry::Err(payload),
        9 => Entry::End(serde_json::from_slice(&payload)?),
        other => {
            let why = format!("a record of kind {other}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, why));
        }
    };
    Ok(Some((time, entry)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(id: u32) -> ExecInfo {
        ExecInfo {
            id: ExecId(id),
            argv: vec!["make".into()],
            user: None,
            terminal: false,
            started_ms: u64::from(id),
            ended: None,
        }
    }

    fn end() -> ExecEnd {
        ExecEnd {
            at_ms: 9,
            exit_code: 3,
            signal: None,
            failure: None,
        }
    }

    fn read(dir: &Path, id: u32) -> Vec<Entry> {
        let mut all = Vec::new();
        ExecLog::read(dir, ExecId(id), |_, entry| {
            all.push(entry);
            Ok(())
        })
        .unwrap();
        all
    }

    #[test]
    fn a_log_is_read_back_byte_for_byte() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = ExecLog::begin(dir.path(), &command(1));
        let mut tail = ExecLog::tail(dir.path(), ExecId(1)).unwrap();
        log.output(false, b"out\xff\n");
        log.output(true, b"err");
        assert_eq!(tail.next().unwrap().unwrap().1, Entry::Start(command(1)));
        assert_eq!(
            tail.next().unwrap().unwrap().1,
            Entry::Out(b"out\xff\n".to_vec())
        );
        assert_eq!(tail.next().unwrap().unwrap().1, Entry::Err(b"err".to_vec()));
        assert_eq!(tail.next().unwrap(), None);
        log.end(&end());
        assert_eq!(tail.next().unwrap().unwrap().1, Entry::End(end()));
        let all = read(dir.path(), 1);
        assert_eq!(all.len(), 4);
        assert_eq!(ExecLog::list(dir.path())[0].ended, Some(end()));
        assert_eq!(ExecLog::last_number(dir.path()), 1);
    }

    #[test]
    fn a_long_log_keeps_its_end_and_stays_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = ExecLog::begin(dir.path(), &command(2));
        let mut tail = ExecLog::tail(dir.path(), ExecId(2)).unwrap();
        let chunk = vec![b'x'; 500_000];
        let mut followed = 0;
        for _ in 0..100 {
            log.output(false, &chunk);
            while let Some((_, entry)) = tail.next().unwrap() {
                followed += usize::from(matches!(entry, Entry::Out(_)));
            }
        }
        assert_eq!(followed, 100, "whoever follows misses nothing");
        log.output(false, b"last");
        log.end(&end());
        let size: u64 = fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().metadata().unwrap().len())
            .sum();
        assert!(size <= 2 * (LIMIT + 1024), "{size}");
        let all = read(dir.path(), 2);
        assert!(matches!(all[0], Entry::Start(_)));
        assert_eq!(all[all.len() - 2], Entry::Out(b"last".to_vec()));
        assert_eq!(ExecLog::list(dir.path())[0].argv, ["make"]);
    }

    #[test]
    fn old_logs_go_and_the_main_command_stays() {
        let dir = tempfile::tempdir().unwrap();
        ExecLog::begin(dir.path(), &command(0));
        // One runs on and stays, whatever its age.
        ExecLog::begin(dir.path(), &command(1));
        for id in 2..=130 {
            ExecLog::begin(dir.path(), &command(id)).end(&end());
        }
        let ids: Vec<u32> = ExecLog::list(dir.path())
            .iter()
            .map(|info| info.id.0)
            .collect();
        assert_eq!(ids.len(), KEPT + 2);
        assert_eq!(ids[..3], [0, 1, 31]);
        assert_eq!(*ids.last().unwrap(), 130);
        ExecLog::close_all(dir.path());
        assert!(
            ExecLog::list(dir.path())
                .iter()
                .all(|info| info.ended.is_some())
        );
    }

    #[test]
    fn a_damaged_log_is_an_error_and_not_memory() {
        let dir = tempfile::tempdir().unwrap();
        let mut bytes = vec![1; 9];
        bytes.extend(u32::MAX.to_le_bytes());
        fs::write(path(dir.path(), ExecId(1)), bytes).unwrap();
        let error = ExecLog::read(dir.path(), ExecId(1), |_, _| Ok(())).unwrap_err();
        assert_eq!(error.code(), "log-unreadable");
        let error = ExecLog::read(dir.path(), ExecId(2), |_, _| Ok(())).unwrap_err();
        assert_eq!(error.code(), "log-not-found");
    }
}
