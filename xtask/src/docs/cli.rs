//! `cli.md`: every verb and option, walked from the command itself.

use std::fmt::Write as _;

use clap::{Arg, ArgAction, Command};

/// The page.
pub(super) fn page() -> String {
    let mut command = bulkhead::cli::command();
    command.build();
    let mut text = super::GENERATED.to_owned();
    text.push_str("\n# Command line\n\n");
    text.push_str(&about(&command));
    text.push_str("\n## Options of every verb\n\n");
    let global = |arg: &&Arg| arg.is_global_set();
    text.push_str(&list(command.get_arguments().filter(global)));
    text.push_str("\n## What --json prints\n\n");
    text.push_str(&printed());
    for verb in command.get_subcommands() {
        section(verb, 2, &mut text);
    }
    text
}

/// The schema of what each verb prints.
fn printed() -> String {
    let mut text = "One value on stdout (`net log`: one a line), as the schema of the verb says. \
         Failures are on stderr, one a line: [error](json/error.schema.json).\n\n| verb | schema |\n| --- | --- |\n"
        .to_owned();
    for (words, schema) in bulkhead::cli::PRINTED {
        let schema = match schema {
            Some(name) => format!("[{name}](json/{name}.schema.json)"),
            None => "no JSON".to_owned(),
        };
        let _ = writeln!(text, "| `{words}` | {schema} |");
    }
    text
}

/// A verb and the verbs below it.
fn section(command: &Command, level: usize, text: &mut String) {
    if command.is_hide_set() || command.get_name() == "help" {
        return;
    }
    let name = command.get_bin_name().unwrap_or(command.get_name());
    let _ = write!(text, "\n{} {name}\n\n", "#".repeat(level));
    text.push_str(&about(command));
    let mut verbs = command.get_subcommands().peekable();
    if verbs.peek().is_none() {
        let usage = command.clone().render_usage().to_string();
        let usage = usage.trim_start_matches("Usage:").trim();
        let _ = write!(text, "\n```\n{usage}\n```\n");
    }
    let own = |arg: &&Arg| {
        !arg.is_global_set()
            && !arg.is_hide_set()
            && !["help", "version"].contains(&arg.get_id().as_str())
    };
    let (words, options): (Vec<&Arg>, Vec<&Arg>) = command
        .get_arguments()
        .filter(own)
        .partition(|arg| arg.is_positional());
    let args = list(words.into_iter().chain(options));
    if !args.is_empty() {
        let _ = write!(text, "\n{args}");
    }
    for verb in verbs {
        section(verb, level + 1, text);
    }
}

fn about(command: &Command) -> String {
    let about = command.get_long_about().or(command.get_about());
    about.map_or_else(String::new, |about| sentence(&about.to_string()) + "\n")
}

/// One line for each argument.
fn list<'a>(args: impl Iterator<Item = &'a Arg>) -> String {
    args.map(|arg| {
        let help = arg.get_long_help().or(arg.get_help());
        let help = help.map_or_else(String::new, ToString::to_string);
        let choices: Vec<String> = arg
            .get_possible_values()
            .iter()
            .filter(|_| arg.get_action().takes_values())
            .map(|value| format!("`{}`", value.get_name()))
            .collect();
        let choices = match choices.is_empty() {
            true => String::new(),
            false => format!(" One of {}.", choices.join(", ")),
        };
        let defaults: Vec<_> = arg
            .get_default_values()
            .iter()
            .filter(|_| arg.get_action().takes_values())
            .map(|value| value.to_string_lossy())
            .collect();
        let default = match defaults.is_empty() {
            true => String::new(),
            false => format!(" [default: {}]", defaults.join(", ")),
        };
        format!(
            "- {}: {}{choices}{default}\n",
            spelled(arg),
            sentence(&help)
        )
    })
    .collect()
}

/// As it is typed: `` `-m`, `--memory <MEMORY>` ``.
fn spelled(arg: &Arg) -> String {
    let values: Vec<String> = arg
        .get_value_names()
        .unwrap_or_default()
        .iter()
        .map(|name| format!("<{name}>"))
        .collect();
    let values = values.join(" ");
    let Some(long) = arg.get_long() else {
        return format!("`{values}`");
    };
    let short = arg.get_short().map(|short| format!("`-{short}`, "));
    let short = short.unwrap_or_default();
    let many = match arg.get_action() {
        ArgAction::Append => " (may be repeated)",
        _ => "",
    };
    match arg.get_action().takes_values() {
        true => format!("{short}`--{long} {values}`{many}"),
        false => format!("{short}`--{long}`"),
    }
}

/// Clap takes the full stop from what it shows; a page wants it.
fn sentence(text: &str) -> String {
    let text = text.trim_end();
    match text.is_empty() || text.ends_with(['.', ']', ':']) {
        true => text.to_owned(),
        false => format!("{text}."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_verb_and_every_option_is_on_the_page() {
        fn walk(command: &Command, page: &str) {
            for arg in command.get_arguments() {
                if let Some(long) = arg.get_long().filter(|long| *long != "help") {
                    let found = long == "version" || page.contains(&format!("`--{long}"));
                    assert!(found, "--{long} of {}", command.get_name());
                }
            }
            // What is not for people has no page.
            for verb in command.get_subcommands().filter(|verb| !verb.is_hide_set()) {
                let name = format!(" {}\n", verb.get_name());
                assert!(verb.get_name() == "help" || page.contains(&name), "{name}");
                walk(verb, page);
            }
        }
        let command = bulkhead::cli::command();
        assert!(command.get_subcommands().count() > 5);
        walk(&command, &page());
    }
}
