//! A state and a runtime directory of one's own, and every process that belongs
//! to them, whatever Bulkhead says of it.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bulkhead::host::netns::{self, Netns};
use bulkhead::host::{nft, process};
use bulkhead::plan::firewall::Family;
use bulkhead::run::{Dirs, Found};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long a verb may take: a start, on a busy host, by emulation.
pub(crate) const VERB: Duration = Duration::from_secs(90);
/// Longer than the kernel takes to remove a link.
const SETTLED: Duration = Duration::from_secs(60);

/// Words of verbs for a file of the place's own, and for its only template.
pub(crate) const EXPORT: &str = "@export";
pub(crate) const TEMPLATE: &str = "@template";

/// The namespace that stands for the host's network.
const HOST: &str = "host.netns";

/// With what machines are made.
#[derive(Debug, Clone)]
pub(crate) struct Kit {
    /// The bulkhead binary.
    pub(crate) bulkhead: PathBuf,
    /// The state directory whose images and kernels are used.
    pub(crate) state_dir: PathBuf,
    /// kvm or tcg.
    pub(crate) accel: String,
    /// Kernel other than the image's.
    pub(crate) kernel: Option<String>,
    /// Whether machines have networks, which lead into a namespace of each
    /// place's own.
    pub(crate) networks: bool,
    /// How long it may take until everything is in order.
    pub(crate) within: Duration,
}

/// Directories of our own; gone with all processes when dropped.
#[derive(Debug)]
pub(crate) struct Place {
    pub(super) kit: Kit,
    dir: tempfile::TempDir,
    /// What machines' networks lead into, where they have any.
    host: Option<Netns>,
}

/// A process, told from a later one with the same id by its start time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) pid: i32,
    pub(crate) start_time: u64,
    pub(crate) parent: i32,
    pub(crate) words: Vec<String>,
    /// It executes the bulkhead binary.
    pub(crate) ours: bool,
}

impl Process {
    /// A supervisor, or what it forked and was not executed yet.
    pub(crate) fn is_supervise(&self) -> bool {
        self.ours && self.words.iter().any(|word| word == "supervise")
    }

    /// For people.
    pub(crate) fn shown(&self) -> String {
        let words: Vec<&str> = self.words.iter().take(3).map(String::as_str).collect();
        format!("process {} ({} ...)", self.pid, words.join(" "))
    }

    /// Sends a signal to this very process.
    pub(crate) fn signal(&self, signal: Signal) {
        if process::is_same(self.pid, self.start_time) {
            let _ = kill(Pid::from_raw(self.pid), signal);
        }
    }
}

