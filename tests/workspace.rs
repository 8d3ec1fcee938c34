//! Changes of a guest: shown so that git applies them, and brought back whole.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use bulkhead::error::Explain;
use bulkhead::guest::archive::{Limits, PackLimits, pack};
use bulkhead::run::workspace::{ApplyOptions, Changes, DiffOptions, Error, apply, artifacts, diff};
use exchange::{Exchange, content, sh};
use tree::{open, sample, snapshot, temp};

#[path = "support/exchange.rs"]
#[allow(dead_code)]
mod exchange;
#[path = "support/tree.rs"]
#[allow(dead_code)]
mod tree;

/// A workspace of text, and what a guest does to it.
fn text(dir: &Path) {
    let numbers: String = (1..=60).map(|n| format!("line {n}\n")).collect();
    fs::write(dir.join("numbers"), numbers).unwrap();
    fs::write(dir.join("no newline"), "a\nb").unwrap();
    fs::write(dir.join("gone"), "x\ny\n").unwrap();
    fs::write(dir.join("script"), "#!/bin/sh\n").unwrap();
    fs::write(dir.join("becomes-link"), "text\n").unwrap();
    fs::write(dir.join("carriage"), "a\rb\r\nc\r").unwrap();
    symlink("numbers", dir.join("link")).unwrap();
    fs::create_dir_all(dir.join("old/deep")).unwrap();
    fs::write(dir.join("old/deep/file"), "old\n").unwrap();
    fs::write(dir.join("same"), "same\n").unwrap();
}

fn work(dir: &Path) {
    sh(
        dir,
        r"sed -i -e 's/^line 3$/line three/' -e '/^line 30$/d' -e '$a the end' numbers
        printf 'a\nb\nc' > 'no newline'; rm gone; chmod 755 script; ln -sfn same link
        rm becomes-link; ln -s same becomes-link; rm -r old; mkdir -p new/dir; : > new/dir/empty
        printf 'x\n' > 'new/with space'; printf 'caf\303\251\n' > new/utf8; printf 'a\rz\r\nc\r' > carriage
        printf 'only' > new/unended; touch -d 2001-01-01 same",
    );
}

#[test]
fn git_and_patch_apply_the_diff() {
    for tool in [
        "git apply --whitespace=nowarn ../changes.diff",
        "patch -s -p1 < ../changes.diff",
    ] {
        let exchange = Exchange::new(text);
        work(&exchange.guest);
        fs::write(exchange.top.path().join("changes.diff"), exchange.diff()).unwrap();
        if Command::new(tool.split(' ').next().unwrap())
            .arg("--version")
            .output()
            .is_err()
        {
            println!("skipped: git_and_patch_apply_the_diff: no `{tool}`");
            continue;
        }
        sh(&exchange.host, tool);
        let (found, expected) = (content(&exchange.host), content(&exchange.guest));
        assert_eq!(found, expected, "{tool}");
    }
}

#[test]
fn the_diff_names_odd_files_as_git_does() {
    let exchange = Exchange::new(|_| {});
    fs::write(exchange.guest.join("quote\"back\\slash"), "x\n").unwrap();
    fs::write(exchange.top.path().join("changes.diff"), exchange.diff()).unwrap();
    sh(
        &exchange.host,
        "git apply ../changes.diff && test -f 'quote\"back\\slash'",
    );
}

#[test]
fn binary_files_and_directories_are_summed_up() {
    let exchange = Exchange::new(|dir| fs::write(dir.join("b"), [0; 10]).unwrap());
    fs::write(exchange.guest.join("b"), [0; 20]).unwrap();
    fs::create_dir(exchange.guest.join("d")).unwrap();
    let text = String::from_utf8(exchange.diff()).unwrap();
    assert_eq!(
        text,
        "# b: binary or large file, 10 bytes -> 20 bytes\n# d: new directory\n"
    );
}

