//! Images made from scripts, archives and recipes.

mod support;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use support::{Bulkhead, Ran};

/// A copy of the prepared images, free to be added to.
fn with_copied_images() -> (Bulkhead, tempfile::TempDir) {
    let temp = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let bulkhead = Bulkhead::new();
    let base = bulkhead
        .state()
        .join("images/names/base")
        .canonicalize()
        .unwrap();
    let images = temp.path().join("images");
    fs::create_dir_all(images.join("names")).unwrap();
    let copied = Command::new("cp").arg("-a").args([&base, &images]).status();
    assert!(copied.unwrap().success());
    let id = base.file_name().unwrap().to_str().unwrap();
    std::os::unix::fs::symlink(format!("../{id}"), images.join("names/base")).unwrap();
    (bulkhead.with_state(temp.path()), temp)
}

fn run_in(bulkhead: &Bulkhead, image: &str, script: &str) -> Ran {
    let words = [
        "run", "--accel", "tcg", "--image", image, "--", "sh", "-c", script,
    ];
    bulkhead.raw(&words)
}

#[test]
fn a_script_makes_a_new_image() {
    let (bulkhead, temp) = with_copied_images();
    let script = temp.path().join("provision.sh");
    let text = "#!/bin/sh\nset -e\necho hello > /etc/greeting\nln /etc/greeting /etc/same\n\
                cp /bin/true /usr/local/bin/tool; chmod 4755 /usr/local/bin/tool\n\
                mkdir -p /home/agent/d; chown 1000:1000 /home/agent/d; echo left > /tmp/x\n";
    fs::write(&script, text).unwrap();
    let script = script.to_str().unwrap();
    let words = [
        "image", "build", "--from", "base", "--run", script, "--name", "greeting", "--accel", "tcg",
    ];
    let built = bulkhead.raw(&words);
    assert_eq!(built.code, 0, "{built:?}");
    let look = "cat /etc/greeting; stat -c %h /etc/same; stat -c %a /usr/local/bin/tool; \
                stat -c %u /home/agent/d; ls /tmp /workspace/input; id -un";
    let run = run_in(&bulkhead, "greeting", look);
    let expected = "hello\n2\n4755\n1000\n/tmp:\n\n/workspace/input:\nagent\n";
    assert_eq!((run.stdout.as_str(), run.code), (expected, 0), "{run:?}");
    let shown = bulkhead.raw(&["--json", "image", "inspect", "greeting"]);
    let shown: serde_json::Value = serde_json::from_str(&shown.stdout).unwrap();
    let base = bulkhead.raw(&["--json", "image", "inspect", "base"]);
    let base: serde_json::Value = serde_json::from_str(&base.stdout).unwrap();
    assert_eq!(shown["manifest"]["from"], base["id"]);
    assert_eq!(shown["manifest"]["packages"], base["manifest"]["packages"]);

    fs::write(script, "#!/bin/sh\nexit 3\n").unwrap();
    let words = [
        "image", "build", "--from", "base", "--run", script, "--name", "failed", "--accel", "tcg",
    ];
    let failed = bulkhead.raw(&words);
    assert_eq!(failed.code, 125, "{failed:?}");
    assert!(failed.stderr.contains("script-failed"), "{failed:?}");
    let list = bulkhead.raw(&["image", "ls"]).stdout;
    assert!(
        list.contains("greeting") && !list.contains("failed"),
        "{list}"
    );
    let list = bulkhead.json(&["image", "ls"]);
    let found = list.as_array().unwrap().iter();
    let mut found = found.filter(|one| one["names"] == serde_json::json!(["greeting"]));
    assert_eq!(found.next().map(|one| &one["id"]), Some(&shown["id"]));
    let removed = bulkhead.json(&["image", "rm", "greeting"]);
    assert_eq!(removed["removed"][0], shown["id"], "{removed}");
    assert!(!bulkhead.raw(&["image", "ls"]).stdout.contains("greeting"));
}

