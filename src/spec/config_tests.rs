//! Layers: their order, the origin of what they say, and what is refused.

use std::ffi::OsString;
use std::path::Path;

use super::*;
use crate::error::Report;
use crate::spec::{Bytes, Timeout};

const SYSTEM: &str = "/etc/bulkhead/config.toml";

fn file(path: &str, text: &str) -> Layer {
    Layer::file(Path::new(path), text).unwrap()
}

fn environment(variables: &[(&str, &str)]) -> Result<Layer, SpecError> {
    Layer::environment(|name| {
        let found = variables.iter().find(|(known, _)| *known == name);
        found.map(|(_, value)| OsString::from(value))
    })
}

fn flags(machine: Request) -> Layer {
    Layer::flags(Config {
        machine,
        ..Config::default()
    })
}

/// Value and origin of a key, as text.
fn shown(merged: &Merged, words: &[&str]) -> (String, String) {
    let settings = merged.settings().unwrap();
    let found = settings.iter().find(|setting| setting.key == key(words));
    let found = found.unwrap_or_else(|| panic!("{words:?} is not in {settings:?}"));
    let value = match &found.value {
        Value::String(text) => text.clone(),
        value => value.to_string(),
    };
    (value, found.origin.to_string())
}

fn refused(text: &str) -> Report {
    let error = Layer::file(Path::new(SYSTEM), text).and_then(|layer| merge(&[layer]));
    Report::of(&error.and_then(|merged| merged.settings()).unwrap_err())
}

#[track_caller]
fn assert_says(report: &Report, code: &str, words: &[&str]) {
    assert_eq!(report.code, code, "{report:?}");
    let text = format!("{}: {}", report.what, report.cause);
    for word in words {
        assert!(text.contains(word), "{word} is not in {report:?}");
    }
}

#[test]
fn each_layer_wins_over_those_below() {
    let system = "state_dir = \"/a\"\nqemu = \"/q\"\n[machine]\nimage = \"a\"\nmemory = \"1G\"\n\
                  disk = \"5G\"\ntimeout = \"1s\"\nttl = \"1h\"\n";
    let user = "[machine]\nmemory = \"3G\"\n\n\ndisk = \"6G\"\ntimeout = \"2s\"\n";
    let spec = "timeout = \"4s\"\ncommand = [\"b\"]\nname = \"n\"\n";
    let layers = [
        file(SYSTEM, system),
        file("/u.toml", user),
        environment(&[("BULKHEAD_DISK", "7G"), ("BULKHEAD_TIMEOUT", "3s")]).unwrap(),
        Layer::spec(Path::new("s.toml"), spec).unwrap(),
        flags(Request {
            command: vec!["c".into()],
            timeout: Some(Timeout::secs(5)),
            ..Request::default()
        }),
    ];
    let show = |count: usize, words: &[&str]| shown(&merge(&layers[..count]).unwrap(), words);
    let text = |value: &str, origin: &str| (value.to_owned(), origin.to_owned());
    let all = layers.len();
    let system = |line| format!("{SYSTEM}:{line}");
    assert_eq!(show(all, &["state_dir"]), text("/a", &system(1)));
    assert_eq!(show(all, &["qemu"]), text("/q", &system(2)));
    assert_eq!(show(all, &["machine", "image"]), text("a", &system(4)));
    assert_eq!(show(all, &["machine", "memory"]), text("3G", "/u.toml:2"));
    assert_eq!(show(2, &["machine", "disk"]), text("6G", "/u.toml:5"));
    assert_eq!(show(all, &["machine", "disk"]), text("7G", "BULKHEAD_DISK"));
    let timeouts: Vec<_> = (1..=all)
        .map(|count| show(count, &["machine", "timeout"]))
        .collect();
    assert_eq!(
        timeouts,
        [
            text("1s", &system(7)),
            text("2s", "/u.toml:6"),
            text("3s", "BULKHEAD_TIMEOUT"),
            text("4s", "s.toml:1"),
            text("5s", "--timeout"),
        ]
    );
    assert_eq!(
        show(all, &["machine", "cpus"]),
        text("2", "profile standard")
    );
    assert_eq!(show(all, &["machine", "channel"]), text("auto", "default"));
    assert_eq!(show(all, &["machine", "kernel"]), text("null", "default"));
    let spec = merge(&layers).unwrap().resolve().unwrap();
    assert_eq!(
        (spec.id.as_str(), &spec.command.argv[..]),
        ("n", &["c".to_owned()][..])
    );
}

