//! A repository's `config`: the host's text plus harmless keys of the guest.
//!
//! The guest's text is only read, by our own strict parser; what is added is
//! written anew in one canonical form, so git cannot read it differently.

use std::collections::BTreeSet;

use crate::guest::archive::printable;

/// A merged configuration.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Merged {
    /// The new text.
    pub(super) text: Vec<u8>,
    /// Keys of the guest that were left out, safe to print.
    pub(super) refused: Vec<String>,
}

/// One `key = value`, names in lower case except for the subsection.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Setting {
    section: String,
    subsection: Option<String>,
    key: String,
    /// `None` for a key without `=`, which git takes for true.
    value: Option<String>,
}

impl Setting {
    fn place(&self) -> (&str, Option<&str>) {
        (&self.section, self.subsection.as_deref())
    }

    fn name(&self) -> String {
        let name = match &self.subsection {
            Some(sub) => format!("{}.{sub}.{}", self.section, self.key),
            None => format!("{}.{}", self.section, self.key),
        };
        printable(name.as_bytes())
    }
}

/// Adds to `host`'s text (`None`: a new repository) what is harmless and new in
/// `guest`'s. Keys the guest removed or changed stay as the host has them.
pub(super) fn merge(host: Option<&[u8]>, guest: &[u8]) -> Result<Merged, &'static str> {
    let own = parse(host.unwrap_or_default())
        .map_err(|()| "left out: the host's own config is not understood")?;
    let theirs =
        parse(guest).map_err(|()| "left out: not a git configuration that is understood")?;
    let mut remotes: BTreeSet<&str> = own
        .iter()
        .chain(
            theirs
                .iter()
                .filter(|setting| harmless(setting, host.is_none())),
        )
        .filter(|setting| setting.section == "remote")
        .filter_map(|setting| setting.subsection.as_deref())
        .collect();
    remotes.insert(".");
    let mut added: Vec<&Setting> = Vec::new();
    let mut refused = BTreeSet::new();
    for setting in &theirs {
        if own.contains(setting) {
            continue;
        }
        // Where the host has the section of a remote or branch, a second value
        // would redirect it; elsewhere, the host's own value wins.
        let taken = match &setting.subsection {
            Some(_) => own.iter().any(|own| own.place() == setting.place()),
            None => own
                .iter()
                .any(|own| own.place() == setting.place() && own.key == setting.key),
        };
        let names_remote = (&*setting.section, &*setting.key) != ("branch", "remote")
            || setting
                .value
                .as_deref()
                .is_some_and(|name| remotes.contains(name));
        if taken || !names_remote || !harmless(setting, host.is_none()) {
            refused.insert(setting.name());
        } else {
            added.push(setting);
        }
    }
    Ok(Merged {
        text: append(host.unwrap_or_default(), &added),
        refused: refused.into_iter().collect(),
    })
}

/// A setting that names a file which git runs or believes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Pointer {
    /// The top of the working tree, seen from the repository.
    Worktree(String),
    /// Hooks or attributes, seen from the top of the working tree.
    Tree(String),
    /// More configuration, seen from the file that includes it.
    Include(String),
}

/// The files that a configuration names.
pub(super) fn pointers(text: &[u8]) -> Result<Vec<Pointer>, ()> {
    let settings = parse(text)?.into_iter();
    let pointers = settings.filter_map(|setting| {
        let path = setting.value.filter(|path| !path.is_empty())?;
        match (&*setting.section, &setting.subsection, &*setting.key) {
            ("core", None, "worktree") => Some(Pointer::Worktree(path)),
            ("core", None, "hookspath" | "attributesfile") => Some(Pointer::Tree(path)),
            ("include", None, "path") | ("includeif", Some(_), "path") => {
                Some(Pointer::Include(path))
            }
            _ => None,
        }
    });
    Ok(pointers.collect())
}

