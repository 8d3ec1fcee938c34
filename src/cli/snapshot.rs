//! `bulkhead snapshot` and `bulkhead fork`.

use std::path::PathBuf;

use super::Global;
use super::export;
use super::message::{Failure, print_json, print_report, print_text, visible};
use super::output::Removed;
use super::table::Table;
use crate::error::Report;
use crate::run::FAILED;
use crate::snapshot::{SnapshotName, Summary, Wish};
use crate::spec::VmId;
use crate::supervise::Machines;

/// Options of `bulkhead snapshot`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Save a machine: memory and disk of one that runs, which goes on after it
    Save {
        /// Name of the machine
        vm: VmId,
        /// Name of the snapshot
        name: SnapshotName,
        /// What it is for
        #[arg(long, value_name = "TEXT")]
        description: Option<String>,
        /// A tag of yours; may be repeated
        #[arg(long = "tag", value_name = "KEY=VALUE", value_parser = tag)]
        tags: Vec<(String, String)>,
        /// Only the disk, also of a machine that does not run
        #[arg(long)]
        disk_only: bool,
    },
    /// List the snapshots of a machine
    Ls {
        /// Name of the machine
        vm: VmId,
    },
    /// Show a snapshot, its files checked
    Inspect {
        /// Name of the machine
        vm: VmId,
        /// Name of the snapshot
        name: SnapshotName,
    },
    /// Remove snapshots
    Rm {
        /// Name of the machine
        vm: VmId,
        /// Names of snapshots
        #[arg(required = true)]
        names: Vec<SnapshotName>,
    },
    /// Make a machine what it was when it was saved: with its memory it runs on from there
    Restore {
        /// Name of the machine
        vm: VmId,
        /// Name of the snapshot
        name: SnapshotName,
        /// Only its disk: a machine that runs is started again
        #[arg(long)]
        disk_only: bool,
    },
    /// Write a snapshot, with what its machine is made of, to one file
    Export {
        /// Name of the machine
        vm: VmId,
        /// Name of the snapshot
        name: SnapshotName,
        /// A file that is not there yet (`-`: stdout)
        file: PathBuf,
    },
    /// Make a machine of such a file: its first start goes on from there
    Import(Box<export::Args>),
}

/// Options of `bulkhead fork`.
#[derive(Debug, clap::Args)]
pub(super) struct Fork {
    /// Name of a running machine
    vm: VmId,
    /// How many
    #[arg(short, long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    number: u32,
    /// How their names begin; a number follows [default: the machine's name]
    #[arg(long, value_name = "PREFIX")]
    name: Option<VmId>,
}

fn tag(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("it is not KEY=VALUE")?;
    match key.is_empty() {
        true => Err("it has no key".into()),
        false => Ok((key.to_owned(), value.to_owned())),
    }
}

/// Runs the verb.
pub(super) async fn run(args: Args, global: &Global) -> Result<i32, Failure> {
    let settings = global.settings()?;
    let machines = Machines::new(settings.host());
    match args.verb {
        Verb::Save {
            vm,
            name,
            description,
            tags,
            disk_only,
        } => {
            let wish = Wish {
                name: name.clone(),
                description,
                tags: tags.into_iter().collect(),
                disk_only,
                transient: false,
            };
            machines.save(&vm, wish).await?;
            match global.json {
                true => print_json(&machines.snapshots(&vm)?.summary(&name)?),
                false => print_text(&format!("{name}\n")),
            }
        }
        Verb::Ls { vm } => {
            let (all, errors) = machines.snapshots(&vm)?.list()?;
            match global.json {
                true => print_json(&all),
                false => table(&all),
            }
            for error in &errors {
                print_report(&Report::of(error), global.json);
            }
            return Ok(if errors.is_empty() { 0 } else { FAILED });
        }
        Verb::Inspect { vm, name } => {
            let store = machines.snapshots(&vm)?;
            // Its files are checked by opening it.
            store.get(&name)?;
            inspect(&store.summary(&name)?, global.json);
        }
        Verb::Rm { vm, names } => {
            let store = machines.snapshots(&vm)?;
            for name in &names {
                store.rm(name)?;
            }
            match global.json {
                true => print_json(&Removed {
                    removed: names.iter().map(ToString::to_string).collect(),
                }),
                false => names
                    .iter()
                    .for_each(|name| print_text(&format!("{name}\n"))),
            }
        }
        Verb::Restore {
            vm,
            name,
            disk_only,
        } => {
            let launcher = settings.launcher();
            machines.restore(&vm, &name, disk_only, &launcher).await?;
            match global.json {
                true => print_json(&machines.look(&vm).await?),
                false => print_text(&format!("{vm}\n")),
            }
        }
        Verb::Export { vm, name, file } => {
            export::export(&file, global.json, |to, of| {
                machines.export(&vm, &name, to, of)
            })?;
        }
        Verb::Import(args) => return export::import(*args, global).await,
    }
    Ok(0)
}

/// Branches a running machine, and prints the names of the new ones.
pub(super) async fn fork(args: Fork, global: &Global) -> Result<i32, Failure> {
    let settings = global.settings()?;
    let machines = Machines::new(settings.host());
    let prefix = args.name.as_ref().unwrap_or(&args.vm);
    let name = |number| format!("{prefix}-{number}").parse::<VmId>();
    let names = (1..=args.number).map(name).collect::<Result<Vec<_>, _>>();
    let names = names.map_err(|malformed| crate::spec::SpecError::Variable {
        name: "--name".into(),
        why: malformed.to_string(),
    })?;
    machines
        .fork(&args.vm, &names, &settings.launcher())
        .await?;
    match global.json {
        true => print_json(&names),
        false => names
            .iter()
            .for_each(|name| print_text(&format!("{name}\n"))),
    }
    Ok(0)
}

fn table(all: &[Summary]) {
    let mut table = Table::new(&["NAME", "PARENT", "OF", "ON DISK", "DESCRIPTION"]);
    for one in all {
        let manifest = &one.manifest;
        let parent = manifest.parent.as_ref();
        table.row(&[
            manifest.name.to_string(),
            parent.map_or("-".into(), ToString::to_string),
            of(one).into(),
            format!("{} MiB", one.allocated.div_ceil(1 << 20)),
            manifest.description.clone().unwrap_or_else(|| "-".into()),
        ]);
    }
    for line in table.lines() {
        print_text(&format!("{line}\n"));
    }
}

fn of(one: &Summary) -> &'static str {
    match one.manifest.saved {
        Some(_) => "memory and disk",
        None => "disk",
    }
}

fn inspect(one: &Summary, json: bool) {
    if json {
        return print_json(one);
    }
    let manifest = &one.manifest;
    let mut lines = vec![
        ("name", manifest.name.to_string()),
        ("of", of(one).to_owned()),
        ("on disk", format!("{} bytes", one.allocated)),
        ("image", manifest.image.clone()),
    ];
    lines.extend(
        manifest
            .parent
            .as_ref()
            .map(|name| ("parent", name.to_string())),
    );
    lines.extend(
        manifest
            .description
            .clone()
            .map(|text| ("description", text)),
    );
    let tags = manifest.tags.iter();
    lines.extend(tags.map(|(key, value)| ("tag", format!("{key}={value}"))));
    if let Some(saved) = &manifest.saved {
        lines.push(("paused", format!("{} ms", saved.paused_ms)));
        lines.push(("qemu version", saved.qemu.to_string()));
    }
    for (name, value) in lines {
        print_text(&format!("{}\n", visible(&format!("{name:13} {value}"))));
    }
}
