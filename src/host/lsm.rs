//! Which security module of the host confines processes by labels.

use std::fs;
use std::path::Path;

use crate::plan::jail::PROFILE;
use crate::plan::{LsmFacts, LsmKind};

/// The active module; none where neither AppArmor nor SELinux is.
pub fn active() -> Option<LsmFacts> {
    active_in(Path::new("/"))
}

fn active_in(root: &Path) -> Option<LsmFacts> {
    let read = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
    if read("sys/module/apparmor/parameters/enabled").trim() == "Y" {
        return Some(LsmFacts {
            kind: LsmKind::Apparmor,
            profile: has_profile(root),
        });
    }
    let selinux = root.join("sys/fs/selinux/enforce").exists();
    selinux.then_some(LsmFacts {
        kind: LsmKind::Selinux,
        profile: false,
    })
}

/// Whether our profile is loaded (apparmorfs). Only root may read the list, but
/// everybody the directory.
fn has_profile(root: &Path) -> bool {
    let dir = root.join("sys/kernel/security/apparmor");
    if let Ok(list) = fs::read_to_string(dir.join("profiles")) {
        let named = |line: &str| line.split(' ').next() == Some(PROFILE);
        return list.lines().any(named);
    }
    // `NAME.NUMBER`
    let loaded = fs::read_dir(dir.join("policy/profiles"));
    loaded.into_iter().flatten().flatten().any(|entry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        name.rsplit_once('.').map(|(name, _)| name) == Some(PROFILE)
    })
}

/// Whether SELinux only tells what it would refuse.
pub fn is_permissive() -> bool {
    fs::read_to_string("/sys/fs/selinux/enforce").is_ok_and(|text| text.trim() == "0")
}

/// The label a process has, as the module of that kind says it.
///
/// # Errors
/// The process is gone, or no such module is active.
pub fn label(pid: i32, kind: LsmKind) -> std::io::Result<String> {
    let read = |name: &str| fs::read(format!("/proc/{pid}/attr/{name}"));
    let text = match kind {
        // With several modules `current` may be another's (Linux 5.8).
        LsmKind::Apparmor => read("apparmor/current").or_else(|_| read("current")),
        LsmKind::Selinux => read("current"),
    };
    let text = String::from_utf8_lossy(&text?).into_owned();
    Ok(text.trim_end_matches(['\0', '\n']).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_and_profiles_are_found_by_their_files() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        assert_eq!(active_in(root.path()), None);
        write("sys/fs/selinux/enforce", "1");
        let found = active_in(root.path()).unwrap();
        assert_eq!((found.kind, found.profile), (LsmKind::Selinux, false));
        write("sys/module/apparmor/parameters/enabled", "Y\n");
        let found = active_in(root.path()).unwrap();
        assert_eq!((found.kind, found.profile), (LsmKind::Apparmor, false));
        let dir = "sys/kernel/security/apparmor";
        write(
            &format!("{dir}/policy/profiles/bulkhead-qemu.7/mode"),
            "enforce",
        );
        assert!(active_in(root.path()).unwrap().profile);
        write(&format!("{dir}/profiles"), "bulkhead-qemu-2 (enforce)\n");
        assert!(!active_in(root.path()).unwrap().profile);
        write(
            &format!("{dir}/profiles"),
            "a (enforce)\nbulkhead-qemu (complain)\n",
        );
        assert!(active_in(root.path()).unwrap().profile);
    }
}
