//! Limits of reads and writes in a control group of version 2, on a disk: the
//! lab's own, which a test may write to.

mod support;

use std::fs;
use std::time::{Duration, Instant};

use bulkhead::host::cgroup::device_of;
use bulkhead::spec::{Bytes, IoLimits, Request as Wish};
use bulkhead_agent::SCRATCH_SERIAL;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::json;
use support::live::{Live, disk_file, sh};

/// The lab's disk on a directory; unmounted when dropped.
struct Disk {
    dir: tempfile::TempDir,
    /// `MAJOR:MINOR`
    device: String,
}

impl Disk {
    fn new() -> Self {
        let read = |file| fs::read_to_string(file).unwrap_or_default();
        let disks = fs::read_dir("/sys/block").unwrap().flatten();
        let disk = disks
            .map(|disk| disk.path())
            .find(|disk| read(disk.join("serial")).trim() == SCRATCH_SERIAL)
            .expect("this is no lab: it has no disk of a Bulkhead machine");
        let node = std::path::Path::new("/dev").join(disk.file_name().unwrap());
        let dir = tempfile::tempdir().unwrap();
        // It is mounted already, where no path leads any more.
        let (flags, none) = (MsFlags::empty(), None::<&str>);
        mount(Some(&node), dir.path(), Some("ext4"), flags, none).unwrap();
        let device = read(disk.join("dev")).trim().to_owned();
        Self { dir, device }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = umount2(self.dir.path(), MntFlags::MNT_DETACH);
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs the lab's disk: cargo xtask lab test"]
async fn the_group_holds_a_vmm_that_does_not_hold_itself() {
    let disk = Disk::new();
    let place = tempfile::tempdir_in(disk.dir.path()).unwrap();
    let live = Live::at(place.path());
    let wish = Wish {
        memory: Some(Bytes::mib(256)),
        disk: Some(Bytes::mib(64)),
        ..Wish::default()
    };
    let machine = live.start(wish).await;
    assert_eq!(device_of(machine.dir()).as_ref(), Some(&disk.device));
    let group = machine.cgroup().unwrap().clone();
    assert_eq!(group.io(), "");
    // Zeros would become holes, and QEMU leaves it to the kernel when to write:
    // now.
    let file = disk_file(&machine);
    sh(&machine, "head -c 12M /dev/urandom > /dev/shm/f").await;
    let write = async || {
        let begin = Instant::now();
        sh(&machine, "dd if=/dev/shm/f of=f bs=1M conv=fsync").await;
        file.sync_all().unwrap();
        begin.elapsed()
    };
    let plain = write().await;
    let limits = IoLimits {
        write_bytes: Some(Bytes::mib(1)),
        read_operations: Some(5000),
        ..IoLimits::default()
    };
    machine.set_io_limits(limits).await.unwrap();
    let device = &disk.device;
    let held = format!("io.max {device} rbps=max wbps=1048576 riops=5000 wiops=max");
    assert_eq!(group.io(), held);
    // What a broken QEMU would do: forget its own limits.
    for id in ["root-disk", "scratch-disk"] {
        let none = json!({
            "id": id, "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0,
        });
        let asked = machine.monitor().execute_raw("block_set_io_throttle", none);
        asked.await.unwrap();
    }
    // The file was made by us, and the kernel takes its writes for ours until it
    // has seen for a while who writes (fs/fs-writeback.c, wbc_detach_inode).
    let mut limited = Duration::ZERO;
    let mut rounds = 0;
    // 12 MiB at 1 a second; the first may come in a burst.
    while limited < Duration::from_secs(9).max(plain * 3 / 2) {
        limited = write().await;
        rounds += 1;
        assert!(rounds < 40, "{limited:?}");
    }
    println!("held in round {rounds}: {limited:?}");
    machine.set_io_limits(IoLimits::default()).await.unwrap();
    assert_eq!(group.io(), "");
    let free = write().await;
    assert!(free < limited * 3 / 4, "{limited:?} to {free:?}");
    machine.kill().await.unwrap();
}
