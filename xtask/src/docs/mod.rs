//! `cargo xtask docs`: the reference below docs/, generated from the code.

mod cli;
mod config;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use bulkhead::cli::{
    BuiltImage, BuiltTemplate, Copied, DetachedExec, ExecOutcome, Exported, Forwarded,
    ImportedTemplate, MachineUse, NetworkView, Proposal, PrunedTemplates, Removed, ShownImage,
};
use bulkhead::error::Failed;
use bulkhead::net::Event;
use bulkhead::run::{Finding, Found, ListedTemplate, Outcome, QgaInfo, doctor};
use bulkhead::spec::{Setting, VmId};
use bulkhead::supervise::{ExecInfo, View};
use bulkhead::{image, snapshot};
use bulkhead_agent::Info;
use schemars::generate::SchemaSettings;
use serde_json::Value;

/// First line of a generated page.
const GENERATED: &str = "<!-- Written by `cargo xtask docs`; change the code instead. -->\n";

/// Options.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only say what is stale; fail if anything is.
    #[arg(long)]
    check: bool,
}

/// Runs the task.
pub(crate) fn run(args: &Args) -> Result<()> {
    if args.check {
        return check();
    }
    let dir = reference()?;
    for path in stale(&dir)? {
        let path = dir.join(path);
        match files()?.get(path.strip_prefix(&dir)?) {
            Some(text) => write(&path, text)?,
            None => fs::remove_file(&path)?,
        }
        println!("{}", path.display());
    }
    Ok(())
}

/// Fails when a file is not what would be written.
pub(crate) fn check() -> Result<()> {
    let stale = stale(&reference()?)?;
    if stale.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = stale.iter().map(|path| path.to_string_lossy()).collect();
    bail!(
        "docs/reference is stale ({}); run `cargo xtask docs`",
        names.join(", ")
    );
}

fn reference() -> Result<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    Ok(root.context("xtask has a parent")?.join("docs/reference"))
}

/// What `--json` prints, by name.
fn outputs() -> Vec<(&'static str, Value)> {
    vec![
        ("config-show", schema::<Vec<Setting>>()),
        ("cp", schema::<Copied>()),
        ("doctor", schema::<Vec<doctor::Check>>()),
        ("error", schema::<Failed>()),
        ("exec", schema::<ExecOutcome>()),
        ("exec-detach", schema::<DetachedExec>()),
        ("export", schema::<Exported>()),
        ("forward", schema::<Forwarded>()),
        ("gc", schema::<Vec<Found>>()),
        ("image-build", schema::<BuiltImage>()),
        ("image-inspect", schema::<ShownImage>()),
        ("image-ls", schema::<Vec<image::Summary>>()),
        ("inspect", schema::<View>()),
        ("inspect-guest", schema::<Info>()),
        ("inspect-qga", schema::<QgaInfo>()),
        ("logs-list", schema::<Vec<ExecInfo>>()),
        ("ls", schema::<Vec<View>>()),
        ("names", schema::<Vec<VmId>>()),
        ("net-learn", schema::<Proposal>()),
        ("net-log", schema::<Event>()),
        ("net-show", schema::<NetworkView>()),
        ("outcome", schema::<Outcome>()),
        ("removed", schema::<Removed>()),
        ("snapshot-inspect", schema::<snapshot::Summary>()),
        ("snapshot-ls", schema::<Vec<snapshot::Summary>>()),
        ("stats", schema::<Vec<MachineUse>>()),
        ("template-build", schema::<BuiltTemplate>()),
        ("template-import", schema::<ImportedTemplate>()),
        ("template-inspect", schema::<ListedTemplate>()),
        ("template-ls", schema::<Vec<ListedTemplate>>()),
        ("template-prune", schema::<PrunedTemplates>()),
        ("verify", schema::<Vec<Finding>>()),
    ]
}

/// The schema of what is printed: as it is written, not as it may be read.
fn schema<T: schemars::JsonSchema>() -> Value {
    let settings = SchemaSettings::draft2020_12().for_serialize();
    let mut schema = settings.into_generator().into_root_schema_for::<T>().into();
    tidy(&mut schema);
    schema
}

/// Descriptions are rustdoc: links to items and line ends mean nothing here.
fn tidy(value: &mut Value) {
    match value {
        Value::Object(map) => {
            if let Some(Value::String(text)) = map.get_mut("description") {
                let paragraphs = text.split("\n\n").map(|part| part.replace('\n', " "));
                let text_only = paragraphs.collect::<Vec<_>>().join("\n\n");
                *text = text_only.replace("[`", "`").replace("`]", "`");
            }
            map.values_mut().for_each(tidy);
        }
        Value::Array(values) => values.iter_mut().for_each(tidy),
        _ => {}
    }
}

/// Every file of the reference.
fn files() -> Result<BTreeMap<PathBuf, String>> {
    let json = |value: &Value| anyhow::Ok(serde_json::to_string_pretty(value)? + "\n");
    let config = config::schema();
    let mut files = BTreeMap::from([
        ("cli.md".into(), cli::page()),
        ("config.md".into(), config::page(&config)?),
        ("config.schema.json".into(), json(&config)?),
    ]);
    for (name, schema) in outputs() {
        let path = PathBuf::from(format!("json/{name}.schema.json"));
        files.insert(path, json(&schema)?);
    }
    Ok(files)
}

/// Files that are missing, different, or not ours to have.
fn stale(dir: &Path) -> Result<Vec<PathBuf>> {
    let files = files()?;
    let differs = |path: &PathBuf, text: &String| {
        fs::read_to_string(dir.join(path)).map_or(true, |there| there != *text)
    };
    let mut stale: Vec<PathBuf> = files
        .iter()
        .filter(|(path, text)| differs(path, text))
        .map(|(path, _)| path.clone())
        .collect();
    for entry in fs::read_dir(dir.join("json")).into_iter().flatten() {
        let path = Path::new("json").join(entry?.file_name());
        if !files.contains_key(&path) {
            stale.push(path);
        }
    }
    Ok(stale)
}

fn write(path: &Path, text: &str) -> Result<()> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    }
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn what_verbs_print_and_errors_have_schemas_and_nothing_else_has() {
        let printed = bulkhead::cli::PRINTED.iter();
        let mut said: BTreeSet<_> = printed.filter_map(|(_, schema)| *schema).collect();
        said.insert("error");
        let outputs = outputs();
        let made: BTreeSet<_> = outputs.iter().map(|(name, _)| *name).collect();
        assert_eq!(made, said);
    }

    #[test]
    fn a_stale_a_missing_and_a_left_over_file_are_found() {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files().unwrap() {
            write(&dir.path().join(path), &text).unwrap();
        }
        assert!(stale(dir.path()).unwrap().is_empty());
        write(&dir.path().join("cli.md"), "old").unwrap();
        fs::remove_file(dir.path().join("json/error.schema.json")).unwrap();
        write(&dir.path().join("json/gone.schema.json"), "{}").unwrap();
        let expected = ["cli.md", "json/error.schema.json", "json/gone.schema.json"];
        assert_eq!(stale(dir.path()).unwrap(), expected.map(PathBuf::from));
    }
}