/// The list of what may be added. Everything else may run, load or redirect.
fn harmless(setting: &Setting, new_repository: bool) -> bool {
    let Some(value) = setting.value.as_deref() else {
        return false;
    };
    if value.chars().any(char::is_control) {
        return false;
    }
    let boolean = matches!(value, "true" | "false");
    let plain = setting.subsection.is_none();
    let named = setting.subsection.as_deref().is_some_and(is_ref_part);
    match (&*setting.section, &*setting.key) {
        ("core", "repositoryformatversion") => {
            plain && new_repository && matches!(value, "0" | "1")
        }
        ("core", "bare" | "filemode" | "ignorecase" | "precomposeunicode" | "symlinks") => {
            plain && boolean
        }
        ("core", "logallrefupdates") => plain && (boolean || value == "always"),
        ("extensions", "objectformat") => {
            plain && new_repository && matches!(value, "sha1" | "sha256")
        }
        ("extensions", "refstorage") => {
            plain && new_repository && matches!(value, "files" | "reftable")
        }
        ("user", "name" | "email") => plain,
        ("branch", "remote") => named,
        ("branch", "merge") => named && value.starts_with("refs/heads/") && is_ref_part(value),
        ("branch", "rebase") => named && boolean,
        ("remote", "url") => named && is_network_url(value),
        ("remote", "fetch") => named && is_tracking_refspec(value),
        ("submodule", "url") => named && is_network_url(value),
        ("submodule", "active") => named && boolean,
        _ => false,
    }
}

/// Letters that occur in names of branches, remotes and submodules.
fn is_ref_part(name: &str) -> bool {
    let fine = |c: char| c.is_ascii_alphanumeric() || "/._-+@#".contains(c);
    !name.is_empty()
        && !name.starts_with(['-', '/', '.'])
        && !name.contains("..")
        && name.chars().all(fine)
}

/// `https://`, `http://`, `ssh://`, `git://` or `user@host:path`: forms that
/// name a host and cannot name a command, a helper (`ext::`) or a local path.
fn is_network_url(url: &str) -> bool {
    if url.contains("::") || url.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return false;
    }
    let host = |text: &str| {
        let fine = |c: char| c.is_ascii_alphanumeric() || "._-@:[]%~+".contains(c);
        !text.is_empty() && !text.starts_with('-') && !text.contains("@-") && text.chars().all(fine)
    };
    for scheme in ["https://", "http://", "ssh://", "git://"] {
        if let Some(rest) = url.strip_prefix(scheme) {
            return host(rest.split('/').next().unwrap_or_default());
        }
    }
    match url.split_once(':') {
        Some((at, path)) => {
            at.contains('@') && host(at) && !path.is_empty() && !path.starts_with('-')
        }
        None => false,
    }
}

/// `+refs/...:refs/remotes/...`: a fetch that cannot overwrite own branches.
fn is_tracking_refspec(spec: &str) -> bool {
    let spec = spec.strip_prefix('+').unwrap_or(spec);
    let plain = |part: &str| !part.contains(char::is_whitespace) && !part.contains("..");
    spec.split_once(':').is_some_and(|(from, to)| {
        from.starts_with("refs/") && to.starts_with("refs/remotes/") && plain(from) && plain(to)
    })
}

fn append(host: &[u8], added: &[&Setting]) -> Vec<u8> {
    let mut text = host.to_vec();
    if added.is_empty() {
        return text;
    }
    // An empty line also ends a last line that was continued with `\`.
    if !text.is_empty() {
        text.extend_from_slice(if text.ends_with(b"\n") {
            b"\n"
        } else {
            b"\n\n"
        });
    }
    let escape = |value: &str| value.replace('\\', "\\\\").replace('"', "\\\"");
    let mut current = None;
    for setting in added {
        if current != Some(setting.place()) {
            current = Some(setting.place());
            let head = match &setting.subsection {
                Some(sub) => format!("[{} \"{}\"]\n", setting.section, escape(sub)),
                None => format!("[{}]\n", setting.section),
            };
            text.extend_from_slice(head.as_bytes());
        }
        let value = escape(setting.value.as_deref().unwrap_or_default());
        text.extend_from_slice(format!("\t{} = \"{value}\"\n", setting.key).as_bytes());
    }
    text
}

