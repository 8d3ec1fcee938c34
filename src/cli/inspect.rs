//! `bulkhead inspect`.

use super::Global;
use super::message::{Failure, print_json, print_text, visible};
use super::table::{age, clock, duration};
use crate::run::Controller;
use crate::spec::VmId;
use crate::supervise::{Machines, View};

/// Options.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Name of a machine.
    vm: VmId,
    /// Ask the guest of a running machine: OS, interfaces, processes.
    #[arg(long)]
    guest: bool,
    /// Ask qemu-guest-agent instead of Bulkhead's own agent.
    #[arg(long, requires = "guest")]
    qga: bool,
}

/// Shows a machine.
pub(super) async fn run(args: Args, global: &Global) -> Result<i32, Failure> {
    let host = global.host()?;
    if args.guest {
        let controller = Controller::new(&host.dirs, args.vm);
        return guest(&controller, args.qga, global.json).await;
    }
    let view = Machines::new(host).look(&args.vm).await?;
    match global.json {
        true => print_json(&view),
        false => show(&view),
    }
    Ok(0)
}

fn show(view: &View) {
    let line = |name: &str, value: String| print_text(&format!("{name:<12}{}\n", visible(&value)));
    line("name", view.id.to_string());
    line(
        "state",
        format!("{} for {}", view.state, age(view.since_ms)),
    );
    line("reason", view.reason.clone());
    line("image", format!("{} ({})", view.image.name, view.image.id));
    line(
        "limits",
        format!(
            "{}: {} CPUs, {} of memory, {} of disk",
            view.profile, view.vcpus, view.memory, view.disk
        ),
    );
    for exception in &view.exceptions {
        line("exception", exception.to_string());
    }
    line("accelerator", view.accel.as_str().to_owned());
    if !view.command.is_empty() {
        line("command", view.command.join(" "));
    }
    for (name, value) in &view.labels {
        line("label", format!("{name}={value}"));
    }
    if let Some(name) = &view.snapshot {
        line("snapshot", name.to_string());
    }
    if let Some(name) = &view.restore {
        line("next start", format!("goes on from snapshot {name}"));
    }
    if let Some(at) = view.deadline_ms {
        line("until", clock(at));
    }
    if let Some(idle) = view.lifetime.idle {
        line("idle limit", idle.to_string());
    }
    if let Some(owner) = &view.supervisor {
        let answers = match view.live {
            Some(_) => "answers",
            None => "does not answer",
        };
        line("supervisor", format!("process {}, {answers}", owner.pid));
    }
    if let Some(live) = &view.live {
        let unknown = || "unknown".to_owned();
        line("vmm", live.vmm.clone().unwrap_or_else(unknown));
        line(
            "guest agent",
            match live.agent {
                true => "answers".into(),
                false => "does not answer".into(),
            },
        );
        line("busy", format!("{} commands and transfers", live.busy));
        line("idle for", duration(live.idle_ms));
    }
    if let Some(ended) = &view.ended {
        line("exit code", ended.exit_code.to_string());
        if let Some(network) = &ended.network {
            line("network", network.clone());
        }
    }
    for one in &view.violations {
        let text = format!("{} stopped for calling {}", clock(one.at_ms), one.call);
        line("violation", text);
    }
    for change in &view.history {
        let text = format!("{} {} ({})", clock(change.at_ms), change.to, change.reason);
        line("history", text);
    }
}

/// As `println!`, but a reader that went away is no failure.
macro_rules! printed {
    ($($word:tt)*) => { print_text(&format!("{}\n", format_args!($($word)*))) };
}

async fn guest(controller: &Controller, qga: bool, json: bool) -> Result<i32, Failure> {
    if qga {
        print_json(&controller.qga().await?);
        return Ok(0);
    }
    let info = controller.guest().await?;
    if json {
        print_json(&info);
        return Ok(0);
    }
    // The guest wrote all of this, and its owner may be another version.
    let safe = visible;
    printed!("os         {}", safe(&info.os));
    printed!("kernel     {}", safe(&info.kernel));
    printed!("hostname   {}", safe(&info.hostname));
    printed!(
        "uptime     {}.{:03} s",
        info.uptime_ms / 1000,
        info.uptime_ms % 1000
    );
    printed!(
        "memory     {} of {} KiB available",
        info.available_kib,
        info.memory_kib
    );
    for interface in &info.interfaces {
        let addresses = safe(&interface.addresses.join(" "));
        printed!(
            "interface  {} {} {addresses}",
            safe(&interface.name),
            safe(&interface.mac)
        );
    }
    printed!("    PID    PPID     UID  RSS KiB  COMMAND");
    for one in &info.processes {
        printed!(
            "{:7} {:7} {:7} {:8}  {}",
            one.pid,
            one.ppid,
            one.uid,
            one.rss_kib,
            safe(&one.command)
        );
    }
    Ok(0)
}
