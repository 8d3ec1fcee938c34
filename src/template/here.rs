//! What a host has of what no machine on it can choose.

use std::io;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use super::digest;
use crate::plan::HostFacts;
use crate::plan::jail::{FIRMWARE, LIBRARIES};

/// What a host has, whatever image a machine is of.
#[derive(Debug, Clone)]
pub(crate) struct Here {
    /// Digest of QEMU; none where there is no QEMU.
    pub(crate) qemu: Option<String>,
    /// The processor.
    pub(crate) processor: String,
    /// Digests of the kernels that a machine can have besides its image's own.
    pub(crate) kernels: Vec<String>,
    /// Digest of a kernel that was named by path; none where there was none.
    pub(crate) named: Option<String>,
}

impl Here {
    /// Looks at this host. Digests of what seldom changes are kept in `cache`.
    ///
    /// # Errors
    /// A file cannot be read.
    pub(crate) fn look(
        facts: Option<&HostFacts>,
        kernels: &[PathBuf],
        cache: &Path,
    ) -> io::Result<Self> {
        let kernels = kernels.iter().map(|kernel| digest::cached(kernel, cache));
        Ok(Self {
            qemu: facts.map(|facts| qemu(facts, cache)).transpose()?,
            processor: processor()?,
            kernels: kernels.collect::<io::Result<_>>()?,
            named: None,
        })
    }
}

/// Digest of QEMU and the firmware and modules it loads. Its libraries change
/// nothing of a machine's state.
pub(super) fn qemu(facts: &HostFacts, cache: &Path) -> io::Result<String> {
    let Ok(closure) = &facts.closure else {
        return digest::cached(&facts.qemu, cache);
    };
    let mut hash = Sha256::new();
    let is_library = |place: &Path| {
        place.starts_with(LIBRARIES)
            || !place.starts_with(FIRMWARE) && place.to_string_lossy().contains("/ld-linux")
    };
    for (place, file) in &closure.files {
        if !is_library(place) {
            hash.update(place.as_os_str().as_encoded_bytes());
            hash.update(digest::cached(file, cache)?);
        }
    }
    Ok(digest::hex(hash.finalize()))
}

/// Model and features of the first processor.
pub(super) fn processor() -> io::Result<String> {
    Ok(first(&std::fs::read_to_string("/proc/cpuinfo")?))
}

/// The same of `/proc/cpuinfo` as it is given.
fn first(cpuinfo: &str) -> String {
    let line = |name: &str| {
        let mut lines = cpuinfo.lines();
        let value = lines.find_map(|line| line.strip_prefix(name)?.split_once(':'));
        value.map_or("", |(_, value)| value.trim())
    };
    let features = Sha256::digest([line("flags"), line("microcode")].join("\n"));
    let features = digest::hex(features);
    format!("{} ({})", line("model name"), &features[..12])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpuinfo(model: &str, microcode: &str, flags: &str) -> String {
        let one = format!(
            "processor\t: 0\nmodel\t\t: 85\nmodel name\t: {model}\nmicrocode\t: {microcode}\n\
             cpu MHz\t\t: 2400.000\nflags\t\t: {flags}\nvmx flags\t: vnmi\n\n"
        );
        // The second is not looked at.
        format!("{one}processor\t: 1\nmodel name\t: another\nflags\t\t: none\n")
    }

    #[test]
    fn a_processor_is_its_model_its_features_and_its_microcode() {
        let all = [
            cpuinfo("Xeon", "0x1", "fpu sse2 avx2"),
            cpuinfo("Xeon", "0x1", "fpu sse2"),
            cpuinfo("Xeon", "0x2", "fpu sse2 avx2"),
            cpuinfo("EPYC", "0x1", "fpu sse2 avx2"),
        ]
        .map(|text| first(&text));
        let distinct: std::collections::BTreeSet<_> = all.iter().collect();
        assert_eq!(distinct.len(), all.len(), "{all:?}");
        assert!(all[0].starts_with("Xeon ("), "{all:?}");
        let faster = cpuinfo("Xeon", "0x1", "fpu sse2 avx2").replace("2400", "3100");
        assert_eq!(first(&faster), all[0]);
    }
}
