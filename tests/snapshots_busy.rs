//! Snapshots of guests that write all the while: to a database, and to memory.

mod support;

use std::collections::BTreeMap;

use serde_json::Value;
use support::{Bulkhead, Detached};

/// A database for that.
const PREPARE: &str = r#"
import sqlite3
db = sqlite3.connect('/var/busy.db')
db.execute('pragma journal_mode=wal')
db.execute('create table chain (n integer primary key, noise blob, sum text)')
"#;

/// Writes to a database as fast as it can, each row with a digest of all before
/// it, and each transaction on disk before the next. Knows what it wrote last,
/// and ends where the database knows less.
const WRITER: &str = r#"
import hashlib, os, sqlite3
db = sqlite3.connect('/var/busy.db', isolation_level=None)
db.execute('pragma synchronous=full')
n, last = 0, ''
while True:
    noise = os.urandom(2000)
    last = hashlib.sha256(last.encode() + noise).hexdigest()
    db.execute('begin')
    db.execute('insert into chain values (?, ?, ?)', (n, noise, last))
    db.execute('commit')
    n += 1
    assert db.execute('select count(*) from chain').fetchone()[0] == n
"#;

/// Says how long the chain is, and ends with an error where it is broken.
const CHECKER: &str = r#"
import hashlib, sqlite3
db = sqlite3.connect('/var/busy.db', timeout=60)
assert db.execute('pragma integrity_check').fetchone()[0] == 'ok'
last, count = '', 0
for n, noise, told in db.execute('select n, noise, sum from chain order by n'):
    last = hashlib.sha256(last.encode() + noise).hexdigest()
    assert (n, told) == (count, last), n
    count += 1
print(count)
"#;

/// Writes to 48 MiB of memory over and over, and tells when a page is not what
/// it was written last.
const SCRIBBLER: &str = r#"
import os
size, page, generation = 48 << 20, 4096, 0
memory = bytearray(size)
while True:
    mark = bytes([generation % 251]) * page
    for at in range(0, size, page):
        memory[at:at + page] = mark
    assert memory.count(mark[:1]) == size
    generation += 1
    with open('/tmp/new', 'w') as out:
        out.write(str(generation))
    os.rename('/tmp/new', '/tmp/generation')
"#;

/// Runs a script as root; it must succeed.
#[track_caller]
fn sh(bulkhead: &Bulkhead, vm: &str, script: &str) -> String {
    bulkhead.must(&["exec", "-u", "root", vm, "sh", "-c", script])
}

fn busy(bulkhead: &Bulkhead) -> Detached<'_> {
    let vm = bulkhead.create("vm", &["--disk", "256M", "--start"]);
    let file =
        |name: &str, text: &str| format!("cat > /var/{name}.py <<'PYTHON'\n{text}\nPYTHON\n");
    let write = [
        file("prepare", PREPARE),
        file("writer", WRITER),
        file("checker", CHECKER),
        file("scribbler", SCRIBBLER),
    ];
    sh(bulkhead, "vm", &write.concat());
    vm
}

/// Starts something that runs on when the command has ended.
fn begin(bulkhead: &Bulkhead, name: &str) {
    let script = format!("(python3 /var/{name}.py </dev/null >/var/{name}.log 2>&1 &)");
    sh(bulkhead, "vm", &script);
}

#[track_caller]
fn rows(bulkhead: &Bulkhead) -> u64 {
    let told = sh(bulkhead, "vm", "python3 /var/checker.py && cat /var/*.log");
    // The logs of what runs are empty.
    told.trim().parse().unwrap_or_else(|_| panic!("{told}"))
}

