//! What each verb prints with `--json`, and the shapes that only the command
//! line has.

use serde::Serialize;

use crate::run::PrunedTemplate;
use crate::spec::Publish;
use crate::supervise::ExecId;

/// Every verb, and the name of the schema (`docs/reference/json`) of what it
/// prints to stdout with `--json`; none where that is not JSON. A verb stands
/// here once more, and before, with an option that makes it print something
/// else. `net log` prints any number of values, one a line, every other verb one
/// value or, where it failed, none. Failures go to stderr, one a line (`error`).
pub const PRINTED: [(&str, Option<&str>); 58] = [
    ("run", Some("outcome")),
    ("create", Some("inspect")),
    ("start", Some("names")),
    ("restart", Some("names")),
    ("reset", Some("names")),
    ("exec --detach", Some("exec-detach")),
    ("exec", Some("exec")),
    ("attach", Some("exec")),
    ("cp", Some("cp")),
    ("forward", Some("forward")),
    ("logs --list", Some("logs-list")),
    ("logs", None),
    ("ls", Some("ls")),
    ("stats", Some("stats")),
    ("top", Some("stats")),
    ("set", Some("names")),
    ("net show", Some("net-show")),
    ("net allow", Some("names")),
    ("net deny", Some("names")),
    ("net log", Some("net-log")),
    ("net learn", Some("net-learn")),
    ("pause", Some("names")),
    ("resume", Some("names")),
    ("stop", Some("names")),
    ("kill", None),
    ("wait", Some("inspect")),
    ("rm", Some("names")),
    ("image build", Some("image-build")),
    ("image ls", Some("image-ls")),
    ("image inspect", Some("image-inspect")),
    ("image import", Some("image-build")),
    ("image rm", Some("removed")),
    ("template build", Some("template-build")),
    ("template ls", Some("template-ls")),
    ("template inspect", Some("template-inspect")),
    ("template rm", Some("removed")),
    ("template prune", Some("template-prune")),
    ("template export", Some("export")),
    ("template import", Some("template-import")),
    ("snapshot save", Some("snapshot-inspect")),
    ("snapshot ls", Some("snapshot-ls")),
    ("snapshot inspect", Some("snapshot-inspect")),
    ("snapshot rm", Some("removed")),
    ("snapshot restore", Some("inspect")),
    ("snapshot export", Some("export")),
    ("snapshot import", Some("inspect")),
    ("fork", Some("names")),
    ("doctor --apparmor-profile", None),
    ("doctor", Some("doctor")),
    ("inspect --qga", Some("inspect-qga")),
    ("inspect --guest", Some("inspect-guest")),
    ("inspect", Some("inspect")),
    ("verify", Some("verify")),
    ("console", None),
    ("gc", Some("gc")),
    ("config show", Some("config-show")),
    ("completions", None),
    ("man", None),
];

/// A command that runs on by itself.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct DetachedExec {
    /// Its name in the machine: `e1`, `e2` and so on.
    pub(super) exec: ExecId,
}

/// What was copied into a machine or out of it.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Copied {
    /// What was left out or changed on the way; empty when all of it is there.
    pub(super) warnings: Vec<String>,
}

/// Ports of this host that lead to a machine from now on.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Forwarded {
    /// Each as `ADDRESS:PORT:GUEST-PORT`, with the port that was found free.
    pub(super) forwarded: Vec<Publish>,
}

/// What was removed.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Removed {
    /// Ids of images and templates, names of snapshots; empty where an image
    /// lost one of several names.
    pub(super) removed: Vec<String>,
}

/// A snapshot or template that was written to a file.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Exported {
    /// The file, as it was given.
    pub(super) file: String,
    /// Its size.
    pub(super) bytes: u64,
}

/// An image that was built or imported.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct BuiltImage<'a> {
    /// `sha256-` and the digest of its manifest.
    pub(super) id: &'a str,
    /// Name it was built under.
    pub(super) name: &'a str,
}

/// An image as it is shown, its files checked.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ShownImage<'a> {
    /// `sha256-` and the digest of its manifest.
    pub(super) id: &'a str,
    /// Where its files are.
    pub(super) dir: String,
    /// What it is made of.
    pub(super) manifest: &'a crate::image::Manifest,
}

/// A template that was built, or was there.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct BuiltTemplate<'a> {
    /// Its id, which its key gives.
    pub(super) id: &'a str,
    /// It was there already.
    pub(super) kept: bool,
    /// What is in it.
    pub(super) manifest: &'a crate::template::Manifest,
}

/// Templates that could not be used any more.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct PrunedTemplates {
    /// They are still there: it was only asked which would go.
    pub(super) dry_run: bool,
    /// What was removed, or would be, and why.
    pub(super) removed: Vec<PrunedTemplate>,
    /// Bytes that their files took of the disk together.
    pub(super) bytes: u64,
}

/// A template that was taken in.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ImportedTemplate<'a> {
    /// Its id, which its key gives.
    pub(super) id: &'a str,
    /// What is in it.
    pub(super) manifest: &'a crate::template::Manifest,
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Every verb that has none below it, and every option of one, by the words
    /// that are typed.
    fn verbs(command: &clap::Command, before: &str, found: &mut BTreeSet<String>) {
        let shown = command.get_subcommands().filter(|verb| {
            // What is not for people prints for its own program only.
            !verb.is_hide_set() && verb.get_name() != "help"
        });
        for verb in shown {
            let words = format!("{before}{}", verb.get_name());
            if verb.has_subcommands() {
                verbs(verb, &format!("{words} "), found);
                continue;
            }
            for option in verb.get_arguments().filter_map(clap::Arg::get_long) {
                found.insert(format!("{words} --{option}"));
            }
            found.insert(words);
        }
    }

    #[test]
    fn every_verb_says_what_it_prints_as_json() {
        let mut found = BTreeSet::new();
        verbs(&crate::cli::command(), "", &mut found);
        let said: BTreeSet<_> = PRINTED.iter().map(|(words, _)| *words).collect();
        assert_eq!(said.len(), PRINTED.len(), "one stands there twice");
        for words in &said {
            assert!(found.contains(*words), "there is no `{words}`");
        }
        for verb in found.iter().filter(|words| !words.contains(" --")) {
            assert!(said.contains(verb.as_str()), "nothing of `{verb}`");
        }
        // The first that fits counts: with an option it has to stand before.
        for (at, (words, _)) in PRINTED.iter().enumerate() {
            let Some((verb, _)) = words.split_once(" --") else {
                continue;
            };
            let bare = PRINTED.iter().position(|(words, _)| *words == verb);
            assert!(bare.is_some_and(|bare| at < bare), "{words}");
        }
    }
}
