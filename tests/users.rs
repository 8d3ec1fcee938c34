//! Who is heard at the control socket of a machine.

mod support;

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use support::{Bulkhead, Ran, ran};

/// Somebody who owns nothing here.
const STRANGER: u32 = 12_346;

/// Asks a socket for something, and prints what it answers.
const ASK: &str = r#"
    use IO::Socket::UNIX;
    $SIG{PIPE} = 'IGNORE';
    my $socket = IO::Socket::UNIX->new(Peer => $ARGV[0]) or die "cannot connect: $!\n";
    print $socket "$ARGV[1]\n";
    $socket->flush;
    my $line = <$socket>;
    print defined $line ? $line : "nothing\n";
"#;

/// As this user, with nothing of root's.
fn called(mut command: Command, uid: u32) -> Ran {
    command.current_dir("/").stdin(Stdio::null());
    if uid != 0 {
        command.uid(uid).gid(uid);
    }
    ran(command.output().unwrap())
}

fn asked(socket: &Path, uid: u32, ask: &str) -> Ran {
    let mut command = Command::new("perl");
    command.args(["-e", ASK]).arg(socket).arg(ask);
    called(command, uid)
}

#[test]
fn a_stranger_at_the_control_socket_is_refused_and_the_machine_goes_on() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: users: only root can be several users");
        return;
    }
    let bulkhead = Bulkhead::new().with_own_state();
    let vm = bulkhead.create("roots", &["--start"]);
    let (vmm, supervisor) = (vm.vmm(), vm.supervisor());
    let socket = bulkhead.runtime().join("roots.sock");
    let status = r#"{"ask":"status"}"#;
    // Directories keep strangers out first.
    let kept_out = asked(&socket, STRANGER, status);
    assert!(
        kept_out
            .stderr
            .contains("cannot connect: Permission denied"),
        "{kept_out:?}"
    );
    let open = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    open(bulkhead.runtime(), 0o755);
    open(&socket, 0o666);
    // It can be reached now, and this is how it is asked.
    let told = asked(&socket, 0, status);
    assert!(told.stdout.contains("\"vmm\":\"running\""), "{told:?}");

    for ask in [
        status,
        r#"{"ask":"stop","grace":null,"force":true}"#,
        r#"{"ask":"detach","request":{"exec":{"argv":["touch","/tmp/stranger"]},"timeout":null}}"#,
        r#"{"ask":"streams"}"#,
        r#"{"ask":"console"}"#,
        "",
    ] {
        let refused = asked(&socket, STRANGER, ask);
        let answer: serde_json::Value = serde_json::from_str(&refused.stdout)
            .unwrap_or_else(|error| panic!("{ask}: {error}: {refused:?}"));
        assert_eq!(answer["refused"]["code"], "machine-foreign", "{ask}");
    }
    // The program says so, too, and who may.
    let top = tempfile::tempdir().unwrap();
    open(top.path(), 0o755);
    let program = top.path().join("bulkhead");
    fs::copy(env!("CARGO_BIN_EXE_bulkhead"), &program).unwrap();
    let verbs: [&[&str]; 3] = [
        &["verify", "roots"],
        &["console", "roots"],
        &["inspect", "--guest", "roots"],
    ];
    for verb in verbs {
        let mut command = Command::new(&program);
        command
            .args(verb)
            .env_clear()
            .env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin")
            .env("BULKHEAD_CONFIG", "none")
            .env("BULKHEAD_STATE_DIR", top.path())
            .env("BULKHEAD_RUNTIME_DIR", bulkhead.runtime());
        let refused = called(command, STRANGER);
        let words = "error [machine-foreign]: this machine belongs to user 0, \
                     and does not listen to user 12346";
        assert!(
            refused.code == 125 && refused.stderr.contains(words),
            "{verb:?}: {refused:?}"
        );
        assert!(refused.stderr.contains("or as root"), "{refused:?}");
    }
    // It is as it was, and listens to its owner.
    let view = vm.inspect();
    assert_eq!(
        (&view["state"], vm.vmm(), vm.supervisor()),
        (&"running".into(), vmm, supervisor)
    );
    let found = bulkhead.exec(&["roots", "ls", "/tmp/stranger"]);
    assert_ne!(found.code, 0, "{found:?}");
    assert_eq!(bulkhead.must(&["exec", "roots", "echo", "on"]), "on\n");
    assert_eq!(view["live"]["busy"], 0, "{view}");
}