#[test]
fn tables_are_merged_entry_by_entry() {
    let layers = [
        file(
            SYSTEM,
            "[machine.env]\nA = \"1\"\nB = \"1\"\n[machine.labels]\n\"a/b.c\" = \"x\"\n",
        ),
        file("/u.toml", "[machine]\nenv = { B = \"2\" }\n"),
    ];
    let merged = merge(&layers).unwrap();
    let show = |words: &[&str]| shown(&merged, words).1;
    assert_eq!(show(&["machine", "env", "A"]), format!("{SYSTEM}:2"));
    assert_eq!(show(&["machine", "env", "B"]), "/u.toml:2");
    assert_eq!(show(&["machine", "labels", "a/b.c"]), format!("{SYSTEM}:5"));
    let env = &merged.config.machine.env;
    assert_eq!((env["A"].as_str(), env["B"].as_str()), ("1", "2"));
}

#[test]
fn a_profile_named_above_takes_the_place_of_limits_below() {
    let below = file(
        SYSTEM,
        "[machine]\nmemory = \"1G\"\nnetwork = \"off\"\n[network.off]\nmode = \"isolated\"\n",
    );
    let named = |profile: &str| {
        flags(Request {
            profile: Some(profile.parse().unwrap()),
            ..Request::default()
        })
    };
    let merged = merge(&[below.clone(), named("intensive")]).unwrap();
    let text = |value: &str, origin: &str| (value.to_owned(), origin.to_owned());
    assert_eq!(
        shown(&merged, &["machine", "memory"]),
        text("4G", "profile intensive")
    );
    assert_eq!(
        shown(&merged, &["machine", "network"]),
        text("off", &format!("{SYSTEM}:3"))
    );
    assert_eq!(shown(&merged, &["machine", "profile"]).1, "--profile");
    let merged = merge(&[below, named("isolated")]).unwrap();
    assert_eq!(
        shown(&merged, &["machine", "network"]),
        text("isolated", "profile isolated")
    );
}

#[test]
fn a_profile_defined_again_is_replaced_as_a_whole() {
    let layers = [
        file(
            SYSTEM,
            "[profile.big]\nbase = \"intensive\"\nmemory = \"9G\"\n",
        ),
        file(
            "/u.toml",
            "[machine]\nprofile = \"big\"\n[profile.big]\ncpus = 3\n",
        ),
    ];
    let merged = merge(&layers).unwrap();
    let spec = merged.resolve_machine().unwrap();
    assert_eq!((spec.limits.vcpus, spec.limits.memory), (3, Bytes::gib(2)));
    assert_eq!(shown(&merged, &["profile", "big", "cpus"]).1, "/u.toml:4");
    let settings = merged.settings().unwrap();
    let memory = key(&["profile", "big", "memory"]);
    assert!(settings.iter().all(|setting| setting.key != memory));
}

#[test]
fn every_scalar_key_has_a_variable() {
    let variables = [
        ("BULKHEAD_STATE_DIR", "/s"),
        ("BULKHEAD_IMAGE", "i"),
        ("BULKHEAD_KERNEL", "tuned"),
        ("BULKHEAD_PROFILE", "light"),
        ("BULKHEAD_CPUS", "3"),
        ("BULKHEAD_MEMORY", "3G"),
        ("BULKHEAD_DISK", "3G"),
        ("BULKHEAD_TIMEOUT", "3s"),
        ("BULKHEAD_TTL", "3h"),
        ("BULKHEAD_IDLE_TIMEOUT", "3m"),
        ("BULKHEAD_SURVIVORS", "adopt"),
        ("BULKHEAD_STOP_GRACE", "3s"),
        ("BULKHEAD_NETWORK", "isolated"),
        ("BULKHEAD_ACCEL", "tcg"),
        ("BULKHEAD_MACHINE", "q35"),
        ("BULKHEAD_CHANNEL", "serial"),
        ("BULKHEAD_WAIVE", "seccomp"),
        ("BULKHEAD_LSM_LABEL", "a_t:s0"),
        ("BULKHEAD_USER", "1000"),
        ("BULKHEAD_WORKDIR", "/w"),
    ];
    let merged = merge(&[environment(&variables).unwrap()]).unwrap();
    for (name, _) in variables {
        let word = name.trim_start_matches("BULKHEAD_").to_lowercase();
        let words = match word.as_str() {
            "state_dir" => vec![word.as_str()],
            word => vec!["machine", word],
        };
        assert_eq!(shown(&merged, &words).1, name);
    }
    assert_eq!(variables.len(), MACHINE_KEYS.len() - MAPS.len() + 1);
    let empty = environment(&[("BULKHEAD_MEMORY", "")]).unwrap();
    assert_eq!(empty.config, Config::default());
    for (name, value) in [("BULKHEAD_CPUS", "two"), ("BULKHEAD_ACCEL", "xen")] {
        let error = environment(&[(name, value)]).unwrap_err();
        assert_says(&Report::of(&error), "variable-invalid", &[name]);
    }
}

