//! The program under test, with directories of its own and the prepared images.
#![allow(dead_code)] // each test file uses a part of it

pub(crate) mod live;
pub(crate) mod net;
pub(crate) mod printed;
pub(crate) mod schema;
pub(crate) mod template;
pub(crate) mod terminal;
pub(crate) mod vmms;

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

/// The `bulkhead` binary, on the state directory that `cargo xtask test` prepared.
pub(crate) struct Bulkhead {
    state: PathBuf,
    runtime: PathBuf,
    image: &'static str,
    own: tempfile::TempDir,
    /// The network namespace it is called in, and its resolvers there.
    inside: Option<(bulkhead::host::netns::Netns, String)>,
    /// Another QEMU than the host's.
    qemu: Option<String>,
}

impl Drop for Bulkhead {
    /// What a run of a failing test leaves: its leases go with its directory,
    /// and nobody would find what they stand for.
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.raw(&["gc"]);
        }
    }
}

/// What executes guests: `tcg`, or `kvm` in the lab.
pub(crate) fn accel() -> String {
    std::env::var("BULKHEAD_TEST_ACCEL").unwrap_or_else(|_| "tcg".into())
}

/// `own`, or one directory for all tests, where a proof that KVM works serves
/// all of them.
pub(crate) fn runtime(own: &Path) -> PathBuf {
    std::env::var_os("BULKHEAD_TEST_RUNTIME").map_or(own.to_owned(), PathBuf::from)
}

/// What one call gave.
#[derive(Debug)]
pub(crate) struct Ran {
    pub stdout: String,
    pub stderr: String,
    pub code: i32,
}

impl Bulkhead {
    /// Runs use the small image.
    pub(crate) fn new() -> Self {
        Self::with_image("base")
    }

    pub(crate) fn with_image(image: &'static str) -> Self {
        let state = std::env::var_os("BULKHEAD_TEST_STATE")
            .expect("these tests need images: run them with `cargo xtask test`");
        let own = tempfile::tempdir().unwrap();
        Self {
            state: state.into(),
            runtime: runtime(own.path()),
            image,
            own,
            inside: None,
            qemu: None,
        }
    }

    /// `bulkhead run`, under emulation unless in the lab; options come before `--`.
    pub(crate) fn run(&self, words: &[&str]) -> Ran {
        self.run_with_input(words, b"")
    }

    pub(crate) fn run_with_input(&self, words: &[&str], input: &[u8]) -> Ran {
        let fixed = ["run", "--accel", &accel(), "--image", self.image];
        self.call(&[&fixed, words].concat(), input)
    }

    /// Any call.
    pub(crate) fn raw(&self, words: &[&str]) -> Ran {
        self.call(words, b"")
    }

    pub(crate) fn raw_with_input(&self, words: &[&str], input: &[u8]) -> Ran {
        self.call(words, input)
    }

    /// Directory with images and runs.
    pub(crate) fn state(&self) -> &Path {
        &self.state
    }

    /// A state directory of its own, with the prepared images and kernels in it.
    pub(crate) fn with_own_state(mut self) -> Self {
        let state = self.own.path().join("state");
        std::fs::create_dir(&state).unwrap();
        for name in ["images", "kernels"] {
            std::os::unix::fs::symlink(self.state.join(name), state.join(name)).unwrap();
        }
        self.state = state;
        self
    }

    /// Called in the network namespace kept under this path, with networks for
    /// machines whose names these resolvers resolve.
    pub(crate) fn inside(mut self, path: &Path, resolvers: &str) -> Self {
        let netns = bulkhead::host::netns::Netns::open(path).unwrap();
        self.inside = Some((netns, resolvers.to_owned()));
        self
    }

    pub(crate) fn spawn(&self, command: &mut Command) -> Child {
        match &self.inside {
            None => command.spawn().unwrap(),
            Some((netns, _)) => netns.run_in(|| command.spawn()).unwrap().unwrap(),
        }
    }

