//! What a start is given.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::clone::Origin;
use super::network::Given;
use crate::guest::archive::HostDir;
use crate::host::network::Site;
use crate::spec::UidRange;

/// What starting a machine needs besides its plan.
#[derive(Debug, Clone)]
pub struct StartOptions {
    /// Where empty disks are kept for copying.
    pub cache: PathBuf,
    /// How long the guest may take until its agent answers.
    pub boot_timeout: Duration,
    /// End the machine when the thread that starts it ends. Only right where
    /// that thread lives as long as the machine should.
    pub die_with_thread: bool,
    /// The plan's share, already open; opened by its path when absent. Whoever
    /// may rename it must not choose what the guest sees.
    pub share: Option<HostDir>,
    /// Where user ids are taken.
    pub uid_dir: PathBuf,
    /// User ids that are nobody else's.
    pub uids: UidRange,
    /// The plan's writable disk, where it outlives the VMM; made when missing.
    pub disk: Option<PathBuf>,
    /// Where the machine's sockets are, where it can outlive its owner.
    pub sockets: Option<PathBuf>,
    /// Where its network namespace is kept, where it has a network.
    pub netns: PathBuf,
    /// Where its network leads.
    pub site: Site,
    /// What the caller has for its network.
    pub given: Given,
    /// Where it is written down when the VMM does what it may not.
    pub violations: PathBuf,
    /// File of exceptions from what no machine may reach: when they held, and how
    /// they were used.
    pub exceptions: PathBuf,
    /// What its memory is at the start.
    pub memory: Memory,
    /// For one that is taken over: its user has paused it. What stands still
    /// otherwise was being saved, and goes on.
    pub paused: bool,
}

/// What a machine's memory is at its start.
#[derive(Debug, Clone, Default)]
pub enum Memory {
    /// Empty: it boots.
    #[default]
    Empty,
    /// A file, empty, that is to be a template's.
    Saved(Arc<File>),
    /// A template's, or a snapshot's.
    Cloned(Arc<Origin>),
}

impl Memory {
    /// The template, and who the machine becomes.
    pub(super) fn origin(&self) -> Option<&Origin> {
        match self {
            Self::Cloned(origin) => Some(origin),
            Self::Empty | Self::Saved(_) => None,
        }
    }

    /// The file for QEMU.
    pub(super) fn file(&self) -> io::Result<Option<File>> {
        match self {
            Self::Empty => Ok(None),
            Self::Saved(file) => file.try_clone().map(Some),
            Self::Cloned(origin) => origin.ram.as_ref().map(File::try_clone).transpose(),
        }
    }
}
