//! The lab itself: a Bulkhead machine whose root becomes this machine's.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use bulkhead::error::{Explain, Report};
use bulkhead::guest::Stream;
use bulkhead::plan::SHARE_TAG;
use bulkhead::run::{Dirs, Host, Io, Machine, command, recover};
use bulkhead::spec::{Accel, Bytes, Catalog, NetworkMode, Request as Wish, VmId, WorkspaceMode};
use bulkhead_agent::{Exec, Request};

use super::{Options, kit};

/// Makes this machine's root the lab's.
const ENTER: &str = include_str!("enter.sh");
/// Where the share is mounted at first.
const SHARE: &str = "/run/share";
/// How long the lab may take to boot, and to do what is asked for here: hosts
/// that are busy with other things included.
const PATIENCE: Duration = Duration::from_secs(300);

/// A running lab. Dropping it ends it.
pub(super) struct Lab {
    machine: Machine,
    _runtime: tempfile::TempDir,
}

impl Lab {
    /// Boots it and makes it a KVM host.
    pub(super) async fn start(options: &Options) -> Result<Self> {
        let temp = tempfile::tempdir()?;
        let dirs = Dirs {
            state: options.state_dir.canonicalize().with_context(|| {
                let dir = options.state_dir.display();
                format!("no images in {dir}: `cargo xtask setup` makes them")
            })?,
            runtime: temp.path().to_owned(),
        };
        // A lab whose task was killed leaves its record.
        recover(&dirs, false).map_err(explain)?;
        let host = Host {
            die_with_thread: true,
            boot_timeout: PATIENCE,
            ..Host::new(dirs)
        };
        let wish = Wish {
            name: Some(format!("lab-{}", VmId::random()).parse()?),
            // With Debian's own kernel, which has everything as modules.
            image: Some("base".into()),
            accel: Some(Accel::Tcg),
            nested: Some(true),
            cpus: Some(2),
            memory: Some(options.memory),
            // Tests mount it, too: sparse.
            disk: Some(Bytes::mib(512)),
            workspace: Some("/".into()),
            workspace_mode: Some(WorkspaceMode::Share),
            read_only: Some(true),
            network: Some(NetworkMode::Isolated.into()),
            command: vec!["true".into()],
            ..Wish::default()
        };
        let spec = wish.resolve(&Catalog::default()).map_err(explain)?;
        let image = host.images().get(&spec.image).map_err(explain)?;
        let release = &image.manifest.kernel.release;
        let kit = kit::ensure(release)?;
        let (_, machine) = host.start(&spec).await.map_err(explain)?;
        let lab = Self {
            machine,
            _runtime: temp,
        };
        if let Err(error) = lab.enter(&kit, release).await {
            lab.say_last_words().await;
            lab.end().await?;
            return Err(error);
        }
        Ok(lab)
    }

    async fn enter(&self, kit: &Path, release: &str) -> Result<()> {
        let mount = Request::Mount9p {
            tag: SHARE_TAG.into(),
            path: SHARE.into(),
            read_only: true,
        };
        let channel = self.machine.channel();
        channel
            .ask("mount the share", &mount, PATIENCE)
            .await
            .map_err(explain)?;
        let kit = kit.to_str().context("the target directory is not UTF-8")?;
        let words = ["/bin/sh", "-c", ENTER, "enter", SHARE, kit, release];
        let exec = Exec {
            argv: words.map(str::to_owned).into(),
            cwd: Some("/".into()),
            user: Some("root".into()),
            ..Exec::default()
        };
        let (code, text) = self.collect(exec).await?;
        ensure!(code == 0, "entering the lab failed ({code}): {text}");
        Ok(())
    }

    /// Runs a program as root in the current directory and gives its exit code.
    pub(super) async fn run(
        &self,
        argv: Vec<String>,
        env: &[(String, String)],
        io: &mut Io,
        limit: Option<Duration>,
    ) -> Result<i32> {
        let exec = Exec {
            stdin: io.stdin.is_some(),
            ..here(argv, env)?
        };
        self.follow(exec, io, limit).await
    }