#[test]
fn a_nul_anywhere_makes_a_file_binary() {
    let exchange = Exchange::new(|_| {});
    sh(
        &exchange.guest,
        "(yes | head -c 20000; printf '\\0'; yes | head -c 20000) > late; (yes | head -c 9000) > holes; truncate -s 4M holes",
    );
    assert_eq!(
        String::from_utf8(exchange.diff()).unwrap(),
        "# holes: binary or large file, none -> 4194304 bytes\n# late: binary or large file, none -> 40001 bytes\n"
    );
}

#[test]
fn the_diff_has_an_end() {
    let exchange = Exchange::new(|_| {});
    sh(
        &exchange.guest,
        "yes line | head -c 700000 > a; cp a b; cp a c; echo small > d",
    );
    let options = DiffOptions {
        total: 1 << 20,
        ..DiffOptions::default()
    };
    let mut shown = Vec::new();
    diff(
        &open(&exchange.host),
        &exchange.stage(),
        &mut shown,
        &options,
    )
    .unwrap();
    assert!(shown.len() < (1 << 20) + 100);
    let shown = String::from_utf8(shown).unwrap();
    assert!(shown.ends_with("# diff cut after 1 MiB\n"));
    // Whole files only, which can be applied.
    fs::write(exchange.top.path().join("changes.diff"), shown).unwrap();
    sh(
        &exchange.host,
        "git apply --whitespace=nowarn ../changes.diff",
    );
    assert_eq!(sh(&exchange.host, "ls"), "a\n");
}

#[test]
fn a_terminal_is_not_driven_by_the_diff() {
    let exchange = Exchange::new(|_| {});
    fs::write(
        exchange.guest.join("evil"),
        "\x1b]0;owned\x07\ttab\u{202e}\n",
    )
    .unwrap();
    let mut shown = Vec::new();
    diff(
        &open(&exchange.host),
        &exchange.stage(),
        &mut shown,
        &DiffOptions {
            escape: true,
            ..DiffOptions::default()
        },
    )
    .unwrap();
    let shown = String::from_utf8(shown).unwrap();
    assert!(
        shown.contains("+\\u{1b}]0;owned\\u{7}\ttab\\u{202e}\n"),
        "{shown}"
    );
    assert!(!shown.contains(['\x1b', '\x07']));
}

#[test]
fn changes_are_brought_back_whole() {
    let exchange = Exchange::new(|dir| {
        text(dir);
        sample(&dir.join("old"));
    });
    work(&exchange.guest);
    let host = snapshot(&exchange.host);
    exchange.diff();
    assert_eq!(host, snapshot(&exchange.host), "showing changed something");
    assert_eq!(exchange.apply(), "");
    let files = |dir: &Path| {
        let mut all = snapshot(dir);
        all.retain(|_, what| !what.starts_with("link"));
        all
    };
    assert_eq!(files(&exchange.host), files(&exchange.guest));
    assert_eq!(content(&exchange.host), content(&exchange.guest));
    assert_eq!(
        fs::read_dir(exchange.top.path().join("staging"))
            .unwrap()
            .count(),
        0
    );
}

#[test]
fn files_become_directories_and_the_reverse() {
    let exchange = Exchange::new(|dir| {
        sh(
            dir,
            "mkdir -p d/e; echo 1 > d/e/f; echo 2 > g; ln -s d l; ln -s g m",
        )
        .clear()
    });
    sh(
        &exchange.guest,
        "rm -r d g l m; echo 3 > d; mkdir g l; echo 4 > g/h; echo 5 > l/i; echo 6 > m",
    );
    assert_eq!(exchange.apply(), "");
    assert_eq!(content(&exchange.host), content(&exchange.guest));
}

