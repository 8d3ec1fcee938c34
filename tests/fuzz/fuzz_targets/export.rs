//! An export, taken into stores: as it is, or with the chain and the
//! compression made right around what is in it.
#![no_main]

use std::fs;
use std::path::Path;

use bulkhead::error::Explain;
use bulkhead::export::{Content, Import, fuzz};
use bulkhead::spec::{Catalog, VmId};
use bulkhead::{snapshot, template};
use bulkhead_fuzz::{Node, check_error, temp, tree};

/// More data than this is not written: it is the same in small.
const MOST: u64 = 1 << 24;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((how, data)) = data.split_first() else {
        return;
    };
    let bytes = match how % 3 {
        0 => data.to_vec(),
        1 => fuzz::seal(data),
        _ => fuzz::seal_frame(data),
    };
    let import = match Import::open(&bytes[..], "x") {
        Ok(import) => import,
        Err(error) => return check_error(&error),
    };
    let header = import.header().clone();
    let again = serde_json::to_vec(&header).expect("it can be encoded");
    let again = serde_json::from_slice(&again).expect("it was just encoded");
    assert_eq!(header, again);
    if header.data > MOST {
        return;
    }
    let dir = temp();
    match &header.content {
        Content::Template(manifest) => {
            let store = template::Store::new(dir.path());
            match import.keep_template(&store) {
                Ok(kept) => {
                    assert_eq!(kept.manifest, **manifest);
                    assert!(store.get(&kept.id).is_ok());
                }
                Err(error) => refused(&error, &dir.path().join("templates")),
            }
        }
        Content::Snapshot { manifest, machine } => {
            let request = machine.request(&manifest.image, manifest.disk.size);
            match request.resolve_machine(&Catalog::default()) {
                Ok(spec) => harmless(&spec),
                Err(error) => check_error(&error),
            }
            let vm: VmId = "vm".parse().expect("it is a name");
            let store = snapshot::Store::new(dir.path(), &vm);
            let disk_only = how & 0x80 != 0;
            match import.keep_snapshot(&store, disk_only) {
                Ok(kept) => {
                    assert_eq!(kept.name, manifest.name);
                    assert!(!disk_only || kept.saved.is_none());
                    assert!(store.get(&kept.name).is_ok());
                }
                Err(error) => refused(&error, &dir.path().join("snapshots")),
            }
        }
    }
    // Directories and files, and nothing else, wherever it says to go.
    for node in tree(dir.path()).values() {
        assert!(matches!(node, Node::Dir | Node::File { .. }), "{node:?}");
    }
});

/// Nothing is left of what was not taken in.
fn refused(error: &dyn Explain, place: &Path) {
    check_error(error);
    let entries = fs::read_dir(place).into_iter().flatten().flatten();
    let mut names = entries.map(|entry| entry.file_name());
    assert!(names.all(|name| name == ".lock"));
}

/// Whatever an export says, it opens nothing of the host.
fn harmless(spec: &bulkhead::spec::Spec) {
    assert_eq!(spec.workspace.dir, None);
    assert!(spec.publish.is_empty() && !spec.nested);
    assert_eq!(spec.waive, Default::default());
    assert!(spec.network.exceptions.is_empty());
    assert!(spec.kernel.iter().all(|kernel| !kernel.contains('/')));
}