    /// Runs a program on a terminal.
    pub(super) async fn run_on_terminal(
        &self,
        argv: Vec<String>,
        env: &[(String, String)],
        io: &mut Io,
    ) -> Result<i32> {
        let exec = Exec {
            stdin: true,
            terminal: Some(io.size),
            ..here(argv, env)?
        };
        self.follow(exec, io, None).await
    }

    async fn follow(&self, exec: Exec, io: &mut Io, limit: Option<Duration>) -> Result<i32> {
        let what = format!("run {}", exec.argv.first().map_or("", String::as_str));
        let stream = self.open(exec).await?;
        let done = command(stream, what.clone(), io, "lab", limit).await;
        let done = done.map_err(explain)?;
        if let Some(refused) = done.refused {
            eprintln!("lab: {}", refused.what);
        }
        if let (true, Some(limit)) = (done.timed_out, limit) {
            bail!("{what}: not over after {} s", limit.as_secs());
        }
        Ok(done.exit_code)
    }

    async fn open(&self, exec: Exec) -> Result<Stream> {
        let request = Request::Exec(exec);
        self.machine.channel().open(&request).await.map_err(explain)
    }

    /// Runs a program of the lab's own and gives its exit code and what it wrote.
    async fn collect(&self, exec: Exec) -> Result<(i32, String)> {
        let mut io = Io::collecting(std::env::temp_dir());
        let stream = self.open(exec).await?;
        let done = command(stream, "run it".into(), &mut io, "lab", Some(PATIENCE)).await;
        let done = done.map_err(explain)?;
        let text = [done.stdout, done.stderr].map(|one| one.unwrap_or_default().text);
        Ok((done.exit_code, text.concat()))
    }

    /// Prints what the lab's kernel said last, for who has to find out what went
    /// wrong.
    pub(super) async fn say_last_words(&self) {
        let console = self.machine.console().last_lines(30);
        let kernel = async {
            let words = ["/run/lab/busybox", "dmesg"].map(str::to_owned);
            self.collect(here(words.into(), &[])?).await
        };
        let kernel = tokio::time::timeout(Duration::from_secs(10), kernel).await;
        let kernel = match kernel {
            Ok(Ok((_, text))) => {
                let lines: Vec<&str> = text.lines().collect();
                lines[lines.len().saturating_sub(30)..].join("\n")
            }
            Ok(Err(error)) => format!("cannot be had: {error:#}"),
            Err(_) => "cannot be had: the lab does not answer".into(),
        };
        eprintln!("the lab's console: {console}\nthe lab's kernel:\n{kernel}");
    }

    /// Ends it. Nothing in it is worth waiting for.
    pub(super) async fn end(self) -> Result<()> {
        match self.machine.kill().await {
            Ok(()) => Ok(()),
            Err(errors) => bail!("the lab left something behind: {errors:?}"),
        }
    }
}

/// A program as root in the current directory, with what it may need of this
/// environment.
fn here(argv: Vec<String>, env: &[(String, String)]) -> Result<Exec> {
    let cwd = std::env::current_dir()?;
    let passed = |name: &str| {
        let known = ["PATH", "HOME", "LANG"].contains(&name);
        known || name.starts_with("BULKHEAD_") || name.starts_with("RUST_")
    };
    let own = std::env::vars_os().filter_map(|(name, value)| {
        let name = name.into_string().ok().filter(|name| passed(name))?;
        Some((name, value.into_string().ok()?))
    });
    Ok(Exec {
        argv,
        env: own.chain(env.iter().cloned()).collect(),
        cwd: Some(cwd.to_str().context("this directory is not UTF-8")?.into()),
        user: Some("root".into()),
        ..Exec::default()
    })
}

/// This process's own streams.
pub(super) fn plain_io(input: bool) -> Io {
    Io {
        stdin: input.then(|| Box::new(tokio::io::stdin()) as _),
        stdout: Some(Box::new(tokio::io::stdout())),
        stderr: Some(Box::new(tokio::io::stderr())),
        ..Io::collecting(std::env::temp_dir())
    }
}

fn explain(error: impl Explain) -> anyhow::Error {
    let report = Report::of(&error);
    anyhow::anyhow!("{}: {}\n{}", report.what, report.cause, report.remedy)
}
