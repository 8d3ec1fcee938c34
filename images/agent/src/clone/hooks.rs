//! Programs of the image that must run in every clone before it is handed out.

use std::fs::{self, File};
use std::io::{Read, Seek};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bulkhead_agent::FailureKind;

use crate::failure::{Context, Result, failure};

/// How long all of them may take together.
const PATIENCE: Duration = Duration::from_secs(20);
/// How much of what one says is told, in bytes.
const WORDS: u64 = 1024;
const ROOT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Runs the executable files in `dir`, by name, as root.
///
/// # Errors
/// One of them failed, or they take too long.
pub(super) fn run(dir: &Path, generation: u64) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    for hook in list(dir)? {
        run_one(&hook, generation, deadline)?;
    }
    Ok(())
}

/// Whether there are any, or something that [`run`] would complain of.
pub(super) fn any(dir: &Path) -> bool {
    !list(dir).is_ok_and(|hooks| hooks.is_empty())
}

fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.context(|| format!("cannot list {}", dir.display()))?,
    };
    let is_program = |path: &PathBuf| {
        fs::metadata(path)
            .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    };
    let paths = entries.flatten().map(|entry| entry.path());
    let mut hooks: Vec<PathBuf> = paths.filter(is_program).collect();
    hooks.sort();
    Ok(hooks)
}

fn run_one(hook: &Path, generation: u64, deadline: Instant) -> Result<()> {
    let what = || format!("cannot run {}", hook.display());
    // In memory: what a program says must not wait for a reader.
    let mut words = memory().context(what)?;
    let both = words
        .try_clone()
        .and_then(|one| Ok((one, words.try_clone()?)));
    let (out, err) = both.context(what)?;
    let mut child = Command::new(hook)
        .env_clear()
        .env("PATH", ROOT_PATH)
        .env("BULKHEAD_GENERATION", generation.to_string())
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(err)
        .spawn()
        .context(what)?;
    let ended = loop {
        match child.try_wait().context(what)? {
            Some(status) => break status.to_string(),
            None if Instant::now() > deadline => {
                let _ = child.kill();
                let _ = child.wait();
                break format!("no end within {} s", PATIENCE.as_secs());
            }
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    };
    if ended == "exit status: 0" {
        return Ok(());
    }
    let mut said = Vec::new();
    let _ = words.rewind();
    let _ = words.take(WORDS).read_to_end(&mut said);
    Err(failure(
        FailureKind::System,
        format!(
            "the hook {} failed ({ended}): {}",
            hook.display(),
            String::from_utf8_lossy(&said).trim()
        ),
    ))
}

fn memory() -> nix::Result<File> {
    let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
    nix::sys::memfd::memfd_create(c"hook", flags).map(File::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(dir: &Path, name: &str, script: &str, mode: u32) {
        let path = dir.join(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn they_run_by_name_and_the_first_failure_ends_it() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        run(&dir.path().join("none"), 1).unwrap();
        let note = |word| format!("echo {word} $BULKHEAD_GENERATION >> {}", log.display());
        hook(dir.path(), "20-b", &note("b"), 0o755);
        hook(dir.path(), "10-a", &note("a"), 0o755);
        hook(dir.path(), "30-text", &note("no"), 0o644);
        run(dir.path(), 7).unwrap();
        assert_eq!(fs::read_to_string(&log).unwrap(), "a 7\nb 7\n");
        hook(dir.path(), "15-bad", "echo broken; exit 3", 0o755);
        let error = run(dir.path(), 8).unwrap_err().message;
        assert!(
            error.contains("15-bad") && error.contains("status: 3") && error.contains("broken"),
            "{error}"
        );
        assert!(fs::read_to_string(&log).unwrap().ends_with("b 7\na 8\n"));
    }
}
