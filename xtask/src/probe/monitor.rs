//! `cargo xtask probe qmp`: QEMU told over its own monitor to reach out.
//!
//! Whoever has broken QEMU can do what its monitor can, and more. Each command
//! is given to a machine of its own: QEMU must refuse it, or be ended for the
//! system call it makes.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;
use bulkhead::error::{Explain as _, Report};
use bulkhead::run::{Host, Machine};
use bulkhead::spec::{Accel, Catalog, Request};
use serde_json::{Value, json};

use super::vmm::place;
use super::{Came, Row, Rows};
use crate::setup;

/// How long QEMU may take to fail in the background.
const PATIENCE: Duration = Duration::from_secs(3);

/// Options.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Print the attempts as JSON; the closing line is on stderr then.
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

/// What it is told, and a file that must not come of it.
fn attempts(canary: &Path) -> Vec<(&'static str, &'static str, Value)> {
    let file = canary.display().to_string();
    let socket = |kind: &str, data: Value| {
        let addr = json!({ "type": kind, "data": data });
        json!({ "id": "out", "backend": { "type": "socket", "data": { "addr": addr, "server": false } } })
    };
    vec![
        (
            "run a program by migration",
            "migrate",
            json!({ "uri": format!("exec:touch {file}") }),
        ),
        (
            "connect by migration",
            "migrate",
            json!({ "uri": "tcp:127.0.0.1:45871" }),
        ),
        (
            "connect to a path by migration",
            "migrate",
            json!({ "uri": format!("unix:{file}") }),
        ),
        (
            "add a TCP socket",
            "chardev-add",
            socket("inet", json!({ "host": "127.0.0.1", "port": "45871" })),
        ),
        (
            "add a Unix socket",
            "chardev-add",
            socket("unix", json!({ "path": file })),
        ),
        (
            "add a vsock socket",
            "chardev-add",
            socket("vsock", json!({ "cid": "2", "port": "1" })),
        ),
        (
            "add a datagram socket",
            "chardev-add",
            json!({ "id": "out", "backend": { "type": "udp", "data": {
            "remote": { "type": "inet", "data": { "host": "127.0.0.1", "port": "53" } } } } }),
        ),
        (
            "add a terminal",
            "chardev-add",
            json!({ "id": "out", "backend": { "type": "pty", "data": {} } }),
        ),
        (
            "write characters to a file",
            "chardev-add",
            json!({ "id": "out", "backend": { "type": "file", "data": { "out": file } } }),
        ),
        (
            "open the host's users as a disk",
            "blockdev-add",
            json!({ "driver": "raw", "node-name": "out",
            "file": { "driver": "file", "filename": "/etc/passwd" } }),
        ),
        (
            "open the host's disk",
            "blockdev-add",
            json!({ "driver": "host_device", "node-name": "out", "filename": "/dev/vda" }),
        ),
        (
            "open a disk over the network",
            "blockdev-add",
            json!({ "driver": "nbd", "node-name": "out",
            "server": { "type": "inet", "host": "127.0.0.1", "port": "45871" } }),
        ),
        (
            "make a disk",
            "blockdev-create",
            json!({ "job-id": "out", "options": { "driver": "file", "filename": file, "size": 4096 } }),
        ),
        (
            "serve its disks",
            "nbd-server-start",
            json!({ "addr": { "type": "inet", "data": { "host": "0.0.0.0", "port": "45872" } } }),
        ),
        (
            "write its memory to a file",
            "pmemsave",
            json!({ "val": 0, "size": 4096, "filename": file }),
        ),
        (
            "dump its memory",
            "dump-guest-memory",
            json!({ "paging": false, "protocol": format!("file:{file}") }),
        ),
        (
            "back memory by a file",
            "object-add",
            json!({ "qom-type": "memory-backend-file", "id": "out",
            "size": 4096, "mem-path": "/dev/shm" }),
        ),
        (
            "read a secret from a file",
            "object-add",
            json!({ "qom-type": "secret", "id": "out", "file": "/etc/shadow" }),
        ),
        (
            "use the host's random device",
            "object-add",
            json!({ "qom-type": "rng-random", "id": "out", "filename": "/dev/random" }),
        ),
        (
            "make a tap",
            "netdev_add",
            json!({ "type": "tap", "id": "out", "ifname": "out0", "script": "no", "downscript": "no" }),
        ),
        (
            "make a user network",
            "netdev_add",
            json!({ "type": "user", "id": "out" }),
        ),
        (
            "add a device of the host",
            "device_add",
            json!({ "driver": "vfio-pci", "host": "0000:00:00.0", "id": "out" }),
        ),
        (
            "trace itself",
            "trace-event-set-state",
            json!({ "name": "*", "enable": true, "ignore-unavailable": true }),
        ),
        (
            "share a directory anew",
            "object-add",
            json!({ "qom-type": "filter-dump", "id": "out", "netdev": "n", "file": file }),
        ),
    ]
}

