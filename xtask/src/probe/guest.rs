//! `cargo xtask probe guest`: what a guest sees of its machine, from inside and
//! from QEMU's own list of devices.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use bulkhead::error::Explain as _;
use bulkhead::guest::Output;
use bulkhead::plan::Channel;
use bulkhead::run::{Host, Machine};
use bulkhead::spec::{Accel, Catalog, MachineType, Request};
use bulkhead_agent::{Exec, Request as Ask};
use serde_json::json;

use super::vmm::place;
use super::{Came, Row, Rows};
use crate::setup;

/// Types of devices no machine of ours has.
const FORBIDDEN: [&str; 12] = [
    "vmport", "vmmouse", "fdc", "vga", "VGA", "usb", "ide", "ahci", "e1000", "rtl8139", "hda",
    "pvpanic",
];

/// Options.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Print the findings as JSON; the closing line is on stderr then.
    #[arg(long)]
    json: bool,
    /// kvm or tcg.
    #[arg(long, default_value = "tcg")]
    accel: String,
    /// The QEMU binary.
    #[arg(long, env = "BULKHEAD_QEMU")]
    qemu: Option<PathBuf>,
    /// Kernel other than the image's, such as `tuned`.
    #[arg(long)]
    kernel: Option<String>,
    /// Where images are kept.
    #[arg(long, env = "BULKHEAD_STATE_DIR", default_value_os_t = setup::usual_state_dir())]
    state_dir: PathBuf,
}

/// Runs the task; gives whether a guest sees what was planned, and no more.
pub(crate) fn run(args: &Args) -> Result<bool> {
    let temp = tempfile::Builder::new().prefix("bh-probe-").tempdir()?;
    let host = Host {
        qemu: args.qemu.clone(),
        ..place(temp.path(), &args.state_dir)?
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let rows = Rows::said();
    for kind in [MachineType::Microvm, MachineType::Q35] {
        for row in runtime.block_on(look(&host, args, kind))? {
            rows.add(row);
        }
    }
    rows.close(args.json)
}

async fn look(host: &Host, args: &Args, kind: MachineType) -> Result<Vec<Row>> {
    let begin = Instant::now();
    let wish = Request {
        image: Some("base".into()),
        kernel: args.kernel.clone(),
        accel: Some(match args.accel.as_str() {
            "kvm" => Accel::Kvm,
            "tcg" => Accel::Tcg,
            other => bail!("--accel cannot be {other}"),
        }),
        machine: Some(kind),
        memory: Some("256M".parse()?),
        cpus: Some(1),
        command: vec!["true".into()],
        network: Some(bulkhead::spec::NetworkMode::Isolated.into()),
        ..Request::default()
    };
    let spec = wish.resolve(&Catalog::default())?;
    let started = host.start(&spec).await;
    let (_, machine) =
        started.map_err(|error| anyhow::anyhow!("no machine: {}: {error}", error.code()))?;
    let name = format!("{kind:?}").to_lowercase();
    let row = |case: &str, seen: String, good: bool| Row {
        case: format!("{name}: {case}"),
        came: if good { Came::Passed } else { Came::Failed },
        why: vec![seen],
        again: format!("cargo xtask probe guest --accel {}", args.accel),
        ms: begin.elapsed().as_millis(),
        tried: None,
    };
    let mut rows = Vec::new();
    // Linux: include/uapi/linux/virtio_ids.h. Two disks, the ports, and vsock
    // where the host has it.
    let wanted = match machine.plan().channel {
        Channel::Serial => "0x0002 0x0002 0x0003",
        Channel::Vsock => "0x0002 0x0002 0x0003 0x0013",
    };
    let virtio = sh(
        &machine,
        "cat /sys/bus/virtio/devices/*/device | sort | tr '\\n' ' '",
    )
    .await?;
    let planned = virtio.trim() == wanted;
    rows.push(row("virtio devices are those planned", virtio, planned));
    let pci = sh(
        &machine,
        "cat /sys/bus/pci/devices/*/class 2>/dev/null | sort -u | tr '\\n' ' '",
    )
    .await?;
    // Bridges, virtio disks and ports; no display (0x03), no network (0x02),
    // no USB (0x0c03), no storage but virtio's.
    let allowed = ["0x060000", "0x060100", "0x010000", "0x078000", "0x00ff00"];
    let known = match kind {
        MachineType::Microvm => pci.trim().is_empty(),
        MachineType::Q35 => pci.split_whitespace().all(|class| allowed.contains(&class)),
    };
    rows.push(row("PCI devices are those planned", pci, known));
    let flags = sh(&machine, "grep -owE 'svm|vmx' /proc/cpuinfo | sort -u").await?;
    let none = flags.is_empty();
    rows.push(row("no nested virtualization", flags, none));
    let net = sh(&machine, "ls /sys/class/net").await?;
    let lo = net.trim() == "lo";
    rows.push(row("no network device", net, lo));
    let screens = sh(
        &machine,
        "ls /sys/class/graphics /sys/class/drm 2>/dev/null | grep -v :",
    )
    .await?;
    let none = screens.split_whitespace().all(|name| name == "fbcon");
    rows.push(row("no screen", screens, none));
    let floppy = sh(&machine, "ls /dev/fd0 /dev/sr0 /dev/sda 2>/dev/null").await?;
    let none = floppy.is_empty();
    rows.push(row("no floppy, CD or SCSI disk", floppy, none));
    let types = types(&machine).await?;
    let odd: Vec<_> = types
        .iter()
        .filter(|kind| FORBIDDEN.iter().any(|word| kind.contains(word)))
        .cloned()
        .collect();
    let good = odd.is_empty() && types.len() > 5;
    let seen = if good {
        format!("{} devices", types.len())
    } else {
        odd.join(" ")
    };
    rows.push(row(
        "QEMU has no VMware port, floppy, screen, USB or IDE",
        seen,
        good,
    ));
    for leak in machine.kill().await.err().into_iter().flatten() {
        eprintln!("{leak}");
    }
    Ok(rows)
}

/// Types of all devices QEMU has, planned or built in.
async fn types(machine: &Machine) -> Result<Vec<String>> {
    let mut types = Vec::new();
    for path in [
        "/machine",
        "/machine/unattached",
        "/machine/peripheral",
        "/machine/peripheral-anon",
    ] {
        let listed = machine
            .monitor()
            .execute_raw("qom-list", json!({ "path": path }))
            .await?;
        for one in listed.as_array().into_iter().flatten() {
            let kind = one["type"].as_str().unwrap_or_default();
            if let Some(kind) = kind.strip_prefix("child<") {
                types.push(kind.trim_end_matches('>').to_owned());
            }
        }
    }
    Ok(types)
}

/// What a script prints in the guest, as root.
async fn sh(machine: &Machine, script: &str) -> Result<String> {
    let exec = Exec {
        argv: ["sh", "-c", script].map(str::to_owned).into(),
        user: Some("root".into()),
        ..Exec::default()
    };
    let work = async {
        let mut stream = machine.channel().open(&Ask::Exec(exec)).await?;
        stream.started("run a script").await?;
        let mut text = Vec::new();
        loop {
            match stream.next().await? {
                Output::Out(bytes) => text.extend(bytes),
                Output::Err(_) => {}
                Output::Exit(_) => return anyhow::Ok(String::from_utf8(text)?),
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), work).await?
}