/// Waits until there are more rows than these.
#[track_caller]
fn grows(bulkhead: &Bulkhead, from: u64) -> u64 {
    for _ in 0..60 {
        let now = rows(bulkhead);
        if now > from {
            return now;
        }
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
    panic!("nothing is written any more after {from} rows");
}

fn paused_ms(bulkhead: &Bulkhead, name: &str) -> u64 {
    let told: Value = bulkhead.json(&["snapshot", "inspect", "vm", name]);
    told["manifest"]["saved"]["paused_ms"].as_u64().unwrap()
}

#[test]
fn a_database_that_is_written_to_is_whole_in_every_snapshot() {
    let bulkhead = Bulkhead::with_image("default").with_own_state();
    let _vm = busy(&bulkhead);
    sh(&bulkhead, "vm", "python3 /var/prepare.py");
    begin(&bulkhead, "writer");
    grows(&bulkhead, 5);
    let mut saved = Vec::new();
    for name in ["one", "two"] {
        let before = rows(&bulkhead);
        bulkhead.must(&["snapshot", "save", "vm", name]);
        saved.push((name, before, grows(&bulkhead, before)));
        println!("{name} stood still for {} ms", paused_ms(&bulkhead, name));
    }
    bulkhead.must(&["snapshot", "save", "--disk-only", "vm", "disk"]);
    for (name, before, _) in [saved[1], saved[0], saved[1]] {
        bulkhead.must(&["snapshot", "restore", "vm", name]);
        // The writer was in it, and goes on.
        let now = rows(&bulkhead);
        assert!(
            now >= before,
            "{name}: {now} rows, {before} when it was saved"
        );
        grows(&bulkhead, now);
    }
    // Without the memory it is what a power cut leaves: whole, and nothing lost.
    bulkhead.must(&["snapshot", "restore", "vm", "disk"]);
    let now = rows(&bulkhead);
    assert!(now >= saved[1].2, "{now} rows and {saved:?}");
}

/// The bytes that whole pages of a saved memory consist of, and how many pages
/// of each there are; pages of zeroes are not in the file.
fn marks(state: &std::path::Path) -> BTreeMap<u8, usize> {
    let (mut marks, mut last, mut run) = (BTreeMap::new(), None, 0);
    for byte in std::fs::read(state).unwrap() {
        run = if last == Some(byte) { run + 1 } else { 1 };
        last = Some(byte);
        if run % 4096 == 0 {
            *marks.entry(byte).or_default() += 1;
        }
    }
    // Others fill pages, too: few, or the kernel with what it frees of itself.
    marks.retain(|byte, pages| *byte != 0xcc && *pages > 100);
    marks
}

#[test]
fn memory_that_is_written_to_all_the_while_is_saved_as_it_was_at_one_moment() {
    let bulkhead = Bulkhead::with_image("default").with_own_state();
    let _vm = busy(&bulkhead);
    begin(&bulkhead, "scribbler");
    let generation = || -> u64 {
        let told = sh(
            &bulkhead,
            "vm",
            "cat /tmp/generation; cat /var/scribbler.log",
        );
        told.trim().parse().unwrap_or_else(|_| panic!("{told}"))
    };
    sh(
        &bulkhead,
        "vm",
        "while [ ! -s /tmp/generation ]; do sleep 0.1; done",
    );
    let at = generation();
    bulkhead.must(&["snapshot", "save", "vm", "s"]);
    println!("it stood still for {} ms", paused_ms(&bulkhead, "s"));
    // What was being written then, and what was written before.
    // Under KVM it runs on, and pages are in the file again and again.
    if support::accel() == "tcg" {
        let marks = marks(&bulkhead.state().join("runs/vm/snapshots/s/state"));
        assert!((1..=2).contains(&marks.len()), "pages of {marks:?}");
    }
    for _ in 0..3 {
        bulkhead.must(&["snapshot", "restore", "vm", "s"]);
        let restored = generation();
        assert!(restored >= at, "{restored} after {at}");
        sh(
            &bulkhead,
            "vm",
            &format!(
                "while [ $(cat /tmp/generation) -lt {} ]; do sleep 0.1; done",
                restored + 2
            ),
        );
        generation();
    }
}
