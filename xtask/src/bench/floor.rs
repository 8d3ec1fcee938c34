//! QEMU as one would start it by hand: the plan's arguments, with sockets and
//! files named instead of handed over.

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail};
use bulkhead::guest::Channel;
use bulkhead::image::scratch;
use bulkhead::plan::Plan;
use bulkhead_agent::{Configure, Request};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};

use super::config::{Bed, Config, PATIENCE, explain, ms};
use super::ours::{self, AGENT, ALL, ANSWER, COMMAND, KERNEL, POWER_OFF, QMP, SPAWN, VMM_CPU};
use super::rounds::Sample;

/// A running one.
pub(super) struct Bare {
    qemu: Child,
    channel: Channel,
    /// Its sockets and its disk.
    _dir: tempfile::TempDir,
    begin: Instant,
    spawn: Duration,
    qmp: Duration,
    ready: Duration,
    cpu: Duration,
}

impl Bare {
    /// Starts one and waits for its monitor and its agent.
    pub(super) async fn start(bed: &Bed, config: &Config) -> Result<Self> {
        let dir = tempfile::tempdir_in(bed.temp())?;
        let (_, plan) = bed.plan(config)?;
        // Made beforehand: a floor does no work but QEMU's.
        let disk = dir.path().join("scratch.img");
        let template = scratch::template(&bed.dirs().cache(), plan.scratch.0).map_err(explain)?;
        scratch::copy(&template, &disk).map_err(explain)?;
        let args = arguments(&plan, config, dir.path(), &disk)?;
        bed.cool(config)?;
        Self::run(&plan, dir, args, None).await
    }

    /// Starts one from the files of a template, as its clones are.
    pub(super) async fn restore(bed: &Bed, config: &Config, template: &Path) -> Result<Self> {
        let dir = tempfile::tempdir_in(bed.temp())?;
        let (_, plan) = bed.plan(config)?;
        let disk = dir.path().join("scratch.img");
        scratch::copy(&template.join("disk"), &disk).map_err(explain)?;
        let mut args = arguments(&plan, config, dir.path(), &disk)?;
        let machine = args.iter().position(|word| word == "-machine");
        let machine = machine.and_then(|at| args.get_mut(at + 1));
        machine
            .context("no -machine in the plan")?
            .push_str(",memory-backend=ram");
        let ram = format!(
            "memory-backend-file,id=ram,size={}M,mem-path={},share=off",
            plan.memory.as_mib(),
            template.join("ram").display()
        );
        args.extend(["-object".into(), ram, "-incoming".into(), "defer".into()]);
        Self::run(&plan, dir, args, Some(&template.join("state"))).await
    }

    async fn run(
        plan: &Plan,
        dir: tempfile::TempDir,
        args: Vec<String>,
        state: Option<&Path>,
    ) -> Result<Self> {
        // Inherited: its number is what QEMU is told.
        let state = state.map(File::open).transpose()?;
        if let Some(state) = &state {
            fcntl(state, FcntlArg::F_SETFD(FdFlag::empty()))?;
        }
        let begin = Instant::now();
        let mut qemu = Command::new(&plan.qemu)
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .context("cannot start QEMU")?;
        let spawn = begin.elapsed();
        let monitor = connect(dir.path().join("qmp"), &mut qemu).await?;
        let agent = connect(dir.path().join("agent"), &mut qemu).await?;
        let monitor = async {
            negotiate(monitor, state.as_ref()).await?;
            anyhow::Ok(begin.elapsed())
        };
        let agent = async {
            let connected = match &state {
                None => Channel::connect(agent).await,
                Some(_) => Channel::connect_again(agent).await,
            };
            let (channel, _) = connected.map_err(explain)?;
            anyhow::Ok((channel, begin.elapsed()))
        };
        let up = async {
            match &state {
                None => tokio::try_join!(monitor, agent),
                // What is sent before is lost: the machine is another then.
                Some(_) => Ok((monitor.await?, agent.await?)),
            }
        };
        let up = tokio::time::timeout(PATIENCE, up).await;
        let (qmp, (channel, ready)) = up.context("bare QEMU's agent is silent")??;
        let pid = qemu.id().context("bare QEMU has ended")?;
        let cpu = ours::cpu_of(i32::try_from(pid)?)?;
        Ok(Self {
            qemu,
            channel,
            _dir: dir,
            begin,
            spawn,
            qmp,
            ready,
            cpu,
        })
    }

    pub(super) fn pid(&self) -> Result<u32> {
        self.qemu.id().context("bare QEMU has ended")
    }

    pub(super) async fn stop(mut self) -> Result<()> {
        let off = self.channel.ask("power off", &Request::PowerOff, PATIENCE);
        // It may be gone before its answer gets through.
        let _ = off.await;
        let status = tokio::time::timeout(PATIENCE, self.qemu.wait()).await;
        status.context("bare QEMU does not power off")??;
        Ok(())
    }
}

/// From the files of a template to nothing.
pub(super) async fn cloned_life(bed: &Bed, config: &Config, template: &Path) -> Result<Sample> {
    let bare = Bare::restore(bed, config, template).await?;
    let (begin, spawn, qmp, ready) = (bare.begin, bare.spawn, bare.qmp, bare.ready);
    let cpu = bare.cpu;
    // Nothing runs in it before. What that takes is ours, not the floor's.
    let restored = Request::Restored {
        generation: 1,
        identity: Configure {
            hostname: Some("bare".into()),
            unix_ns: Some(now_ns()),
            seed: Some("00".repeat(64)),
            ..Configure::default()
        },
    };
    let ask = bare.channel.ask("be a clone", &restored, PATIENCE).await;
    ask.map_err(explain)?;
    let command = ours::run_true(&bare.channel).await?;
    let down = Instant::now();
    bare.stop().await?;
    Ok(Sample::from(vec![
        (SPAWN, ms(spawn)),
        (QMP, ms(qmp)),
        (ANSWER, ms(ready.saturating_sub(spawn))),
        (AGENT, ms(ready)),
        (COMMAND, ms(command)),
        (POWER_OFF, ms(down.elapsed())),
        (ALL, ms(begin.elapsed())),
        (VMM_CPU, ms(cpu)),
    ]))
}

