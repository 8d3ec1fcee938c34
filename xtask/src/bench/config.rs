//! What machines are measured: their configuration, and where they run.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use bulkhead::error::{Explain, Report as Explained};
use bulkhead::image::Image;
use bulkhead::plan::Plan;
use bulkhead::run::{Dirs, Host};
use bulkhead::spec::{
    Accel, Bytes, Catalog, ChannelKind, JailLayer, MachineType, Request as Wish, Spec, Waived,
};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use crate::setup;

/// Longer than any of it should take.
pub(super) const PATIENCE: Duration = Duration::from_secs(120);

/// Options of every bench.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Common {
    /// Rounds: how often each subject is measured.
    #[arg(long, short, default_value_t = 10)]
    pub(super) n: usize,
    #[command(flatten)]
    pub(super) config: Config,
    /// Print the results as JSON.
    #[arg(long)]
    pub(super) json: bool,
    /// Leave the results as JSON and as a picture in this directory.
    #[arg(long, value_name = "DIR")]
    pub(super) save: Option<PathBuf>,
    /// Where images are kept.
    #[arg(long, env = "BULKHEAD_STATE_DIR", default_value_os_t = setup::usual_state_dir())]
    state_dir: PathBuf,
}

/// A machine's configuration.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub(super) struct Config {
    /// Image to boot.
    #[arg(long, default_value = "base")]
    pub(super) image: String,
    /// Kernel other than the image's, such as `tuned`.
    #[arg(long)]
    pub(super) kernel: Option<String>,
    /// Machine type: microvm or q35.
    #[arg(long, default_value = "microvm")]
    pub(super) machine: String,
    /// kvm or tcg.
    #[arg(long, default_value = "kvm")]
    pub(super) accel: String,
    /// The guest's processors.
    #[arg(long, default_value_t = 1)]
    pub(super) cpus: u32,
    /// The guest's memory in MiB.
    #[arg(long, default_value_t = 256)]
    pub(super) memory: u64,
    /// The QEMU binary.
    #[arg(long, env = "BULKHEAD_QEMU")]
    pub(super) qemu: Option<PathBuf>,
    /// Drop kernel, image and disk template from the page cache before each start.
    #[arg(long)]
    pub(super) cold: bool,
    /// Only bare QEMU: words for the kernel's command line.
    #[arg(skip)]
    pub(super) append: Vec<String>,
    /// Only bare QEMU: words (up to their `=`) that are not on that line.
    #[arg(skip)]
    pub(super) without: Vec<String>,
    /// Only bare QEMU: more options for `-machine`.
    #[arg(skip)]
    pub(super) options: Vec<String>,
    /// Only bare QEMU: more options for `-cpu`.
    #[arg(skip)]
    pub(super) features: Vec<String>,
    /// Started by hand instead of by Bulkhead.
    #[arg(skip)]
    pub(super) bare: bool,
    /// Layers of the jail it does without.
    #[arg(skip)]
    pub(super) waive: Waived,
    /// Cloned from a template.
    #[arg(skip)]
    pub(super) clone: bool,
}

impl Config {
    /// This one, changed as `kernel=tuned,machine=q35` says.
    pub(super) fn with(&self, changes: &str) -> Result<Self> {
        let mut config = self.clone();
        for change in changes.split(',').filter(|change| !change.is_empty()) {
            let (key, value) = change
                .split_once('=')
                .map_or((change, ""), |(key, value)| (key, value));
            let text = || value.to_owned();
            match key {
                "image" => config.image = text(),
                // `kernel=` is the image's own.
                "kernel" => config.kernel = Some(text()).filter(|name| !name.is_empty()),
                "machine" => config.machine = text(),
                "accel" => config.accel = text(),
                "cpus" => config.cpus = value.parse().context("cpus")?,
                "memory" => config.memory = value.parse().context("memory")?,
                "qemu" => config.qemu = Some(value.into()),
                "cold" => config.cold = true,
                "warm" => config.cold = false,
                "bare" => config.bare = true,
                "jail" => config.waive = Waived::default(),
                // Commas are taken.
                "waive" => config.waive = value.replace('+', ",").parse()?,
                "nojail" => config.waive = no_layer()?,
                "clone" => config.clone = true,
                "append" => config.append.push(text()),
                "without" => config.without.push(text()),
                "option" => config.options.push(text()),
                "cpu" => config.features.push(text()),
                other => bail!(
                    "no machine can be configured by {other}: image, kernel, machine, accel, \
                     cpus, memory, qemu, cold, warm, clone, jail, nojail, waive, bare, append, \
                     without, option and cpu are possible"
                ),
            }
        }
        if config.bare && config.clone {
            bail!("bare QEMU clones nothing here: bare and clone exclude each other");
        }
        let knobs = [
            &config.append,
            &config.without,
            &config.options,
            &config.features,
        ];
        if !config.bare && knobs.iter().any(|knob| !knob.is_empty()) {
            bail!("append, without, option and cpu need bare: Bulkhead chooses these itself");
        }
        Ok(config)
    }

