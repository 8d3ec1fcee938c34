//! The guest kernel's command line.

use super::{Channel, HostFacts, Network};
use crate::image::KernelFormat;
use crate::spec::{Accel, MachineType, Spec};

/// Builds it. Each option stands here with its reason; the figures are in
/// docs/decisions/0004-boot.md.
pub(super) fn build(
    spec: &Spec,
    channel: Channel,
    facts: &HostFacts,
    format: KernelFormat,
) -> String {
    let mut options = vec![
        // Kernel messages go to the serial port, warnings and worse only.
        "console=ttyS0".to_owned(),
        "quiet".into(),
        // A panic ends QEMU (-no-reboot) instead of hanging.
        "panic=-1".into(),
        "8250.nr_uarts=1".into(),
        // Bulkhead credits fresh entropy before any command; until then the
        // CPU's own generator serves.
        "random.trust_cpu=on".into(),
    ];
    if format == KernelFormat::Bzimage {
        // Else its setup code reads every disk through the firmware, and with
        // QEMU 10.0 some boots hang there.
        options.push("edd=off".into());
    }
    if spec.machine == MachineType::Microvm {
        // No keyboard controller: a triple fault is the way to restart.
        options.push("reboot=t".into());
        if format == KernelFormat::Vmlinux {
            options.push("pci=off".into());
        }
    }
    if spec.accel == Accel::Tcg {
        // The emulated timer interrupt check fails now and then.
        options.push("no_timer_check".into());
        // Alternatives are patched for SMP from the start; saves 170 ms and more.
        options.push("noreplace-smp".into());
        // Tests of ciphers, which only cost time; a second processor once hung
        // in one.
        options.push("cryptomgr.notests".into());
        if spec.machine == MachineType::Microvm {
            // Without it most boots hang ("Unable to calibrate against PIT").
            if let Some(khz) = facts.tsc_khz {
                options.push(format!("tsc_early_khz={khz}"));
            }
            options.push("tsc=reliable".into());
        }
    }
    options.push(
        match channel {
            Channel::Serial => "bulkhead.channel=serial",
            Channel::Vsock => "bulkhead.channel=vsock",
        }
        .into(),
    );
    if let Some(network) = Network::of(&spec.network) {
        options.extend(network.options());
    }
    options.join(" ")
}
