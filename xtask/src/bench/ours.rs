//! A machine of Bulkhead's, through the library.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use bulkhead::guest::{Channel, GuestError, Output};
use bulkhead::run::Machine;
use bulkhead_agent::{Exec, Reply, Request};

use super::config::{Bed, Config, PATIENCE, explain, ms};
use super::rounds::Sample;

/// What is measured of a machine's life, each from the beginning but the
/// command and the power-off.
pub(super) const SPAWN: &str = "spawn";
pub(super) const QMP: &str = "qmp-ready";
pub(super) const KERNEL: &str = "kernel-entry";
pub(super) const AGENT: &str = "agent-ready";
/// From there: QEMU executes until its agent answers, whoever that is by then.
pub(super) const ANSWER: &str = "spawn-to-answer";
pub(super) const COMMAND: &str = "first-command";
pub(super) const POWER_OFF: &str = "power-off";
pub(super) const ALL: &str = "all";
/// CPU time of the VMM until the agent is ready.
pub(super) const VMM_CPU: &str = "vmm-cpu";
/// CPU time of our own process, without its children.
pub(super) const OWN_CPU: &str = "own-cpu";

/// CPU time this process has used, its children not.
pub(super) fn own_cpu() -> Result<Duration> {
    use nix::sys::resource::{UsageWho, getrusage};
    use nix::sys::time::TimeValLike as _;
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let us = (usage.user_time() + usage.system_time()).num_microseconds();
    Ok(Duration::from_micros(us.try_into()?))
}

/// CPU time the threads of a process have used, in nanoseconds' precision: what
/// else the host does hardly shows in it.
pub(super) fn cpu_of(pid: i32) -> Result<Duration> {
    let mut sum = 0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may end meanwhile.
        let text = std::fs::read_to_string(task?.path().join("schedstat")).unwrap_or_default();
        sum += text
            .split(' ')
            .next()
            .map_or(0, |ns| ns.parse().unwrap_or(0));
    }
    Ok(Duration::from_nanos(sum))
}

/// Starts one.
pub(super) async fn start(bed: &Bed, config: &Config) -> Result<Machine> {
    let host = bed.host(config);
    let (_, machine) = host.start(&bed.spec(config)?).await.map_err(explain)?;
    Ok(machine)
}

pub(super) async fn stop(machine: Machine) -> Result<()> {
    let stopped = machine.stop(PATIENCE).await;
    stopped.map_err(|errors| anyhow::anyhow!("{errors:?}"))
}

/// From nothing to nothing.
pub(super) async fn life(bed: &Bed, config: &Config) -> Result<Sample> {
    bed.cool(config)?;
    let (host, spec) = (bed.host(config), bed.spec(config)?);
    let cpu = own_cpu()?;
    let begin = Instant::now();
    let (_, machine) = host.start(&spec).await.map_err(explain)?;
    let ready = begin.elapsed();
    let vmm_cpu = cpu_of(machine.process().pid())?;
    // What precedes the machine's own clock: checking the image, planning.
    let phases = machine.phases();
    let before = ready.saturating_sub(Duration::from_micros(phases.agent_us));
    let since = |us| before + Duration::from_micros(us);
    let answer = ms(Duration::from_micros(
        phases.answer_us.saturating_sub(phases.spawned_us),
    ));
    // A clone's began long ago.
    let entry = match machine.template() {
        None => Some(kernel_entry(machine.channel(), begin).await?),
        Some(_) => None,
    };
    let command = run_true(machine.channel()).await?;
    let down = Instant::now();
    stop(machine).await?;
    let mut sample = Sample::from(vec![
        (SPAWN, ms(since(phases.spawned_us))),
        (QMP, ms(since(phases.qmp_us))),
        (ANSWER, answer),
        (AGENT, ms(ready)),
        (COMMAND, ms(command)),
        (POWER_OFF, ms(down.elapsed())),
        (ALL, ms(begin.elapsed())),
        (VMM_CPU, ms(vmm_cpu)),
        (OWN_CPU, ms(own_cpu()?.saturating_sub(cpu))),
    ]);
    if let Some(entry) = entry {
        sample.set(KERNEL, ms(entry));
    }
    Ok(sample)
}

/// When the guest's kernel began to keep time.
pub(super) async fn kernel_entry(channel: &Channel, begin: Instant) -> Result<Duration> {
    let ask = channel
        .ask("describe itself", &Request::Info, PATIENCE)
        .await;
    let Reply::Info(info) = ask.map_err(explain)? else {
        bail!("the agent gave no proper answer to Info");
    };
    let up = Duration::from_millis(info.uptime_ms);
    Ok(begin.elapsed().saturating_sub(up))
}

/// How long `true` takes.
pub(super) async fn run_true(channel: &Channel) -> Result<Duration> {
    let start = Instant::now();
    run(channel, &["true"], Vec::new()).await?;
    Ok(start.elapsed())
}

/// Runs a command as root with `input`, and gives how many bytes it wrote.
pub(super) async fn run(channel: &Channel, argv: &[&str], input: Vec<u8>) -> Result<u64> {
    let exec = Exec {
        argv: argv.iter().map(|word| (*word).to_owned()).collect(),
        user: Some("root".into()),
        stdin: !input.is_empty(),
        ..Exec::default()
    };
    let open = channel.open(&Request::Exec(exec)).await;
    let mut stream = open.map_err(explain)?;
    stream.started("run a command").await.map_err(explain)?;
    let writer = stream.input();
    let send = async {
        if !input.is_empty() {
            writer.send(&input).await?;
            writer.end().await?;
        }
        Ok::<_, GuestError>(())
    };
    let mut count = 0;
    let read = async {
        loop {
            match stream.next().await? {
                Output::Out(bytes) | Output::Err(bytes) => count += bytes.len() as u64,
                Output::Exit(exit) => return Ok(exit),
            }
        }
    };
    let ((), exit) = tokio::try_join!(send, read).map_err(explain)?;
    if exit.code != Some(0) {
        bail!("{argv:?} failed in the guest: {exit:?}");
    }
    Ok(count)
}