    fn spec(&self) -> Result<Spec> {
        let wish = Wish {
            image: Some(self.image.clone()),
            kernel: self.kernel.clone(),
            cpus: Some(self.cpus),
            memory: Some(Bytes::mib(self.memory)),
            machine: Some(match self.machine.as_str() {
                "microvm" => MachineType::Microvm,
                "q35" => MachineType::Q35,
                other => bail!("--machine cannot be {other}: microvm and q35 are possible"),
            }),
            accel: Some(match self.accel.as_str() {
                "kvm" => Accel::Kvm,
                "tcg" => Accel::Tcg,
                other => bail!("--accel cannot be {other}: kvm and tcg are possible"),
            }),
            channel: Some(ChannelKind::Serial),
            command: vec!["true".into()],
            waive: Some(self.waive.clone()),
            network: Some(bulkhead::spec::NetworkMode::Isolated.into()),
            cold: Some(!self.clone),
            domain: Some("bench".parse().map_err(explain)?),
            ..Wish::default()
        };
        wish.resolve(&Catalog::default()).map_err(explain)
    }
}

/// All layers of the jail waived.
fn no_layer() -> Result<Waived> {
    let all: Vec<_> = JailLayer::ALL.iter().map(|layer| layer.as_str()).collect();
    Ok(all.join(",").parse()?)
}

/// Where machines are measured.
#[derive(Debug)]
pub(super) struct Bed {
    dirs: Dirs,
    temp: tempfile::TempDir,
}

impl Bed {
    pub(super) fn new(common: &Common) -> Result<Self> {
        let temp = tempfile::Builder::new()
            .prefix("bulkhead-bench-")
            .tempdir()?;
        let dirs = Dirs {
            state: common.state_dir.clone(),
            runtime: temp.path().join("runtime"),
        };
        Ok(Self { dirs, temp })
    }

    /// Gone with the bed.
    pub(super) fn temp(&self) -> &std::path::Path {
        self.temp.path()
    }

    pub(super) fn dirs(&self) -> &Dirs {
        &self.dirs
    }

    pub(super) fn host(&self, config: &Config) -> Host {
        Host {
            qemu: config.qemu.clone(),
            die_with_thread: true,
            ..Host::new(self.dirs.clone())
        }
    }

    pub(super) fn spec(&self, config: &Config) -> Result<Spec> {
        config.spec()
    }

    pub(super) fn plan(&self, config: &Config) -> Result<(Image, Plan)> {
        // Bare QEMU finds its files where they are, not where a jail has them.
        let spec = Spec {
            waive: "files,user".parse().map_err(explain)?,
            ..config.spec()?
        };
        self.host(config).plan(&spec).map_err(explain)
    }

    /// Takes what a start reads out of the page cache where that is asked for.
    /// What somebody else has mapped (QEMU itself) stays.
    pub(super) fn cool(&self, config: &Config) -> Result<()> {
        if !config.cold {
            return Ok(());
        }
        let (image, plan) = self.plan(config)?;
        let scratch = bulkhead::image::scratch::template(&self.dirs.cache(), plan.scratch.0);
        let files = [
            plan.kernel.path,
            image.initramfs(),
            plan.root,
            scratch.map_err(explain)?,
        ];
        for path in files {
            let file = std::fs::File::open(&path)
                .with_context(|| format!("cannot open {}", path.display()))?;
            // Dirty pages stay.
            file.sync_all()?;
            posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        }
        Ok(())
    }
}

pub(super) fn explain(error: impl Explain) -> anyhow::Error {
    let report = Explained::of(&error);
    anyhow::anyhow!("{}: {}\n{}", report.what, report.cause, report.remedy)
}

pub(super) fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        config: Config,
    }

    fn config() -> Config {
        let line: Line = clap::Parser::parse_from(["bench", "--kernel", "tuned"]);
        line.config
    }

    #[test]
    fn a_configuration_is_changed_by_words() {
        let changed = config().with("machine=q35,kernel=,cold").unwrap();
        assert_eq!(
            (changed.machine.as_str(), changed.kernel, changed.cold),
            ("q35", None, true)
        );
        let bare = config().with("bare,append=loglevel=0,without=quiet");
        assert_eq!(bare.unwrap().append, ["loglevel=0"]);
    }

    #[test]
    fn the_jail_is_left_out_as_a_whole_or_by_layers() {
        let waived = |words: &str| config().with(words).unwrap().waive.to_string();
        assert_eq!(waived("jail"), "");
        assert_eq!(waived("waive=files+user"), "user,files");
        assert_eq!(
            waived("nojail"),
            "user,files,namespaces,seccomp,landlock,cgroup,lsm"
        );
        assert!(config().with("waive=walls").is_err());
    }

    #[test]
    fn what_has_no_effect_is_refused() {
        assert!(config().with("color=red").is_err());
        assert!(config().with("append=quiet").is_err());
    }
}