/// Kills processes and waits until they have let go of everything.
pub(crate) fn end(processes: &[Process]) {
    for process in processes {
        process.signal(Signal::SIGKILL);
    }
    let begin = Instant::now();
    let lives = |one: &Process| process::is_same(one.pid, one.start_time);
    while processes.iter().any(lives) && begin.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What a verb gave.
#[derive(Debug)]
pub(crate) struct Given {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
}

impl Place {
    /// Makes the directories; images, kernels and empty disks are `kit`'s own.
    pub(crate) fn new(kit: &Kit) -> Result<Self> {
        // Short: the path of a socket may have 107 bytes.
        let dir = tempfile::Builder::new().prefix("bh-probe-").tempdir()?;
        // Nothing may have been run from there yet.
        fs::create_dir_all(kit.state_dir.join("cache"))?;
        for name in ["images", "kernels", "cache"] {
            let from = kit.state_dir.join(name).canonicalize();
            let from = from.with_context(|| {
                let dir = kit.state_dir.display();
                format!("{dir} has no {name}: run `cargo xtask setup` and `cargo xtask kernel`")
            })?;
            fs::create_dir_all(dir.path().join("state"))?;
            symlink(from, dir.path().join("state").join(name))?;
        }
        let host = kit.networks.then(|| Netns::make(&dir.path().join(HOST)));
        Ok(Self {
            kit: kit.clone(),
            host: host.transpose()?,
            dir,
        })
    }

    /// Where Bulkhead keeps things.
    pub(crate) fn dirs(&self) -> Dirs {
        Dirs {
            state: self.dir.path().join("state"),
            runtime: self.dir.path().join("run"),
        }
    }

    /// A file for the probe itself.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The namespace that machines' networks lead into, where they have any.
    pub(crate) fn uplink(&self) -> Option<PathBuf> {
        self.host.as_ref().map(|_| self.file(HOST))
    }

    /// A verb, ready to be spawned. Its words on stderr go to `verb.err`.
    pub(crate) fn verb<S: AsRef<OsStr>>(
        &self,
        words: impl IntoIterator<Item = S>,
    ) -> Result<Command> {
        let dirs = self.dirs();
        let mut command = match &self.host {
            None => Command::new(&self.kit.bulkhead),
            Some(_) => {
                let mut command = Command::new("nsenter");
                let net = format!("--net={}", self.file(HOST).display());
                command.arg(net).arg(&self.kit.bulkhead);
                command
            }
        };
        let network = match self.host {
            None => "isolated",
            Some(_) => "nat-filtered",
        };
        command
            .args(words.into_iter().map(|word| self.word(word.as_ref())))
            .env("BULKHEAD_CONFIG", "none")
            .env("BULKHEAD_NETWORK", network)
            .env("BULKHEAD_STATE_DIR", &dirs.state)
            .env("BULKHEAD_RUNTIME_DIR", &dirs.runtime)
            .env("BULKHEAD_ACCEL", &self.kit.accel)
            .env("BULKHEAD_IMAGE", "base")
            .env_remove("BULKHEAD_FAULT")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(self.file("verb.err"))?);
        if let Some(kernel) = &self.kit.kernel {
            command.env("BULKHEAD_KERNEL", kernel);
        }
        Ok(command)
    }

    /// A word of a verb: [`EXPORT`] and [`TEMPLATE`] stand for what is here.
    fn word(&self, word: &OsStr) -> OsString {
        let template = || {
            let all = entries(&self.dirs().state.join("templates")).into_iter();
            let mut names = all.filter_map(|path| Some(path.file_name()?.to_owned()));
            names.find(|name| !name.as_bytes().starts_with(b"."))
        };
        match word.to_str() {
            Some(EXPORT) => self.file(EXPORT).into(),
            Some(TEMPLATE) => template().unwrap_or_else(|| word.to_owned()),
            _ => word.to_owned(),
        }
    }

    /// Runs a verb to its end.
    pub(crate) fn run(&self, words: &[&str]) -> Result<Given> {
        let errors = tempfile::NamedTempFile::new_in(self.dir.path())?;
        let output = tempfile::NamedTempFile::new_in(self.dir.path())?;
        let mut command = self.verb(words)?;
        command.stdout(output.reopen()?).stderr(errors.reopen()?);
        let code = wait(&mut command.spawn()?, VERB)?;
        Ok(Given {
            code,
            stdout: fs::read(output.path())?,
            stderr: String::from_utf8_lossy(&fs::read(errors.path())?).into_owned(),
        })
    }

    /// Runs a verb that must succeed.
    pub(crate) fn must(&self, words: &[&str]) -> Result<Vec<u8>> {
        let given = self.run(words)?;
        ensure!(
            given.code == Some(0),
            "bulkhead {} gave {:?}: {}",
            words.join(" "),
            given.code,
            given.stderr.trim()
        );
        Ok(given.stdout)
    }

    /// Every living process that belongs here: by its environment, its
    /// arguments, or a file it has open.
    pub(crate) fn processes(&self) -> Vec<Process> {
        let me = fs::read_link("/proc/self/exe").ok();
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        // Neither this program nor a child that is still a copy of it, and has
        // its files open. Asked first: after that it only has its own.
        let another = |pid: &i32| {
            let program = fs::read_link(format!("/proc/{pid}/exe")).ok();
            program.is_some() && program != me
        };
        pids.filter(another)
            .filter(|pid| belongs(*pid, self.dir.path()))
            .filter_map(|pid| self.examine(pid))
            .collect()
    }

    fn examine(&self, pid: i32) -> Option<Process> {
        let start_time = process::start_time(pid)?;
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let parent = stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(1)?;
        let words = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let program = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
        let found = Process {
            pid,
            start_time,
            parent: parent.parse().ok()?,
            words: String::from_utf8_lossy(&words)
                .split_terminator('\0')
                .map(str::to_owned)
                .collect(),
            ours: program == self.kit.bulkhead,
        };
        // It may have ended, and its id been given away, while it was read.
        process::is_same(pid, start_time).then_some(found)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Supervisors might start something while it is looked for.
        for _ in 0..5 {
            let left = self.processes();
            if left.is_empty() {
                break;
            }
            end(&left);
        }
        // What they held outlives them: control groups, for one. The dying keep
        // their locks for a moment.
        for _ in 0..20 {
            let found = bulkhead::run::recover(&self.dirs(), false).unwrap_or_default();
            let busy = |one: &Found| matches!(one, Found::Alive { .. } | Found::Dead { .. });
            if !found.iter().any(busy) {
                break;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        for file in self.used_by() {
            let _ = fs::remove_file(file);
        }
        if self.host.take().is_some() {
            let _ = netns::release(&self.file(HOST));
        }
    }
}

impl Place {
    /// Links of machines on the host's side, and machines that the rules there
    /// count. Waits for links that the kernel is about to take away.
    pub(crate) fn networks(&self) -> Result<(usize, usize)> {
        let Some(host) = &self.host else {
            return Ok((0, 0));
        };
        let look = || {
            let devices = fs::read_to_string("/proc/thread-self/net/dev")?;
            let links = devices.lines().filter(|line| line.trim().starts_with("bh"));
            let members = nft::counters(Family::Inet)?;
            let members = members.keys().filter(|name| name.starts_with("machine-"));
            Ok::<_, std::io::Error>((links.count(), members.count()))
        };
        let begin = Instant::now();
        loop {
            let (links, members) = host.run_in(look)??;
            if links <= members || begin.elapsed() > SETTLED {
                return Ok((links, members));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The files that keep images from being removed for the sake of machines here.
    pub(crate) fn used_by(&self) -> Vec<PathBuf> {
        let images = self.dirs().state.join("images");
        let files = entries(&images)
            .into_iter()
            .flat_map(|image| entries(&image.join("used-by")));
        let runs = self.dirs().runs();
        files
            .filter(|file| {
                fs::read(file)
                    .is_ok_and(|text| Path::new(OsStr::from_bytes(&text)).starts_with(&runs))
            })
            .collect()
    }
}

/// What is in a directory; nothing where there is none.
pub(crate) fn entries(dir: &Path) -> Vec<PathBuf> {
    let found = fs::read_dir(dir).into_iter().flatten().flatten();
    let found = found.map(|entry| entry.path());
    // The place of user ids stays; what it must not have is one that is taken.
    let taken = |path: &PathBuf| !path.ends_with("uids") || !entries(path).is_empty();
    found.filter(taken).collect()
}

/// Whether a process has to do with `dir`.
fn belongs(pid: i32, dir: &Path) -> bool {
    let needle = dir.as_os_str().as_bytes();
    let has = |name: &str| {
        fs::read(format!("/proc/{pid}/{name}"))
            .is_ok_and(|text| text.windows(needle.len()).any(|part| part == needle))
    };
    let open = || {
        entries(Path::new(&format!("/proc/{pid}/fd")))
            .iter()
            .filter_map(|link| fs::read_link(link).ok())
            .any(|target| target.starts_with(dir))
    };
    has("cmdline") || has("environ") || open()
}

/// Waits for a child; kills it when it takes longer than `limit`.
pub(crate) fn wait(child: &mut std::process::Child, limit: Duration) -> Result<Option<i32>> {
    let begin = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status.code());
        }
        if begin.elapsed() > limit {
            let _ = child.kill();
            let _ = child.wait();
            anyhow::bail!("it did not end within {} s", limit.as_secs());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