#[test]
fn a_mode_the_guest_left_alone_stays() {
    let exchange = Exchange::new(|dir| {
        sh(
            dir,
            "echo 1 > shared; chmod 666 shared; echo 1 > suid; chmod 4755 suid; mkdir d; chmod 2777 d",
        );
    });
    sh(
        &exchange.guest,
        "echo 2 > shared; echo 2 > suid; echo 2 > d/f; echo 2 > wide; chmod 777 wide",
    );
    exchange.apply();
    let mode = |name| fs::metadata(exchange.host.join(name)).unwrap().mode() & 0o7777;
    assert_eq!(
        [mode("shared"), mode("suid"), mode("d")],
        [0o666, 0o755, 0o2777]
    );
    assert_eq!(mode("wide") & 0o022, 0, "umask");
}

#[test]
fn what_changed_on_the_host_is_a_conflict() {
    let exchange = Exchange::new(|dir| {
        sh(
            dir,
            "echo 1 > a; echo 1 > b; echo 1 > c; echo 1 > d; echo 1 > e",
        )
        .clear()
    });
    sh(
        &exchange.guest,
        "echo guest > a; rm b; echo guest > new; echo guest > e; rm d",
    );
    sh(
        &exchange.host,
        "echo host > a; echo host > b; echo host > new; echo host > c; rm d e",
    );
    let before = snapshot(&exchange.host);
    let error = exchange.try_apply(false).unwrap_err();
    assert_eq!(error.code(), "workspace-conflict");
    let Error::Conflict { paths } = &error else {
        panic!("{error}")
    };
    assert_eq!(paths, &["a", "b", "e", "new"]);
    assert_eq!(
        before,
        snapshot(&exchange.host),
        "a refused apply changed something"
    );
    exchange.try_apply(true).unwrap();
    assert_eq!(
        sh(&exchange.host, "cat a c e new; ls"),
        "guest\nhost\nguest\nguest\na\nc\ne\nnew\n"
    );
}

#[test]
fn a_touch_that_keeps_size_and_time_is_still_a_conflict() {
    let exchange = Exchange::new(|dir| sh(dir, "echo 1 > a").clear());
    sh(&exchange.guest, "echo guest > a");
    sh(&exchange.host, "cp -p a ../a; echo 2 > a; touch -r ../a a");
    assert_eq!(
        exchange.try_apply(false).unwrap_err().code(),
        "workspace-conflict"
    );
}

#[test]
fn host_symlinks_are_never_written_through() {
    let exchange = Exchange::new(|dir| {
        sh(
            dir,
            "mkdir ../outside d; echo safe > ../outside/f; echo 1 > d/f",
        )
        .clear()
    });
    sh(&exchange.guest, "echo guest > d/f; echo guest > d/new");
    sh(&exchange.host, "rm -r d; ln -s ../outside d");
    assert_eq!(
        exchange.try_apply(false).unwrap_err().code(),
        "workspace-conflict"
    );
    let error = exchange.try_apply(true).unwrap_err();
    assert_eq!(error.code(), "workspace-partly-applied");
    assert_eq!(
        sh(&exchange.host, "cat ../outside/f; ls ../outside"),
        "safe\nf\n"
    );
}

/// The workspace may belong to a user who is not the one who applies.
#[test]
fn a_workspace_replaced_by_a_symlink_is_not_followed() {
    let exchange = Exchange::new(|dir| sh(dir, "mkdir ../outside; echo 1 > a; echo 1 > b").clear());
    sh(&exchange.guest, "echo guest > a; echo guest > new; rm b");
    let (archive, removed) = exchange.answer();
    let dir = open(&exchange.host);
    sh(
        exchange.top.path(),
        "echo secret > outside/a; echo safe > outside/b; mv host moved; ln -s outside host",
    );
    let packed = pack(&dir, std::io::sink(), &PackLimits::default()).unwrap();
    let staging = exchange.top.path().join("staging");
    let limits = Limits::default();
    let changes = Changes::stage(&archive[..], &removed[..], &staging, &dir, &limits).unwrap();
    let mut shown = Vec::new();
    diff(&dir, &changes, &mut shown, &DiffOptions::default()).unwrap();
    assert!(!String::from_utf8(shown).unwrap().contains("secret"));
    apply(&dir, &changes, &packed.manifest, &ApplyOptions::default()).unwrap();
    artifacts(&archive[..], &staging, &dir, &limits).unwrap();
    assert_eq!(
        sh(
            exchange.top.path(),
            "cat outside/*; ls -A outside; cat moved/*; ls -A moved"
        ),
        "secret\nsafe\na\nb\nguest\nguest\na\nnew\n"
    );
}

