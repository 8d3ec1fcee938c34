//! The monitor against real QEMU.

use std::{
    io::{Read, Seek},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use bulkhead::{
    error::Explain,
    qmp::{ConnectionEnd, Monitor, Needs, Offer, QmpError, Schema},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use qapi::qmp;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{
    net::UnixStream,
    process::{Child, Command},
    task::JoinSet,
};

/// Ample for a start on a busy machine; nothing waits for it in vain.
const DEADLINE: Duration = Duration::from_secs(60);

/// A paused microvm with nothing to run.
struct Qemu {
    child: Child,
    monitor: Monitor,
}

impl Qemu {
    async fn start(binary: &Path) -> Self {
        let (ours, theirs) = pair();
        let child = Command::new(binary)
            .args(["-M", "microvm", "-accel", "tcg", "-m", "16", "-S"])
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-chardev", "socket,id=qmp,fd=0"])
            .args(["-mon", "chardev=qmp,mode=control"])
            .stdin(Stdio::from(theirs))
            .kill_on_drop(true)
            .spawn()
            .expect("QEMU starts");
        let monitor = Monitor::connect(ours, DEADLINE).await.expect("greeting");
        Self { child, monitor }
    }

    fn signal(&self, signal: Signal) {
        let pid = self.child.id().expect("QEMU runs");
        kill(Pid::from_raw(pid.try_into().unwrap()), signal).unwrap();
    }

    async fn status(&self) -> String {
        #[derive(Deserialize)]
        struct Status {
            status: String,
        }
        let command = qmp::query_status {};
        let status: Status = self.monitor.execute_into(command).await.unwrap();
        status.status
    }

    async fn exit(mut self) -> ExitStatus {
        let exit = tokio::time::timeout(DEADLINE, self.child.wait()).await;
        exit.expect("QEMU ends").unwrap()
    }
}

fn pair() -> (UnixStream, OwnedFd) {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    (UnixStream::from_std(ours).unwrap(), theirs.into())
}

/// Runs each case with the host's QEMU and, where there is one, with 10.0.
macro_rules! on_each_qemu {
    ($($case:ident),* $(,)?) => {
        mod host_qemu {
            $(#[tokio::test] async fn $case() {
                let qemu = std::env::var_os("BULKHEAD_QEMU");
                let qemu = qemu.unwrap_or_else(|| "qemu-system-x86_64".into());
                super::$case(qemu.into()).await;
            })*
        }
        mod qemu_10 {
            $(#[tokio::test] async fn $case() {
                match std::env::var_os("BULKHEAD_QEMU10") {
                    Some(qemu) => super::$case(qemu.into()).await,
                    None => eprintln!(
                        "skipped: qemu_10::{}: BULKHEAD_QEMU10 names no QEMU 10.0 \
                        (`cargo xtask qemu10` makes one)",
                        stringify!($case)
                    ),
                }
            })*
        }
    };
}

on_each_qemu!(
    greets_and_quits,
    offers_what_is_needed,
    survives_cancelled_calls,
    answers_a_hundred_commands_at_once,
    refusals_carry_the_words_of_qemu,
    late_replies_are_discarded,
    death_wakes_every_waiter,
    events_arrive_in_order,
    unknown_enum_values_do_no_harm,
    descriptors_reach_migration,
    descriptors_reach_a_disk,
);

async fn greets_and_quits(binary: PathBuf) {
    let qemu = Qemu::start(&binary).await;
    assert!(qemu.monitor.version().major >= 7);
    assert_eq!(qemu.status().await, "prelaunch");
    qemu.monitor.quit().await.unwrap();
    assert!(qemu.exit().await.success());
}

async fn offers_what_is_needed(binary: PathBuf) {
    let offer = Offer::of(&binary, DEADLINE).await.unwrap();
    let schema = Schema::from_value(offer.schema).unwrap();
    let mut missing = Needs::ours().missing(&schema);
    missing.retain(|item| !item.optional);
    assert_eq!(missing, []);
    assert!(schema.offers_event("DEVICE_DELETED"));
}

async fn survives_cancelled_calls(binary: PathBuf) {
    let qemu = Qemu::start(&binary).await;
    for round in 0..50 {
        // From before the first byte is written to the middle of the reply.
        let patience = Duration::from_micros(round * 100);
        let call = qemu.monitor.execute_raw("query-qmp-schema", Value::Null);
        _ = tokio::time::timeout(patience, call).await;
    }
    assert_eq!(qemu.status().await, "prelaunch");
    let schema = qemu.monitor.schema().await.unwrap();
    assert!(schema.offers_command("stop"));
}

async fn answers_a_hundred_commands_at_once(binary: PathBuf) {
    let qemu = Qemu::start(&binary).await;
    let mut calls = JoinSet::new();
    for n in 0..100 {
        let monitor = qemu.monitor.clone();
        calls.spawn(async move {
            let path = format!("/nowhere-{n}-");
            let reply = monitor.execute_raw("qom-list", json!({ "path": path }));
            (path, reply.await.unwrap_err().to_string())
        });
    }
    let mut count = 0;
    while let Some(done) = calls.join_next().await {
        let (path, error) = done.unwrap();
        assert!(error.contains(&path), "the reply for {path} is: {error}");
        count += 1;
    }
    assert_eq!(count, 100);
}

