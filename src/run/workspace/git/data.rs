//! Which names below a repository's root hold nothing but data.

use crate::guest::archive::Kind;
use crate::text::is_ignorable;

/// What to do with one name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    Keep,
    /// A configuration file: to be rebuilt.
    Config,
    /// A file named `.git`: depends on its content.
    Gitfile,
    Drop(&'static str),
    /// Left out without a word: every `git init` makes it.
    Quiet,
}

/// Whether some file system or git itself would read `part` as `.git`: other
/// case, NTFS short names, streams, trailing dots and spaces, and the
/// characters HFS+ ignores (git's fsck and `verify_path`).
pub(super) fn disguised(part: &[u8]) -> bool {
    let text = folded(part);
    text == ".git"
        || text
            .strip_prefix("git~")
            .is_some_and(|n| n.len() == 1 && n.as_bytes()[0].is_ascii_digit())
}

/// `part` without what some file system leaves out when it compares names.
pub(super) fn folded(part: &[u8]) -> String {
    let text = String::from_utf8_lossy(part);
    let text: String = (text.chars().filter(|&c| !is_ignorable(c)))
        .flat_map(|c| match c {
            // Long s and the sign for kelvin: lower case of both S and K.
            '\u{17f}' => 's'.to_lowercase(),
            '\u{212a}' => 'k'.to_lowercase(),
            c => c.to_lowercase(),
        })
        .collect();
    let text = text.split(':').next().unwrap_or_default();
    text.trim_end_matches(['.', ' ']).to_owned()
}

/// Whether git keeps plain data at `parts` below a repository's root.
///
/// `nested` says that another repository below this one holds the name and
/// judges it too. Names are compared exactly: whatever a file system might take
/// for another name is not on the list.
pub(super) fn data(
    parts: &[&[u8]],
    kind: Kind,
    nested: bool,
    host_has: impl Fn(&[&[u8]]) -> bool,
) -> Verdict {
    const NOT_DATA: Verdict = Verdict::Drop("left out: git could run it, or be redirected by it");
    let Some((first, rest)) = parts.split_first() else {
        return Verdict::Keep;
    };
    if kind == Kind::Symlink {
        return Verdict::Drop("left out: a symlink inside a repository");
    }
    let dir = kind == Kind::Dir;
    let last = *parts.last().unwrap_or(first);
    if last.ends_with(b".lock") || last.starts_with(b"tmp_obj_") {
        return Verdict::Quiet;
    }
    let keep = match (*first, rest) {
        (b"config", []) if kind == Kind::File => return Verdict::Config,
        (
            b"HEAD" | b"ORIG_HEAD" | b"FETCH_HEAD" | b"MERGE_HEAD" | b"CHERRY_PICK_HEAD"
            | b"REVERT_HEAD" | b"AUTO_MERGE" | b"MERGE_MSG" | b"MERGE_MODE" | b"MERGE_RR"
            | b"SQUASH_MSG" | b"COMMIT_EDITMSG" | b"TAG_EDITMSG" | b"index" | b"packed-refs"
            | b"shallow" | b"description",
            [],
        ) => !dir,
        (name, []) if name.starts_with(b"sharedindex.") => !dir,
        (b"objects" | b"refs" | b"logs" | b"info" | b"lfs" | b"reftable" | b"modules", []) => dir,
        (b"objects", rest) => object(rest, dir),
        (b"refs" | b"logs" | b"reftable", _) => true,
        (b"info", [name]) => !dir && matches!(*name, b"exclude" | b"refs" | b"sparse-checkout"),
        (b"lfs", [b"objects", ..]) => true,
        // Submodules: directories on the way, then repositories of their own.
        (b"modules", _) => dir || nested,
        (b"worktrees", [id, ..]) => nested && host_has(&[b"worktrees", id]),
        (b"hooks" | b"branches", []) if dir => return Verdict::Quiet,
        (b"hooks", [name]) if name.ends_with(b".sample") && !host_has(parts) => {
            return Verdict::Quiet;
        }
        (b"gc.pid" | b"gc.log", []) => return Verdict::Quiet,
        _ => false,
    };
    if keep { Verdict::Keep } else { NOT_DATA }
}

/// Names below `objects`.
fn object(parts: &[&[u8]], dir: bool) -> bool {
    let hex = |name: &[u8]| !name.is_empty() && name.iter().all(u8::is_ascii_hexdigit);
    match parts {
        [b"pack" | b"info"] => dir,
        [fan] => dir && fan.len() == 2 && hex(fan),
        [b"pack", name] => {
            !dir && (name.starts_with(b"pack-") || name.starts_with(b"multi-pack-index"))
        }
        [b"info", b"packs" | b"commit-graph"] => !dir,
        [b"info", b"commit-graphs"] => dir,
        [b"info", b"commit-graphs", _] => !dir,
        [fan, name] => !dir && fan.len() == 2 && hex(fan) && hex(name),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disguises_of_dot_git_are_seen_through() {
        for name in [
            ".GIT",
            ".git ",
            ".git.",
            ".git . .",
            "git~1",
            "GIT~1",
            ".g\u{200c}it",
            ".git::$INDEX_ALLOCATION",
            ".g\u{34f}it",
            ".\u{fe0f}git",
            ".gi\u{3164}t",
            ".git\u{e0001}",
            "\u{180e}.git",
            ".git.\u{ad} ",
        ] {
            assert!(disguised(name.as_bytes()), "{name}");
        }
        for name in [
            ".gitignore",
            ".github",
            "git",
            "git~x",
            "agit~1",
            ".gitmodules",
        ] {
            assert!(!disguised(name.as_bytes()), "{name}");
        }
    }

    #[test]
    fn letters_some_file_systems_take_for_others_are_folded() {
        for (name, plain) in [
            ("ref\u{17f}", "refs"),
            ("HOO\u{212a}S", "hooks"),
            ("he\u{ffa0}ad. ", "head"),
            ("OBJECTS:x", "objects"),
        ] {
            assert_eq!(folded(name.as_bytes()), plain);
        }
    }

    #[test]
    fn only_data_may_enter_a_repository() {
        let judge = |path: &str, nested| {
            let parts: Vec<_> = path.split('/').map(str::as_bytes).collect();
            data(&parts, Kind::File, nested, |_| false)
        };
        for path in [
            "HEAD",
            "index",
            "objects/ab/cdef",
            "objects/pack/pack-1.idx",
            "refs/heads/a/b",
            "logs/HEAD",
        ] {
            assert_eq!(judge(path, false), Verdict::Keep, "{path}");
        }
        for path in [
            "hooks/post-commit",
            "HOOKS/post-commit",
            "info/attributes",
            "objects/info/alternates",
            "objects/INFO/alternates",
            "commondir",
            "gitdir",
            "config.worktree",
            "remotes/origin",
            "branches/x",
            "rebase-merge/git-rebase-todo",
            "sequencer/todo",
            "modules/x",
            "modules/x/hooks/y",
            "worktrees/x/HEAD",
        ] {
            assert!(matches!(judge(path, false), Verdict::Drop(_)), "{path}");
        }
        assert_eq!(judge("modules/x/HEAD", true), Verdict::Keep);
        assert_eq!(judge("config", false), Verdict::Config);
        assert_eq!(judge("hooks/pre-push.sample", false), Verdict::Quiet);
        let link = data(&[b"refs", b"heads"], Kind::Symlink, false, |_| false);
        assert!(matches!(link, Verdict::Drop(_)));
    }
}
