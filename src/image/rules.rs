//! What belongs in a root file system, and what would differ at every build.

use tar::EntryType;

/// What to do with an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rule {
    /// Write it.
    Pass,
    /// Write it, and keep its content for the manifest.
    Keep,
    /// Keep its content; it is written, completed, at the end.
    Rewrite,
    /// Leave it out.
    Drop,
}

/// Files with the same content in every image. The machine's identity is set
/// at boot; an empty machine-id is how systemd spells "not set yet".
pub(super) const FIXED: &[(&[u8], &str)] = &[
    (b"etc/hostname", "bulkhead\n"),
    (b"etc/machine-id", ""),
    (
        b"etc/hosts",
        "127.0.0.1 localhost bulkhead\n::1 localhost ip6-localhost\n",
    ),
    (b"etc/resolv.conf", ""),
];

/// Account databases.
pub(super) const ACCOUNTS: [&[u8]; 4] =
    [b"etc/passwd", b"etc/group", b"etc/shadow", b"etc/gshadow"];

/// Directories the guest agent and its user count on, with their modes.
pub(super) const DIRS: &[(&[u8], u32)] = &[
    (b"dev", 0o755),
    (b"etc", 0o755),
    (b"home", 0o755),
    (b"home/agent", 0o755),
    (b"proc", 0o555),
    (b"root", 0o700),
    (b"run", 0o755),
    (b"sys", 0o555),
    (b"tmp", 0o1777),
    (b"var", 0o755),
    (b"var/tmp", 0o1777),
    (b"workspace", 0o755),
    (b"workspace/input", 0o755),
    (b"workspace/output", 0o755),
    (b"workspace/work", 0o755),
];

/// Places whose content belongs to a running system.
const VOLATILE: &[&str] = &["dev", "proc", "sys", "run", "tmp", "var/tmp"];

/// Files that differ at every build or belong to one machine.
const LEFTOVERS: &[&str] = &[
    ".dockerenv",
    "etc/.pwd.lock",
    "etc/group-",
    "etc/gshadow-",
    "etc/passwd-",
    "etc/shadow-",
    "etc/subgid-",
    "etc/subuid-",
    "var/cache/ldconfig/aux-cache",
    "var/cache/apt/pkgcache.bin",
    "var/cache/apt/srcpkgcache.bin",
    "var/cache/debconf/config.dat-old",
    "var/cache/debconf/templates.dat-old",
    "var/lib/dbus/machine-id",
    "var/lib/dpkg/available-old",
    "var/lib/dpkg/diversions-old",
    "var/lib/dpkg/lock",
    "var/lib/dpkg/lock-frontend",
    "var/lib/dpkg/statoverride-old",
    "var/lib/dpkg/status-old",
    "var/lib/dpkg/triggers/Lock",
    "var/lib/systemd/random-seed",
    "var/lib/urandom/random-seed",
];

/// Documentation and translations, which nobody reads inside a machine.
/// Licences (`copyright`) stay: they must go with the programs.
const TRIMMED: &[&str] = &[
    "usr/share/doc",
    "usr/share/doc-base",
    "usr/share/gtk-doc",
    "usr/share/info",
    "usr/share/lintian",
    "usr/share/locale",
    "usr/share/man",
];

/// What to do with the entry at `path`; `trim` leaves documentation out.
pub(super) fn rule(path: &[u8], kind: EntryType, trim: bool) -> Rule {
    // Names that are no UTF-8 are nobody's business here.
    let Ok(path) = std::str::from_utf8(path) else {
        return Rule::Pass;
    };
    let is_dir = kind == EntryType::Directory;
    let below = |dir: &str| {
        path.strip_prefix(dir)
            .is_some_and(|rest| rest.starts_with('/'))
    };
    if VOLATILE.iter().any(|dir| below(dir)) || LEFTOVERS.contains(&path) {
        return Rule::Drop;
    }
    if !is_dir {
        let fixed = FIXED.iter().any(|(name, _)| *name == path.as_bytes());
        let key = path.starts_with("etc/ssh/ssh_host_") && path.contains("_key");
        let cache = below("var/cache/apt") || below("var/lib/apt/lists") || below("var/log");
        if fixed || key || cache {
            return Rule::Drop;
        }
    }
    if trim && TRIMMED.iter().any(|dir| below(dir)) {
        let licence = path.starts_with("usr/share/doc/")
            && (path.ends_with("/copyright") || (is_dir && path.matches('/').count() == 3));
        if !licence {
            return Rule::Drop;
        }
    }
    if kind == EntryType::Regular {
        if ACCOUNTS.contains(&path.as_bytes()) {
            return Rule::Rewrite;
        }
        let packages = path == "var/lib/dpkg/status"
            || below("var/lib/dpkg/status.d")
            || path == "lib/apk/db/installed"
            || path == "usr/lib/apk/db/installed";
        if packages {
            return Rule::Keep;
        }
    }
    Rule::Pass
}

/// Mode of an account database that did not exist before.
pub(super) fn mode_of(path: &[u8]) -> u32 {
    if path.ends_with(b"shadow") {
        0o600
    } else {
        0o644
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_state_is_left_out() {
        let file = |path: &str| rule(path.as_bytes(), EntryType::Regular, true);
        assert_eq!(file("etc/machine-id"), Rule::Drop);
        assert_eq!(file("etc/ssh/ssh_host_rsa_key.pub"), Rule::Drop);
        assert_eq!(file("run/lock/x"), Rule::Drop);
        assert_eq!(file("usr/share/man/man1/ls.1.gz"), Rule::Drop);
        assert_eq!(file("usr/share/doc/git/copyright"), Rule::Pass);
        assert_eq!(file("usr/share/doc/git/README"), Rule::Drop);
        assert_eq!(file("var/lib/dpkg/status"), Rule::Keep);
        assert_eq!(file("etc/passwd"), Rule::Rewrite);
        assert_eq!(file("running"), Rule::Pass);
        let man = b"usr/share/man/man1/ls.1.gz";
        assert_eq!(rule(man, EntryType::Regular, false), Rule::Pass);
        assert_eq!(rule(b"var/log", EntryType::Directory, true), Rule::Pass);
    }
}
