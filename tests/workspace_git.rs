//! Repositories that come back from a guest: real git works on them, and runs
//! nothing that the guest put there.

use std::fs;
use std::path::Path;

use bulkhead::error::Explain;
use bulkhead::guest::archive::Limits;
use bulkhead::run::workspace::Changes;
use exchange::{Exchange, sh, try_sh};
use tree::open;

#[path = "support/exchange.rs"]
#[allow(dead_code)]
mod exchange;
#[path = "support/tree.rs"]
#[allow(dead_code)]
mod tree;

/// A repository with one commit on `main`.
fn repository(dir: &Path) {
    sh(
        dir,
        "git init -q -b main .; echo 1 > a; git add a; git commit -q -m first",
    );
}

/// Everything a user might innocently run; failures are fine, canaries are not.
const USE: &str = "
    set +e
    git status; git log -p -1; git diff; git show --textconv HEAD; git diff --ext-diff
    echo more >> a; git add -A; git -c commit.gpgSign=false commit -m x; git commit --amend -m y; git tag -a t -m t
    git checkout -b other; git checkout -; git stash; git stash pop; git merge other; git rebase --continue
    git st; git lg; git fetch; git fetch up; git pull; git push up main; git submodule update --init; git gc -q
    git blame a; git grep -q 1; git worktree list; git -C sub status; git -C sub commit --allow-empty -m z
    git archive HEAD > /dev/null; git rebase -i HEAD~1; git clean -n; git branch --edit-description; git bisect start
    true";

/// Ways to make git run a command, all touching `CANARY`; run in a repository.
const MALICE: &str = r#"
    canary="touch $CANARY"
    mkdir -p .git/hooks .git/info evilhooks
    for hook in pre-commit post-commit commit-msg prepare-commit-msg post-checkout pre-push post-merge pre-rebase \
                post-index-change reference-transaction pre-auto-gc post-rewrite applypatch-msg fsmonitor-watchman; do
        for dir in .git/hooks evilhooks; do printf '#!/bin/sh\n%s-hook\n' "$canary" > $dir/$hook; chmod 755 $dir/$hook; done
    done
    cat >> .git/config <<END
[core]
    fsmonitor = "$canary-fsmonitor; false"
    hooksPath = evilhooks
    pager = "$canary-pager"
    editor = "$canary-editor; true"
    sshCommand = "$canary-ssh"
    alternateRefsCommand = "$canary-alternate"
[sequence]
    editor = "$canary-sequence; true"
[filter "evil"]
    clean = "$canary-clean; cat"
    smudge = "$canary-smudge; cat"
    process = "$canary-process"
[diff "evil"]
    textconv = "$canary-textconv; cat"
    command = "$canary-diff"
[diff]
    external = "$canary-external"
[merge "evil"]
    driver = "$canary-driver"
[alias]
    st = "!$canary-alias"
    lg = "!$canary-alias"
[include]
    path = evil.config
[remote "up"]
    url = ssh://example.invalid/x
    uploadpack = "$canary-upload"
    receivepack = "$canary-receive"
[remote "ext"]
    url = "ext::sh -c $canary-ext"
[branch "main"]
    remote = ext
    merge = refs/heads/main
[protocol "ext"]
    allow = always
[commit]
    gpgSign = true
[gpg]
    program = "$canary-gpg"
[tar "tar"]
    command = "$canary-tar"
END
    printf '[core]\n\tfsmonitor = "%s-include; false"\n' "$canary" > .git/evil.config
    printf '[core]\n\tfsmonitor = "%s-worktree; false"\n' "$canary" > .git/config.worktree
    printf '[extensions]\n\tworktreeConfig = true\n' >> .git/config
    printf '* filter=evil diff=evil merge=evil\n' | tee .git/info/attributes > .gitattributes
    mkdir -p .git/rebase-merge; printf 'exec %s-exec\n' "$canary" > .git/rebase-merge/git-rebase-todo
    echo /etc > .git/objects/info/alternates
"#;

/// Runs `script` in `dir` with `$CANARY` below the test's directory.
fn plant(exchange: &Exchange, dir: &Path, script: &str) {
    let canary = exchange.top.path().join("canary");
    sh(dir, &format!("CANARY={}\n{script}", canary.display()));
}