    /// With another QEMU than the host's.
    pub(crate) fn with_qemu(mut self, path: &str) -> Self {
        self.qemu = Some(path.to_owned());
        self
    }

    /// Another state directory.
    pub(crate) fn with_state(mut self, state: &Path) -> Self {
        self.state = state.to_owned();
        self
    }

    /// The program with its directories, to be started by hand.
    pub(crate) fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bulkhead"));
        command
            .args(words)
            .env("BULKHEAD_CONFIG", "none")
            // Networks are tested in namespaces of their own.
            .env("BULKHEAD_NETWORK", "isolated")
            .env("BULKHEAD_STATE_DIR", &self.state)
            .env("BULKHEAD_RUNTIME_DIR", &self.runtime);
        if let Some(qemu) = &self.qemu {
            command.env("BULKHEAD_QEMU", qemu);
        }
        if let Some((_, resolvers)) = &self.inside {
            command
                .env("BULKHEAD_NETWORK", "nat-filtered")
                .env("BULKHEAD_RESOLVERS", resolvers);
        }
        command
    }

    /// Starts `bulkhead run --name NAME` and waits until the command's first
    /// line, which must be `ready`.
    pub(crate) fn start(&self, name: &str, words: &[&str]) -> Started {
        let fixed = [
            "run",
            "--accel",
            &accel(),
            "--image",
            self.image,
            "--name",
            name,
        ];
        let mut child = self
            .command(&[&fixed, words].concat())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        let started = Started { child, stdout };
        if line != "ready\n" {
            panic!("it did not get ready: {:?}", started.finish());
        }
        started
    }

    fn call(&self, words: &[&str], input: &[u8]) -> Ran {
        let mut command = self.command(words);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = self.spawn(&mut command);
        // A program that ends early does not take its input.
        let _ = child.stdin.take().unwrap().write_all(input);
        let ran = ran(child.wait_with_output().unwrap());
        printed::check_call(words, &ran);
        ran
    }
}

/// What a call gave that was started by hand.
pub(crate) fn ran(output: std::process::Output) -> Ran {
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ran {
        stdout: text(output.stdout),
        stderr: text(output.stderr),
        code: output.status.code().unwrap_or(-1),
    }
}

/// A detached machine, removed when dropped, also by a failing test.
pub(crate) struct Detached<'a> {
    bulkhead: &'a Bulkhead,
    name: String,
}

impl Bulkhead {
    /// `bulkhead create` with the tuned kernel; options and, after `--`, its
    /// command.
    pub(crate) fn create(&self, name: &str, words: &[&str]) -> Detached<'_> {
        let fixed = [
            "create",
            "--accel",
            &accel(),
            "--kernel",
            "tuned",
            "--image",
            self.image,
            "--memory",
            "256M",
            "--cpus",
            "1",
            "--name",
            name,
        ];
        let made = self.raw(&[&fixed, words].concat());
        assert_eq!(
            (made.code, made.stdout),
            (0, format!("{name}\n")),
            "{}",
            made.stderr
        );
        Detached {
            bulkhead: self,
            name: name.to_owned(),
        }
    }

    /// A machine that a verb makes, such as a fork; it may be there or not.
    pub(crate) fn made(&self, name: &str) -> Detached<'_> {
        Detached {
            bulkhead: self,
            name: name.to_owned(),
        }
    }

    /// A call that must succeed; gives its stdout.
    pub(crate) fn must(&self, words: &[&str]) -> String {
        let ran = self.raw(words);
        assert_eq!(ran.code, 0, "{words:?}: {ran:?}");
        ran.stdout
    }

    /// A call that must fail with this code of ours; gives its stderr.
    pub(crate) fn must_fail(&self, words: &[&str], code: &str) -> String {
        let ran = self.raw(words);
        let told = ran.stderr.contains(&format!("error [{code}]"));
        assert!(ran.code == 125 && told, "{words:?}: {ran:?}");
        ran.stderr
    }

    /// What `bulkhead --json` prints, which is what its schema says.
    pub(crate) fn json(&self, words: &[&str]) -> serde_json::Value {
        let text = self.must(&[&["--json"], words].concat());
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{words:?}: {error}: {text}"))
    }

    /// Directory with sockets.
    pub(crate) fn runtime(&self) -> &Path {
        &self.runtime
    }

    /// Runs in a machine: the command after its name.
    pub(crate) fn exec(&self, words: &[&str]) -> Ran {
        self.raw(&[&["exec"], words].concat())
    }
}

