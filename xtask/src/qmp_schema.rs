//! `qmp-schema`: dumps of what each QEMU version offers, and what is missing.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use bulkhead::qmp::{Needs, Offer, Schema};
use clap::Subcommand;
use flate2::{Compression, GzBuilder, read::GzDecoder};
use serde_json::Value;

/// A busy machine may take its time to start QEMU.
const DEADLINE: Duration = Duration::from_secs(30);

/// Options.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Ask a QEMU what it offers and keep the answer.
    Capture {
        /// The QEMU binary.
        #[arg(long, env = "BULKHEAD_QEMU", default_value = "qemu-system-x86_64")]
        qemu: PathBuf,
        /// Name of the dump [default: qemu-MAJOR.MINOR].
        #[arg(long)]
        name: Option<String>,
    },
    /// Say what `needs.toml` asks for and a dump lacks.
    Check,
    /// Say what differs between two dumps, given by name.
    Diff { old: String, new: String },
}

/// Runs the task.
pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../qmp-schema");
    match args.verb {
        Verb::Capture { qemu, name } => capture(&dir, &qemu, name),
        Verb::Check => check(&dir),
        Verb::Diff { old, new } => diff(&load(&dir, &old)?, &load(&dir, &new)?),
    }
}

fn capture(dir: &Path, qemu: &Path, name: Option<String>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let offer = runtime.block_on(Offer::of(qemu, DEADLINE))?;
    let version = &offer.version;
    let name = name.unwrap_or_else(|| format!("qemu-{}.{}", version.major, version.minor));
    let path = dir.join(format!("{name}.json.gz"));
    let Value::Array(entities) = offer.schema else {
        bail!(
            "{} answered query-qmp-schema with something else",
            qemu.display()
        );
    };
    let mut file = tempfile::NamedTempFile::new_in(dir)?;
    // No time and no name in the header: the same QEMU gives the same file.
    let gzip = GzBuilder::new()
        .mtime(0)
        .write(&mut file, Compression::best());
    let mut writer = BufWriter::new(gzip);
    // One entity a line, for `zdiff`.
    for (index, entity) in entities.iter().enumerate() {
        writer.write_all(if index == 0 { b"[\n" } else { b",\n" })?;
        serde_json::to_writer(&mut writer, entity)?;
    }
    writer.write_all(b"\n]\n")?;
    writer.into_inner().map_err(|e| e.into_error())?.finish()?;
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    file.as_file().set_permissions(mode)?;
    file.persist(&path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    println!(
        "{name}: {version} ({}), {} entities",
        version.package,
        entities.len()
    );
    Ok(())
}

fn check(dir: &Path) -> anyhow::Result<()> {
    let needs = Needs::parse(&fs::read_to_string(dir.join("needs.toml"))?)?;
    let mut complete = true;
    for name in dumps(dir)? {
        println!("{name}:");
        let missing = needs.missing(&Schema::from_value(load(dir, &name)?)?);
        for item in &missing {
            let note = if item.optional { " (optional)" } else { "" };
            println!("  no {item}{note}");
        }
        if missing.is_empty() {
            println!("  nothing is missing");
        }
        complete &= missing.iter().all(|item| item.optional);
    }
    ensure!(complete, "a dump lacks something that is not optional");
    Ok(())
}

/// Prints commands and events by name, with a mark where the arguments differ.
fn diff(old: &Value, new: &Value) -> anyhow::Result<()> {
    let (old, new) = (flatten(old)?, flatten(new)?);
    for name in old.keys().filter(|name| !new.contains_key(*name)) {
        println!("- {name}");
    }
    for (name, shape) in &new {
        match old.get(name) {
            None => println!("+ {name}"),
            Some(before) if before != shape => println!("~ {name}"),
            Some(_) => {}
        }
    }
    Ok(())
}

/// Commands and events, and every member of their arguments by path. Types are
/// named by number, and the numbers differ between versions: they are followed.
fn flatten(schema: &Value) -> anyhow::Result<BTreeMap<String, Value>> {
    let entities = schema.as_array().context("a dump is a list")?;
    let by_name: BTreeMap<&str, &Value> = entities
        .iter()
        .filter_map(|entity| Some((entity["name"].as_str()?, entity)))
        .collect();
    let mut flat = BTreeMap::new();
    for (name, entity) in &by_name {
        let kind = match entity["meta-type"].as_str() {
            Some(kind @ ("command" | "event")) => kind,
            _ => continue,
        };
        let path = format!("{kind} {name}");
        flat.insert(path.clone(), entity["features"].clone());
        if let Some(arguments) = entity["arg-type"].as_str() {
            expand(&by_name, arguments, &path, &mut Vec::new(), &mut flat);
        }
    }
    Ok(flat)
}

fn expand<'a>(
    types: &BTreeMap<&str, &'a Value>,
    name: &'a str,
    path: &str,
    inside: &mut Vec<&'a str>,
    flat: &mut BTreeMap<String, Value>,
) {
    let Some(entity) = types.get(name) else {
        return;
    };
    // Types are recursive, and deep repetition says nothing new.
    if inside.contains(&name) || inside.len() == 4 {
        return;
    }
    inside.push(name);
    let list = |key: &str| entity[key].as_array().into_iter().flatten();
    for value in list("values").filter_map(Value::as_str) {
        flat.insert(format!("{path}={value}"), Value::Null);
    }
    for member in list("members") {
        let Some(type_name) = member["type"].as_str() else {
            continue;
        };
        let path = match member["name"].as_str() {
            Some(member) => format!("{path}.{member}"),
            None => path.to_owned(),
        };
        flat.insert(path.clone(), member["features"].clone());
        expand(types, type_name, &path, inside, flat);
    }
    let elements = entity["element-type"].as_str();
    let variants = list("variants").filter_map(|variant| variant["type"].as_str());
    for type_name in elements.into_iter().chain(variants) {
        expand(types, type_name, path, inside, flat);
    }
    inside.pop();
}

/// Names of the dumps, sorted.
fn dumps(dir: &Path) -> anyhow::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        names.extend(
            name.to_string_lossy()
                .strip_suffix(".json.gz")
                .map(str::to_owned),
        );
    }
    names.sort();
    Ok(names)
}

fn load(dir: &Path, name: &str) -> anyhow::Result<Value> {
    let path = dir.join(format!("{name}.json.gz"));
    let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
    serde_json::from_reader(GzDecoder::new(file))
        .with_context(|| format!("cannot read {}", path.display()))
}