#[test]
fn unknown_keys_are_named_with_file_line_and_key() {
    let report = refused("qemu = \"/q\"\nstatedir = \"/s\"\n");
    assert_says(&report, "config-invalid", &[SYSTEM, "line 2", "statedir"]);
    let report = refused("[machine]\n\nmemroy = \"1G\"\n");
    assert_says(
        &report,
        "config-invalid",
        &[SYSTEM, "line 3", "machine.memroy"],
    );
    // A name, a command or a workspace is one machine's.
    for text in ["name = \"a\"", "command = [\"a\"]", "workspace = \"/w\""] {
        let report = refused(&format!("[machine]\n{text}\n"));
        assert_says(&report, "config-invalid", &[SYSTEM, "line 2"]);
    }
    let report = refused("[profile.big]\nvcpus = 1\n");
    assert_says(&report, "config-invalid", &[SYSTEM, "line 2", "vcpus"]);
    // What nothing enforces must not look as if it were.
    let report = refused("[network.lan]\nmode = \"isolated\"\nallow = [\"10.0.0.0/8\"]\n");
    assert_says(&report, "config-invalid", &[SYSTEM, "line 3", "allow"]);
    let report = refused("[network.lan]\nmode = \"bridged\"\n");
    assert_says(&report, "config-invalid", &[SYSTEM, "line 2", "bridged"]);
    let report = refused("[network.lan]\nmode = \"bridge\"\n");
    assert_says(&report, "value-invalid", &[SYSTEM, "bridge"]);
    // An address is one machine's.
    let report = refused("[machine]\nbridge = \"br0:192.0.2.50/24@192.0.2.1\"\n");
    assert_says(&report, "config-invalid", &[SYSTEM, "line 2", "bridge"]);
}

#[test]
fn the_file_that_is_wrong_is_named() {
    let layers = [
        file(SYSTEM, "[machine]\nmemory = \"1G\"\n"),
        file("/u.toml", "# mine\n[machine]\nmemory = \"1M\"\n"),
    ];
    let error = merge(&layers).unwrap().resolve_machine().unwrap_err();
    assert_says(&Report::of(&error), "value-invalid", &["/u.toml:3", "1M"]);
    let layers = [
        file(SYSTEM, "[machine]\nprofile = \"big\"\n"),
        file("/u.toml", "[profile.huge]\n"),
    ];
    let error = merge(&layers).unwrap().resolve_machine().unwrap_err();
    let at = format!("{SYSTEM}:2");
    assert_says(
        &Report::of(&error),
        "profile-unknown",
        &[&at, "big", "huge", "light"],
    );
    let asked = flags(Request {
        profile: Some("vast".parse().unwrap()),
        ..Request::default()
    });
    let error = merge([&layers[0], &asked]).unwrap().resolve_machine();
    let report = Report::of(&error.unwrap_err());
    assert_says(&report, "profile-unknown", &["vast", "light"]);
}

#[test]
fn definitions_that_cannot_be_are_refused_at_their_line() {
    for (text, code, word) in [
        ("[profile.light]\ncpus = 1\n", "name-taken", ":1"),
        (
            "[profile.a]\ncpus = 1\nbase = \"b\"\n",
            "profile-unknown",
            ":3",
        ),
        (
            "[profile.a]\nbase = \"light\"\ncpus = 99\n",
            "value-invalid",
            ":3",
        ),
        (
            "[profile.a]\nbase = \"light\"\nnetwork = \"lan\"\n",
            "network-unknown",
            ":3",
        ),
        (
            "\n[network.bridge]\nmode = \"isolated\"\n",
            "name-taken",
            ":3",
        ),
        ("[machine]\nnetwork = \"lan\"\n", "network-unknown", ":2"),
    ] {
        let at = format!("{SYSTEM}{word}");
        assert_says(&refused(text), code, &[&at]);
    }
}

#[test]
fn a_file_means_the_same_wherever_it_is_used() {
    for text in [
        "state_dir = \"s\"",
        "runtime_dir = \"./r\"",
        "qemu = \"qemu-system-x86_64\"",
        "[machine]\nkernel = \"./vmlinux\"",
    ] {
        assert_says(&refused(text), "config-invalid", &[SYSTEM, "line", "/"]);
    }
    file(SYSTEM, "[machine]\nkernel = \"tuned\"\n");
}

#[test]
fn the_boot_timeout_is_read_from_every_layer() {
    let layers = [
        file(SYSTEM, "boot_timeout = \"1m\"\n"),
        environment(&[("BULKHEAD_BOOT_TIMEOUT", "2m")]).unwrap(),
        Layer::flags(Config {
            boot_timeout: Some(Timeout::secs(180)),
            ..Config::default()
        }),
    ];
    for (count, seconds) in [(1, 60), (2, 120), (3, 180)] {
        let merged = merge(&layers[..count]).unwrap();
        assert_eq!(merged.config.boot_timeout, Some(Timeout::secs(seconds)));
    }
    let refused = environment(&[("BULKHEAD_BOOT_TIMEOUT", "x")]);
    assert_says(
        &Report::of(&refused.unwrap_err()),
        "variable-invalid",
        &["BULKHEAD_BOOT_TIMEOUT"],
    );
}
