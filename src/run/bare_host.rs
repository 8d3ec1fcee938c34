//! A host for tests, on which nothing can be started: images of small files, and
//! another program in QEMU's place.

use std::fs;
use std::path::PathBuf;

use serde_json::json;
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

use super::{Dirs, Host, stale};
use crate::host::probe;
use crate::plan::Ram;
use crate::spec::{Catalog, ProfileName, Request, Spec};
use crate::template::{DISK, Described, Key, RAM, STATE, Template};

pub(crate) struct BareHost {
    pub(crate) host: Host,
    pub(crate) dir: TempDir,
}

impl BareHost {
    /// With an image `base`.
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let dirs = Dirs {
            state: dir.path().join("state"),
            runtime: dir.path().join("run"),
        };
        let qemu = dir.path().join("qemu");
        fs::copy("/bin/sh", &qemu).unwrap();
        let host = Host {
            qemu: Some(qemu),
            ..Host::new(dirs)
        };
        let made = Self { host, dir };
        made.image("base", "agent");
        made
    }

    /// Makes an image, and lets `name` stand for it; gives its id.
    pub(crate) fn image(&self, name: &str, agent: &str) -> String {
        let digest = |bytes: &[u8]| {
            let digest = Sha256::digest(bytes);
            digest
                .iter()
                .map(|b| format!("{b:02x}"))
                .collect::<String>()
        };
        let file = |name: &str| json!({ "file": name, "size": name.len(), "sha256": digest(name.as_bytes()) });
        let manifest = json!({
            "schema": 1,
            "name": name,
            "root": file("root"),
            "kernel": { "image": file("kernel"), "release": "6.12.0", "format": "bzimage" },
            "initramfs": file("initramfs"),
            "agent": { "version": "0.1.0", "protocol": 1, "sha256": digest(agent.as_bytes()) },
            "packages": [],
        });
        let text = serde_json::to_vec(&manifest).unwrap();
        let id = format!("sha256-{}", digest(&text));
        let images = self.host.images().dir().to_owned();
        let dir = images.join(&id);
        fs::create_dir_all(&dir).unwrap();
        fs::create_dir_all(images.join("names")).unwrap();
        for name in ["root", "kernel", "initramfs"] {
            fs::write(dir.join(name), name).unwrap();
        }
        fs::write(dir.join("manifest.json"), text).unwrap();
        let link = images.join("names").join(name);
        let _ = fs::remove_file(&link);
        std::os::unix::fs::symlink(PathBuf::from("..").join(&id), link).unwrap();
        id
    }

    /// A machine of the image `base` under KVM.
    pub(crate) fn spec(&self) -> Spec {
        let request: Request = toml::from_str(
            "name = \"vm\"\nimage = \"base\"\naccel = \"kvm\"\nnetwork = \"isolated\"\n\
             memory = \"256M\"\ndisk = \"64M\"\n",
        )
        .unwrap();
        request.resolve_machine(&Catalog::default()).unwrap()
    }

    /// What a machine of `spec` would have to have in common with what was saved.
    pub(crate) fn key(&self, spec: &Spec) -> Key {
        let ram = Ram::Restored { backed: false };
        self.host.plan_with(spec, ram).unwrap().2
    }

    /// `key` with another value of a part.
    pub(crate) fn changed(key: &Key, part: &str, value: &str) -> Key {
        let mut parts = serde_json::to_value(key).unwrap();
        parts[part] = value.into();
        serde_json::from_value(parts).unwrap()
    }

    /// A template with this key, which need not be this host's.
    pub(crate) fn template(&self, key: Key, kernel: Option<String>) -> Template {
        let store = self.host.templates();
        let staged = store.stage().unwrap();
        for (name, size) in [(RAM, 256 << 20), (STATE, 5), (DISK, 64 << 20)] {
            let file = fs::File::create(staged.path().join(name)).unwrap();
            file.set_len(size).unwrap();
        }
        let of = Described {
            key,
            life: bulkhead_agent::Life::default(),
            created_ms: 1,
            image: "base".into(),
            profile: ProfileName::default(),
            warm: None,
            behind: true,
            qemu: serde_json::from_str(r#"{"major":7,"minor":2,"micro":0,"package":""}"#).unwrap(),
            kernel,
        };
        store.commit(staged, of).unwrap()
    }

    /// Its processor, as it is told.
    pub(crate) fn processor(&self) -> String {
        let qemu = probe::find_qemu(self.host.qemu.as_deref()).unwrap();
        let facts = probe::facts(qemu, &self.host.dirs.cache());
        stale::here(&self.host, Some(&facts)).unwrap().processor
    }
}