#[test]
fn a_partial_apply_lists_both_sides() {
    let exchange = Exchange::new(|dir| sh(dir, "mkdir d; echo 1 > d/f; echo 1 > z").clear());
    sh(&exchange.guest, "rm -r d; echo now a file > d; echo 2 > z");
    // Never packed, so the guest cannot have removed it.
    sh(&exchange.host, "mkfifo d/pipe");
    let error = exchange.try_apply(false).unwrap_err();
    let Error::Partial {
        applied,
        failed,
        kept,
    } = &error
    else {
        panic!("{error}")
    };
    let hidden = kept.as_deref().unwrap();
    assert!(hidden.starts_with(".bulkhead-apply-"), "{error}");
    assert_eq!(applied, &["z", "d/f"]);
    assert!(
        failed.len() == 1 && failed[0].starts_with("d ("),
        "{failed:?}"
    );
    assert_eq!(
        sh(&exchange.host, "cat z; ls -A d; ls -A"),
        format!("2\npipe\n{hidden}\nd\nz\n")
    );
    // What had no place is not lost, and stays out of the next guest.
    assert_eq!(
        sh(&exchange.host, "cat .bulkhead-apply-*/*"),
        "now a file\n"
    );
    let packed = pack(
        &open(&exchange.host),
        std::io::sink(),
        &PackLimits::default(),
    )
    .unwrap();
    assert!(
        packed
            .manifest
            .entries
            .keys()
            .all(|name| !name.as_bytes().starts_with(b".bulk"))
    );
}

#[test]
fn nothing_is_removed_when_something_cannot_be_placed() {
    let exchange =
        Exchange::new(|dir| sh(dir, "mkdir d; echo precious > d/old; echo 1 > d/f").clear());
    // The guest renames a file, and replaces a file by a directory ...
    sh(
        &exchange.guest,
        "mv d/old d/new; mkdir e; rm d/f; mkdir d/f; echo 2 > d/f/g",
    );
    // ... and the new name cannot be written: the host has a directory there.
    sh(&exchange.host, "mkdir -p d/new/in");
    let error = exchange.try_apply(true).unwrap_err();
    let Error::Partial { failed, kept, .. } = &error else {
        panic!("{error}")
    };
    assert_eq!(failed.len(), 2, "{error}");
    assert!(failed[1].starts_with("d/old (not removed"), "{error}");
    let hidden = exchange.host.join(kept.as_deref().unwrap());
    assert_eq!(
        sh(&exchange.host, "cat d/old d/f/g; ls d"),
        "precious\n2\nf\nnew\nold\n"
    );
    assert_eq!(sh(&hidden, "cat *"), "precious\n");
}

#[test]
fn a_guest_cannot_remove_what_it_never_had() {
    let exchange = Exchange::new(|dir| sh(dir, "echo 1 > a; echo 1 > b").clear());
    sh(&exchange.host, "echo mine > later; mkdir empty");
    let (staging, dir) = (exchange.top.path().join("staging"), open(&exchange.host));
    let manifest = pack(
        &open(&exchange.guest),
        std::io::sink(),
        &PackLimits::default(),
    )
    .unwrap()
    .manifest;
    let removed = &b"a\0later\0empty\0"[..];
    let limits = Limits::default();
    let changes = Changes::stage(&[0; 1024][..], removed, &staging, &dir, &limits).unwrap();
    let applied = apply(&dir, &changes, &manifest, &ApplyOptions { force: true }).unwrap();
    assert_eq!(sh(&exchange.host, "ls"), "b\nempty\nlater\n");
    assert_eq!(applied.removed.len(), 1);
    assert_eq!(applied.warnings.list.len(), 2);
}