fn now_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    u64::try_from(now.unwrap_or_default().as_nanos()).unwrap_or_default()
}

/// From nothing to nothing.
pub(super) async fn life(bed: &Bed, config: &Config) -> Result<Sample> {
    let bare = Bare::start(bed, config).await?;
    let (begin, spawn, qmp, ready) = (bare.begin, bare.spawn, bare.qmp, bare.ready);
    let cpu = bare.cpu;
    let entry = ours::kernel_entry(&bare.channel, begin).await?;
    let command = ours::run_true(&bare.channel).await?;
    let down = Instant::now();
    bare.stop().await?;
    Ok(Sample::from(vec![
        (SPAWN, ms(spawn)),
        (QMP, ms(qmp)),
        (KERNEL, ms(entry)),
        (ANSWER, ms(ready.saturating_sub(spawn))),
        (AGENT, ms(ready)),
        (COMMAND, ms(command)),
        (POWER_OFF, ms(down.elapsed())),
        (ALL, ms(begin.elapsed())),
        (VMM_CPU, ms(cpu)),
    ]))
}

/// Connects to a socket that QEMU is about to open.
pub(super) async fn connect(path: PathBuf, qemu: &mut Child) -> Result<UnixStream> {
    let begin = Instant::now();
    loop {
        match UnixStream::connect(&path).await {
            Ok(socket) => return Ok(socket),
            Err(_) if begin.elapsed() < PATIENCE => {}
            Err(error) => return Err(error).context("QEMU opens no socket"),
        }
        if let Some(status) = qemu.try_wait()? {
            bail!("bare QEMU ended with {status}");
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// What a monitor wants to hear before it does anything, and where the machine
/// is to be restored from, without waiting in between; waits for the answers.
async fn negotiate(monitor: UnixStream, state: Option<&File>) -> Result<()> {
    let mut monitor = BufReader::new(monitor);
    let mut line = String::new();
    monitor.read_line(&mut line).await?;
    let mut words = r#"{"execute":"qmp_capabilities"}"#.to_owned();
    if let Some(state) = state {
        words += r#"{"execute":"migrate-set-capabilities","arguments":{"capabilities":[
            {"capability":"x-ignore-shared","state":true},{"capability":"events","state":true}]}}"#;
        words += &format!(
            r#"{{"execute":"migrate-incoming","arguments":{{"uri":"fd:{}"}}}}"#,
            state.as_raw_fd()
        );
    }
    monitor.write_all(words.as_bytes()).await?;
    let over = if state.is_some() {
        "\"completed\""
    } else {
        "\"return\""
    };
    while !line.contains(over) {
        line.clear();
        if monitor.read_line(&mut line).await? == 0 || line.contains("\"failed\"") {
            bail!("bare QEMU's monitor closed, or its state was refused: {line}");
        }
        if line.contains("\"error\"") {
            bail!("bare QEMU refuses: {line}");
        }
    }
    Ok(())
}

/// The plan's arguments with descriptors replaced by names.
fn arguments(plan: &Plan, config: &Config, sockets: &Path, disk: &Path) -> Result<Vec<String>> {
    let mut args = Vec::new();
    let mut words = plan.args.iter();
    while let Some(flag) = words.next() {
        let takes_value = !matches!(
            flag.as_str(),
            "-nodefaults" | "-no-user-config" | "-no-reboot"
        );
        let value = if takes_value { words.next() } else { None };
        if flag == "-add-fd" {
            continue;
        }
        args.push(flag.clone());
        let Some(value) = value else { continue };
        let id = value.split(',').find_map(|part| part.strip_prefix("id="));
        args.push(match (flag.as_str(), id) {
            ("-chardev", Some(id)) => {
                let path = sockets.join(id);
                format!("socket,id={id},path={},server=on,wait=off", path.display())
            }
            ("-blockdev", _) => value
                .replace("/dev/fdset/1", &plan.root.display().to_string())
                .replace("/dev/fdset/2", &disk.display().to_string()),
            ("-append", _) => command_line(value, config),
            ("-machine", _) => with(value, &config.options),
            ("-cpu", _) => with(value, &config.features),
            _ => value.clone(),
        });
    }
    if args
        .iter()
        .any(|word| word.contains("fd=") || word.contains("/fdset/"))
    {
        bail!("a descriptor is left in bare QEMU's arguments: {args:?}");
    }
    Ok(args)
}

fn with(value: &str, options: &[String]) -> String {
    let more = options.iter().map(|option| format!(",{option}"));
    value.to_owned() + &more.collect::<String>()
}

/// The kernel's command line with the configuration's changes.
fn command_line(line: &str, config: &Config) -> String {
    let name = |word: &str| word.split('=').next().unwrap_or_default().to_owned();
    let kept = line
        .split(' ')
        .filter(|word| !config.without.contains(&name(word)));
    let words: Vec<&str> = kept
        .chain(config.append.iter().map(String::as_str))
        .collect();
    words.join(" ")
}
