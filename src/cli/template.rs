//! `bulkhead template`: build, show and remove templates.

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::Global;
use super::export;
use super::machine_args::MachineArgs;
use super::message::{Failure, print_json, print_report, print_text, say, visible};
use super::output::{BuiltTemplate, ImportedTemplate, PrunedTemplates, Removed};
use super::run::signals;
use crate::error::Report;
use crate::run::{
    Build, FAILED, Io, ListedTemplate, RunError, build, import_template, inspect_template,
    list_templates, now_ms, prune_templates,
};
use crate::spec::{DomainName, Request, Timeout};
use crate::template::Difference;

/// Digits of an id that tell templates apart.
const SHORT: usize = 12;
/// Width of a template's state, where only its QEMU differs.
const STATE: usize = 11;
/// Besides the command of a run, which a template has none of.
const NO_COMMAND: &str = "true";

/// Options of `bulkhead template`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Boot a machine once and save it: machines of the same kind start from it
    Build(Box<BuildArgs>),
    /// List templates, and whether this host has what they were built with
    Ls,
    /// Show a template, its files checked, and what this host has otherwise
    Inspect {
        /// Id, or how it begins
        template: String,
    },
    /// Remove templates; machines cloned from them are not affected
    Rm {
        /// Ids, or how they begin
        #[arg(required_unless_present = "all")]
        templates: Vec<String>,
        /// All of them
        #[arg(long, conflicts_with = "templates")]
        all: bool,
    },
    /// Remove templates that cannot be used any more: what they were built with
    /// is not what this host has now, or they are damaged
    Prune {
        /// Only show what would be removed
        #[arg(long)]
        dry_run: bool,
    },
    /// Write a template to one file
    Export {
        /// Id, or how it begins
        template: String,
        /// A file that is not there yet (`-`: stdout)
        file: PathBuf,
    },
    /// Take such a file in, where the same image, kernel, QEMU and processor are
    Import {
        /// An export of a template (`-`: from stdin)
        file: PathBuf,
        /// Trust domain whose machines are to be cloned from it
        #[arg(long, value_name = "NAME", default_value_t)]
        domain: DomainName,
    },
}

/// Options of `bulkhead template build`.
#[derive(Debug, clap::Args)]
struct BuildArgs {
    #[command(flatten)]
    machine: MachineArgs,
    /// Command for a shell to run before the machine is saved
    #[arg(long, value_name = "COMMAND")]
    warm: Option<String>,
    /// For machines with a workspace in mode `share`
    #[arg(long)]
    share: bool,
    /// Build it again, although there is one
    #[arg(long)]
    rebuild: bool,
    /// Leave the guest's clock right meanwhile, and not 65 minutes behind: what used
    /// OpenSSL by then repeats itself in clones of the first hour
    #[arg(long)]
    true_clock: bool,
}

/// Runs the verb.
pub(super) async fn run(args: Args, global: &Global) -> Result<i32, Failure> {
    let store = global.host()?.templates();
    match args.verb {
        Verb::Build(args) => return make(*args, global).await,
        Verb::Ls => return list(global),
        Verb::Inspect { template } => {
            inspect(&inspect_template(&global.host()?, &template)?, global.json);
        }
        Verb::Prune { dry_run } => return prune(dry_run, global),
        Verb::Rm { mut templates, all } => {
            if all {
                templates = store.ids()?;
            }
            let mut removed = Vec::new();
            for template in &templates {
                removed.push(store.rm(template)?);
            }
            match global.json {
                true => print_json(&Removed { removed }),
                false => removed.iter().for_each(|id| print_text(&format!("{id}\n"))),
            }
        }
        Verb::Export { template, file } => {
            let template = store.get(&template)?;
            export::export(&file, global.json, |to, of| {
                crate::export::template(template, now_ms(), to, of)
            })?;
        }
        Verb::Import { file, domain } => {
            let template = import_template(&global.host()?, export::open(&file)?, &domain)?;
            match global.json {
                true => print_json(&ImportedTemplate {
                    id: &template.id,
                    manifest: &template.manifest,
                }),
                false => print_text(&format!("{}\n", template.id)),
            }
        }
    }
    Ok(0)
}