impl Detached<'_> {
    pub(crate) fn start(&self) {
        self.bulkhead.must(&["start", &self.name]);
    }

    pub(crate) fn inspect(&self) -> serde_json::Value {
        self.bulkhead.json(&["inspect", &self.name])
    }

    pub(crate) fn state(&self) -> String {
        self.inspect()["state"].as_str().unwrap().to_owned()
    }

    /// Waits until it is in this state.
    pub(crate) fn becomes(&self, state: &str) -> serde_json::Value {
        let begin = std::time::Instant::now();
        loop {
            let seen = self.inspect();
            if seen["state"] == state {
                return seen;
            }
            // The lab is slow.
            let patience = std::time::Duration::from_secs(180);
            assert!(begin.elapsed() < patience, "not {state}: {seen}");
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
    }

    pub(crate) fn supervisor(&self) -> nix::unistd::Pid {
        let pid = self.inspect()["supervisor"]["pid"].as_i64().unwrap();
        nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap())
    }

    pub(crate) fn vmm(&self) -> nix::unistd::Pid {
        let pid = self.inspect()["live"]["vmm_pid"].as_i64().unwrap();
        nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap())
    }
}

impl Drop for Detached<'_> {
    fn drop(&mut self) {
        let removed = self.bulkhead.raw(&["rm", "--force", &self.name]);
        if !std::thread::panicking() && removed.code != 0 {
            // A test may have removed it itself.
            assert!(removed.stderr.contains("machine-not-found"), "{removed:?}");
        }
    }
}

/// A run that is under way; killed when dropped.
pub(crate) struct Started {
    child: Child,
    stdout: BufReader<ChildStdout>,
}

impl Started {
    pub(crate) fn pid(&self) -> nix::unistd::Pid {
        nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).unwrap())
    }

    pub(crate) fn signal(&self, signal: nix::sys::signal::Signal) {
        nix::sys::signal::kill(self.pid(), signal).unwrap();
    }

    /// Gives the command a line and waits for its answer.
    pub(crate) fn ask(&mut self, line: &str) -> String {
        let stdin = self.child.stdin.as_mut().unwrap();
        writeln!(stdin, "{line}").unwrap();
        self.line()
    }

    /// Its next line.
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        line
    }

    /// Waits for the end; what was read before is not in its output.
    pub(crate) fn finish(mut self) -> Ran {
        drop(self.child.stdin.take());
        let mut stdout = String::new();
        self.stdout.read_to_string(&mut stdout).unwrap();
        let mut stderr = String::new();
        let pipe = self.child.stderr.as_mut().unwrap();
        pipe.read_to_string(&mut stderr).unwrap();
        let code = self.child.wait().unwrap().code().unwrap_or(-1);
        Ran {
            stdout,
            stderr,
            code,
        }
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What is below a directory, but for the locks of the store, verdicts on KVM,
/// and the place of user ids when none is taken.
pub(crate) fn entries(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != ".lock" && name != "state" && !name.starts_with("kvm-"))
        .filter(|name| name != "uids" || !entries(&dir.join("uids")).is_empty())
        .collect();
    names.sort();
    names
}

/// QEMU processes whose command line names this machine.
pub(crate) fn machines(name: &str) -> Vec<String> {
    let name = format!("{name},debug-threads=on");
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|process| std::fs::read(process.path().join("cmdline")).ok())
        .map(|line| String::from_utf8_lossy(&line).replace('\0', " "))
        .filter(|line| line.contains(&name))
        .collect()
}
