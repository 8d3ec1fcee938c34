//! A workspace and a guest played by GNU tar and a copy of the directory.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use bulkhead::guest::archive::{Limits, Manifest, PackLimits, pack};
use bulkhead::run::workspace::{Applied, ApplyOptions, Changes, DiffOptions, Error, apply, diff};
use tempfile::TempDir;

use super::tree::{open, snapshot, temp};

/// `host/` is the workspace, `guest/` what the guest made of it.
pub(crate) struct Exchange {
    pub(crate) top: TempDir,
    pub(crate) host: PathBuf,
    pub(crate) guest: PathBuf,
    manifest: Manifest,
    before: BTreeMap<OsString, String>,
}

impl Exchange {
    /// Sends in what `fill` puts into the workspace.
    pub(crate) fn new(fill: impl FnOnce(&Path)) -> Self {
        let top = temp();
        let (host, guest) = (top.path().join("host"), top.path().join("guest"));
        for dir in [&host, &guest, &top.path().join("staging")] {
            fs::create_dir(dir).unwrap();
        }
        fill(&host);
        let mut exchange = Self {
            top,
            host,
            guest,
            manifest: Manifest::default(),
            before: BTreeMap::new(),
        };
        exchange.send();
        exchange
    }

    /// Sends the workspace, as it is now, into an empty guest.
    pub(crate) fn send(&mut self) {
        fs::remove_dir_all(&self.guest).unwrap();
        fs::create_dir(&self.guest).unwrap();
        let mut bytes = Vec::new();
        self.manifest = pack(&open(&self.host), &mut bytes, &PackLimits::default())
            .unwrap()
            .manifest;
        tar(&["-xpf-"], &self.guest, &bytes);
        self.before = snapshot(&self.guest);
    }

    /// The guest's answer: an archive and the removed names.
    pub(crate) fn answer(&self) -> (Vec<u8>, Vec<u8>) {
        let after = snapshot(&self.guest);
        let changed: Vec<_> = after
            .iter()
            .filter(|(name, what)| self.before.get(*name) != Some(what))
            .collect();
        let mut list = Vec::new();
        for (name, _) in changed {
            list.extend_from_slice(name.as_bytes());
            list.push(0);
        }
        let archive = match list.is_empty() {
            true => vec![0; 1024],
            false => {
                let args = [
                    "-cf-",
                    "--no-recursion",
                    "--null",
                    "--verbatim-files-from",
                    "-T-",
                ];
                tar(&args, &self.guest, &list)
            }
        };
        let mut removed = Vec::new();
        for name in self.before.keys().filter(|name| !after.contains_key(*name)) {
            removed.extend_from_slice(name.as_bytes());
            removed.push(0);
        }
        (archive, removed)
    }

    /// The answer, staged.
    pub(crate) fn stage(&self) -> Changes {
        let (archive, removed) = self.answer();
        let staging = self.top.path().join("staging");
        Changes::stage(
            &archive[..],
            &removed[..],
            &staging,
            &open(&self.host),
            &Limits::default(),
        )
        .unwrap()
    }

    pub(crate) fn diff(&self) -> Vec<u8> {
        let mut text = Vec::new();
        diff(
            &open(&self.host),
            &self.stage(),
            &mut text,
            &DiffOptions::default(),
        )
        .unwrap();
        text
    }

    pub(crate) fn try_apply(&self, force: bool) -> Result<Applied, Error> {
        apply(
            &open(&self.host),
            &self.stage(),
            &self.manifest,
            &ApplyOptions { force },
        )
    }

    /// Brings the changes back; gives the warnings, one a line.
    pub(crate) fn apply(&self) -> String {
        let changes = self.stage();
        let applied = apply(
            &open(&self.host),
            &changes,
            &self.manifest,
            &ApplyOptions::default(),
        )
        .unwrap();
        let warnings = changes.warnings.list.iter().chain(&applied.warnings.list);
        warnings.map(|warning| format!("{warning}\n")).collect()
    }
}

/// Runs GNU tar in `dir` on `input`.
fn tar(args: &[&str], dir: &Path, input: &[u8]) -> Vec<u8> {
    let mut tar = Command::new("tar");
    tar.args(args)
        .current_dir(dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut tar = tar.spawn().unwrap();
    let mut stdin = tar.stdin.take().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(input));
        let output = tar.wait_with_output().unwrap();
        assert!(output.status.success());
        output.stdout
    })
}

/// A shell in `dir` with no git configuration but the repository's own.
pub(crate) fn try_sh(dir: &Path, script: &str) -> Output {
    Command::new("sh")
        .args(["-ec", script])
        .current_dir(dir)
        .env("HOME", "/nonexistent")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_CONFIG_SYSTEM", "/dev/null")
        .env("GIT_AUTHOR_NAME", "A")
        .env("GIT_AUTHOR_EMAIL", "a@example.org")
        .env("GIT_COMMITTER_NAME", "A")
        .env("GIT_COMMITTER_EMAIL", "a@example.org")
        .env("GIT_EDITOR", "true")
        .output()
        .unwrap()
}

/// As [`try_sh`], and it must succeed; gives its stdout.
pub(crate) fn sh(dir: &Path, script: &str) -> String {
    let output = try_sh(dir, script);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{script}\n{}{}",
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}

/// Name to type, content or target: what a diff carries.
pub(crate) fn content(dir: &Path) -> BTreeMap<OsString, String> {
    let mut all = BTreeMap::new();
    for name in snapshot(dir).into_keys() {
        let path = dir.join(&name);
        let meta = path.symlink_metadata().unwrap();
        if meta.is_symlink() {
            all.insert(name, format!("-> {:?}", fs::read_link(&path).unwrap()));
        } else if meta.is_file() {
            let executable = std::os::unix::fs::MetadataExt::mode(&meta) & 0o100;
            let text = fs::read(&path).unwrap();
            all.insert(
                name,
                format!(
                    "{executable:o} {}",
                    std::ffi::OsStr::from_bytes(&text).display()
                ),
            );
        }
    }
    all
}