async fn make(args: BuildArgs, global: &Global) -> Result<i32, Failure> {
    let settings = global.settings()?;
    let file = args.machine.spec.clone();
    let wish = Build {
        warm: args.warm,
        share: args.share,
        rebuild: args.rebuild,
        true_clock: args.true_clock,
    };
    let request = Request {
        command: vec![NO_COMMAND.into()],
        ..args.machine.request()
    };
    let spec = settings.spec(request, file.as_deref())?;
    let host = settings.host();
    // Every start clears away what dead ones left; failing at that stops nobody.
    if let Err(error) = crate::run::recover(&host.dirs, false) {
        tracing::debug!("recovery: {error}");
    }
    if wish.warm.is_some() && !wish.true_clock {
        say(
            "bulkhead: the guest's clock is 65 minutes behind while it warms up (--true-clock: right)",
        );
    }
    let io = Io {
        // The result is all that belongs on stdout.
        stdout: Some(Box::new(tokio::io::stderr())),
        stderr: Some(Box::new(tokio::io::stderr())),
        signals: signals()?,
        ..Io::collecting(host.dirs.state.join("output"))
    };
    let built = build(&host, &spec, &wish, io).await?;
    match global.json {
        true => print_json(&BuiltTemplate {
            id: &built.template.id,
            kept: built.kept,
            manifest: &built.template.manifest,
        }),
        false => print_text(&format!("{}\n", built.template.id)),
    }
    Ok(0)
}

fn list(global: &Global) -> Result<i32, Failure> {
    let (all, errors) = list_templates(&global.host()?)?;
    match global.json {
        true => print_json(&all),
        false => table(&all),
    }
    Ok(failed(&errors, global.json))
}

fn prune(dry_run: bool, global: &Global) -> Result<i32, Failure> {
    let (removed, errors) = prune_templates(&global.host()?, dry_run)?;
    let bytes = removed.iter().map(|one| one.bytes).sum();
    if global.json {
        print_json(&PrunedTemplates {
            dry_run,
            removed,
            bytes,
        });
        return Ok(failed(&errors, true));
    }
    let (verb, gives) = match dry_run {
        true => ("would remove", "would be given back"),
        false => ("removed", "given back"),
    };
    for one in &removed {
        let why = match &one.damage {
            Some(damage) => format!("it is damaged: {damage}"),
            None => Difference::told(&one.differences),
        };
        let line = format!("{verb} {} ({} bytes): {why}", one.id, one.bytes);
        print_text(&format!("{}\n", visible(&line)));
    }
    print_text(&format!("{bytes} bytes {gives}\n"));
    Ok(failed(&errors, false))
}

/// Tells what failed; gives the exit code.
fn failed(errors: &[RunError], json: bool) -> i32 {
    for error in errors {
        print_report(&Report::of(error), json);
    }
    if errors.is_empty() { 0 } else { FAILED }
}

fn table(all: &[ListedTemplate]) {
    print_text(&format!(
        "{:SHORT$}  {:16} {:10} {:>7} {:>9} {:>9} {:STATE$} {}\n",
        "ID", "IMAGE", "DOMAIN", "MEMORY", "ON DISK", "AGE", "STATE", "WARM-UP"
    ));
    for ListedTemplate {
        template,
        differences,
        ..
    } in all
    {
        let manifest = &template.manifest;
        let created = UNIX_EPOCH + Duration::from_millis(manifest.created_ms);
        let age = SystemTime::now()
            .duration_since(created)
            .unwrap_or_default();
        let parts: Vec<&str> = differences.iter().map(|one| one.part.as_str()).collect();
        let state = match parts.is_empty() {
            true => "usable".to_owned(),
            false => format!("stale: {}", parts.join(", ")),
        };
        let line = format!(
            "{:SHORT$}  {:16} {:10} {:>7} {:>5} MiB {:>9} {state:STATE$} {}",
            &template.id[..SHORT],
            manifest.image,
            manifest.key.part("domain"),
            manifest.key.part("memory"),
            template.allocated.div_ceil(1 << 20),
            Timeout::secs(age.as_secs()).to_string(),
            manifest.warm.as_deref().unwrap_or("-"),
        );
        print_text(&format!("{}\n", visible(&line)));
    }
}

fn inspect(one: &ListedTemplate, json: bool) {
    if json {
        return print_json(one);
    }
    let (template, manifest) = (&one.template, &one.template.manifest);
    let usable = match one.usable {
        true => "yes".to_owned(),
        false => format!("no: {}", Difference::told(&one.differences)),
    };
    let mut lines = vec![
        ("id", template.id.clone()),
        ("usable", usable),
        ("image", manifest.image.clone()),
        ("profile", manifest.profile.to_string()),
        ("qemu version", manifest.qemu.to_string()),
        ("on disk", format!("{} bytes", template.allocated)),
        ("boot", manifest.life.boot_id.clone()),
    ];
    if let Some(warm) = &manifest.warm {
        lines.push(("warm-up", warm.clone()));
    }
    if let Some(kernel) = &manifest.kernel {
        lines.push(("kernel file", kernel.clone()));
    }
    let parts = manifest.key.parts();
    lines.extend(parts.map(|(name, value)| (name, value.to_owned())));
    for (name, value) in lines {
        print_text(&format!("{}\n", visible(&format!("{name:13} {value}"))));
    }
}