/// Which canaries have sung.
fn canaries(exchange: &Exchange) -> Vec<String> {
    let names = fs::read_dir(exchange.top.path()).unwrap();
    let names = names.map(|item| item.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with("canary")).collect()
}

#[test]
fn the_canaries_do_sing_where_nothing_is_sanitised() {
    let exchange = Exchange::new(repository);
    plant(&exchange, &exchange.guest, MALICE);
    // Some hide others: take away the loudest after each round.
    for hush in [
        "true",
        "rm .git/config.worktree; sed -i -e /process/d -e /textconv/d .git/config",
        "rm .git/evil.config",
    ] {
        try_sh(&exchange.guest, USE);
        sh(&exchange.guest, hush);
    }
    try_sh(&exchange.guest, USE);
    let sung = canaries(&exchange);
    for name in [
        "alias",
        "clean",
        "fsmonitor",
        "hook",
        "include",
        "process",
        "ssh",
        "textconv",
        "worktree",
    ] {
        assert!(
            sung.contains(&format!("canary-{name}")),
            "{name} is missing in {sung:?}"
        );
    }
}

#[test]
fn commits_made_in_the_guest_come_back() {
    let exchange = Exchange::new(repository);
    sh(
        &exchange.guest,
        "git checkout -q -b work; echo 2 > b; git add b; git commit -q -m second; git gc -q; echo 3 > c; git add c;
         git commit -q -m third; git tag v1; echo dirty >> a; git stash -q; git config user.name Guest",
    );
    let log = sh(&exchange.guest, "git log --format=%H%s --all");
    let warnings = exchange.apply();
    assert_eq!(warnings, "");
    assert_eq!(sh(&exchange.host, "git status --porcelain"), "");
    assert_eq!(sh(&exchange.host, "git log --format=%H%s --all"), log);
    assert_eq!(
        sh(
            &exchange.host,
            "git symbolic-ref HEAD; git config user.name"
        ),
        "refs/heads/work\nGuest\n"
    );
    assert_eq!(
        sh(&exchange.host, "git fsck --strict; git stash list | wc -l").trim(),
        "1"
    );
    assert!(!exchange.host.join(".git/objects/info/alternates").exists());
}

#[test]
fn a_repository_made_in_the_guest_comes_back() {
    for format in ["sha1", "sha256"] {
        let exchange = Exchange::new(|dir| fs::write(dir.join("a"), "1\n").unwrap());
        let script = format!(
            "git init -q --object-format={format} -b main .; git add a; git commit -q -m first;
             git remote add origin https://example.invalid/x; git config branch.main.remote origin;
             git config branch.main.merge refs/heads/main"
        );
        sh(&exchange.guest, &script);
        assert_eq!(exchange.apply(), "");
        assert_eq!(
            sh(
                &exchange.host,
                "git status --porcelain; git log --format=%s; git remote"
            ),
            "first\norigin\n"
        );
        assert!(!exchange.host.join(".git/hooks").exists());
    }
}

#[test]
fn nothing_of_the_guest_runs_in_a_repository_of_the_host() {
    let exchange = Exchange::new(repository);
    sh(
        &exchange.guest,
        "echo 2 > b; git add b; git commit -q -m second",
    );
    plant(&exchange, &exchange.guest, MALICE);
    let config = fs::read(exchange.host.join(".git/config")).unwrap();
    let warnings = exchange.apply();
    for left_out in [
        "core.fsmonitor",
        "core.hookspath",
        "filter.evil.clean",
        "alias.st",
        "include.path",
        "remote.ext.url",
        "remote.up.uploadpack",
        "branch.main.remote",
        "extensions.worktreeconfig",
        ".git/hooks/pre-commit",
        ".git/config.worktree",
        ".git/info/attributes",
        ".git/objects/info/alternates",
        ".git/rebase-merge/git-rebase-todo",
        ".gitattributes",
    ] {
        assert!(
            warnings.contains(left_out),
            "{left_out} is not in\n{warnings}"
        );
    }
    let merged = fs::read(exchange.host.join(".git/config")).unwrap();
    assert!(merged.starts_with(&config), "the host's own text changed");
    assert_eq!(sh(&exchange.host, "git log --format=%s"), "second\nfirst\n");
    try_sh(&exchange.host, USE);
    assert_eq!(canaries(&exchange), Vec::<String>::new());
}

