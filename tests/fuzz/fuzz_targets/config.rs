//! A configuration file, laid under what a user asks for, and all it comes to.
#![no_main]

use std::path::Path;

use bulkhead::spec::{Config, Layer, NetworkPolicy, Request, merge};
use bulkhead_fuzz::check_error;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let layer = match Layer::file(Path::new("/etc/bulkhead/config.toml"), text) {
        Ok(layer) => layer,
        Err(error) => return check_error(&error),
    };
    let merged = match merge([&layer]) {
        Ok(merged) => merged,
        Err(error) => return check_error(&error),
    };
    let spec = match merged.resolve_machine() {
        Ok(spec) => spec,
        Err(error) => return check_error(&error),
    };
    // What resolves can be shown, key by key, and each says where it comes from.
    let settings = merged.settings().expect("what resolves can be shown");
    assert!(settings.iter().all(|one| !one.key.is_empty()));
    // What is held to is a whole policy, and stays one when it is kept.
    let text = serde_json::to_string(&spec.network).expect("a policy can be kept");
    let again: NetworkPolicy = serde_json::from_str(&text).expect("what was kept can be read");
    assert_eq!(spec.network, again);
    // Flags that say nothing change nothing.
    let flags = Layer::flags(Config {
        machine: Request::default(),
        ..Config::default()
    });
    let over = merge([&layer, &flags]).expect("nothing more is said");
    let other = over.resolve_machine().expect("nothing more is said");
    assert_eq!(
        (&spec.network, &spec.limits, &spec.profile),
        (&other.network, &other.limits, &other.profile)
    );
});
