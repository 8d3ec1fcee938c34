//! What programs draw that ran already when their machine was saved: in eight
//! clones of one template, and in forks of one machine.

mod support;

use std::collections::BTreeSet;

use support::{Bulkhead, accel};

const MACHINE: [&str; 8] = [
    "--kernel", "tuned", "--memory", "256M", "--cpus", "1", "--disk", "64M",
];

/// Draws when it is told to, and has drawn from all of it before. The random
/// part of a TLS client's greeting is OpenSSL's: it has a generator of its own
/// in the memory of the program, and takes from the kernel when it begins, or
/// when it is told to.
const DRAWER: &str = r#"
import os, ssl, sys, time, uuid
def greeting():
    inward, outward = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(inward, outward, server_hostname='good.org')
    try:
        tls.do_handshake()
    except ssl.SSLWantReadError:
        pass
    # Record header, type, length and version come before it.
    return outward.read()[11:43].hex()
used = sys.argv[1] == 'used'
os.urandom(16), uuid.uuid4(), used and greeting()
open('/tmp/ready-' + sys.argv[1], 'w').close()
while not os.path.exists('/tmp/go'):
    time.sleep(0.05)
lines = ['urandom ' + os.urandom(16).hex(), 'uuid4 ' + str(uuid.uuid4())]
lines.append(('tls-used ' if used else 'tls-new ') + greeting())
if used:
    ssl.RAND_add(os.urandom(32), 32)
    lines.append('tls-reseeded ' + greeting())
with open('/tmp/new-' + sys.argv[1], 'w') as out:
    out.write('\n'.join(sys.argv[1] + '-' + line for line in lines) + '\n')
os.rename('/tmp/new-' + sys.argv[1], '/tmp/drawn-' + sys.argv[1])
"#;

/// Starts two of them, and waits until they have begun.
fn begin() -> String {
    format!(
        "cat > /tmp/draw.py <<'PYTHON'\n{DRAWER}\nPYTHON\n\
         for who in new used; do (python3 /tmp/draw.py $who </dev/null >/tmp/log 2>&1 &); done; \
         for who in new used; do while [ ! -e /tmp/ready-$who ]; do sleep 0.1; done; done"
    )
}

/// Has them draw, and tells what they drew.
const ASK: &str = "touch /tmp/go; for who in new used; do \
     while [ ! -e /tmp/drawn-$who ]; do sleep 0.05; done; cat /tmp/drawn-$who; done; \
     echo machine-id $(cat /etc/machine-id); echo hostname $(hostname)";

/// What each drew, line by line: all of it differs, but for what OpenSSL has in
/// memory, of which there are so many.
#[track_caller]
fn differ(told: &[String], greetings: usize) {
    let all: Vec<Vec<(&str, &str)>> = told
        .iter()
        .map(|one| {
            one.lines()
                .map(|line| line.split_once(' ').unwrap())
                .collect()
        })
        .collect();
    let names: Vec<&str> = all[0].iter().map(|(name, _)| *name).collect();
    assert_eq!(names.len(), 9, "{told:?}");
    for (at, name) in names.iter().enumerate() {
        let values: BTreeSet<&str> = all.iter().map(|one| one[at].1).collect();
        println!("{name}: {} of {} differ", values.len(), told.len());
        assert!(values.iter().all(|value| value.len() > 1), "{values:?}");
        let wanted = match *name {
            "used-tls-used" => greetings,
            _ => told.len(),
        };
        assert_eq!(values.len(), wanted, "{name}: {told:?}");
    }
}

/// Clones of a template of such a machine; gives what each of them drew.
#[track_caller]
fn clones(count: usize, options: &[&str]) -> Vec<String> {
    let bulkhead = Bulkhead::with_image("default").with_own_state();
    let fixed = [
        "template",
        "build",
        "--image",
        "default",
        "--accel",
        &accel(),
    ];
    let warm = begin();
    let warm = ["-u", "root", "--warm", &warm];
    let id = bulkhead.must(&[&fixed[..], &MACHINE, &warm, options].concat());
    let ask = format!("echo ready; read go; {ASK}");
    let rest = [
        "-u",
        "root",
        "--template",
        id.trim_end(),
        "--",
        "sh",
        "-c",
        &ask,
    ];
    let words = [&MACHINE[..], &rest].concat();
    let names: Vec<String> = (0..count).map(|at| format!("draw{at}")).collect();
    // All of them are there before the first one draws.
    let clones: Vec<_> = names
        .iter()
        .map(|name| bulkhead.start(name, &words))
        .collect();
    let told = clones.into_iter().map(|mut clone| {
        let first = clone.ask("go");
        let ran = clone.finish();
        assert_eq!(ran.code, 0, "{ran:?}");
        first + &ran.stdout
    });
    told.collect()
}

#[test]
fn eight_clones_draw_different_things() {
    differ(&clones(8, &[]), 8);
}

#[test]
fn with_a_true_clock_openssl_repeats_itself() {
    // The limit that docs/templates.md tells of.
    differ(&clones(2, &["--true-clock"]), 1);
}

#[test]
fn forks_and_the_machine_that_was_forked_draw_different_things() {
    let bulkhead = Bulkhead::with_image("default").with_own_state();
    let _vm = bulkhead.create("vm", &["--disk", "64M", "--start"]);
    let sh = |vm: &str, script: &str| bulkhead.must(&["exec", vm, "sh", "-c", script]);
    sh("vm", &begin());
    let _forks = ["f-1", "f-2"].map(|name| bulkhead.made(name));
    bulkhead.must(&["fork", "vm", "-n", "2", "--name", "f"]);
    let told = ["vm", "f-1", "f-2"].map(|vm| sh(vm, ASK));
    differ(&told, 1);
}
