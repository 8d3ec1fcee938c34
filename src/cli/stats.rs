//! `bulkhead stats` and `bulkhead top`: what machines use.

use std::collections::HashMap;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use tokio::io::AsyncReadExt;

use super::Global;
use super::message::{Failure, print_json};
use super::table::{Table, bytes, duration};
use super::terminal::{self, RawMode};
use crate::spec::VmId;
use crate::supervise::{Machines, View};

/// Options of `bulkhead stats`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Names of machines [default: all that run].
    vms: Vec<VmId>,
    /// How long CPU time is measured.
    #[arg(long, value_name = "TIME", default_value = "1s")]
    interval: crate::spec::Timeout,
}

/// Options of `bulkhead top`.
#[derive(Debug, clap::Args)]
pub(super) struct Top {
    /// How often it is looked.
    #[arg(long, value_name = "TIME", default_value = "1s")]
    interval: crate::spec::Timeout,
}

/// What one machine uses.
#[derive(Debug, serde::Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct MachineUse {
    /// The machine.
    id: VmId,
    /// CPU time of QEMU in percent of one processor.
    cpu_percent: f64,
    /// CPU time of QEMU since its start, in milliseconds.
    cpu_ms: u64,
    /// Resident memory of QEMU at the moment, in bytes.
    memory_bytes: u64,
    /// Bytes on the host that its disk takes.
    disk_bytes: Option<u64>,
    /// Commands and transfers under way.
    busy: usize,
    /// Milliseconds since anything happened in it.
    idle_ms: u64,
}

/// CPU time of each machine at the last look.
struct Before {
    at: Instant,
    cpu: HashMap<VmId, u64>,
}

impl Before {
    fn of(views: &[View]) -> Self {
        let cpu = |view: &View| Some((view.id.clone(), view.live.as_ref()?.vmm_cpu_ms));
        Self {
            at: Instant::now(),
            cpu: views.iter().filter_map(cpu).collect(),
        }
    }

    fn used(&self, view: &View) -> Option<MachineUse> {
        let live = view.live.as_ref()?;
        let before = self.cpu.get(&view.id).copied().unwrap_or(live.vmm_cpu_ms);
        let wall = self.at.elapsed().as_secs_f64().max(0.001);
        #[expect(clippy::cast_precision_loss)] // milliseconds of a look's interval
        let cpu = live.vmm_cpu_ms.saturating_sub(before) as f64 / 10.0 / wall;
        Some(MachineUse {
            id: view.id.clone(),
            cpu_percent: (cpu * 10.0).round() / 10.0,
            cpu_ms: live.vmm_cpu_ms,
            memory_bytes: live.vmm_rss_kib << 10,
            disk_bytes: live.disk_bytes,
            busy: live.busy,
            idle_ms: live.idle_ms,
        })
    }
}

async fn running(machines: &Machines, vms: &[VmId]) -> Result<Vec<View>, Failure> {
    if vms.is_empty() {
        let (mut views, _) = machines.list().await?;
        views.retain(|view| view.live.is_some());
        return Ok(views);
    }
    let mut views = Vec::new();
    for vm in vms {
        // One that does not run is an error, not an empty row.
        machines.running(vm).await?;
        views.push(machines.look(vm).await?);
    }
    Ok(views)
}

fn table(uses: &[MachineUse]) -> Table {
    let mut table = Table::new(&[
        "NAME", "CPU %", "CPU TIME", "MEMORY", "DISK", "BUSY", "IDLE",
    ]);
    for one in uses {
        table.row(&[
            one.id.to_string(),
            format!("{:.1}", one.cpu_percent),
            duration(one.cpu_ms),
            bytes(one.memory_bytes),
            one.disk_bytes.map_or("-".into(), bytes),
            one.busy.to_string(),
            duration(one.idle_ms),
        ]);
    }
    table
}

/// Shows what machines use, measured over a moment.
pub(super) async fn run(args: Args, global: &Global) -> Result<i32, Failure> {
    let machines = Machines::new(global.host()?);
    let before = Before::of(&running(&machines, &args.vms).await?);
    tokio::time::sleep(args.interval.0).await;
    let views = running(&machines, &args.vms).await?;
    let uses: Vec<MachineUse> = views.iter().filter_map(|view| before.used(view)).collect();
    match global.json {
        true => print_json(&uses),
        false => table(&uses).print(),
    }
    Ok(0)
}

/// Shows it live, until q or Ctrl-C.
pub(super) async fn top(args: Top, global: &Global) -> Result<i32, Failure> {
    let machines = Machines::new(global.host()?);
    if !io::stdout().is_terminal() || global.json {
        // For a pipe: one look.
        let args = Args {
            vms: Vec::new(),
            interval: args.interval,
        };
        return run(args, global).await;
    }
    let _screen = Screen::enter();
    let (quit, mut quitting) = tokio::sync::watch::channel(false);
    tokio::spawn(async move {
        let mut stdin = tokio::io::stdin();
        let mut byte = [0];
        while let Ok(1) = stdin.read(&mut byte).await {
            // q, Ctrl-C, Ctrl-D
            if matches!(byte[0], b'q' | 3 | 4) {
                break;
            }
        }
        quit.send_replace(true);
    });
    let mut before = Before::of(&running(&machines, &[]).await?);
    let mut pause = Duration::from_millis(200);
    loop {
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            _ = quitting.wait_for(|quit| *quit) => return Ok(0),
        }
        pause = args.interval.0;
        let (views, _) = machines.list().await?;
        let mut uses: Vec<MachineUse> = views.iter().filter_map(|view| before.used(view)).collect();
        uses.sort_by(|a, b| b.cpu_percent.total_cmp(&a.cpu_percent));
        before = Before::of(&views);
        let size = terminal::size();
        let (rows, cols) = (usize::from(size.rows), usize::from(size.cols));
        let mut screen = format!(
            "\x1b[H{} machines, {} running; q quits\x1b[K\r\n\x1b[K\r\n",
            views.len(),
            uses.len()
        );
        for line in table(&uses).lines().iter().take(rows.saturating_sub(3)) {
            screen.extend(line.chars().take(cols));
            screen.push_str("\x1b[K\r\n");
        }
        screen.push_str("\x1b[J");
        let mut stdout = io::stdout().lock();
        if stdout
            .write_all(screen.as_bytes())
            .and_then(|()| stdout.flush())
            .is_err()
        {
            return Ok(0);
        }
    }
}

/// The terminal's other screen for as long as it lives.
struct Screen(Option<RawMode>);

impl Screen {
    fn enter() -> Self {
        print!("\x1b[?1049h\x1b[?25l\x1b[2J");
        Self(RawMode::enter())
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        print!("\x1b[?25h\x1b[?1049l");
        let _ = io::stdout().flush();
        drop(self.0.take());
    }
}
