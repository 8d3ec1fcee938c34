//! A file for `bulkhead run --spec`, and the plan that comes of it.
#![no_main]

use std::fs;
use std::sync::LazyLock;

use bulkhead::image::{Image, KernelFormat, Manifest};
use bulkhead::plan::{HostFacts, KernelChoice, Plan};
use bulkhead::spec::{Catalog, Request, Spec};
use bulkhead_fuzz::{check_error, temp};
use tempfile::TempDir;

static DIR: LazyLock<TempDir> = LazyLock::new(temp);

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let path = DIR.path().join("spec.toml");
    fs::write(&path, data).expect("it can be written");
    let request = match Request::load(&path) {
        Ok(request) => request,
        Err(error) => return check_error(&error),
    };
    // Files and flags are laid over each other.
    let request = Request::default().over(request);
    if let Err(error) = request.clone().resolve(&Catalog::default()) {
        check_error(&error);
    }
    let Ok(spec) = request.resolve_machine(&Catalog::default()) else {
        return;
    };
    let text = serde_json::to_string(&spec).expect("what resolves can be kept");
    let again: Spec = serde_json::from_str(&text).expect("what was kept can be read");
    assert_eq!(spec, again);

    let kernel = KernelChoice {
        path: "/kernel".into(),
        format: KernelFormat::Vmlinux,
    };
    let facts = HostFacts {
        qemu: "/qemu".into(),
        tsc_khz: None,
        vhost_vsock: false,
        closure: Ok(bulkhead::plan::jail::Closure::default()),
        unprivileged: false,
        lsm: None,
        open_kvm: false,
        raises_limits: true,
    };
    match Plan::new(&spec, &IMAGE, kernel, &facts) {
        Ok(plan) => {
            assert!(plan.args.iter().all(|word| !word.contains('\0')));
            let text = serde_json::to_string(&plan).expect("a plan can be kept");
            let again: Plan = serde_json::from_str(&text).expect("what was kept can be read");
            assert_eq!(plan, again);
        }
        Err(error) => check_error(&error),
    }
});

static IMAGE: LazyLock<Image> = LazyLock::new(|| Image {
    id: format!("sha256-{}", "0".repeat(64)),
    dir: "/image".into(),
    manifest: serde_json::from_str::<Manifest>(include_str!("../corpus/image/manifest.json"))
        .expect("it is one"),
});