#[test]
fn nothing_of_the_guest_runs_in_a_new_repository() {
    for place in [".", "sub", "deep/er"] {
        let exchange = Exchange::new(|dir| fs::write(dir.join("a"), "1\n").unwrap());
        let dir = exchange.guest.join(place);
        fs::create_dir_all(&dir).unwrap();
        repository(&dir);
        plant(&exchange, &dir, MALICE);
        exchange.apply();
        let dir = exchange.host.join(place);
        assert_eq!(sh(&dir, "git log --format=%s"), "first\n");
        try_sh(&dir, USE);
        assert_eq!(canaries(&exchange), Vec::<String>::new(), "{place}");
    }
}

#[test]
fn the_hosts_own_hooks_and_settings_stay() {
    let exchange = Exchange::new(|dir| {
        repository(dir);
        sh(
            dir,
            "printf '#!/bin/sh\\nexit 1\\n' > .git/hooks/pre-push; chmod 755 .git/hooks/pre-push",
        );
        sh(
            dir,
            "echo secret > .git/info/attributes; git remote add origin https://example.invalid/good",
        );
    });
    let config = sh(&exchange.host, "cat .git/config");
    sh(
        &exchange.guest,
        "echo evil > .git/hooks/pre-push; rm .git/info/attributes; git remote set-url origin https://example.invalid/evil;
         git remote set-url --push origin https://example.invalid/evil; git config core.bare true",
    );
    let warnings = exchange.apply();
    assert!(
        warnings.contains("remote.origin.url") && warnings.contains("core.bare"),
        "{warnings}"
    );
    assert_eq!(sh(&exchange.host, "cat .git/config"), config);
    assert_eq!(
        sh(
            &exchange.host,
            "cat .git/hooks/pre-push .git/info/attributes"
        ),
        "#!/bin/sh\nexit 1\nsecret\n"
    );
}

#[test]
fn a_repository_removed_in_the_guest_is_kept() {
    let exchange = Exchange::new(repository);
    sh(&exchange.guest, "rm -rf .git; echo 2 > a");
    let warnings = exchange.apply();
    assert!(warnings.contains(".git: repository kept"), "{warnings}");
    assert_eq!(sh(&exchange.host, "git status --porcelain"), " M a\n");
}

#[test]
fn a_dot_git_that_points_elsewhere_stays_out() {
    let exchange = Exchange::new(|dir| fs::create_dir(dir.join("sub")).unwrap());
    let (guest, host) = (&exchange.guest, &exchange.host);
    sh(
        guest,
        "mkdir plain x y z; echo 'gitdir: ../plain' > sub/.git; ln -s ../plain x/.git",
    );
    sh(
        guest,
        "echo 'gitdir: /tmp/evil' > y/.git; echo 'gitdir: ../.git/modules/../../plain' > z/.git",
    );
    let warnings = exchange.apply();
    assert_eq!(warnings.lines().count(), 4, "{warnings}");
    assert_eq!(sh(host, "find . -name .git"), "");
}

#[test]
fn names_some_file_systems_take_for_dot_git_stay_out() {
    let exchange = Exchange::new(|_| {});
    for name in [
        ".GIT",
        ".git ",
        ".git.",
        "git~1",
        ".g\u{200c}it",
        "sub/.Git",
    ] {
        fs::create_dir_all(exchange.guest.join(name).join("hooks")).unwrap();
        fs::write(exchange.guest.join(name).join("config"), "[core]\n").unwrap();
    }
    exchange.apply();
    assert_eq!(sh(&exchange.host, "ls -A"), "sub\n");
}

#[test]
fn a_bare_repository_anywhere_is_held_to_the_same_rules() {
    let exchange = Exchange::new(|_| {});
    sh(&exchange.guest, "git init -q --bare innocent/docs");
    let bare = exchange.guest.join("innocent/docs");
    plant(
        &exchange,
        &bare,
        "git config core.fsmonitor \"touch $CANARY\"; git config alias.st \"!touch $CANARY\"",
    );
    plant(
        &exchange,
        &bare,
        "printf '#!/bin/sh\\ntouch $CANARY\\n' > hooks/reference-transaction; chmod 755 hooks/*",
    );
    let warnings = exchange.apply();
    assert!(
        warnings.contains("innocent/docs/hooks/reference-transaction"),
        "{warnings}"
    );
    let bare = exchange.host.join("innocent/docs");
    assert_eq!(sh(&bare, "git rev-parse --is-bare-repository"), "true\n");
    try_sh(
        &bare,
        "git st; git status; git update-ref refs/heads/x HEAD",
    );
    sh(
        &bare,
        "git update-ref refs/heads/x $(echo x | git hash-object -w --stdin) || true",
    );
    assert_eq!(canaries(&exchange), Vec::<String>::new());
}