#[test]
fn directories_of_others_keep_their_owner() {
    if !nix::unistd::Uid::effective().is_root() {
        println!("skipped: directories_of_others_keep_their_owner: not root");
        return;
    }
    let exchange = Exchange::new(|dir| sh(dir, "mkdir d; chown 1234:2345 .; chown 77 d").clear());
    sh(&exchange.guest, "chmod 700 d; mkdir d/new");
    exchange.apply();
    let owner = |name| fs::metadata(exchange.host.join(name)).unwrap().uid();
    assert_eq!((owner("d"), owner("d/new")), (77, 1234));
}

#[test]
fn everything_belongs_to_the_owner_of_the_workspace() {
    if !nix::unistd::Uid::effective().is_root() {
        println!("skipped: everything_belongs_to_the_owner_of_the_workspace: not root");
        return;
    }
    let exchange = Exchange::new(|dir| sh(dir, "echo 1 > a").clear());
    sh(&exchange.host, "chown 1234:2345 .");
    sh(
        &exchange.guest,
        "echo 2 > a; mkdir -p n/m; echo 3 > n/m/f; ln -s a l",
    );
    exchange.apply();
    for name in [".", "a", "n", "n/m", "n/m/f", "l"] {
        let meta = fs::symlink_metadata(exchange.host.join(name)).unwrap();
        assert_eq!((meta.uid(), meta.gid()), (1234, 2345), "{name}");
    }
}

#[test]
fn removed_names_that_escape_are_refused() {
    let exchange = Exchange::new(|_| {});
    let staging = exchange.top.path().join("staging");
    for removed in [&b"../x\0"[..], b"/etc\0", b"a\0cut short"] {
        let staged = Changes::stage(
            &[0; 1024][..],
            removed,
            &staging,
            &open(&exchange.host),
            &Limits::default(),
        );
        assert!(matches!(
            staged.unwrap_err().code(),
            "archive-hostile" | "archive-truncated"
        ));
    }
    assert_eq!(
        fs::read_dir(&staging).unwrap().count(),
        0,
        "a refused answer left its staging directory"
    );
}

#[test]
fn removed_names_are_counted_as_they_are_read() {
    let exchange = Exchange::new(|_| {});
    let staging = exchange.top.path().join("staging");
    let refused = |removed: &[u8], limits: &Limits| {
        let dir = open(&exchange.host);
        let staged = Changes::stage(&[0; 1024][..], removed, &staging, &dir, limits);
        staged.unwrap_err().code()
    };
    let few = Limits {
        entries: 10,
        ..Limits::default()
    };
    assert_eq!(refused(&b"a\0".repeat(11), &few), "archive-too-large");
    let short = Limits {
        name_bytes: 100,
        ..Limits::default()
    };
    let again = b"a name of some length\0".repeat(5);
    assert_eq!(refused(&again, &short), "archive-too-large");
    let deep = [&b"d/".repeat(20)[..], b"x\0"].concat();
    assert_eq!(refused(&deep, &short), "archive-too-large");
}

#[test]
fn artifacts_replace_files_of_the_same_name() {
    let (from, staging, to) = (temp(), temp(), temp());
    sh(from.path(), "echo new > report; mkdir sub; echo x > sub/y");
    let dir = to.path().join("made/here");
    fs::create_dir_all(&dir).unwrap();
    sh(&dir, "echo old > report; echo keep > other");
    let mut archive = Vec::new();
    pack(&open(from.path()), &mut archive, &PackLimits::default()).unwrap();
    let applied = artifacts(
        &archive[..],
        staging.path(),
        &open(&dir),
        &Limits::default(),
    )
    .unwrap();
    assert_eq!(applied.written.len(), 3);
    assert_eq!(sh(&dir, "cat report sub/y other"), "new\nx\nkeep\n");
}

