//! A machine's life in phases: ours, and that of a QEMU started by hand with
//! the same kernel, disks and devices.

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use bulkhead::error::{Explain, Report as Explained};
use bulkhead::guest::{Channel, Output};
use bulkhead::image::scratch;
use bulkhead::plan::Plan;
use bulkhead::run::{Dirs, Host};
use bulkhead::spec::{Accel, Catalog, ChannelKind, MachineType, Request as Wish, Spec};
use bulkhead_agent::{Exec, Reply, Request};
use tokio::net::UnixStream;

use crate::setup;

use super::stats::{self, Ratio, Report, Row};

const OURS: &str = "bulkhead";
const FLOOR: &str = "bare-qemu";
/// What is measured, each from the beginning but the last two.
const PHASES: [&str; 6] = [
    "spawn",
    "kernel-start",
    "agent-ready",
    "command",
    "power-off",
    "all",
];
/// Longer than any of it should take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Options.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Pairs of boots.
    #[arg(long, short, default_value_t = 10)]
    n: usize,
    /// Image to boot.
    #[arg(long, default_value = "base")]
    image: String,
    /// Kernel other than the image's, such as `tuned`.
    #[arg(long)]
    kernel: Option<String>,
    /// Machine type: microvm or q35.
    #[arg(long, default_value = "microvm")]
    machine: String,
    /// kvm or tcg.
    #[arg(long, default_value = "kvm")]
    accel: String,
    /// The QEMU binary.
    #[arg(long, env = "BULKHEAD_QEMU")]
    qemu: Option<PathBuf>,
    /// Print the results as JSON.
    #[arg(long)]
    json: bool,
    /// Where images are kept.
    #[arg(long, env = "BULKHEAD_STATE_DIR", default_value_os_t = setup::usual_state_dir())]
    state_dir: PathBuf,
}

/// Milliseconds of each phase, in the order of [`PHASES`].
type Sample = [f64; PHASES.len()];

/// Runs the bench.
pub(crate) fn run(args: Args) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(measure(args))
}

async fn measure(args: Args) -> Result<()> {
    let temp = tempfile::tempdir()?;
    let dirs = Dirs {
        state: args.state_dir.clone(),
        runtime: temp.path().join("runtime"),
    };
    let host = Host {
        qemu: args.qemu.clone(),
        die_with_thread: true,
        ..Host::new(dirs)
    };
    let wish = |waive: Option<&str>| -> Result<Spec> {
        let wish = Wish {
            image: Some(args.image.clone()),
            kernel: args.kernel.clone(),
            machine: Some(match args.machine.as_str() {
                "microvm" => MachineType::Microvm,
                "q35" => MachineType::Q35,
                other => bail!("--machine cannot be {other}: microvm and q35 are possible"),
            }),
            accel: Some(match args.accel.as_str() {
                "kvm" => Accel::Kvm,
                "tcg" => Accel::Tcg,
                other => bail!("--accel cannot be {other}: kvm and tcg are possible"),
            }),
            channel: Some(ChannelKind::Serial),
            command: vec!["true".into()],
            waive: waive.map(str::parse).transpose()?,
            ..Wish::default()
        };
        wish.resolve(&Catalog::default()).map_err(explain)
    };
    // Bare QEMU finds its files where they are.
    let (image, plan) = host.plan(&wish(Some("files"))?).map_err(explain)?;
    let (mut ours, mut floor) = (Vec::new(), Vec::new());
    let shown = std::io::stderr().is_terminal();
    // The first pair warms the page cache and is not counted.
    for round in 0..=args.n {
        if shown {
            eprint!("\rbench boot: {round} of {} pairs", args.n);
        }
        let pair = if round % 2 == 0 {
            let first = bulkhead(&host, &wish(None)?).await?;
            (first, bare(&plan, &host, temp.path()).await?)
        } else {
            let first = bare(&plan, &host, temp.path()).await?;
            (bulkhead(&host, &wish(None)?).await?, first)
        };
        if round > 0 {
            ours.push(pair.0);
            floor.push(pair.1);
        }
    }
    if shown {
        eprintln!();
    }
    let column = |samples: &[Sample], at: usize| -> Vec<f64> {
        samples.iter().map(|sample| sample[at]).collect()
    };
    let (mut rows, mut ratios) = (Vec::new(), Vec::new());
    for (at, phase) in PHASES.into_iter().enumerate() {
        let (ours, floor) = (column(&ours, at), column(&floor, at));
        rows.push(Row::of(OURS, phase, &ours));
        rows.push(Row::of(FLOOR, phase, &floor));
        ratios.push(Ratio::of((OURS, &ours), (FLOOR, &floor), phase));
    }
    let report = Report {
        bench: "boot",
        host: host_facts(&args, &plan, &image.manifest.kernel.release)?,
        rows,
        ratios,
    };
    match args.json {
        true => println!("{}", serde_json::to_string_pretty(&report)?),
        false => print!("{}", report.table()),
    }
    Ok(())
}

