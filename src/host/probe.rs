//! Looks at the host and says what it can do.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::Explain;
use crate::plan::HostFacts;

/// The host lacks something no machine can do without.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// No QEMU.
    #[error("QEMU was not found: {tried}")]
    NoQemu {
        /// Where it was looked for.
        tried: String,
    },
}

impl Explain for ProbeError {
    fn code(&self) -> &'static str {
        "qemu-not-found"
    }

    fn remedy(&self) -> String {
        "Install qemu-system-x86, or name the binary with --qemu or BULKHEAD_QEMU.".into()
    }
}

/// Finds QEMU: the one asked for, else `qemu-system-x86_64` in `PATH`.
///
/// # Errors
/// There is none, or it cannot be executed.
pub fn find_qemu(asked: Option<&Path>) -> Result<PathBuf, ProbeError> {
    let executable = |path: &Path| {
        use std::os::unix::fs::PermissionsExt;
        fs::metadata(path)
            .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    };
    if let Some(path) = asked {
        // A bare name is looked up; anything with a slash is a path.
        if path.components().count() > 1 || path.is_absolute() {
            return if executable(path) {
                Ok(path.to_owned())
            } else {
                Err(ProbeError::NoQemu {
                    tried: format!("{} cannot be executed", path.display()),
                })
            };
        }
    }
    let name = asked.unwrap_or(Path::new("qemu-system-x86_64"));
    let dirs = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&dirs)
        .map(|dir| dir.join(name))
        .find(|path| executable(path))
        .ok_or_else(|| ProbeError::NoQemu {
            tried: format!("{} is not in PATH", name.display()),
        })
}

/// Collects the facts a plan depends on.
///
/// What is costly to find out is kept in `cache`.
pub fn facts(qemu: PathBuf, cache: &Path) -> HostFacts {
    let closure = super::closure::of(&qemu, cache).map_err(|error| error.to_string());
    HostFacts {
        closure,
        unprivileged: !nix::unistd::geteuid().is_root(),
        lsm: super::lsm::active(),
        open_kvm: open_kvm(),
        raises_limits: raises_limits(),
        qemu,
        tsc_khz: tsc_khz(),
        // The agent listens to privileged ports of the host only.
        vhost_vsock: nix::unistd::geteuid().is_root() && vhost_vsock().is_ok(),
    }
}

/// Whether the mode of /dev/kvm lets everybody read and write.
fn open_kvm() -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    fs::metadata("/dev/kvm").is_ok_and(|meta| meta.permissions().mode() & 0o006 == 0o006)
}

/// Whether we have CAP_SYS_RESOURCE (capabilities(7)).
fn raises_limits() -> bool {
    const SYS_RESOURCE: u64 = 1 << 24;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|text| u64::from_str_radix(text.trim(), 16).ok());
    effective.is_some_and(|set| set & SYS_RESOURCE != 0)
}

/// Opens /dev/vhost-vsock.
///
/// # Errors
/// It is missing, or not ours to open.
pub fn vhost_vsock() -> std::io::Result<fs::File> {
    fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/vhost-vsock")
}

/// The clock the kernel measured for the first CPU, in kHz.
fn tsc_khz() -> Option<u64> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = cpuinfo.lines().find(|line| line.starts_with("cpu MHz"))?;
    let mhz: f64 = line.split(':').nth(1)?.trim().parse().ok()?;
    // A few thousand MHz: no precision is lost.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    Some((mhz * 1000.0) as u64).filter(|khz| *khz > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_qemu_is_named() {
        let error = find_qemu(Some(Path::new("/nowhere/qemu"))).unwrap_err();
        assert!(error.to_string().contains("/nowhere/qemu"), "{error}");
        let error = find_qemu(Some(Path::new("no-such-qemu"))).unwrap_err();
        assert!(error.to_string().contains("no-such-qemu"), "{error}");
    }
}