/// Runs the task; gives whether nothing got out.
pub(crate) fn run(args: &Args) -> Result<bool> {
    let temp = tempfile::Builder::new().prefix("bh-probe-").tempdir()?;
    let host = Host {
        qemu: args.qemu.clone(),
        ..place(temp.path(), &args.state_dir)?
    };
    let _loopback = std::net::TcpListener::bind("127.0.0.1:45871")?;
    let outside = tempfile::tempdir()?;
    let canary = outside.path().join("canary");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let rows = Rows::said();
    for (name, command, arguments) in attempts(&canary) {
        let begin = Instant::now();
        let (mut came, why) = runtime.block_on(attempt(&host, args, command, arguments))?;
        if canary.exists() {
            came = Came::Failed;
            std::fs::remove_file(&canary)?;
        }
        rows.add(Row {
            case: name.to_owned(),
            came,
            why: vec![why],
            again: format!("cargo xtask probe qmp --accel {}", args.accel),
            ms: begin.elapsed().as_millis(),
            tried: None,
        });
    }
    rows.close(args.json)
}

async fn attempt(
    host: &Host,
    args: &Args,
    command: &str,
    arguments: Value,
) -> Result<(Came, String)> {
    let wish = Request {
        image: Some("base".into()),
        kernel: args.kernel.clone(),
        accel: Some(match args.accel.as_str() {
            "kvm" => Accel::Kvm,
            "tcg" => Accel::Tcg,
            other => anyhow::bail!("--accel cannot be {other}"),
        }),
        memory: Some("256M".parse()?),
        cpus: Some(1),
        command: vec!["true".into()],
        network: Some(bulkhead::spec::NetworkMode::Isolated.into()),
        ..Request::default()
    };
    let spec = wish.resolve(&Catalog::default())?;
    let (_, machine) = host
        .start(&spec)
        .await
        .map_err(|error| anyhow::anyhow!("no machine: {}: {error}", error.code()))?;
    let answer = machine.monitor().execute_raw(command, arguments).await;
    let judged = match answer {
        Ok(_) => background(&machine).await,
        Err(error) => {
            // A lost monitor is QEMU's end; what ended it says more.
            let end = tokio::time::timeout(Duration::from_millis(500), machine.process().wait());
            match end.await {
                Ok(_) => ended(&machine).await,
                Err(_) => (Came::Passed, format!("refused: {error}")),
            }
        }
    };
    for leak in machine.kill().await.err().into_iter().flatten() {
        eprintln!("{leak}");
    }
    Ok(judged)
}

/// What was accepted may fail later: a migration, a job.
async fn background(machine: &Machine) -> (Came, String) {
    if tokio::time::timeout(PATIENCE, machine.process().wait())
        .await
        .is_ok()
    {
        return ended(machine).await;
    }
    let failed = |value: Result<Value, _>| -> Option<String> {
        let value: Value = value.ok()?;
        let text = value.to_string();
        text.contains("\"failed\"").then_some(text).or_else(|| {
            value
                .as_array()?
                .iter()
                .find_map(|job| Some(job.get("error")?.to_string()))
        })
    };
    let migration = machine
        .monitor()
        .execute_raw("query-migrate", json!({}))
        .await;
    let jobs = machine.monitor().execute_raw("query-jobs", json!({})).await;
    match failed(migration).or_else(|| failed(jobs)) {
        Some(why) => (Came::Passed, format!("failed: {why}")),
        // Nothing left the jail: the canary and the socket tell.
        None => (Came::Passed, "accepted, without effect outside".into()),
    }
}

async fn ended(machine: &Machine) -> (Came, String) {
    match machine.end_reason().await {
        Some(error) => {
            let report = Report::of(&error);
            let came = match report.code.as_str() {
                "system-call-violation" | "qemu-died" => Came::Passed,
                _ => Came::Failed,
            };
            (came, report.what)
        }
        None => (Came::Failed, "it ended without a reason".into()),
    }
}
