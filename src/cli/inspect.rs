//! `bulkhead inspect`.

use super::Global;
use super::message::{Failure, print_json, visible};
use crate::run::Controller;
use crate::spec::VmId;

/// Options.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Name of a running machine.
    vm: VmId,
    /// Ask the guest itself: OS, interfaces, processes.
    #[arg(long, required = true)]
    guest: bool,
    /// Ask qemu-guest-agent instead of Bulkhead's own agent.
    #[arg(long, requires = "guest")]
    qga: bool,
}

/// Shows a running machine.
pub(super) async fn run(args: Args, global: &Global) -> Result<i32, Failure> {
    let controller = Controller::new(&global.host().dirs, args.vm);
    if args.qga {
        print_json(&controller.qga().await?);
        return Ok(0);
    }
    let info = controller.guest().await?;
    if global.json {
        print_json(&info);
        return Ok(0);
    }
    // The guest wrote all of this, and its owner may be another version.
    let safe = visible;
    println!("os         {}", safe(&info.os));
    println!("kernel     {}", safe(&info.kernel));
    println!("hostname   {}", safe(&info.hostname));
    println!(
        "uptime     {}.{:03} s",
        info.uptime_ms / 1000,
        info.uptime_ms % 1000
    );
    println!(
        "memory     {} of {} KiB available",
        info.available_kib, info.memory_kib
    );
    for interface in &info.interfaces {
        let addresses = safe(&interface.addresses.join(" "));
        println!(
            "interface  {} {} {addresses}",
            safe(&interface.name),
            safe(&interface.mac)
        );
    }
    println!("    PID    PPID     UID  RSS KiB  COMMAND");
    for one in &info.processes {
        println!(
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
