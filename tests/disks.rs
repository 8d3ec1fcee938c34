//! Disks of running machines: a full host, deleted files, more space.

mod support;

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead::error::Explain as _;
use bulkhead::run::{DiskState, Machine};
use bulkhead::spec::{Bytes, Request as Wish};
use nix::sys::signal::{Signal, kill};
use support::Bulkhead;
use support::live::{KERNELS, Live, Tmpfs, disk_file, own_state, sh};

/// More than anything here takes on a busy host.
const PATIENCE: Duration = Duration::from_secs(60);
const GRACE: Duration = Duration::from_secs(20);

fn disk(size: Bytes) -> Wish {
    Wish {
        disk: Some(size),
        ..Wish::default()
    }
}

async fn until(machine: &Machine, wanted: impl FnMut(&DiskState) -> bool) -> DiskState {
    let mut state = machine.disk().state();
    let found = tokio::time::timeout(PATIENCE, state.wait_for(wanted)).await;
    match found {
        Ok(found) => found.unwrap().clone(),
        Err(_) => panic!("it stays {:?}", machine.disk().trouble()),
    }
}

async fn status(machine: &Machine) -> String {
    let command = qapi::qmp::query_status {};
    let status: serde_json::Value = machine.monitor().execute_into(command).await.unwrap();
    status["status"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_host_stops_the_machine_until_there_is_space() {
    let tmpfs = Tmpfs::new(96);
    let ballast = tmpfs.ballast(40);
    let live = Live::at(tmpfs.path());
    let machine = live.start(Wish::default()).await;
    assert_eq!(machine.disk().trouble(), None);
    // More than there is now, less than there will be.
    let script = "head -c 70000000 /dev/urandom | tee f | sha256sum; sync; \
                  echo 3 > /proc/sys/vm/drop_caches; sha256sum < f";
    let free = async {
        let full = until(&machine, |state| *state != DiskState::Fine).await;
        assert!(matches!(&full, DiskState::Full { path, .. } if path == machine.dir()));
        let words = full.to_string();
        assert!(
            words.contains("full") && words.contains("bytes free"),
            "{words}"
        );
        // The user pauses it besides: nothing resumes it then.
        machine.disk().hold(true);
        fs::remove_file(&ballast).unwrap();
        until(
            &machine,
            |state| matches!(state, DiskState::Full { free, .. } if *free > 8 << 20),
        )
        .await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(status(&machine).await, "io-error");
        machine.disk().hold(false);
        until(&machine, |state| *state == DiskState::Fine).await;
    };
    let (sums, ()) = tokio::join!(sh(&machine, script), free);
    let sums: Vec<_> = sums.lines().collect();
    assert!(sums.len() == 2 && sums[0] == sums[1], "{sums:?}");
    assert_eq!(status(&machine).await, "running");
    let stalls = machine.disk().stalls().unwrap();
    assert!(
        stalls.contains("paused") && !stalls.contains("to its end"),
        "{stalls}"
    );
    machine.stop(GRACE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_comes_later_sees_a_machine_that_stopped_before() {
    let tmpfs = Tmpfs::new(64);
    let live = Live::at(tmpfs.path());
    let machine = live.start(Wish::default()).await;
    machine.disk().hold(true);
    let write = sh(&machine, "head -c 100000000 /dev/zero > f; sync");
    let look = async {
        until(&machine, |state| *state != DiskState::Fine).await;
        let later = bulkhead::run::DiskWatch::start(machine.monitor(), machine.dir());
        let mut state = later.state();
        let found = tokio::time::timeout(PATIENCE, state.wait_for(|s| *s != DiskState::Fine));
        assert!(matches!(
            *found.await.unwrap().unwrap(),
            DiskState::Full { .. }
        ));
    };
    tokio::select! {
        text = write => panic!("it fitted: {text}"),
        () = look => {}
    }
    machine.kill().await.unwrap();
}

#[test]
fn a_run_waits_for_space_as_long_as_its_time_limit_allows() {
    let tmpfs = Tmpfs::new(64);
    let bulkhead = Bulkhead::new().with_state(&own_state(tmpfs.path()));
    let run = |timeout: &str, bytes: &str| {
        bulkhead.run(&[
            "--json",
            "--kernel",
            "tuned",
            "--timeout",
            timeout,
            "--user",
            "root",
            "--",
            "sh",
            "-c",
            "head -c $1 /dev/zero > /root/f; sync",
            "sh",
            bytes,
        ])
    };
    let warnings = |ran: &support::Ran| {
        let outcome: serde_json::Value =
            serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("{error}: {ran:?}"));
        outcome["warnings"].to_string()
    };
    // Half of it is enough to fill, and soon filled.
    let ballast = tmpfs.ballast(30);
    let never = run("20s", "100000000");
    assert_eq!(never.code, 124, "{never:?}");
    let told = warnings(&never);
    assert!(
        told.contains("disk was full") && told.contains("to its end"),
        "{told}"
    );

    let later = std::thread::scope(|scope| {
        scope.spawn(|| {
            let deadline = Instant::now() + PATIENCE;
            let (mut last, mut since) = (tmpfs.free(), Instant::now());
            while Instant::now() < deadline {
                let now = tmpfs.free();
                if now != last {
                    (last, since) = (now, Instant::now());
                }
                // Nobody writes any more: it stands still.
                if now <= 1 << 20 && since.elapsed() > Duration::from_secs(2) {
                    break;
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            fs::remove_file(&ballast).unwrap();
        });
        run("60s", "40000000")
    });
    assert_eq!(later.code, 0, "{later:?}");
    let told = warnings(&later);
    assert!(
        told.contains("disk was full") && !told.contains("to its end"),
        "{told}"
    );
    assert!(later.stderr.contains("paused"), "{later:?}");
}

#[test]
fn a_survivor_on_a_full_disk_is_left_until_there_is_space() {
    let tmpfs = Tmpfs::new(96);
    let ballast = tmpfs.ballast(40);
    let bulkhead = Bulkhead::new().with_state(&own_state(tmpfs.path()));
    let vm = bulkhead.create("brimful", &["--survivors", "adopt", "--start"]);
    let script = "head -c 70000000 /dev/urandom > /root/f; sync";
    bulkhead.must(&["exec", "-d", "-u", "root", "brimful", "sh", "-c", script]);
    vm.becomes("paused");
    let vmm = vm.vmm();
    kill(vm.supervisor(), Signal::SIGKILL).unwrap();
    vm.becomes("lost");
    let refused = bulkhead.must_fail(&["gc"], "machine-stands-still");
    assert!(refused.contains("bytes free"), "{refused:?}");
    kill(vmm, None).unwrap();
    assert_eq!(vm.state(), "lost");
    fs::remove_file(&ballast).unwrap();
    assert!(bulkhead.must(&["gc"]).contains("took over brimful"));
    let script = "head -c 1000000 /dev/zero > f && sync && echo on";
    let on = bulkhead.must(&["exec", "brimful", "sh", "-c", script]);
    assert_eq!(on, "on\n");
    assert_eq!(vm.vmm(), vmm);
}

/// A disk on which every discard fails, by QEMU's own means.
const FAILING: &str = r#"#!/bin/sh
for word do
    shift
    case $word in
    driver=raw,node-name=scratch,*)
        word=$(echo "$word" | sed -e 's/file\.driver=file/file.driver=blkdebug,file.image.driver=file/' \
            -e 's/file\.filename/file.image.filename/' -e 's/file\.locking/file.image.locking/')
        error=file.inject-error.0
        word=$word,$error.event=none,$error.iotype=discard,$error.errno=5
        ;;
    esac
    set -- "$@" "$word"
done
exec qemu-system-x86_64 "$@"
"#;

#[test]
fn a_disk_that_fails_ends_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let qemu = dir.path().join("qemu");
    fs::write(&qemu, FAILING).unwrap();
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(&qemu, executable).unwrap();
    let script = "head -c 5000000 /dev/zero > f; sync; rm f; sync; sleep 50";
    let begin = Instant::now();
    let run = Bulkhead::new().run(&[
        "--qemu",
        qemu.to_str().unwrap(),
        // A script: a jail would need a shell.
        "--waive",
        "files,seccomp",
        "--kernel",
        "tuned",
        "--",
        "sh",
        "-c",
        script,
    ]);
    assert_eq!(run.code, 125, "{run:?}");
    assert!(run.stderr.contains("disk-failed"), "{run:?}");
    assert!(run.stderr.contains("Input/output error"), "{run:?}");
    assert!(begin.elapsed() < Duration::from_secs(240), "{run:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_guest_deletes_is_the_hosts_again() {
    for kernel in KERNELS {
        let live = Live::new();
        let machine = live
            .start(Wish {
                // The image's own kernel is what an absent one means.
                kernel: kernel.map(Into::into).or(Some(own_kernel(&live))),
                ..Wish::default()
            })
            .await;
        let file = disk_file(&machine);
        let allocated = || file.metadata().unwrap().blocks() * 512;
        sh(&machine, "head -c 200000000 /dev/urandom > f; sync").await;
        let full = allocated();
        assert!(full > 190_000_000, "{kernel:?}: {full}");
        sh(&machine, "rm f; sync").await;
        let deadline = Instant::now() + PATIENCE;
        while allocated() > full - 190_000_000 {
            assert!(
                Instant::now() < deadline,
                "{kernel:?}: {} stay",
                allocated()
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        machine.stop(GRACE).await.unwrap();
    }
}

fn own_kernel(live: &Live) -> String {
    let image = live.host.images().get("base").unwrap();
    image.kernel().to_str().unwrap().to_owned()
}

/// Size of the guest's file system, in MiB.
async fn size(machine: &Machine) -> u64 {
    let text = sh(machine, "df -m / | tail -n 1").await;
    text.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Powers the machine off and has the file system checked, strictly.
async fn stop_and_check(machine: Machine) {
    let file: File = disk_file(&machine);
    machine.stop(GRACE).await.unwrap();
    let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    let check = Command::new("e2fsck")
        .args(["-fn", &path])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&check.stdout);
    assert!(check.status.success(), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_machine_gets_a_larger_disk() {
    for kernel in KERNELS {
        let live = Live::new();
        let machine = live
            .start(Wish {
                kernel: kernel.map(Into::into).or(Some(own_kernel(&live))),
                ..disk(Bytes::mib(128))
            })
            .await;
        sh(
            &machine,
            "head -c 20000000 /dev/urandom > before; sha256sum before > sums",
        )
        .await;
        assert!(size(&machine).await < 128);
        let grown = machine.grow_disk(Bytes::gib(1)).await.unwrap();
        assert_eq!(
            (grown.before, grown.after),
            (Bytes::mib(128), Bytes::gib(1))
        );
        let now = size(&machine).await;
        assert!((900..=1024).contains(&now), "{kernel:?}: {now}");
        // All of it can be used, and what was there is there.
        sh(
            &machine,
            "head -c 400000000 /dev/zero > after; sync; sha256sum -c sums",
        )
        .await;
        // Twice, past what a group of descriptors covers.
        machine.grow_disk(Bytes::gib(40)).await.unwrap();
        assert!(size(&machine).await > 39_000);
        assert_eq!(machine.stats().await.unwrap().disk_bytes, 40 << 30);
        for smaller in [Bytes::gib(39), Bytes(1)] {
            let error = machine.grow_disk(smaller).await.unwrap_err();
            assert_eq!(error.code(), "value-invalid");
            assert!(error.to_string().contains("cannot shrink"), "{error}");
        }
        let same = machine.grow_disk(Bytes::gib(40)).await.unwrap();
        assert_eq!(same.before, same.after);
        stop_and_check(machine).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_longer_file_is_filled_at_the_next_boot() {
    for kernel in KERNELS {
        let live = Live::new();
        let wish = |size| Wish {
            kernel: kernel.map(Into::into).or(Some(own_kernel(&live))),
            ..disk(size)
        };
        let small = live.start(wish(Bytes::mib(128))).await;
        small.kill().await.unwrap();
        // The next machine gets the small file system in a longer file.
        let cache = live.host.dirs.cache();
        let size_128 = (128_u64 << 20).to_string();
        let mut files = fs::read_dir(&cache).unwrap().map(|entry| entry.unwrap());
        let template = files
            .find(|file| file.file_name().to_string_lossy().contains(&size_128))
            .unwrap()
            .path();
        let name = template.to_str().unwrap();
        let longer = name.replace(&size_128, &(3_u64 << 30).to_string());
        assert_ne!(longer, name);
        fs::rename(name, &longer).unwrap();
        let grown = bulkhead::run::lengthen(longer.as_ref(), Bytes::gib(3)).unwrap();
        assert_eq!(grown.before, Bytes::mib(128));
        let machine = live.start(wish(Bytes::gib(3))).await;
        let now = size(&machine).await;
        assert!((2900..=3072).contains(&now), "{kernel:?}: {now}");
        sh(&machine, "head -c 300000000 /dev/zero > f; sync").await;
        stop_and_check(machine).await;
    }
}