#[test]
fn a_name_cannot_be_hidden_from_the_judge_by_removing_it_too() {
    let exchange = Exchange::new(|_| {});
    sh(
        &exchange.guest,
        "mkdir -p r/objects r/refs r/hooks; echo 'ref: refs/heads/main' > r/HEAD; echo evil > r/hooks/pre-commit",
    );
    let (archive, _) = exchange.answer();
    let staging = exchange.top.path().join("staging");
    let limits = Limits::default();
    let error = Changes::stage(
        &archive[..],
        &b"r/HEAD\0"[..],
        &staging,
        &open(&exchange.host),
        &limits,
    )
    .unwrap_err();
    assert_eq!(error.code(), "archive-hostile");
    assert!(error.to_string().contains("`r/HEAD`"), "{error}");
}

#[test]
fn a_bare_repository_cannot_be_put_together_in_two_runs() {
    let mut exchange = Exchange::new(|_| {});
    // First what lurks, as plain files of a plain directory ...
    sh(&exchange.guest, "mkdir -p trap/hooks");
    plant(
        &exchange,
        &exchange.guest,
        "printf '[alias]\\n st = \"!touch %s\"\\n' $CANARY > trap/config",
    );
    exchange.apply();
    assert!(exchange.host.join("trap/config").exists());
    // ... then what makes git take it for a repository.
    exchange.send();
    sh(
        &exchange.guest,
        "mkdir -p trap/objects trap/refs; echo 'ref: refs/heads/main' > trap/HEAD",
    );
    let warnings = exchange.apply();
    assert!(warnings.contains("trap/HEAD"), "{warnings}");
    try_sh(&exchange.host.join("trap"), "git st");
    assert_eq!(canaries(&exchange), Vec::<String>::new());
}

#[test]
fn what_lurks_keeps_a_directory_from_becoming_a_repository() {
    for lurks in [
        "echo ../evil > trap/commondir",
        "echo ../evil > trap/gitdir",
        "mkdir trap/rebase-merge",
        "mkdir trap/rebase-apply",
        "mkdir trap/sequencer",
        "mkdir trap/worktrees",
        "mkdir trap/modules",
        "mkdir trap/remotes",
        "mkdir trap/branches",
    ] {
        let mut exchange = Exchange::new(|_| {});
        sh(&exchange.guest, &format!("mkdir trap; {lurks}"));
        exchange.apply();
        exchange.send();
        sh(
            &exchange.guest,
            "mkdir -p trap/objects trap/refs; echo 'ref: refs/heads/main' > trap/HEAD",
        );
        let warnings = exchange.apply();
        assert!(warnings.contains("trap/HEAD"), "{lurks}: {warnings}");
        assert!(!exchange.host.join("trap/HEAD").exists(), "{lurks}");
    }
}

#[test]
fn signs_of_a_repository_are_seen_through_disguises() {
    for refs in ["ref\u{17f}", "re\u{34f}fs", "refs. "] {
        let exchange = Exchange::new(|_| {});
        sh(
            &exchange.guest,
            &format!(
                "mkdir -p 'r/{refs}' r/hooks; echo x > r/HEAD; echo evil > r/hooks/pre-commit"
            ),
        );
        let warnings = exchange.apply();
        assert!(
            warnings.contains("r/hooks/pre-commit"),
            "{refs}: {warnings}"
        );
    }
}

