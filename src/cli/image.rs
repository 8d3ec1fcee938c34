//! `bulkhead image`: build, show, import and remove images.

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use super::Global;
use super::machine_args::word;
use super::message::Failure;
use super::output::{BuiltImage, Removed, ShownImage};
use super::run;
use crate::image::{AgentBinary, Builder, Image, KernelSource, Recipe, Result, Summary};
use crate::run::{Io, provision};
use crate::spec::{Accel, Bytes, ProfileName, Request, Timeout};

/// Options of `bulkhead image`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Build an image from Debian packages
    Build(Build),
    /// List images
    Ls,
    /// Show the manifest of an image
    Inspect {
        /// Name or id
        image: String,
    },
    /// Import a root file system: a tar archive or an OCI layout directory
    Import {
        /// The archive or directory
        path: PathBuf,
        /// Name of the new image
        #[arg(long)]
        name: String,
        /// Image to take kernel and guest agent from
        #[arg(long, value_name = "IMAGE", default_value = "default")]
        kernel_from: String,
    },
    /// Remove an image
    Rm {
        /// Name or id
        image: String,
    },
}

/// Options of `bulkhead image build`.
#[derive(Debug, clap::Args)]
pub(crate) struct Build {
    /// Built-in recipe: base or default
    #[arg(default_value = "default", conflicts_with_all = ["recipe", "from"])]
    built_in: String,
    /// Provision: boot this image, run a script in it as root, and save the result
    #[arg(long, value_name = "IMAGE", requires_all = ["run", "name"])]
    #[arg(conflicts_with_all = ["recipe", "kernel", "agent"])]
    from: Option<String>,
    /// The script that provisions
    #[arg(long, value_name = "FILE", requires = "from")]
    run: Option<PathBuf>,
    /// Limits of the provisioning machine [default: standard]
    #[arg(long, requires = "from")]
    profile: Option<ProfileName>,
    /// Its memory [default: the profile's]
    #[arg(long, requires = "from")]
    memory: Option<Bytes>,
    /// Its disk [default: the profile's]
    #[arg(long, requires = "from")]
    disk: Option<Bytes>,
    /// How long the script may take [default: 30m]
    #[arg(long, requires = "from")]
    timeout: Option<Timeout>,
    /// kvm or tcg [default: kvm]
    #[arg(long, value_parser = word::<Accel>)]
    accel: Option<Accel>,
    /// Recipe of your own
    #[arg(long, value_name = "FILE", requires = "name")]
    recipe: Option<PathBuf>,
    /// Name of the image; the recipe's by default
    #[arg(long)]
    name: Option<String>,
    /// Kernel to use: a bzImage or vmlinux, or a directory with one
    #[arg(long, value_name = "PATH")]
    kernel: Option<PathBuf>,
    /// Guest agent to use; BULKHEAD_AGENT, or the one beside this program
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
}

/// Runs the verb. Progress goes to stderr, results to stdout.
pub(super) async fn run(args: Args, global: &Global) -> std::result::Result<(), Failure> {
    let (store, json) = (global.host()?.images(), global.json);
    let builder = Builder::new(&store).with_progress(|text| eprintln!("bulkhead: {text}"));
    match args.verb {
        Verb::Build(build) => match (&build.from, &build.run) {
            (Some(from), Some(script)) => {
                built(&build.provision(from, script, global).await?, json);
            }
            _ => built(&build.run(&builder)?, json),
        },
        Verb::Ls if json => print(&store.list()?),
        Verb::Ls => table(&store.list()?),
        Verb::Inspect { image } => inspect(&store.inspect(&image)?, json),
        Verb::Import {
            path,
            name,
            kernel_from,
        } => {
            let from = store.get(&kernel_from)?;
            built(&builder.import(&path, &name, &from)?, json);
        }
        Verb::Rm { image } => {
            let removed = store.rm(&image)?;
            match json {
                true => print(&Removed { removed }),
                false => removed.iter().for_each(|id| line(id)),
            }
        }
    }
    Ok(())
}

impl Build {
    async fn provision(
        &self,
        from: &str,
        script: &Path,
        global: &Global,
    ) -> std::result::Result<Image, Failure> {
        let request = Request {
            image: Some(from.to_owned()),
            profile: self.profile.clone(),
            memory: self.memory,
            disk: self.disk,
            timeout: Some(self.timeout.unwrap_or(Timeout::secs(30 * 60))),
            accel: self.accel,
            user: Some("root".into()),
            script: Some(run::read_script(script)?),
            ..Request::default()
        };
        let spec = global.settings()?.spec(request, None)?;
        let host = global.host()?;
        let io = Io {
            // The result is all that belongs on stdout.
            stdout: Some(Box::new(tokio::io::stderr())),
            stderr: Some(Box::new(tokio::io::stderr())),
            signals: run::signals()?,
            ..Io::collecting(host.dirs.state.join("output"))
        };
        let name = self.name.as_deref().unwrap_or_default();
        Ok(provision(&host, &spec, name, io).await?)
    }

    fn run(&self, builder: &Builder<'_>) -> Result<Image> {
        let recipe = match &self.recipe {
            Some(path) => Recipe::load(path)?,
            None => Recipe::built_in(&self.built_in)?,
        };
        let agent = AgentBinary::read(&AgentBinary::locate(self.agent.as_deref()))?;
        let kernel = match &self.kernel {
            Some(path) => KernelSource::Path(path.clone()),
            None => KernelSource::Package,
        };
        let name = self.name.as_deref().unwrap_or(&self.built_in);
        builder.from_recipe(&recipe, name, &agent, &kernel)
    }
}

fn built(image: &Image, json: bool) {
    match json {
        true => print(&BuiltImage {
            id: &image.id,
            name: &image.manifest.name,
        }),
        false => line(&image.id),
    }
}

fn inspect(image: &Image, json: bool) {
    let manifest = &image.manifest;
    if json {
        print(&ShownImage {
            id: &image.id,
            dir: image.dir.display().to_string(),
            manifest,
        });
        return;
    }
    line(&format!("id       {}", image.id));
    line(&format!("dir      {}", image.dir.display()));
    if let Some(from) = &manifest.from {
        line(&format!("from     {from}"));
    }
    line(&format!("kernel   {}", manifest.kernel.release));
    line(&format!(
        "agent    {} (messages {})",
        manifest.agent.version, manifest.agent.protocol
    ));
    for file in manifest.files() {
        line(&format!(
            "file     {} {:>11} {}",
            file.sha256, file.size, file.file
        ));
    }
    line(&format!("packages {}", manifest.packages.len()));
}

fn table(images: &[Summary]) {
    line(&format!(
        "{:20} {:16} {:>9} {:>9} {}",
        "NAME", "ID", "SIZE", "PACKAGES", "KERNEL"
    ));
    for image in images {
        let names = match image.names.is_empty() {
            true => "-".to_owned(),
            false => image.names.join(","),
        };
        let mib = image.size.div_ceil(1 << 20);
        line(&format!(
            "{names:20} {:16} {mib:>5} MiB {:>9} {}",
            // Enough of the digest to tell images apart.
            &image.id["sha256-".len()..][..16],
            image.packages,
            image.kernel
        ));
    }
}

fn print(value: &impl serde::Serialize) {
    match serde_json::to_string_pretty(value) {
        Ok(text) => line(&text),
        Err(error) => tracing::error!(%error, "cannot print the result"),
    }
}

/// A reader that went away, as in `| head`, is no failure.
fn line(text: &str) {
    let _ = writeln!(io::stdout(), "{text}");
}