async fn refusals_carry_the_words_of_qemu(binary: PathBuf) {
    let qemu = Qemu::start(&binary).await;
    let unknown = qemu.monitor.execute_raw("no-such-command", Value::Null);
    let unknown = unknown.await.unwrap_err();
    assert!(unknown.is_unknown_command(), "{unknown}");
    assert_eq!(unknown.code(), "qmp-unknown-command");
    let command = qmp::device_del { id: "ghost".into() };
    let refused = qemu.monitor.execute(command).await.unwrap_err();
    assert_eq!(
        refused.to_string(),
        "QEMU's monitor refused `device_del`: Device 'ghost' not found (DeviceNotFound)"
    );
}

async fn late_replies_are_discarded(binary: PathBuf) {
    let qemu = Qemu::start(&binary).await;
    qemu.signal(Signal::SIGSTOP);
    let hasty = qemu.monitor.with_timeout(Duration::from_millis(50));
    let error = hasty.execute(qmp::query_kvm {}).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "QEMU's monitor did not answer `query-kvm` within 50ms"
    );
    qemu.signal(Signal::SIGCONT);
    assert_eq!(qemu.status().await, "prelaunch");
}

async fn death_wakes_every_waiter(binary: PathBuf) {
    let qemu = Qemu::start(&binary).await;
    let mut events = qemu.monitor.events();
    qemu.signal(Signal::SIGSTOP);
    let mut calls = JoinSet::new();
    for _ in 0..10 {
        let monitor = qemu.monitor.clone();
        calls.spawn(async move { monitor.execute(qmp::query_kvm {}).await.unwrap_err() });
    }
    tokio::time::sleep(Duration::from_millis(20)).await;
    qemu.signal(Signal::SIGKILL);
    while let Some(error) = calls.join_next().await {
        let error = error.unwrap();
        assert!(error.is_closed(), "{error}");
        assert!(error.to_string().contains("`query-kvm`"), "{error}");
    }
    let end = qemu.monitor.closed().await;
    assert!(matches!(end, ConnectionEnd::Closed), "{end}");
    assert!(events.next().await.unwrap_err().is_closed());
    let late = qemu.monitor.execute(qmp::stop {}).await.unwrap_err();
    assert!(late.is_closed(), "{late}");
    let mut events = qemu.monitor.events();
    assert!(events.next().await.unwrap_err().is_closed());
}

async fn events_arrive_in_order(binary: PathBuf) {
    let qemu = Qemu::start(&binary).await;
    let mut events = qemu.monitor.events();
    qemu.monitor.execute(qmp::cont {}).await.unwrap();
    qemu.monitor.execute(qmp::stop {}).await.unwrap();
    let resume = events.wait_for("RESUME", DEADLINE, |_| true).await.unwrap();
    let stop = events.wait_for("STOP", DEADLINE, |_| true).await.unwrap();
    assert!(stop.timestamp.unwrap() >= resume.timestamp.unwrap());
    let short = Duration::from_millis(20);
    let none = events.wait_for("RESUME", short, |_| true).await;
    assert!(matches!(none, Err(QmpError::NoEvent { .. })), "{none:?}");
}

async fn unknown_enum_values_do_no_harm(binary: PathBuf) {
    #[derive(Deserialize)]
    struct Capability {
        capability: String,
    }
    let qemu = Qemu::start(&binary).await;
    // qapi's own type does not decode everywhere: an error at most.
    let typed = qemu.monitor.execute(qmp::query_migrate_capabilities {});
    if let Err(error) = typed.await {
        assert!(matches!(error, QmpError::Decode { .. }), "{error}");
    }
    let own = qemu
        .monitor
        .execute_into(qmp::query_migrate_capabilities {});
    let own: Vec<Capability> = own.await.unwrap();
    assert!(own.iter().any(|c| c.capability == "x-ignore-shared"));
}

async fn descriptors_reach_migration(binary: PathBuf) {
    #[derive(Deserialize)]
    struct Migration {
        status: Option<String>,
    }
    let qemu = Qemu::start(&binary).await;
    let mut state = tempfile::tempfile().unwrap();
    let unused = tempfile::tempfile().unwrap();
    // Two at once: each must stay with its own command.
    let (first, second) = tokio::join!(
        qemu.monitor
            .send_fd("state", state.try_clone().unwrap().into()),
        qemu.monitor
            .send_fd("unused", unused.try_clone().unwrap().into()),
    );
    first.and(second).unwrap();
    let uri = json!({ "uri": "fd:state" });
    qemu.monitor.execute_raw("migrate", uri).await.unwrap();
    let done = async {
        loop {
            let migration = qemu.monitor.execute_into(qmp::query_migrate {});
            let migration: Migration = migration.await.unwrap();
            match migration.status.as_deref() {
                Some("completed") => return,
                Some("failed" | "cancelled") => panic!("the migration failed"),
                _ => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    };
    let done = tokio::time::timeout(DEADLINE, done).await;
    done.expect("the migration ends");
    state.rewind().unwrap();
    let mut magic = [0; 4];
    state.read_exact(&mut magic).unwrap();
    assert_eq!(&magic, b"QEVM");
    assert_eq!(unused.metadata().unwrap().len(), 0);
}

async fn descriptors_reach_a_disk(binary: PathBuf) {
    let qemu = Qemu::start(&binary).await;
    let disk = tempfile::tempfile().unwrap();
    disk.set_len(1 << 20).unwrap();
    let fd = qemu.monitor.add_fd(7, disk.into()).await.unwrap();
    assert!(fd > 2);
    let run = |command, arguments| qemu.monitor.execute_raw(command, arguments);
    let node = json!({ "driver": "file", "node-name": "disk", "filename": "/dev/fdset/7" });
    run("blockdev-add", node).await.unwrap();
    let node = json!({ "node-name": "disk" });
    run("blockdev-del", node).await.unwrap();
    run("remove-fd", json!({ "fdset-id": 7 })).await.unwrap();
}
