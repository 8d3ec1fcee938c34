//! What a running machine may use, and does.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bulkhead::error::Explain as _;
use bulkhead::host::cgroup::device_of;
use bulkhead::run::{Machine, Verdict, recover};
use bulkhead::spec::IoLimits;
use bulkhead::spec::{Bytes, Request as Wish};
use bulkhead_agent::{Reply, Request};
use support::Bulkhead;
use support::live::{KERNELS, Live, own_state, sh};

const PATIENCE: Duration = Duration::from_secs(60);
const GRACE: Duration = Duration::from_secs(20);

/// Memory the guest can use. Its total stays: it may take back what the balloon
/// holds before it runs out.
async fn guest_kib(machine: &Machine) -> u64 {
    let ask = machine
        .channel()
        .ask("describe itself", &Request::Info, PATIENCE);
    match ask.await.unwrap() {
        Reply::Info(info) => info.available_kib,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_is_taken_back_and_given_again() {
    for kernel in KERNELS {
        let live = Live::new();
        let own = live.host.images().get("base").unwrap().kernel();
        let kernel = kernel.unwrap_or(own.to_str().unwrap());
        let wish = Wish {
            kernel: Some(kernel.into()),
            ..Wish::default()
        };
        let machine = live.start(wish).await;
        let before = guest_kib(&machine).await;
        assert_eq!(machine.memory_actual().await.unwrap(), Bytes::mib(512));
        let less = Bytes::mib(256);
        let actual = machine.set_memory_target(less, PATIENCE).await.unwrap();
        assert_eq!(actual, less, "{kernel}");
        assert_eq!(machine.memory_actual().await.unwrap(), less);
        assert_eq!(machine.stats().await.unwrap().memory_bytes, less.0);
        let after = guest_kib(&machine).await;
        assert!(
            before > after + (200 << 10),
            "{kernel}: {before} to {after} KiB"
        );
        let all = Bytes::mib(512);
        assert_eq!(machine.set_memory_target(all, PATIENCE).await.unwrap(), all);
        let again = guest_kib(&machine).await;
        assert!(
            again > after + (200 << 10),
            "{kernel}: {after} to {again} KiB"
        );
        for wrong in [Bytes::mib(63), Bytes::mib(513)] {
            let refused = machine.set_memory_target(wrong, PATIENCE).await;
            assert_eq!(refused.unwrap_err().code(), "value-invalid");
        }
        machine.stop(GRACE).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_guest_frees_leaves_the_hosts_memory() {
    let live = Live::new();
    let machine = live.start(Wish::default()).await;
    let rss = async || machine.stats().await.unwrap().rss_bytes;
    let empty = rss().await;
    sh(
        &machine,
        "head -c 250000000 /dev/zero | tr '\\0' x > /dev/shm/f",
    )
    .await;
    let full = rss().await;
    assert!(full > empty + 200_000_000, "{empty} to {full}");
    sh(&machine, "rm /dev/shm/f").await;
    let deadline = Instant::now() + PATIENCE;
    while rss().await > full - 200_000_000 {
        assert!(Instant::now() < deadline, "{full} to {}", rss().await);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    machine.stop(GRACE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_without_balloon_says_so() {
    let live = Live::new();
    let wish = Wish {
        balloon: Some(false),
        ..Wish::default()
    };
    let machine = live.start(wish).await;
    let refused = machine.set_memory_target(Bytes::mib(256), PATIENCE).await;
    assert_eq!(refused.unwrap_err().code(), "no-balloon");
    assert_eq!(
        machine.memory_actual().await.unwrap_err().code(),
        "no-balloon"
    );
    assert_eq!(machine.stats().await.unwrap().memory_bytes, 512 << 20);
    machine.stop(GRACE).await.unwrap();
}

/// The control groups a machine has leased.
fn groups(run: &Path) -> Vec<PathBuf> {
    let text = fs::read_to_string(run.join("leases.json")).unwrap();
    let leases: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
    let groups = leases.iter().filter(|lease| lease["kind"] == "cgroup");
    groups
        .map(|lease| lease["path"].as_str().unwrap().into())
        .collect()
}

/// Whether this host gives machines a control group; said when not.
fn has_group(machine: &Machine) -> bool {
    match machine.cgroup() {
        Ok(_) => true,
        Err(error) => {
            let refused = machine.set_cpu_quota(Some(20)).unwrap_err();
            assert_eq!(refused.to_string(), error.to_string());
            println!("skipped: a_cpu_quota_holds: {error}");
            false
        }
    }
}

/// CPU time of QEMU over three seconds, in percent of one core.
async fn percent(machine: &Machine) -> u64 {
    let begin = (Instant::now(), machine.stats().await.unwrap().cpu_ms);
    tokio::time::sleep(Duration::from_secs(3)).await;
    let used = machine.stats().await.unwrap().cpu_ms - begin.1;
    used * 100 / u64::try_from(begin.0.elapsed().as_millis()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cpu_quota_holds_for_all_of_the_vmm() {
    let live = Live::new();
    let machine = live.start(Wish::default()).await;
    if !has_group(&machine) {
        machine.kill().await.unwrap();
        return;
    }
    let groups = groups(machine.dir());
    assert!(!groups.is_empty());
    // No thread is outside.
    let name = groups[0].file_name().unwrap().to_str().unwrap();
    for task in fs::read_dir(format!("/proc/{}/task", machine.process().pid())).unwrap() {
        let text = fs::read_to_string(task.unwrap().path().join("cgroup")).unwrap();
        assert!(text.contains(name), "{text}");
    }
    sh(&machine, "while :; do :; done > /dev/null 2>&1 &").await;
    machine.set_cpu_quota(Some(20)).unwrap();
    let limited = percent(&machine).await;
    assert!((10..=35).contains(&limited), "{limited} %");
    // Lifted by somebody else, it is found.
    let cpu = async || {
        let findings = machine.verify().await.unwrap();
        let mut all = findings.into_iter().filter(|one| one.layer == "cgroup");
        all.find(|one| one.what == "cpu").map(|one| one.verdict)
    };
    assert_eq!(cpu().await, Some(Verdict::Pass));
    let lift = groups.iter().find_map(|group| {
        let files = [("cpu.max", "max"), ("cpu.cfs_quota_us", "-1")];
        let file = |(name, text)| fs::write(existing(group.join(name))?, text).ok();
        files.into_iter().find_map(file)
    });
    lift.unwrap();
    assert_eq!(cpu().await, Some(Verdict::Fail));
    machine.set_cpu_quota(None).unwrap();
    assert_eq!(cpu().await, None);
    let free = percent(&machine).await;
    assert!(free > limited + limited / 2, "{limited} % to {free} %");
    for wrong in [0, 6401] {
        let refused = machine.set_cpu_quota(Some(wrong)).unwrap_err();
        assert_eq!(refused.code(), "value-invalid");
    }
    machine.kill().await.unwrap();
    assert!(groups.iter().all(|group| !group.exists()), "{groups:?}");
}

fn existing(path: PathBuf) -> Option<PathBuf> {
    path.exists().then_some(path)
}

#[test]
fn the_group_of_a_dead_owner_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    let state = own_state(dir.path());
    let bulkhead = Bulkhead::new().with_state(&state);
    let words = [
        "--kernel",
        "tuned",
        "--",
        "sh",
        "-c",
        "echo ready; sleep 600",
    ];
    let run = bulkhead.start("orphan", &words);
    let groups = groups(&state.join("runs/orphan"));
    if groups.is_empty() {
        println!("skipped: the_group_of_a_dead_owner: no control group");
        return;
    }
    assert!(groups.iter().all(|group| group.exists()), "{groups:?}");
    run.signal(nix::sys::signal::Signal::SIGKILL);
    run.finish();
    let dirs = bulkhead::run::Dirs {
        state,
        runtime: dir.path().join("runtime"),
    };
    let found = recover(&dirs, false).unwrap();
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(groups.iter().all(|group| !group.exists()), "{groups:?}");
    assert!(!dirs.runs().join("orphan").exists(), "{found:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn reads_and_writes_are_limited() {
    let live = Live::new();
    let machine = live.start(Wish::default()).await;
    let timed = async |script: &str| {
        let begin = Instant::now();
        sh(&machine, script).await;
        begin.elapsed()
    };
    let write = "dd if=/dev/zero of=f bs=1M count=24 conv=fsync";
    let read = "echo 3 > /proc/sys/vm/drop_caches; dd if=f of=/dev/null bs=1M";
    let many = "dd if=/dev/zero of=g bs=4k count=60 oflag=dsync";
    let scripts = [write, read, many];
    let limits = IoLimits {
        read_bytes: Some(Bytes::mib(4)),
        write_bytes: Some(Bytes::mib(4)),
        write_operations: Some(10),
        ..IoLimits::default()
    };
    // The control group holds QEMU to it, too, where there is one for a disk.
    let group = machine.cgroup().ok().cloned();
    let on_disk = group.is_some() && device_of(machine.dir()).is_some();
    let held = |limit: &str| {
        group
            .as_ref()
            .is_some_and(|group| group.io().contains(limit))
    };
    // So that there is something to read.
    timed(write).await;
    for script in scripts {
        machine.set_io_limits(limits).await.unwrap();
        assert_eq!(held("4194304"), on_disk);
        let limited = timed(script).await;
        // 24 MiB at 4 a second, 60 writes at 10; the first may come in a burst.
        assert!(limited > Duration::from_secs(4), "{script}: {limited:?}");
        machine.set_io_limits(IoLimits::default()).await.unwrap();
        assert!(!held("4194304"));
        let mut again = timed(script).await;
        for _ in 0..3 {
            if again > limited * 3 / 4 {
                again = timed(script).await;
            }
        }
        assert!(
            again < limited * 3 / 4,
            "{script}: {limited:?} to {again:?}"
        );
    }
    let zero = IoLimits {
        read_operations: Some(0),
        ..IoLimits::default()
    };
    let refused = machine.set_io_limits(zero).await.unwrap_err();
    assert_eq!(refused.code(), "value-invalid");
    machine.stop(GRACE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn stats_tell_what_was_used() {
    let live = Live::new();
    let machine = live.start(Wish::default()).await;
    let before = machine.stats().await.unwrap();
    sh(&machine, "head -c 30000000 /dev/urandom > f; sync; echo 3 > /proc/sys/vm/drop_caches; cat f > /dev/null").await;
    let after = machine.stats().await.unwrap();
    assert!(
        after.written_bytes >= before.written_bytes + 30_000_000,
        "{before:?} {after:?}"
    );
    assert!(
        after.read_bytes >= before.read_bytes + 30_000_000,
        "{before:?} {after:?}"
    );
    assert!(after.write_operations > before.write_operations);
    assert!(after.read_operations > before.read_operations);
    assert!(after.disk_allocated_bytes >= before.disk_allocated_bytes + 29_000_000);
    assert_eq!(after.disk_bytes, 2 << 30);
    assert!(after.vcpu_ms > before.vcpu_ms, "{before:?} {after:?}");
    assert!(after.cpu_ms >= after.vcpu_ms);
    assert!(after.rss_bytes > 64 << 20);
    assert!(
        after
            .pss_bytes
            .is_some_and(|pss| pss > 32 << 20 && pss <= after.rss_bytes)
    );
    machine.stop(GRACE).await.unwrap();
}

/// KiB of QEMU's own: all that is not the guest's memory, page tables included.
fn own_kib(pid: i32, guest: Bytes) -> u64 {
    let kib = |line: &str| -> u64 { line.split_whitespace().nth(1).unwrap().parse().unwrap() };
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let (mut size, mut sum) = (0, 0);
    for line in smaps.lines() {
        if line.starts_with("Size:") {
            size = kib(line);
        } else if line.starts_with("Anonymous:") && size != guest.0 >> 10 {
            sum += kib(line);
        }
    }
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    sum + kib(status
        .lines()
        .find(|line| line.starts_with("VmPTE:"))
        .unwrap())
}

/// Decision 0017: what the control group allows besides the guest's memory.
#[tokio::test(flavor = "multi_thread")]
async fn what_qemu_needs_besides_the_guest_fits_its_headroom() {
    let live = Live::new();
    let machine = live.start(Wish::default()).await;
    let guest = machine.plan().memory;
    let headroom = (machine.plan().jail.memory.0 - guest.0) >> 10;
    let pid = machine.process().pid();
    let idle = own_kib(pid, guest);
    // All the memory, many requests for the disk at once, much code.
    sh(
        &machine,
        "head -c 200M /dev/zero > /dev/shm/f; for n in $(seq 32); do \
         dd if=/dev/urandom of=f$n bs=64k count=32 conv=fsync & done; wait; \
         for n in $(seq 32); do sha256sum f$n & done; wait; \
         find /usr/bin -type f -exec cat {} + | gzip | tail -c 1; true",
    )
    .await;
    let busy = own_kib(pid, guest);
    println!("QEMU's own: {idle} KiB idle, {busy} KiB busy, {headroom} KiB allowed");
    assert!(
        busy > idle && busy < headroom / 2,
        "{idle}, {busy}, {headroom}"
    );
    machine.kill().await.unwrap();
}
