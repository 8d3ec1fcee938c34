//! virtme-ng: runs a command in a guest that has a snapshot of this host's root
//! file system.

use std::path::PathBuf;

use anyhow::Result;

use super::vmtest::hints;
use super::{VIRTME, alone, lacks, place, program, whole};
use crate::bench::config::{Bed, Config};
use crate::bench::facts::first_line;
use crate::bench::report::Missing;
use crate::bench::rounds::Sample;

/// virtme-ng and what it boots.
pub(crate) struct Virtme {
    program: PathBuf,
    version: String,
    kernel: PathBuf,
    hints: String,
    config: Config,
    dir: tempfile::TempDir,
}

impl Virtme {
    pub(super) fn find(
        bed: &Bed,
        config: &Config,
        missing: &mut Vec<Missing>,
    ) -> Result<Option<Self>> {
        let Some(program) = program("vng", &[place()?.join("venv/bin")]) else {
            lacks(missing, VIRTME, "it is not installed");
            return Ok(None);
        };
        // Its guest ends without a word where that is missing.
        if super::program("udevadm", &[]).is_none() {
            lacks(missing, VIRTME, "its guest needs udev");
            return Ok(None);
        }
        let (_, plan) = bed.plan(config)?;
        Ok(Some(Self {
            version: first_line(&program, &["--version"])?,
            program,
            kernel: plan.kernel.path,
            hints: hints(&plan.cmdline),
            config: config.clone(),
            dir: tempfile::tempdir_in(bed.temp())?,
        }))
    }

    pub(super) fn version(&self) -> String {
        self.version.clone()
    }

    pub(super) async fn life(&self) -> Result<Sample> {
        let kvm = match self.config.accel.as_str() {
            "kvm" => "",
            _ => "--disable-kvm",
        };
        let run = format!(
            "cd $DIR; exec \"$PROGRAM\" --run \"$KERNEL\" {kvm} --user root --cpus {} --memory {}M \
             --append \"$HINTS\" --exec true",
            self.config.cpus, self.config.memory
        );
        let mut command = alone(&self.config, self.dir.path(), &run)?;
        command.env("PROGRAM", &self.program);
        // It calls programs of its own by name.
        let own = self.program.parent().map(PathBuf::from);
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = std::env::join_paths(own.into_iter().chain(std::env::split_paths(&path)));
        command.env("PATH", path?);
        command
            .env("KERNEL", &self.kernel)
            .env("HINTS", &self.hints);
        whole(command, VIRTME).await
    }
}