#[test]
fn a_full_disk_is_named_and_leaves_the_workspace_alone() {
    const HELPER: &str = "BH_FULL_DISK";
    let name = "a_full_disk_is_named_and_leaves_the_workspace_alone";
    if std::env::var_os(HELPER).is_none() {
        // A mount of its own namespace goes away with the process.
        let mut unshare = Command::new("unshare");
        let unshare = unshare
            .args(["-m", "--"])
            .arg(std::env::current_exe().unwrap());
        let output = unshare
            .args(["--exact", name, "--nocapture"])
            .env(HELPER, "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        if text.contains("unshare failed") {
            println!("skipped: {name}: no private mount namespace: {text}");
            return;
        }
        assert!(
            output.status.success(),
            "{}{text}",
            String::from_utf8_lossy(&output.stdout)
        );
        return;
    }
    let exchange =
        Exchange::new(|dir| sh(dir, "mount -t tmpfs -o size=1m none .; echo 1 > a").clear());
    // The workspace was opened before the mount covered it: pack again.
    let mut exchange = exchange;
    exchange.send();
    sh(
        &exchange.guest,
        "echo 2 > a; head -c 3000000 /dev/zero | tr '\\0' x > big",
    );
    let before = snapshot(&exchange.host);
    let error = exchange.try_apply(false).unwrap_err();
    assert_eq!(
        (error.code(), error.to_string().contains("`big`")),
        ("no-space", true),
        "{error}"
    );
    assert_eq!(before, snapshot(&exchange.host));
    // The same while unpacking.
    let mut archive = Vec::new();
    pack(&open(&exchange.guest), &mut archive, &PackLimits::default()).unwrap();
    let staged = Changes::stage(
        &archive[..],
        &b""[..],
        &exchange.host,
        &open(&exchange.host),
        &Limits::default(),
    );
    assert_eq!(staged.unwrap_err().code(), "no-space");
    assert_eq!(
        before,
        snapshot(&exchange.host),
        "a refused answer left its staging directory"
    );
}

#[test]
fn other_file_systems_inside_the_workspace_are_written() {
    const HELPER: &str = "BH_INNER_MOUNT";
    let name = "other_file_systems_inside_the_workspace_are_written";
    if std::env::var_os(HELPER).is_none() {
        let mut unshare = Command::new("unshare");
        let unshare = unshare
            .args(["-m", "--"])
            .arg(std::env::current_exe().unwrap());
        let output = unshare
            .args(["--exact", name, "--nocapture"])
            .env(HELPER, "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        if text.contains("unshare failed") {
            println!("skipped: {name}: no private mount namespace: {text}");
            return;
        }
        assert!(
            output.status.success(),
            "{}{text}",
            String::from_utf8_lossy(&output.stdout)
        );
        return;
    }
    let exchange =
        Exchange::new(|dir| sh(dir, "mkdir m; mount -t tmpfs none m; echo 1 > m/a").clear());
    sh(&exchange.guest, "echo 2 > m/a; echo 3 > m/b; ln -s a m/l");
    assert_eq!(exchange.apply(), "");
    assert_eq!(
        sh(&exchange.host, "cat m/a m/b m/l; ls -A m; ls -A"),
        "2\n3\n2\na\nb\nl\nm\n"
    );
}

#[test]
fn modes_are_shown_and_kept() {
    let exchange = Exchange::new(|dir| sh(dir, "echo 1 > tool").clear());
    fs::set_permissions(
        exchange.guest.join("tool"),
        fs::Permissions::from_mode(0o755),
    )
    .unwrap();
    let text = String::from_utf8(exchange.diff()).unwrap();
    assert_eq!(
        text,
        "diff --git a/tool b/tool\nold mode 100644\nnew mode 100755\n"
    );
    exchange.apply();
    assert_eq!(
        fs::metadata(exchange.host.join("tool")).unwrap().mode() & 0o777,
        0o755
    );
}