/// Reads git's configuration syntax (git-config(1), "Syntax").
fn parse(text: &[u8]) -> Result<Vec<Setting>, ()> {
    let text = std::str::from_utf8(text).map_err(|_| ())?;
    let text = text
        .strip_prefix('\u{feff}')
        .unwrap_or(text)
        .replace("\r\n", "\n");
    let mut chars = text.chars().peekable();
    let mut settings = Vec::new();
    let mut section: Option<(String, Option<String>)> = None;
    while let Some(&c) = chars.peek() {
        match c {
            c if c.is_ascii_whitespace() => {
                chars.next();
            }
            '#' | ';' => while chars.next().is_some_and(|c| c != '\n') {},
            '[' => section = Some(parse_section(&mut chars)?),
            c if c.is_ascii_alphabetic() => {
                let (section, subsection) = section.clone().ok_or(())?;
                let mut key = String::new();
                while let Some(c) = chars.next_if(|c| c.is_ascii_alphanumeric() || *c == '-') {
                    key.push(c.to_ascii_lowercase());
                }
                let value = parse_value(&mut chars)?;
                settings.push(Setting {
                    section,
                    subsection,
                    key,
                    value,
                });
            }
            _ => return Err(()),
        }
    }
    Ok(settings)
}

type Chars<'a> = std::iter::Peekable<std::str::Chars<'a>>;

/// `[section]`, `[section "subsection"]` or the old `[section.subsection]`.
fn parse_section(chars: &mut Chars<'_>) -> Result<(String, Option<String>), ()> {
    chars.next();
    let mut name = String::new();
    while let Some(c) = chars.next_if(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.')) {
        name.push(c.to_ascii_lowercase());
    }
    let mut subsection = None;
    if chars.next_if(|c| matches!(c, ' ' | '\t')).is_some() {
        while chars.next_if(|c| matches!(c, ' ' | '\t')).is_some() {}
        chars.next_if_eq(&'"').ok_or(())?;
        let mut sub = String::new();
        loop {
            match chars.next().ok_or(())? {
                '"' => break,
                '\n' => return Err(()),
                '\\' => sub.push(chars.next().filter(|&c| c != '\n').ok_or(())?),
                c => sub.push(c),
            }
        }
        subsection = Some(sub);
    } else if let Some((section, sub)) = name.clone().split_once('.') {
        subsection = Some(sub.to_owned());
        name = section.to_owned();
    }
    chars.next_if_eq(&']').ok_or(())?;
    if name.is_empty() {
        return Err(());
    }
    Ok((name, subsection))
}