fn explain(error: impl Explain) -> anyhow::Error {
    let report = Explained::of(&error);
    anyhow::anyhow!("{}: {}\n{}", report.what, report.cause, report.remedy)
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// A machine of ours, through the library.
async fn bulkhead(host: &Host, spec: &Spec) -> Result<Sample> {
    let begin = Instant::now();
    let (_, machine) = host.start(spec).await.map_err(explain)?;
    let ready = begin.elapsed();
    // What precedes the machine's own clock: checking the image, planning.
    let phases = machine.phases();
    let before = ready.saturating_sub(Duration::from_micros(phases.agent_us));
    let spawned = before + Duration::from_micros(phases.spawned_us);
    let (kernel, command) = in_guest(machine.channel(), begin).await?;
    let down = Instant::now();
    machine
        .stop(PATIENCE)
        .await
        .map_err(|errors| anyhow::anyhow!("{errors:?}"))?;
    let off = down.elapsed();
    Ok([spawned, kernel, ready, command, off, begin.elapsed()].map(ms))
}

/// When the kernel began to keep time, and how long a command takes.
async fn in_guest(channel: &Channel, begin: Instant) -> Result<(Duration, Duration)> {
    let ask = channel
        .ask("describe itself", &Request::Info, PATIENCE)
        .await;
    let Reply::Info(info) = ask.map_err(explain)? else {
        bail!("the agent gave no proper answer to Info");
    };
    let up = Duration::from_millis(info.uptime_ms);
    let kernel = begin.elapsed().saturating_sub(up);
    let start = Instant::now();
    let exec = Exec {
        argv: vec!["true".into()],
        ..Exec::default()
    };
    let open = channel.open(&Request::Exec(exec)).await;
    let mut stream = open.map_err(explain)?;
    stream.started("run true").await.map_err(explain)?;
    loop {
        if let Output::Exit(exit) = stream.next().await.map_err(explain)? {
            if exit.code != Some(0) {
                bail!("true failed in the guest: {exit:?}");
            }
            return Ok((kernel, start.elapsed()));
        }
    }
}

/// QEMU as one would start it by hand: the plan's arguments, with sockets and
/// files named instead of handed over.
async fn bare(plan: &Plan, host: &Host, dir: &Path) -> Result<Sample> {
    let sockets = tempfile::tempdir_in(dir)?;
    // Made beforehand: a floor does no work but QEMU's.
    let disk = sockets.path().join("scratch.img");
    let template = scratch::template(&host.dirs.cache(), plan.scratch.0).map_err(explain)?;
    scratch::copy(&template, &disk).map_err(explain)?;
    let args = named(plan, sockets.path(), &disk)?;
    let begin = Instant::now();
    let mut qemu = tokio::process::Command::new(&plan.qemu)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .context("cannot start QEMU")?;
    let spawned = begin.elapsed();
    let path = sockets.path().join("agent");
    let socket = loop {
        match UnixStream::connect(&path).await {
            Ok(socket) => break socket,
            Err(_) if begin.elapsed() < PATIENCE => {}
            Err(error) => return Err(error).context("QEMU opens no socket for the agent"),
        }
        if let Some(status) = qemu.try_wait()? {
            bail!("bare QEMU ended with {status}");
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    };
    let connected = tokio::time::timeout(PATIENCE, Channel::connect(socket)).await;
    let (channel, _) = connected
        .context("bare QEMU's agent is silent")?
        .map_err(explain)?;
    let ready = begin.elapsed();
    let (kernel, command) = in_guest(&channel, begin).await?;
    let down = Instant::now();
    let _ = channel.ask("power off", &Request::PowerOff, PATIENCE).await;
    let status = tokio::time::timeout(PATIENCE, qemu.wait()).await;
    status.context("bare QEMU does not power off")??;
    let off = down.elapsed();
    Ok([spawned, kernel, ready, command, off, begin.elapsed()].map(ms))
}

/// The plan's arguments with descriptors replaced by names.
fn named(plan: &Plan, sockets: &Path, disk: &Path) -> Result<Vec<String>> {
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

fn host_facts(args: &Args, plan: &Plan, image_kernel: &str) -> Result<stats::Host> {
    let cpus = std::fs::read_to_string("/proc/cpuinfo")?;
    let model = cpus
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let output = |program: &Path, words: &[&str]| -> Result<String> {
        let output = std::process::Command::new(program).args(words).output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text.lines().next().unwrap_or_default().to_owned())
    };
    Ok(stats::Host {
        cpu: model.map_or("unknown", |(_, name)| name).to_owned(),
        cpus: std::thread::available_parallelism()?.get(),
        kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease")?
            .trim()
            .to_owned(),
        qemu: output(&plan.qemu, &["--version"])?,
        guest_kernel: args
            .kernel
            .clone()
            .unwrap_or_else(|| image_kernel.to_owned()),
        machine: args.machine.clone(),
        accel: args.accel.clone(),
        commit: output(Path::new("git"), &["rev-parse", "--short", "HEAD"])?,
    })
}
