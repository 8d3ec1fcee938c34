//! Limits of what a group reads from and writes to block devices.
//!
//! They hold whatever QEMU does: its own throttle, which is fairer to the guest,
//! is of no use when QEMU is not QEMU any more. On v1 what is written by way of
//! the page cache is not counted (cgroup-v1/blkio-controller of the kernel's
//! documentation).

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use nix::libc;

use super::{Cgroup, CgroupError, write};
use crate::spec::IoLimits;

/// v1's files, in the order of [`values`].
const V1: [&str; 4] = [
    "blkio.throttle.read_bps_device",
    "blkio.throttle.write_bps_device",
    "blkio.throttle.read_iops_device",
    "blkio.throttle.write_iops_device",
];
/// v2's words for them (io.max).
const V2: [&str; 4] = ["rbps", "wbps", "riops", "wiops"];

fn values(limits: IoLimits) -> [Option<u64>; 4] {
    [
        limits.read_bytes.map(|bytes| bytes.0),
        limits.write_bytes.map(|bytes| bytes.0),
        limits.read_operations,
        limits.write_operations,
    ]
}

/// The block device a file is on, as `MAJOR:MINOR` of the whole disk; none where
/// its file system is on no single device (tmpfs, overlay, btrfs).
pub fn device_of(file: &Path) -> Option<String> {
    use std::os::unix::fs::MetadataExt as _;
    let number = fs::metadata(file).ok()?.dev();
    let (major, minor) = (libc::major(number), libc::minor(number));
    let dir = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).ok()?;
    let disk = match dir.join("partition").exists() {
        true => dir.parent()?,
        false => &dir,
    };
    Some(fs::read_to_string(disk.join("dev")).ok()?.trim().to_owned())
}

impl Cgroup {
    /// Limits what it reads from and writes to `devices` (see [`device_of`]);
    /// what is absent is not limited any more.
    ///
    /// # Errors
    /// The host has no controller for it, or the kernel refuses.
    pub fn set_io(&self, devices: &BTreeSet<String>, limits: IoLimits) -> Result<(), CgroupError> {
        for device in devices {
            if let Some(file) = self.file("io.max") {
                let words = V2.iter().zip(values(limits)).map(|(word, value)| {
                    let value = value.map_or("max".into(), |value| value.to_string());
                    format!("{word}={value}")
                });
                let words: Vec<_> = words.collect();
                write(&file, &format!("{device} {}", words.join(" ")))?;
                continue;
            }
            for (name, value) in V1.iter().zip(values(limits)) {
                let file = self.file(name).ok_or_else(|| CgroupError::Unavailable {
                    why: "the controller for reads and writes is not there".into(),
                })?;
                // Zero takes a limit away; operations are counted in 32 bits.
                let most = if name.contains("iops") {
                    u64::from(u32::MAX)
                } else {
                    u64::MAX
                };
                let value = value.unwrap_or(0).min(most);
                write(&file, &format!("{device} {value}"))?;
            }
        }
        Ok(())
    }

    /// What is limited, in the kernel's words; empty for nothing.
    pub fn io(&self) -> String {
        let names = ["io.max"].iter().chain(&V1);
        let read = names.filter_map(|name| {
            let text = fs::read_to_string(self.file(name)?).ok()?;
            let text = text.lines().collect::<Vec<_>>().join("; ");
            (!text.is_empty()).then(|| format!("{name} {text}"))
        });
        read.collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Bytes;

    #[test]
    fn limits_come_and_go() {
        let group = match Cgroup::choose(&"cgroup-io".parse().unwrap()) {
            Ok(group) => group,
            Err(error) => {
                println!("skipped: control_group: {error}");
                return;
            }
        };
        group.make().unwrap();
        let disks = fs::read_dir("/sys/block").unwrap().flatten();
        let disk = disks
            .map(|disk| disk.path())
            .find(|disk| disk.join("device").exists())
            .unwrap();
        let device = fs::read_to_string(disk.join("dev")).unwrap();
        let devices = BTreeSet::from([device.trim().to_owned()]);
        let limits = IoLimits {
            read_bytes: Some(Bytes::mib(3)),
            write_operations: Some(77),
            ..IoLimits::default()
        };
        let set = group.set_io(&devices, limits);
        let seen = group.io();
        let lifted = set
            .clone()
            .and_then(|()| group.set_io(&devices, IoLimits::default()));
        let after = group.io();
        group.leases().for_each(|lease| lease.release().unwrap());
        set.unwrap();
        lifted.unwrap();
        assert!(seen.contains("3145728") && seen.contains("77"), "{seen}");
        assert_eq!(after, "");
    }

    #[test]
    fn files_are_on_whole_disks_or_on_none() {
        assert_eq!(device_of(Path::new("/proc")), None);
        // Where this is on a disk, the kernel knows that disk by this number.
        if let Some(device) = device_of(Path::new(env!("CARGO_MANIFEST_DIR"))) {
            let dir = fs::canonicalize(format!("/sys/dev/block/{device}")).unwrap();
            assert!(!dir.join("partition").exists(), "{device}");
        }
    }
}
