//! `seccomp trace`: what each QEMU really calls, against the list in
//! src/vmm/seccomp.toml.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use bulkhead::error::{Explain, Report};
use bulkhead::guest::Output;
use bulkhead::plan::SHARE_TAG;
use bulkhead::run::{Build, Host, Io, Machine, build};
use bulkhead::spec::{Accel, Catalog, MachineType, Request, Spec, WorkspaceMode};
use bulkhead::vmm::seccomp::{Wanted, calls};
use bulkhead_agent::{Exec, Request as Ask};
use serde_json::json;

use crate::probe::vmm::place;
use crate::{qemu10, setup};

/// What is done with a machine while it is traced.
const SCENARIOS: [&str; 4] = ["microvm", "q35", "share", "clone"];

/// What the guest does to its disk and, where it has one, to its share.
const SCRIPT: &str = "set -e; cd $1
    mkdir -p d && echo a > d/a && ln -s a d/l && ln d/a d/h && mv d/a d/b && chmod 700 d/b
    chown 1000:1000 d/b && truncate -s 100 d/b && touch -d @0 d/b && ls -la d
    cat d/b > /dev/null && ls -L d/l || true; rm -r d
    head -c 20000000 /dev/urandom > /root/f && sync && rm /root/f && sync && df . > /dev/null";

/// Where the share is in the guest.
const SHARE: &str = "/workspace/work";
/// How long the guest may take to mount it.
const PATIENCE: Duration = Duration::from_secs(60);

/// Options.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Trace boot, use of disk and share, block jobs, migration, restore and
    /// power-off.
    Trace(Trace),
    /// One traced scenario.
    #[command(hide = true)]
    Drive(Drive),
}

