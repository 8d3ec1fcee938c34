//! vmtest: runs a command in a guest that has this host's root file system,
//! through qemu-guest-agent.

use std::path::PathBuf;

use anyhow::Result;

use super::{VMTEST, alone, lacks, place, program, whole};
use crate::bench::config::{Bed, Config};
use crate::bench::facts::first_line;
use crate::bench::report::Missing;
use crate::bench::rounds::Sample;

/// vmtest and what it boots.
pub(crate) struct Vmtest {
    program: PathBuf,
    version: String,
    config: Config,
    dir: tempfile::TempDir,
}

impl Vmtest {
    pub(super) fn find(
        bed: &Bed,
        config: &Config,
        missing: &mut Vec<Missing>,
    ) -> Result<Option<Self>> {
        let Some(program) = program("vmtest", &[place()?.join("bin")]) else {
            lacks(missing, VMTEST, "it is not installed");
            return Ok(None);
        };
        if super::program("qemu-ga", &[]).is_none() {
            lacks(missing, VMTEST, "its guest needs qemu-guest-agent");
            return Ok(None);
        }
        let (_, plan) = bed.plan(config)?;
        let dir = tempfile::tempdir_in(bed.temp())?;
        let spec = format!(
            "[[target]]\nname = \"bench\"\nkernel = {:?}\ncommand = \"true\"\n\
             kernel_args = {:?}\n[target.vm]\nnum_cpus = {}\nmemory = \"{}M\"\n",
            plan.kernel.path.display().to_string(),
            hints(&plan.cmdline),
            config.cpus,
            config.memory
        );
        std::fs::write(dir.path().join("vmtest.toml"), spec)?;
        Ok(Some(Self {
            version: first_line(&program, &["--version"])?,
            program,
            config: config.clone(),
            dir,
        }))
    }

    pub(super) fn version(&self) -> String {
        self.version.clone()
    }

    pub(super) async fn life(&self) -> Result<Sample> {
        let run = "cd $DIR; exec \"$PROGRAM\" --config vmtest.toml";
        let mut command = alone(&self.config, self.dir.path(), run)?;
        command.env("PROGRAM", &self.program);
        whole(command, VMTEST).await
    }
}

/// What our command line says of clocks and processors: anybody's kernel boots
/// faster for it.
pub(super) fn hints(cmdline: &str) -> String {
    let known = [
        "tsc",
        "tsc_early_khz",
        "no_timer_check",
        "noreplace-smp",
        "cryptomgr.notests",
    ];
    let words = cmdline.split(' ').filter(|word| {
        let name = word.split('=').next().unwrap_or_default();
        known.contains(&name)
    });
    words.collect::<Vec<_>>().join(" ")
}
