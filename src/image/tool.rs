//! Runs the host's tools so that their own words reach the user.

use std::fs;
use std::io::{self, Read as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::error::{Error, Result};

/// A program this crate runs, and the Debian package that has it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tool {
    pub(super) name: &'static str,
    pub(super) package: &'static str,
    /// Whether it only turns one file into another. What goes in may come out of a
    /// guest, or from a stranger: it gets no capabilities.
    pub(super) converts: bool,
}

pub(super) const APT_CACHE: Tool = tool("apt-cache", "apt");
pub(super) const APT_GET: Tool = tool("apt-get", "apt");
pub(super) const DPKG_DEB: Tool = tool("dpkg-deb", "dpkg");
pub(super) const MKFS_EXT4: Tool = converter("mkfs.ext4", "e2fsprogs");
pub(super) const MMDEBSTRAP: Tool = tool("mmdebstrap", "mmdebstrap");
pub(super) const TAR2SQFS: Tool = converter("tar2sqfs", "squashfs-tools-ng");
pub(super) const XZ: Tool = converter("xz", "xz-utils");
pub(super) const ZSTD: Tool = converter("zstd", "zstd");

const fn tool(name: &'static str, package: &'static str) -> Tool {
    let converts = false;
    Tool {
        name,
        package,
        converts,
    }
}

const fn converter(name: &'static str, package: &'static str) -> Tool {
    let converts = true;
    Tool {
        name,
        package,
        converts,
    }
}

/// Lines of a tool's stderr shown when it fails.
const LAST_LINES: usize = 6;
/// How long a tool may take to clean up after SIGTERM.
const PATIENCE: Duration = Duration::from_secs(5);

impl Tool {
    /// A command that ends when this process dies, however it dies.
    ///
    /// `setpriv` (util-linux) asks the kernel for that, so no unsafe code does.
    /// It has a process group of its own: mmdebstrap, when it fails, sends SIGHUP
    /// to all of its group.
    pub(super) fn command(self) -> Command {
        let mut command = Command::new("setpriv");
        command.process_group(0);
        command.args(["--pdeathsig", "TERM"]);
        if self.converts {
            command.arg("--no-new-privs");
            if nix::unistd::geteuid().is_root() {
                command.args(["--inh-caps", "-all", "--bounding-set", "-all"]);
            }
        }
        command.args(["--", self.name]);
        // /usr/sbin is missing from the path of ordinary users on Debian.
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{path}:/usr/local/sbin:/usr/sbin:/sbin"));
        command.env("LC_ALL", "C.UTF-8").stdin(Stdio::null());
        command
    }

    /// Starts a command of this tool; its stderr goes to a file in `dir`.
    pub(super) fn spawn(self, command: &mut Command, dir: &Path) -> Result<Running> {
        let stderr = dir.join(format!(".{}.stderr", self.name));
        let file =
            fs::File::create(&stderr).map_err(|source| Error::io("create", &stderr, source))?;
        let missing = |source| Error::ToolMissing {
            tool: self.name,
            package: self.package,
            source,
        };
        if !self.is_there() {
            return Err(missing(io::ErrorKind::NotFound.into()));
        }
        let child = command.stderr(file).spawn().map_err(missing)?;
        Ok(Running {
            tool: self,
            child,
            stderr,
            dir: dir.to_owned(),
            ended: false,
        })
    }

    /// Runs a command to its end and gives back its stdout.
    pub(super) fn output(self, command: &mut Command, dir: &Path) -> Result<String> {
        let mut running = self.spawn(command.stdout(Stdio::piped()), dir)?;
        let mut text = Vec::new();
        if let Some(mut stdout) = running.stdout() {
            stdout
                .read_to_end(&mut text)
                .map_err(|source| Error::io("read the output of", Path::new(self.name), source))?;
        }
        running.finish()?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// Whether the program is on the path.
    fn is_there(self) -> bool {
        let path = std::env::var("PATH").unwrap_or_default() + ":/usr/local/sbin:/usr/sbin:/sbin";
        path.split(':')
            .any(|dir| Path::new(dir).join(self.name).is_file())
    }
}

/// A tool at work; stopped and waited for when dropped.
pub(super) struct Running {
    tool: Tool,
    child: Child,
    stderr: PathBuf,
    dir: PathBuf,
    ended: bool,
}

impl Running {
    pub(super) fn stdout(&mut self) -> Option<ChildStdout> {
        self.child.stdout.take()
    }

