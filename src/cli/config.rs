//! `bulkhead config`: what is configured, and where.

use serde_json::Value;

use super::Global;
use super::machine_args::{LifetimeArgs, MachineArgs};
use super::message::{Failure, print_json, print_text};
use crate::spec::Setting;

/// Options.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Show every value, as a configuration file that says the same.
    ///
    /// With options of a machine: what a machine made with them gets.
    Show(Box<Show>),
}

#[derive(Debug, clap::Args)]
struct Show {
    /// Say where each value comes from; --json always does.
    #[arg(long)]
    origin: bool,
    #[command(flatten)]
    machine: MachineArgs,
    #[command(flatten)]
    lifetime: LifetimeArgs,
}

/// Runs the verb.
pub(super) fn run(args: Args, global: &Global) -> Result<i32, Failure> {
    let Verb::Show(show) = args.verb;
    let Show {
        origin,
        machine,
        lifetime,
    } = *show;
    let spec = machine.spec.clone();
    let flags = lifetime.into_request(machine.request());
    let merged = global.settings()?.with(flags, spec.as_deref())?;
    let settings = merged.settings()?;
    if global.json {
        print_json(&settings);
    } else {
        print_text(&as_toml(&settings, origin));
    }
    Ok(0)
}

/// The settings as a file that gives the same settings.
fn as_toml(settings: &[Setting], origin: bool) -> String {
    let mut lines = Vec::new();
    let mut table: &[String] = &[];
    for setting in settings {
        let Some((name, above)) = setting.key.split_last() else {
            continue;
        };
        if above != table {
            let words: Vec<String> = above.iter().map(|word| bare(word)).collect();
            lines.push((format!("\n[{}]", words.join(".")), None));
            table = above;
        }
        let line = match &setting.value {
            Value::Null => format!("# {name} =", name = bare(name)),
            Value::String(text) => format!("{} = {}", bare(name), quoted(text)),
            value => format!("{} = {value}", bare(name)),
        };
        lines.push((line, Some(&setting.origin)));
    }
    let width = lines.iter().filter(|(_, origin)| origin.is_some());
    let width = width.map(|(line, _)| line.chars().count()).max();
    let width = width.unwrap_or_default().min(40);
    let line = |(line, from): &(String, Option<_>)| match from {
        Some(from) if origin => format!("{line:width$}  # {from}\n"),
        _ => format!("{line}\n"),
    };
    lines.iter().map(line).collect()
}

fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

/// A key as TOML wants it.
fn bare(key: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-".contains(c);
    match !key.is_empty() && key.chars().all(plain) {
        true => key.to_owned(),
        false => quoted(key),
    }
}
