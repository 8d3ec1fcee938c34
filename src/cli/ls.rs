//! `bulkhead ls`.

use super::Global;
use super::message::{Failure, print_json, print_report, print_text};
use super::table::{Table, age};
use crate::error::Report;
use crate::run::FAILED;
use crate::supervise::{Filter, Kind, Machines, View};

/// Options.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only machines for which this holds: state=STATE, label=NAME[=VALUE],
    /// name=PART, image=IMAGE, kind=machine|run. Several must all hold.
    #[arg(long, short, value_name = "FILTER")]
    filter: Vec<Filter>,
    /// Only names.
    #[arg(long, short)]
    quiet: bool,
}

/// Lists machines.
pub(super) async fn run(args: Args, global: &Global) -> Result<i32, Failure> {
    let settings = global.settings()?;
    let machines = Machines::new(settings.host());
    let (mut views, errors) = machines.list().await?;
    views.retain(|view| args.filter.iter().all(|filter| filter.matches(view)));
    for error in &errors {
        print_report(&Report::of(error), global.json);
    }
    if global.json {
        print_json(&views);
    } else if args.quiet {
        views
            .iter()
            .for_each(|view| print_text(&format!("{}\n", view.id)));
    } else {
        table(&views).print();
    }
    Ok(if errors.is_empty() { 0 } else { FAILED })
}

fn table(views: &[View]) -> Table {
    let mut table = Table::new(&["NAME", "STATE", "FOR", "IMAGE", "CPUS", "MEMORY", "COMMAND"]);
    for view in views {
        let command = match view.command.join(" ") {
            text if text.chars().count() > 40 => {
                text.chars().take(39).chain(['…']).collect::<String>()
            }
            text => text,
        };
        let state = match view.kind {
            Kind::Machine => view.state.to_string(),
            Kind::Run => format!("{} (run)", view.state),
        };
        table.row(&[
            view.id.to_string(),
            state,
            age(view.since_ms),
            view.image.name.clone(),
            view.vcpus.to_string(),
            view.memory.to_string(),
            command,
        ]);
    }
    table
}
