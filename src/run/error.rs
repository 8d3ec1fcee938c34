//! Why a machine could not be started, or ended on its own.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::signal::Signal;

use super::clone::CloneError;
use super::record::RecordError;
use crate::error::Explain;
use crate::guest::GuestError;
use crate::host::cgroup::CgroupError;
use crate::host::network::NetworkError;
use crate::image::Error as ImageError;
use crate::qmp::QmpError;
use crate::spec::SpecError;
use crate::vmm::{ExitStatus, SpawnError};

/// A machine did not come up, or did not stay up.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// Something the machine needs on the host.
    #[error("cannot {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The plan lacks something a machine needs.
    #[error("the plan gives the machine no descriptor for {what}")]
    Missing {
        /// What.
        what: &'static str,
    },
    /// A value that cannot be.
    #[error("{what} cannot be {value}: {why}")]
    Value {
        /// Which value.
        what: &'static str,
        /// What was asked for.
        value: String,
        /// The rule it breaks.
        why: String,
    },
    /// Its memory cannot be changed while it runs.
    #[error("the machine was started without a balloon")]
    NoBalloon,
    /// The agent in the guest does not know what it is asked for.
    #[error("the guest agent is too old to {what}")]
    OldAgent {
        /// What it was asked for.
        what: &'static str,
    },
    /// Its disk was made larger, and the guest's file system was not.
    #[error(
        "the disk has {size} now, but the guest could not make its file system larger; \
         it does at its next boot"
    )]
    NotFilled {
        /// The disk's size.
        size: crate::spec::Bytes,
        /// Why not.
        #[source]
        source: Box<MachineError>,
    },
    /// What the guest writes cannot be written.
    #[error("{0}")]
    DiskFailed(super::DiskState),
    /// A part of the jail could not be made ready.
    #[error("cannot make the jail ready: {what}")]
    Jail {
        /// Which part.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The shared workspace cannot be put into the jail.
    #[error("cannot give {path} to the user of the jail")]
    Share {
        /// The workspace.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A control group could not be made or changed.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// Asked for something that cannot be.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// A port of the host cannot be listened at.
    #[error("cannot listen at {}", .publish.listen)]
    Publish {
        /// What was to lead where.
        publish: crate::spec::Publish,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Resolver, proxy or record of its network could not be started.
    #[error("cannot filter the names of the machine's network")]
    Filter(#[source] io::Error),
    /// Resolver, proxy or record of its network have ended.
    #[error("the machine's network is not filtered any more: a part of the filter has ended")]
    Unfiltered,
    /// It was cloned, and is not to be handed out.
    #[error(transparent)]
    Clone(#[from] CloneError),
    /// The network could not be made.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// A change of its network failed halfway, and could not be taken back.
    #[error("its network could not be put back as it was ({back})")]
    NetworkAstray {
        /// Why not.
        back: Box<NetworkError>,
        /// Why the change failed.
        #[source]
        source: NetworkError,
    },
    /// An empty disk could not be made.
    #[error(transparent)]
    Disk(#[from] ImageError),
    /// The record could not be kept.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// QEMU could not be started.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// QEMU ended with an error.
    #[error("{qemu} ended {}{}", describe(*.status), said(.words))]
    VmmEnded {
        /// The binary.
        qemu: PathBuf,
        /// How.
        status: ExitStatus,
        /// What it wrote to stderr.
        words: String,
    },
    /// A layer that was planned does not hold.
    #[error("the machine is not confined as planned: {failed}")]
    NotConfined {
        /// What does not hold.
        failed: String,
    },
    /// The filter for system calls ended QEMU.
    #[error("{qemu} was stopped for calling {call}")]
    SystemCall {
        /// The binary.
        qemu: PathBuf,
        /// What it called.
        call: String,
    },
    /// QEMU used more memory than its control group allows.
    #[error("{qemu} used more than the {limit} of memory its control group allows")]
    VmmOutOfMemory {
        /// The binary.
        qemu: PathBuf,
        /// The limit.
        limit: crate::spec::Bytes,
    },
    /// The kernel killed QEMU, which had kept to its limit, for want of memory.
    #[error("the host ran out of memory, and its kernel killed {qemu}")]
    HostOutOfMemory {
        /// The binary.
        qemu: PathBuf,
    },
    /// The guest's kernel panicked.
    #[error("the guest kernel panicked; on its console:\n{console}")]
    GuestPanic {
        /// The console's tail.
        console: String,
    },
    /// The guest powered off or restarted by itself.
    #[error("the guest went down by itself; the console's last lines:\n{console}")]
    GuestEnded {
        /// The console's tail.
        console: String,
    },
    /// No answer from the guest agent.
    #[error(
        "the guest agent did not answer within {}{}",
        crate::spec::Timeout(*.after),
        tail(.console)
    )]
    AgentSilent {
        /// How long it was given.
        after: Duration,
        /// The console's tail.
        console: String,
    },
    /// Its start was given up.
    #[error("the machine was stopped before it was up")]
    Cancelled,
    /// The monitor failed.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The guest failed.
    #[error(transparent)]
    Guest(#[from] GuestError),
}

fn describe(status: ExitStatus) -> String {
    match (status.code, status.signal) {
        (Some(code), _) => format!("with exit code {code}"),
        (_, Some(signal)) => match Signal::try_from(signal) {
            Ok(name) => format!("by {name}"),
            Err(_) => format!("by signal {signal}"),
        },
        _ => "without a status".into(),
    }
}

fn said(words: &str) -> String {
    if words.is_empty() {
        " and said nothing".into()
    } else {
        format!("; it said:\n{words}")
    }
}

fn tail(console: &str) -> String {
    if console.is_empty() {
        "; the console is empty".into()
    } else {
        format!("; the console's last lines:\n{console}")
    }
}

impl Explain for MachineError {
    fn code(&self) -> &'static str {
        match self {
            Self::Io { source, .. } if crate::host::is_full(source) => "no-space",
            Self::Io { .. } => "host-refused",
            Self::Missing { .. } => "plan-incomplete",
            Self::Jail { .. } => "jail-failed",
            Self::Share { .. } => "share-unmappable",
            Self::Value { .. } => "value-invalid",
            Self::NoBalloon => "no-balloon",
            Self::OldAgent { .. } => "agent-version",
            Self::NotFilled { source, .. } => source.code(),
            Self::DiskFailed(_) => "disk-failed",
            Self::Cgroup(error) => error.code(),
            Self::Spec(error) => error.code(),
            Self::Publish { .. } => "port-unusable",
            Self::Filter(_) => "network-refused",
            Self::Unfiltered => "network-unfiltered",
            Self::Clone(error) => error.code(),
            Self::Network(error) | Self::NetworkAstray { source: error, .. } => error.code(),
            Self::Disk(error) => error.code(),
            Self::Record(error) => error.code(),
            Self::Spawn(error) => error.code(),
            Self::VmmEnded { .. } => "qemu-died",
            Self::NotConfined { .. } => "not-confined",
            Self::SystemCall { .. } => "system-call-violation",
            Self::VmmOutOfMemory { .. } => "qemu-out-of-memory",
            Self::HostOutOfMemory { .. } => "host-out-of-memory",
            Self::GuestPanic { .. } => "guest-panic",
            Self::GuestEnded { .. } => "guest-ended",
            Self::AgentSilent { .. } => "agent-silent",
            Self::Cancelled => "start-cancelled",
            Self::Qmp(error) => error.code(),
            Self::Guest(error) => error.code(),
        }
    }

    fn system_call(&self) -> Option<&str> {
        match self {
            Self::SystemCall { call, .. } => Some(call),
            _ => None,
        }
    }

    fn remedy(&self) -> String {
        match self {
            Self::Io { path, .. } => {
                format!(
                    "Check the permissions of, and the space for, {}.",
                    path.display()
                )
            }
            Self::Missing { .. } => "Plan with Plan::new; this is a bug otherwise.".into(),
            Self::Jail { .. } => {
                "Look at the reason; a layer of the jail can be left out with --waive LAYER.".into()
            }
            Self::Share { .. } => {
                "Its file system or kernel cannot map owners: exchange copies instead \
                 (--workspace-mode copy), or serve it as its owner (--waive user); \
                 without root, --waive files."
                    .into()
            }
            Self::Value { what, .. } => format!("Give another value for {what}."),
            Self::NoBalloon => "Start it with `balloon = true`.".into(),
            Self::OldAgent { .. } => "Build the image again with `bulkhead image build`.".into(),
            Self::NotFilled { .. } => "Restart it.".into(),
            Self::DiskFailed(_) => {
                "Look after the disk; the kernel's log (dmesg) may say more.".into()
            }
            Self::Cgroup(error) => error.remedy(),
            Self::Spec(error) => error.remedy(),
            Self::Publish { .. } => {
                "Take another port, or see who has it (`ss -ltnp`); `bulkhead forward` takes 0 for any that is free.".into()
            }
            Self::Filter(_) => {
                "Look at the reason; the kernel needs NFLOG (nfnetlink_log) and conntrack over netlink. --network isolated does without."
                    .into()
            }
            Self::Unfiltered => {
                "The machine was stopped, for nothing holds it to its policy. This is a bug: report it."
                    .into()
            }
            Self::Clone(error) => error.remedy(),
            Self::Network(error) => error.remedy(),
            Self::NetworkAstray { .. } => {
                "Start it again: its network is made anew, as it was before the change.".into()
            }
            Self::Disk(error) => error.remedy(),
            Self::Record(error) => error.remedy(),
            Self::Spawn(error) => error.remedy(),
            Self::VmmEnded { .. } => {
                "Act on QEMU's message; `bulkhead doctor` tells what this host can do.".into()
            }
            Self::NotConfined { .. } => {
                "Nothing ran in it. Look at what is said of the layer; it can be left out with \
                 --waive LAYER."
                    .into()
            }
            Self::SystemCall { .. } => {
                "Take the guest for hostile: QEMU never calls this by itself. If it does so with \
                 every guest, this QEMU needs another list: report it, and see --waive seccomp."
                    .into()
            }
            Self::VmmOutOfMemory { .. } => {
                "Take the guest for hostile, or QEMU for leaking: the limit is the guest's memory \
                 and what QEMU needs besides. See --waive cgroup."
                    .into()
            }
            Self::HostOutOfMemory { .. } => {
                "Run fewer machines at once, or smaller ones (--memory). A control group that \
                 Bulkhead runs in may have a limit, too."
                    .into()
            }
            Self::GuestPanic { .. } => {
                "Give the machine more memory with --memory, or use the image's own kernel.".into()
            }
            Self::GuestEnded { .. } => {
                "See there whether the command restarted it or powered it off; check image and kernel else."
                    .into()
            }
            Self::AgentSilent { .. } => {
                "Check image and kernel, and that the accelerator works (`bulkhead doctor`).".into()
            }
            Self::Cancelled => "Start it again.".into(),
            Self::Qmp(error) => error.remedy(),
            Self::Guest(error) => error.remedy(),
        }
    }
}