#[derive(clap::Args)]
struct Trace {
    /// Only this QEMU, instead of the host's and 10.0.
    #[arg(long, env = "BULKHEAD_QEMU")]
    qemu: Option<PathBuf>,
    /// Where images are kept.
    #[arg(long, env = "BULKHEAD_STATE_DIR", default_value_os_t = setup::usual_state_dir())]
    state_dir: PathBuf,
    /// Print the counts as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
struct Drive {
    qemu: PathBuf,
    scenario: String,
    state_dir: PathBuf,
    kernel: Option<String>,
}

/// Runs the task.
pub(crate) fn run(args: Args) -> Result<()> {
    match args.what {
        What::Trace(args) => trace(&args),
        What::Drive(args) => {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            runtime.block_on(drive(&args))
        }
    }
}

/// How often each call was made, by QEMU and scenario.
type Counts = BTreeMap<String, BTreeMap<String, u64>>;

fn trace(args: &Trace) -> Result<()> {
    let qemus = match &args.qemu {
        Some(qemu) => vec![qemu.clone()],
        None => {
            let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
            let host = PathBuf::from("/usr/bin/qemu-system-x86_64");
            std::iter::once(host)
                .chain(qemu10::ensure(&target)?)
                .collect()
        }
    };
    let temp = tempfile::tempdir()?;
    let mut counts = Counts::new();
    for qemu in &qemus {
        let version = Command::new(qemu).arg("--version").output()?;
        let version = String::from_utf8_lossy(&version.stdout);
        let version = version
            .split_whitespace()
            .nth(3)
            .unwrap_or("unknown")
            .to_owned();
        for scenario in SCENARIOS {
            let file = temp.path().join("trace");
            let mut strace = Command::new("strace");
            strace
                .args(["-f", "-Y", "-qq", "-o"])
                .arg(&file)
                .arg(std::env::current_exe()?);
            strace
                .args(["seccomp", "drive"])
                .arg(qemu)
                .arg(scenario)
                .arg(&args.state_dir);
            let status = strace.arg("tuned").status();
            let status = status.context("cannot run strace (apt install strace)")?;
            ensure!(status.success(), "{scenario} on {version} failed");
            let text = String::from_utf8_lossy(&fs::read(&file)?).into_owned();
            for (call, count) in calls_of_qemu(&text) {
                let column = format!("{version} {scenario}");
                *counts.entry(call).or_default().entry(column).or_default() += count;
            }
        }
    }
    let listed = |share, ram| -> Result<BTreeSet<String>> {
        let wanted = Wanted {
            accel: Accel::Tcg,
            share,
            adopt: false,
            ram,
            host_files: false,
            host_pids: false,
        };
        Ok(calls(wanted)?.into_iter().map(|(call, _)| call).collect())
    };
    let plain = listed(false, false)?;
    let lists = [
        ("share", listed(true, false)?),
        ("clone", listed(false, true)?),
    ];
    report(args.json, &counts, &plain, &lists.into())
}

/// Prints the counts, and what `plain` and the longer lists of some scenarios
/// have too few or too many of.
fn report(
    json: bool,
    counts: &Counts,
    plain: &BTreeSet<String>,
    longer: &BTreeMap<&str, BTreeSet<String>>,
) -> Result<()> {
    // Answered with ENOSYS; see [refuse].
    let refused = [
        "clone3",
        "io_uring_setup",
        "get_mempolicy",
        "set_mempolicy",
        "mbind",
        "memfd_create",
    ];
    let missing: Vec<_> = counts
        .iter()
        .filter(|(call, by)| {
            let lacks = |column: &String| {
                let scenario = column.rsplit(' ').next().unwrap_or_default();
                !longer.get(scenario).unwrap_or(plain).contains(*call)
            };
            by.keys().any(lacks) && !refused.contains(&call.as_str())
        })
        .map(|(call, _)| call.clone())
        .collect();
    let all: BTreeSet<&String> = longer.values().flatten().collect();
    let unused: Vec<_> = all
        .into_iter()
        .filter(|call| !counts.contains_key(*call))
        .cloned()
        .collect();
    if json {
        let all = json!({ "counts": counts, "missing": missing, "unused": unused });
        println!("{}", serde_json::to_string_pretty(&all)?);
    } else {
        for (call, by) in counts {
            let by: Vec<_> = by
                .iter()
                .map(|(column, count)| format!("{column}: {count}"))
                .collect();
            println!("{call:<20}{}", by.join(", "));
        }
        println!("not seen here: {}", unused.join(" "));
        println!("missing in the list: {}", missing.join(" "));
    }
    match missing.is_empty() {
        true => Ok(()),
        false => bail!("the list lacks {}", missing.join(", ")),
    }
}

/// Counts the calls of QEMU's threads in what `strace -f -Y` wrote.
fn calls_of_qemu(text: &str) -> BTreeMap<String, u64> {
    let mut counts = BTreeMap::new();
    let (mut threads, mut others) = (BTreeSet::new(), BTreeSet::new());
    for line in text.lines() {
        // `123<comm> call(...`, `123 call(...`, or `123<comm> <... call resumed>`;
        // the name may have a space.
        let digits = line.trim_start_matches(|c: char| c.is_ascii_digit());
        let pid = &line[..line.len() - digits.len()];
        let named = digits
            .strip_prefix('<')
            .and_then(|rest| rest.split_once("> "));
        let (comm, what) = named.unwrap_or(("", digits));
        let what = what.trim_start();
        if what.starts_with("execve(\"/qemu\"") {
            threads.insert(pid.to_owned());
        }
        // A thread that appears afterwards is QEMU's, unless it bears our name.
        let ours = comm.starts_with("xtask") || comm.starts_with("tokio");
        if threads.is_empty() || ours {
            others.insert(pid.to_owned());
        } else if !others.contains(pid) {
            threads.insert(pid.to_owned());
        }
        if let (true, Some((call, _))) = (threads.contains(pid), what.split_once('('))
            && call
                .chars()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
        {
            *counts.entry(call.to_owned()).or_default() += 1;
        }
    }
    counts
}

fn explain<E: Explain>(error: E) -> anyhow::Error {
    let report = Report::of(&error);
    anyhow::anyhow!("{}: {} {}", report.code, report.what, report.cause)
}

async fn drive(args: &Drive) -> Result<()> {
    let temp = tempfile::tempdir()?;
    let host = Host {
        qemu: Some(args.qemu.clone()),
        // Tracing takes its time.
        boot_timeout: Duration::from_secs(300),
        ..place(temp.path(), &args.state_dir)?
    };
    let shared = temp.path().join("shared");
    fs::create_dir(&shared)?;
    let share = args.scenario == "share";
    let wish = Request {
        image: Some("base".into()),
        kernel: args.kernel.clone(),
        accel: Some(Accel::Tcg),
        machine: Some(match args.scenario.as_str() {
            "q35" => MachineType::Q35,
            _ => MachineType::Microvm,
        }),
        memory: Some("256M".parse()?),
        cpus: Some(2),
        // A clone has none.
        balloon: Some(args.scenario != "clone"),
        workspace: share.then(|| shared.clone()),
        workspace_mode: share.then_some(WorkspaceMode::Share),
        waive: Some("seccomp".parse()?),
        command: vec!["true".into()],
        network: Some(bulkhead::spec::NetworkMode::Isolated.into()),
        ..Request::default()
    };
    let spec = wish.resolve(&Catalog::default())?;
    if args.scenario == "clone" {
        return clone(&host, &spec, temp.path()).await;
    }
    let (_, machine) = host.start(&spec).await.map_err(explain)?;
    let dir = match share {
        true => SHARE,
        false => "/root",
    };
    if share {
        let mount = Ask::Mount9p {
            tag: SHARE_TAG.into(),
            path: SHARE.into(),
            read_only: false,
        };
        let asked = machine.channel().ask("mount the share", &mount, PATIENCE);
        asked.await.map_err(explain)?;
    }
    sh(&machine, dir).await?;
    let monitor = machine.monitor();
    for (command, arguments) in [
        ("stop", json!({})),
        ("cont", json!({})),
        ("balloon", json!({ "value": 200 << 20 })),
        (
            "blockdev-add",
            json!({ "driver": "null-co", "node-name": "copy", "size": spec.limits.disk.0 }),
        ),
        (
            "blockdev-backup",
            json!({ "job-id": "copy", "device": "scratch", "target": "copy", "sync": "top" }),
        ),
        ("query-jobs", json!({})),
    ] {
        let answer = monitor.execute_raw(command, arguments).await;
        answer
            .map_err(explain)
            .with_context(|| command.to_owned())?;
    }
    tokio::time::sleep(Duration::from_secs(3)).await;
    if !share {
        let saved = tempfile::tempfile()?;
        monitor
            .send_fd("saved", saved.into())
            .await
            .map_err(explain)?;
        let migrate = monitor
            .execute_raw("migrate", json!({ "uri": "fd:saved" }))
            .await;
        migrate.map_err(explain)?;
        tokio::time::sleep(Duration::from_secs(5)).await;
        monitor
            .execute_raw("cont", json!({}))
            .await
            .map_err(explain)?;
    }
    machine
        .stop(Duration::from_secs(20))
        .await
        .map_err(|errors| anyhow::anyhow!("left behind: {errors:?}"))
}

/// A template is made, and a machine restored from it.
async fn clone(host: &Host, spec: &Spec, temp: &Path) -> Result<()> {
    let io = Io::collecting(temp.to_owned());
    let built = build(host, spec, &Build::default(), io).await;
    let template = built.map_err(explain)?.template;
    let (_, machine) = host.start_clone(spec).await.map_err(explain)?;
    sh(&machine, "/root").await?;
    let stopped = machine.stop(Duration::from_secs(20)).await;
    stopped.map_err(|errors| anyhow::anyhow!("left behind: {errors:?}"))?;
    host.templates().rm(&template.id).map_err(explain)?;
    Ok(())
}

async fn sh(machine: &Machine, dir: &str) -> Result<()> {
    let exec = Exec {
        argv: ["sh", "-c", SCRIPT, "sh", dir].map(str::to_owned).into(),
        user: Some("root".into()),
        ..Exec::default()
    };
    let mut stream = machine
        .channel()
        .open(&Ask::Exec(exec))
        .await
        .map_err(explain)?;
    stream.started("run a script").await.map_err(explain)?;
    loop {
        match stream.next().await.map_err(explain)? {
            Output::Exit(exit) if exit.code == Some(0) => return Ok(()),
            Output::Exit(exit) => bail!("the guest's part failed: {exit:?}"),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_qemus_calls_count() {
        let text = "1<xtask> openat2(3, \"x\") = 4\n\
            2<xtask> mount(\"a\") = 0\n\
            2<xtask> execve(\"/qemu\", [\"qemu\"], 0x1) = 0\n\
            2<qemu> openat(AT_FDCWD, \"/lib/libc.so.6\") = 3\n\
            1<xtask> openat2(3, \"x\") = 4\n\
            3<CPU 0/TCG> futex(0x1, FUTEX_WAKE, 1 <unfinished ...>\n\
            3<CPU 0/TCG> <... futex resumed>) = 1\n";
        let counts = calls_of_qemu(text);
        let calls: Vec<_> = counts.keys().map(String::as_str).collect();
        assert_eq!(calls, ["execve", "futex", "openat"]);
    }
}