/// What follows a key, up to the end of its last line.
fn parse_value(chars: &mut Chars<'_>) -> Result<Option<String>, ()> {
    while chars.next_if(|c| matches!(c, ' ' | '\t')).is_some() {}
    match chars.peek() {
        None | Some('\n') => return Ok(None),
        Some('#' | ';') => {
            while chars.next().is_some_and(|c| c != '\n') {}
            return Ok(None);
        }
        Some('=') => chars.next(),
        Some(_) => return Err(()),
    };
    let (mut value, mut kept, mut quoted) = (String::new(), 0, false);
    while let Some(c) = chars.next() {
        match c {
            '\n' if quoted => return Err(()),
            '\n' => break,
            '"' => quoted = !quoted,
            '#' | ';' if !quoted => {
                while chars.next().is_some_and(|c| c != '\n') {}
                break;
            }
            '\\' => match chars.next() {
                Some('\n') => continue,
                Some('n') => value.push('\n'),
                Some('t') => value.push('\t'),
                Some('b') => value.push('\u{8}'),
                Some(c @ ('\\' | '"')) => value.push(c),
                _ => return Err(()),
            },
            ' ' | '\t' if !quoted => {
                // Blanks count only between words.
                if !value.is_empty() {
                    value.push(c);
                }
                continue;
            }
            c => value.push(c),
        }
        kept = value.len();
    }
    if quoted {
        return Err(());
    }
    value.truncate(kept);
    Ok(Some(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: &[u8] =
        b"[core]\n\tbare = false\n[remote \"origin\"]\n\turl = https://example.org/a\n";

    fn added(guest: &str) -> (String, Vec<String>) {
        let merged = merge(Some(HOST), guest.as_bytes()).unwrap();
        let text = String::from_utf8(merged.text).unwrap();
        (
            text.strip_prefix(std::str::from_utf8(HOST).unwrap())
                .unwrap()
                .to_owned(),
            merged.refused,
        )
    }

    #[test]
    fn harmless_keys_are_added() {
        let (text, refused) = added(
            "[user]\n name = A \\\"B\\\" ; c\n[remote \"up\"]\n url = \"git@example.org:x/y\"\n \
             fetch = +refs/heads/*:refs/remotes/up/*\n[branch \"main\"]\n remote = up\n merge = refs/heads/main\n",
        );
        assert_eq!(refused, Vec::<String>::new());
        assert_eq!(
            text,
            "\n[user]\n\tname = \"A \\\"B\\\"\"\n[remote \"up\"]\n\turl = \"git@example.org:x/y\"\n\
             \tfetch = \"+refs/heads/*:refs/remotes/up/*\"\n[branch \"main\"]\n\tremote = \"up\"\n\
             \tmerge = \"refs/heads/main\"\n"
        );
    }

    #[test]
    fn keys_that_run_or_redirect_are_refused() {
        for text in [
            "[core]\nfsmonitor = x",
            "[core]\nhooksPath = x",
            "[core]\nsshCommand = x",
            "[core]\neditor = x",
            "[core]\npager = x",
            "[core]\naskPass = x",
            "[core]\ngitProxy = x",
            "[core]\nworktree = /",
            "[core]\nattributesFile = x",
            "[core]\nalternateRefsCommand = x",
            "[CORE]\nFsMonitor = x",
            "[filter \"a\"]\nclean = x",
            "[diff \"a\"]\ncommand = x",
            "[diff]\nexternal = x",
            "[merge \"a\"]\ndriver = x",
            "[alias]\nst = !x",
            "[credential]\nhelper = x",
            "[gpg]\nprogram = x",
            "[include]\npath = x",
            "[includeIf \"gitdir:/\"]\npath = x",
            "[url \"a\"]\ninsteadOf = https://",
            "[remote \"b\"]\nuploadpack = x",
            "[remote \"b\"]\nvcs = x",
            "[remote \"b\"]\nproxy = x",
            "[protocol \"ext\"]\nallow = always",
            "[submodule \"a\"]\nupdate = !x",
            "[http]\nproxy = x",
            "[sequence]\neditor = x",
            "[pager]\nlog = x",
            "[extensions]\nworktreeConfig = true",
            "[uploadpack]\npackObjectsHook = x",
            "[core]\nbare = true",
            "[remote \"origin\"]\nurl = https://evil.example",
            "[remote \"origin\"]\npushurl = https://evil.example",
            "[remote \"b\"]\nurl = ext::sh -c x",
            "[remote \"b\"]\nurl = /tmp/x",
            "[remote \"b\"]\nurl = ssh://-oProxyCommand=x/y",
            "[remote \"b\"]\nurl = file:///x",
            "[branch \"m\"]\nremote = ext::x",
            "[branch \"m\"]\nremote = nowhere",
            "[remote \"b\"]\nfetch = +refs/heads/*:refs/heads/*",
            "[user]\nsigningkey = x",
            "[user \"x\"]\nname = y",
        ] {
            let (text, refused) = added(text);
            assert_eq!((text.as_str(), refused.len()), ("", 1), "{refused:?}");
        }
    }

    #[test]
    fn tricks_of_syntax_gain_nothing() {
        assert!(
            merge(None, b"[core] fsmonitor = x\n")
                .unwrap()
                .text
                .is_empty()
        );
        assert!(merge(None, b"[core").is_err());
        assert!(merge(None, b"[user]\nname = \"a\nb\"\n").is_err());
        assert!(merge(None, b"[user]\nname = a\\qb\n").is_err());
        // A newline smuggled into a value does not start a section.
        let merged = merge(None, b"[user]\nname = a\\n[core]\\nfsmonitor=x\n").unwrap();
        assert_eq!(
            (merged.text.len(), merged.refused),
            (0, vec!["user.name".to_owned()])
        );
        // Nor does a quote in a subsection.
        let merged = merge(None, b"[branch \"a\\\"]\"]\nremote = .\n").unwrap();
        assert!(merged.text.is_empty());
    }

    #[test]
    fn an_unchanged_config_stays_byte_for_byte() {
        assert_eq!(merge(Some(HOST), HOST).unwrap().text, HOST);
    }
}
