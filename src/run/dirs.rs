//! Where Bulkhead keeps things.

use std::path::{Path, PathBuf};

/// The places a host gives to Bulkhead. Injected, never looked up inside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dirs {
    /// Images and runs; survives a reboot.
    pub state: PathBuf,
    /// Sockets and verdicts about this boot; need not survive.
    pub runtime: PathBuf,
}

impl Dirs {
    /// Default of [`Dirs::state`].
    pub const STATE: &'static str = "/var/lib/bulkhead";
    /// Default of [`Dirs::runtime`].
    pub const RUNTIME: &'static str = "/run/bulkhead";

    /// Records of runs.
    pub fn runs(&self) -> PathBuf {
        self.state.join("runs")
    }

    /// Record of one run, or of one detached machine.
    pub fn run(&self, id: &crate::spec::VmId) -> PathBuf {
        self.runs().join(id.as_str())
    }

    /// Files that can be made again at any time.
    pub fn cache(&self) -> PathBuf {
        self.state.join("cache")
    }

    /// What runs could not bring back, by run.
    pub fn kept(&self, id: &crate::spec::VmId) -> PathBuf {
        self.state.join("kept").join(id.as_str())
    }

    /// Installed kernels.
    pub fn kernels(&self) -> PathBuf {
        self.state.join("kernels")
    }

    /// Where a machine's own sockets are, where it can outlive its supervisor.
    pub fn machine_sockets(&self, id: &crate::spec::VmId) -> PathBuf {
        self.runtime.join(format!("{id}.vmm"))
    }

    /// The control socket of a machine.
    pub fn control_socket(&self, id: &crate::spec::VmId) -> PathBuf {
        self.runtime.join(format!("{id}.sock"))
    }
}

/// Makes a directory that only its owner can look into.
pub(crate) fn make_private(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
}