    /// Waits for the end, which must be a success.
    pub(super) fn finish(mut self) -> Result<()> {
        self.wait()
    }

    /// The tool's own failure if it has one, else `other`: when a pipe breaks,
    /// what stands at its other end is the reason.
    pub(super) fn blame(mut self, other: Error) -> Error {
        let deadline = Instant::now() + Duration::from_secs(1);
        while Instant::now() < deadline {
            match self.child.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(10)),
                _ => return self.wait().err().unwrap_or(other),
            }
        }
        other
    }

    fn wait(&mut self) -> Result<()> {
        let status = self
            .child
            .wait()
            .map_err(|source| Error::io("wait for", Path::new(self.tool.name), source))?;
        self.ended = true;
        let text = fs::read(&self.stderr).unwrap_or_default();
        let _ = fs::remove_file(&self.stderr);
        if status.success() {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&text).into_owned();
        // On a full disk there is often no room for its words either.
        let mute = text.trim().is_empty() && is_full(&self.dir);
        if mute || text.contains("No space left on device") {
            return Err(Error::NoSpace {
                path: self.dir.clone(),
            });
        }
        let lines: Vec<&str> = text
            .lines()
            .filter(|line| !line.trim().is_empty())
            .collect();
        Err(Error::Tool {
            tool: self.tool.name,
            status: status.to_string(),
            stderr: lines[lines.len().saturating_sub(LAST_LINES)..].join("\n"),
        })
    }
}

/// Whether the file system of `dir` has no block left for files to come.
fn is_full(dir: &Path) -> bool {
    nix::sys::statvfs::statvfs(dir).is_ok_and(|stat| stat.blocks_available() == 0)
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        // A closed pipe ends most tools; SIGTERM lets mmdebstrap tidy up.
        drop((self.child.stdin.take(), self.child.stdout.take()));
        let pid = Pid::from_raw(self.child.id().cast_signed());
        let _ = kill(pid, Signal::SIGTERM);
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SH: Tool = tool("sh", "dash");

    #[test]
    fn the_last_words_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let mut command = SH.command();
        command.args([
            "-c",
            "for i in 1 2 3 4 5 6 7 8; do echo line $i >&2; done; exit 3",
        ]);
        let error = SH.output(&mut command, dir.path()).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("exit status: 3") && text.contains("line 8"),
            "{text}"
        );
        assert!(!text.contains("line 2"), "{text}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_turns_a_file_into_another_has_no_capabilities() {
        let dir = tempfile::tempdir().unwrap();
        let sh = converter("sh", "dash");
        let mut command = sh.command();
        command.args([
            "-c",
            "grep -E '^(CapEff|CapBnd|NoNewPrivs):' /proc/self/status",
        ]);
        let said = sh.output(&mut command, dir.path()).unwrap();
        let values: Vec<_> = said
            .lines()
            .map(|line| line.split_once(":\t").unwrap())
            .collect();
        assert!(values.contains(&("NoNewPrivs", "1")), "{said}");
        assert!(values.contains(&("CapEff", "0000000000000000")), "{said}");
        if nix::unistd::geteuid().is_root() {
            assert!(values.contains(&("CapBnd", "0000000000000000")), "{said}");
        }
    }

    #[test]
    fn a_tool_that_ends_its_group_does_not_end_us() {
        let dir = tempfile::tempdir().unwrap();
        let mut command = SH.command();
        command.args(["-c", "trap '' HUP; kill -HUP 0; exit 3"]);
        let error = SH.output(&mut command, dir.path()).unwrap_err();
        assert!(error.to_string().contains("exit status: 3"), "{error}");
    }

    #[test]
    fn a_full_disk_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let mut command = SH.command();
        command.args(["-c", "echo x: No space left on device >&2; exit 1"]);
        let error = SH.output(&mut command, dir.path()).unwrap_err();
        assert!(matches!(error, Error::NoSpace { .. }), "{error}");
    }

    #[test]
    fn a_missing_tool_names_its_package() {
        let dir = tempfile::tempdir().unwrap();
        let gone = tool("bulkhead-no-such-tool", "some-package");
        let error = gone.output(&mut gone.command(), dir.path()).unwrap_err();
        assert!(matches!(
            error,
            Error::ToolMissing {
                package: "some-package",
                ..
            }
        ));
    }
}