/// Files of the working tree that the host's configuration runs or reads.
#[test]
fn what_the_hosts_configuration_names_stays_out() {
    let exchange = Exchange::new(|dir| {
        repository(dir);
        sh(
            dir,
            "mkdir -p .husky tools/real; echo old > .husky/pre-commit; ln -s tools/real attrs; echo > more
            git config core.hooksPath .husky; git config core.attributesFile attrs/attributes
            git config include.path ../extra.config; git config includeIf.gitdir:/.path $PWD/conditional
            printf '[include]\\n path = nested/deep.config\\n' > extra.config
            git add -A; git commit -q -m more
            git init -q sub; git -C sub config core.hooksPath ../shared-hooks",
        );
    });
    sh(
        &exchange.guest,
        "for f in .husky/pre-commit .husky/new/x tools/real/attributes extra.config conditional \
            nested/deep.config nested/fine sub/fine .HUSKY/x shared-hooks/pre-push; do
            mkdir -p $(dirname $f); echo evil > $f
        done",
    );
    let warnings = exchange.apply();
    for name in [
        ".husky/pre-commit",
        ".husky/new/x",
        ".HUSKY/x",
        "tools/real/attributes",
        "extra.config",
        "conditional",
        "nested/deep.config",
        "shared-hooks/pre-push",
    ] {
        let reason = format!("{name}: left out: git's configuration");
        assert!(warnings.contains(&reason), "{name}: {warnings}");
    }
    assert_eq!(
        sh(&exchange.host, "cat .husky/pre-commit nested/fine sub/fine"),
        "old\nevil\nevil\n"
    );
    // The repository may be elsewhere: of another working tree, or around it.
    for setup in [
        "git init -q ../main; cd ../main; git commit -q --allow-empty -m x
        git config core.hooksPath .husky; git worktree add -q ../host/tree; mv ../host/tree/.git ../host/",
        "git init -q ..; git config core.hooksPath host/.husky",
    ] {
        let exchange = Exchange::new(|dir| sh(dir, setup).clear());
        sh(&exchange.guest, "mkdir .husky; echo evil > .husky/pre-commit");
        let warnings = exchange.apply();
        let reason = ".husky/pre-commit: left out: git's configuration";
        assert!(warnings.contains(reason), "{setup}: {warnings}");
    }
    // Nor may a symlink take the place of what is named, now or once it is gone.
    let exchange = Exchange::new(|dir| {
        repository(dir);
        sh(dir, "git config core.hooksPath tools/hooks");
    });
    sh(
        &exchange.guest,
        "mkdir mine; echo evil > mine/hooks; ln -s mine tools",
    );
    assert!(exchange.apply().contains("tools: left out: git's"));
    assert!(!exchange.host.join("tools").exists());
}

#[test]
fn submodules_come_back_and_run_nothing() {
    let exchange = Exchange::new(repository);
    let other = exchange.top.path().join("other");
    fs::create_dir(&other).unwrap();
    repository(&other);
    sh(
        &exchange.guest,
        "git -c protocol.file.allow=always submodule --quiet add ../other sub; git commit -q -m sub",
    );
    let modules = exchange.guest.join(".git/modules/sub");
    plant(
        &exchange,
        &modules,
        "printf '[alias]\\n st = \"!touch %s\"\\n' $CANARY >> config; echo x > hooks/post-commit",
    );
    let warnings = exchange.apply();
    assert!(
        warnings.contains(".git/modules/sub/hooks/post-commit"),
        "{warnings}"
    );
    assert_eq!(
        sh(
            &exchange.host,
            "git status --porcelain; git -C sub log --format=%s"
        ),
        "first\n"
    );
    assert_eq!(
        sh(
            &exchange.host,
            "git -C sub status --porcelain; git submodule status | cut -c1"
        ),
        " \n"
    );
    try_sh(&exchange.host.join("sub"), "git st");
    assert_eq!(canaries(&exchange), Vec::<String>::new());
}

#[test]
fn other_working_trees_stay_out() {
    let exchange = Exchange::new(repository);
    sh(&exchange.guest, "git worktree add -q wt -b wt");
    let warnings = exchange.apply();
    assert!(warnings.contains("wt/.git"), "{warnings}");
    assert!(
        !exchange.host.join(".git/worktrees").exists() && !exchange.host.join("wt/.git").exists()
    );
    assert_eq!(
        sh(
            &exchange.host,
            "git log -1 --format=%s refs/heads/wt; git worktree prune; git status --porcelain"
        ),
        "first\n?? wt/\n"
    );
}

#[test]
fn the_inside_of_a_repository_is_summed_up_in_the_diff() {
    let exchange = Exchange::new(repository);
    sh(&exchange.guest, "echo 2 > a; git commit -q -a -m second");
    let text = String::from_utf8(exchange.diff()).unwrap();
    assert!(text.starts_with("# repository .git: "), "{text}");
    assert!(
        text.ends_with("--- a/a\n+++ b/a\n@@ -1 +1 @@\n-1\n+2\n"),
        "{text}"
    );
}