#[test]
fn a_root_tar_and_an_oci_layout_are_imported() {
    let (bulkhead, temp) = with_copied_images();
    // The guest's own root file system, as any tool would have packed it.
    let tar = temp.path().join("root.tar");
    let script = "tar -C / --one-file-system -cf - ./bin ./lib ./lib64 ./usr/bin ./usr/lib ./usr/lib64 ./etc";
    let words = [
        "run", "--accel", "tcg", "--image", "base", "--user", "root", "--", "sh", "-c", script,
    ];
    let made = bulkhead
        .command(&words)
        .stdout(fs::File::create(&tar).unwrap())
        .status();
    assert!(made.unwrap().success());
    let path = tar.to_str().unwrap();
    let words = [
        "image",
        "import",
        path,
        "--name",
        "plain",
        "--kernel-from",
        "base",
    ];
    assert_eq!(bulkhead.json(&words)["name"], "plain");
    let run = run_in(&bulkhead, "plain", "id -un; pwd");
    assert_eq!(
        (run.stdout.as_str(), run.code),
        ("agent\n/workspace/work\n", 0),
        "{run:?}"
    );

    let layout = temp.path().join("oci");
    oci_layout(&layout, &tar);
    let words = [
        "image",
        "import",
        layout.to_str().unwrap(),
        "--name",
        "oci",
        "--kernel-from",
        "base",
    ];
    let imported = bulkhead.raw(&words);
    assert_eq!(imported.code, 0, "{imported:?}");
    let run = run_in(
        &bulkhead,
        "oci",
        "cat /etc/layer; ls /etc/hostname /etc/debian_version",
    );
    assert_eq!(run.stdout, "upper\n/etc/hostname\n", "{run:?}");
    // A blob that is not what its name says.
    let blobs = layout.join("blobs/sha256");
    let largest = fs::read_dir(&blobs)
        .unwrap()
        .flatten()
        .max_by_key(|blob| blob.metadata().unwrap().len());
    let largest = largest.unwrap().path();
    let mut bytes = fs::read(&largest).unwrap();
    bytes[600] ^= 1;
    fs::write(&largest, bytes).unwrap();
    let words = [
        "image",
        "import",
        layout.to_str().unwrap(),
        "--name",
        "bad",
        "--kernel-from",
        "base",
    ];
    let refused = bulkhead.raw(&words);
    assert!(
        refused.code == 125 && refused.stderr.contains("help:"),
        "{refused:?}"
    );
}

/// Two layers: `lower`, and one that adds a file and hides another.
fn oci_layout(dir: &Path, lower: &Path) {
    let blobs = dir.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let put = |bytes: &[u8]| {
        let mut sum = Command::new("sha256sum")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        std::io::Write::write_all(&mut sum.stdin.take().unwrap(), bytes).unwrap();
        let digest = String::from_utf8(sum.wait_with_output().unwrap().stdout).unwrap();
        let digest = digest[..64].to_owned();
        fs::write(blobs.join(&digest), bytes).unwrap();
        serde_json::json!({ "digest": format!("sha256:{digest}"), "size": bytes.len() })
    };
    let with_type = |mut blob: serde_json::Value, kind: &str| {
        blob["mediaType"] = format!("application/vnd.oci.image.{kind}").into();
        blob
    };
    let mut upper = tar::Builder::new(Vec::new());
    for (name, text) in [("etc/layer", "upper\n"), ("etc/.wh.debian_version", "")] {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        upper
            .append_data(&mut header, name, text.as_bytes())
            .unwrap();
    }
    let layers = [fs::read(lower).unwrap(), upper.into_inner().unwrap()];
    let layers = layers.map(|layer| with_type(put(&layer), "layer.v1.tar"));
    let config =
        put(br#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}"#);
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": with_type(config, "config.v1+json"),
        "layers": layers,
    });
    let mut manifest = with_type(put(manifest.to_string().as_bytes()), "manifest.v1+json");
    manifest["platform"] = serde_json::json!({ "architecture": "amd64", "os": "linux" });
    let index = serde_json::json!({ "schemaVersion": 2, "manifests": [manifest] });
    fs::write(dir.join("index.json"), index.to_string()).unwrap();
    fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
}

#[test]
fn building_twice_gives_the_same_image_and_an_interrupted_build_nothing() {
    let prepared = Bulkhead::new();
    let temp = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let agent = std::env::var("BULKHEAD_TEST_AGENT").expect("run `cargo xtask test`");
    let words = ["image", "build", "base", "--agent", &agent];
    let bulkhead = Bulkhead::new().with_state(temp.path());
    let mut interrupted = bulkhead
        .command(&words)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let half_made = || {
        let names = fs::read_dir(temp.path().join("images"))
            .into_iter()
            .flatten();
        let mut names = names.map(|entry| entry.unwrap().file_name());
        names.any(|name| name.to_string_lossy().starts_with(".staging-"))
    };
    while !half_made() {
        std::thread::sleep(Duration::from_millis(50));
    }
    std::thread::sleep(Duration::from_secs(4));
    interrupted.kill().unwrap();
    interrupted.wait().unwrap();
    assert!(half_made(), "the build was over before it was interrupted");
    let built = bulkhead.raw(&words);
    assert_eq!(built.code, 0, "{built:?}");
    // The one that `cargo xtask setup` built earlier, from the same packages.
    let first = prepared.raw(&["--json", "image", "inspect", "base"]);
    let first: serde_json::Value = serde_json::from_str(&first.stdout).unwrap();
    assert_eq!(built.stdout.trim(), first["id"].as_str().unwrap());
    let names = |dir: &Path| {
        let mut names: Vec<String> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    let images = names(&temp.path().join("images"));
    assert_eq!(images, [".lock", "names", built.stdout.trim()]);
}
